"""Streamed or not: the same text, the same decision. And in strict mode, no byte that nobody has checked."""

import json
import random

import httpx
import pytest

from upstream_for_tests import HTTP, QUICK, SECRET, USAGE, Fake, Script, UpstreamServer, serving

CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TEXTS = [
    "Yes.",
    "It is 4.",
    "Zwölf Boxkämpfer\n\njagen – 日本語 🎉",
    "```py\nprint(1)\n```",
    " ",
    "",
    "a\u2028b\r\n\r\ndata: x",
    "x" * 900,
]


def rewrite(answer):
    """Some answers stay, some grow, some shrink, some break the corrector; by their text alone."""
    kind = len(answer) % 5
    if kind == 3 and len(answer) > 500:
        return RuntimeError("out of memory")
    return {0: answer, 1: f"{answer} And more.", 2: answer[: len(answer) // 2] or "?", 3: answer, 4: "Wholly new."}[
        kind
    ]


def varied(number):
    """A script and a request, drawn by a number."""
    draw = random.Random(number)
    count = draw.choice([1, 1, 1, 2, 3])
    texts = [draw.choice(TEXTS) + draw.choice(["", str(number)]) for _ in range(count)]
    script = Script(
        texts,
        finish=draw.choice(["stop"] * 6 + ["length", "content_filter"]),
        message=draw.choice([{}] * 8 + [{"tool_calls": [CALL]}, {"refusal": "No."}, {"reasoning_content": "Hm."}]),
        choice=draw.choice([{}] * 9 + [{"logprobs": {"content": [{"token": "a"}]}}]),
        piece=draw.choice([1, 2, 7, 5000]),
        usage=draw.choice([None, dict(USAGE)]),
        done=draw.random() > 0.2,
    )
    parts = [{"type": "text", "text": "And this?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    messages = draw.choice([["Hello?"], ["Hello?", "Hi", "Really?"], [parts]])
    body = {
        "model": draw.choice(["small", "small:aligned"]),
        "messages": [{"role": "user", "content": content} for content in messages],
        **draw.choice([{}] * 8 + [{"response_format": {"type": "json_object"}}, {"logprobs": True}]),
        **draw.choice([{}, {"stream_options": {"include_usage": True}}]),
    }
    mode = draw.choice(["off", "shadow", "correct", "correct", "correct", "strict"])
    return script, body, {"x-everalign-mode": mode}


def read(reply):
    """(status or code, texts by choice, decision) of a reply of either kind."""
    if "event-stream" not in reply.headers["content-type"]:
        found = reply.json()
        if "error" in found:
            return found["error"]["code"], None, None
        texts = {choice["index"]: choice["message"]["content"] or "" for choice in found["choices"]}
        return reply.status_code, texts, found.get("everalign")
    texts, decision = {}, None
    *events, end = [line[6:] for line in reply.text.split("\n\n") if line.startswith("data: ")]
    assert end == "[DONE]"
    for event in map(json.loads, events):
        decision = event.get("everalign", decision)
        for choice in event["choices"]:
            index = choice["index"]
            texts[index] = texts.get(index, "") + (choice["delta"].get("content") or "")
    return reply.status_code, texts, decision


@pytest.mark.parametrize("count", [200, pytest.param(500, marks=pytest.mark.slow)])
def test_the_same_text_and_decision_on_hundreds_of_varied_requests(count):
    scripts = {}
    seen = set()
    with (
        UpstreamServer(lambda body: scripts[body["number"]]) as upstream,
        serving(upstream, corrector=Fake(rewrite), breaker_failures=10**6) as gateway,
        httpx.Client(trust_env=False, base_url=gateway.url) as client,
    ):
        for number in range(count):
            scripts[number], body, headers = varied(number)
            body["number"] = number
            whole = read(client.post("/chat/completions", json=body, headers=headers))
            events = read(client.post("/chat/completions", json={**body, "stream": True}, headers=headers))
            assert whole == events, (number, scripts[number], body, headers)
            seen.add(
                (headers["x-everalign-mode"], whole[2] and whole[2]["correction"], whole[2] and whole[2]["reason"])
            )
    reasons = {reason for _, _, reason in seen}
    assert reasons >= {None, "json", "logprobs", "tool_calls", "length", "content_filter", "empty", "corrector_error"}
    assert {("correct", "applied", None), ("strict", "applied", None), ("correct", "unchanged", None)} <= seen


RAW = f"The raw answer is {SECRET}, {SECRET}."
LEAKS = {
    "plain": Script(RAW),
    "several": Script([RAW, RAW]),
    "reasoning": Script(RAW, message={"reasoning_content": SECRET, "annotations": [SECRET]}),
    "names": Script(RAW, headers={"x-request-id": SECRET, "x-other": SECRET, "openai-version": SECRET}),
    "tools": Script(RAW, message={"tool_calls": [{**CALL, "id": SECRET}]}),
    "audio": Script(RAW, message={"audio": {"data": SECRET}}),
    "logprobs": Script(RAW, choice={"logprobs": {"content": [{"token": SECRET}]}}),
    "cut by length": Script(RAW, finish="length"),
    "filtered": Script(RAW, finish="content_filter"),
    "an odd end": Script(RAW, finish=SECRET),
    "parts": Script(None, message={"content": [{"type": "text", "text": SECRET}]}),
    "usage": Script(RAW, usage={**USAGE, "note": SECRET}),
    "status": Script(
        raw=json.dumps({"error": {"message": SECRET, "code": SECRET, "param": SECRET}}).encode(), status=500
    ),
    "refused": Script(raw=json.dumps({"error": {"message": SECRET, "type": SECRET}}).encode(), status=400),
    "in stream": Script(raw=b'data: {"error": {"message": "%s"}}\n\n' % SECRET.encode()),
    "cut": Script(RAW, cut=6),
    "no end": Script(RAW, cut=6, done=False),
    "malformed": Script(raw=b"data: {" + SECRET.encode() + b"\n\n"),
    "no choices": Script(raw=json.dumps({"choices": SECRET}).encode()),
    "odd choices": Script(raw=json.dumps({"choices": [SECRET]}).encode()),
    "html": Script(raw=f"<b>{SECRET}</b>".encode(), kind="text/html"),
    "hang": Script(RAW, delay=3),
    "drip": Script(RAW, drip=0.15),
    "huge": Script(RAW * 9000, piece=5000),
    "white space": Script(" \n"),
}


def strict_corrector(kind):
    if kind == "error":
        return Fake(lambda _: RuntimeError(SECRET))
    if kind in ("growth", "too_long"):
        return Fake(lambda _: "new", reason=kind)
    return Fake(lambda _: "Checked.")


@pytest.mark.parametrize("kind", ["works", "error", "growth"])
def test_strict_never_lets_a_raw_byte_through(kind):
    scripts = dict(LEAKS)
    if kind != "works":
        scripts = {name: scripts[name] for name in ("plain", "several", "reasoning")}
    from everalign.serving.settings import Limits

    with (
        UpstreamServer(lambda body: scripts[body["script"]]) as upstream,
        serving(
            upstream, corrector=strict_corrector(kind), mode="strict", timeouts=QUICK, retries=0, keepalive=0.1,
            breaker_failures=10**6, limits=Limits(answer_bytes=100_000),
        ) as gateway,
        httpx.Client(trust_env=False, base_url=gateway.url, timeout=10) as client,
    ):  # fmt: skip
        for name in scripts:
            for stream in (False, True):
                body = {
                    "model": "small",
                    "messages": [{"role": "user", "content": "?"}],
                    "script": name,
                    "stream": stream,
                }
                reply = client.post("/chat/completions", json=body)
                assert SECRET not in reply.text, (name, stream)
                assert SECRET not in str(reply.headers), (name, stream)
                answered = "Checked." in reply.text
                assert answered == (kind == "works" and (name in _ANSWERED or (name, stream) == ("drip", False))), (
                    name,
                    stream,
                    reply.text,
                )
                assert answered or "error" in reply.text or name == "white space"


_ANSWERED = ("plain", "several", "reasoning", "names", "usage")


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
        {"modalities": ["audio"]},
        {"grammar": "x"},
    ],
)
def test_strict_refuses_what_could_not_be_checked_before_it_is_paid_for(extra):
    with UpstreamServer() as upstream, serving(upstream, corrector=Fake(), mode="strict") as gateway:
        body = {"model": "small", "messages": [{"role": "user", "content": "?"}], **extra}
        reply = HTTP.post(f"{gateway.url}/chat/completions", json=body)
        assert (reply.status_code, reply.headers["x-should-retry"]) == (400, "false")
        assert reply.json()["error"]["code"].startswith("strict_")
        assert upstream.requests == []
