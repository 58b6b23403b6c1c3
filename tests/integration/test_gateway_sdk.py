"""The official `openai` client, unmodified, before the gateway: only its base URL is another one."""

import asyncio
import json
import time

import openai
import pytest

from upstream_for_tests import HTTP, QUICK, Fake, Script, UpstreamServer, serving

QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


def client(gateway, **settings):
    return openai.OpenAI(base_url=gateway.url, api_key="none", **{"max_retries": 0, **settings})


def ask(gateway, model="small", **parameters):
    return client(gateway).chat.completions.create(model=model, messages=QUESTION, **parameters)


def streamed(gateway, model="small", **parameters):
    """The text of a stream, and its chunks."""
    chunks = list(ask(gateway, model, stream=True, **parameters))
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), chunks


@pytest.fixture(scope="module")
def upstream():
    with UpstreamServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _plain(upstream):
    upstream.answer = lambda _: Script("It is 4.")
    upstream.requests.clear()


@pytest.fixture(scope="module")
def gateway(upstream):
    with serving(upstream, corrector=Fake(), timeouts=QUICK, retries=2) as running:
        yield running


def test_a_plain_answer_is_corrected(gateway, upstream):
    found = ask(gateway, temperature=0.5, extra_body={"novel": {"deep": [1, None]}})
    assert found.choices[0].message.content == "It is 4. (fake)"
    assert found.id.startswith("chatcmpl-")
    assert upstream.requests[0].body == {
        "model": "small", "messages": QUESTION, "temperature": 0.5, "novel": {"deep": [1, None]}
    }  # fmt: skip
    assert found.everalign == {
        "mode": "correct", "correction": "applied", "reason": None, "corrector": "v1", "template": "everalign-1"
    }  # fmt: skip


def test_usage_tells_upstream_and_corrector_apart(gateway):
    usage = ask(gateway).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 5, 12)
    details = {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 1}
    assert usage.corrector == {"completion_tokens": 4, "completion_tokens_details": details, "forward_passes": 2}


def test_streams_are_corrected_and_tell_usage_only_if_asked(gateway, upstream):
    text, chunks = streamed(gateway)
    assert text == "It is 4. (fake)"
    assert all(chunk.choices for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].everalign["correction"] == "applied"
    assert upstream.requests[0].body["stream_options"] == {"include_usage": True}
    text, chunks = streamed(gateway, stream_options={"include_usage": True})
    assert text == "It is 4. (fake)"
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.total_tokens, chunks[-1].usage.corrector["completion_tokens"]) == (12, 4)


def test_an_upstream_that_refuses_to_be_asked_for_usage_is_asked_without(upstream):
    error = {"error": {"message": "Unknown parameter: stream_options", "type": "invalid_request_error"}}

    def answer(body):
        refused = "stream_options" in body
        return Script(raw=json.dumps(error).encode(), status=400, kind="application/json") if refused else Script("4")

    upstream.answer = answer
    with serving(upstream, corrector=Fake()) as gateway:
        assert [streamed(gateway)[0] for _ in range(2)] == ["4 (fake)", "4 (fake)"]
        assert len(upstream.requests) == 3  # it is known from the second time on
        with pytest.raises(openai.BadRequestError, match="stream_options"):
            streamed(gateway, stream_options={"include_usage": True})


def test_headers_say_what_became_of_an_answer(gateway):
    for wanted in ({}, {"stream": True}):
        raw = client(gateway).chat.completions.with_raw_response.create(model="small", messages=QUESTION, **wanted)
        assert raw.headers["x-everalign-mode"] == "correct"
        assert raw.headers["x-everalign-correction"] == "applied"
        assert raw.headers["x-everalign-id"].startswith("chatcmpl-")
        assert raw.headers.get("x-everalign-corrector") == "v1"
        assert raw.request_id


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_pass_untouched(stream, gateway, upstream):
    upstream.answer = lambda _: Script(None, message={"tool_calls": [CALL]}, finish="tool_calls")
    if stream:
        deltas = [chunk.choices[0].delta for chunk in streamed(gateway, tools=[TOOL])[1]]
        calls = next(delta.tool_calls for delta in deltas if delta.tool_calls)
    else:
        found = ask(gateway, tools=[TOOL])
        calls = found.choices[0].message.tool_calls
        assert found.everalign["reason"] == "tool_calls"
    assert calls[0].function.arguments == '{"a": 2}'


def test_json_passes_untouched_and_parses(gateway, upstream):
    upstream.answer = lambda _: Script('{"n": 4}')
    found = ask(gateway, response_format={"type": "json_object"})
    assert json.loads(found.choices[0].message.content) == {"n": 4}
    assert found.everalign["reason"] == "json"
    assert streamed(gateway, response_format={"type": "json_object"})[0] == '{"n": 4}'


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, openai.BadRequestError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (401, openai.InternalServerError),  # the gateway's key, not the client's
        (302, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_become_the_client_s_own(status, expected, stream, gateway, upstream):
    body = json.dumps({"error": {"message": "no: upstream-key", "type": "t", "code": "c", "param": "p"}}).encode()
    upstream.answer = lambda _: Script(raw=body, status=status, kind="application/json", headers={"location": "/x"})
    upstream.requests.clear()
    with pytest.raises(expected) as caught:
        streamed(gateway) if stream else ask(gateway)
    assert "upstream-key" not in str(caught.value)
    if status not in (401, 302):
        assert (caught.value.body["message"], caught.value.code, caught.value.param) == ("no: ***", "c", "p")
    assert len(upstream.requests) == 1
    gateway.gateway.upstreams["default"].circuits.of("small").enter().succeeded()


def test_the_client_does_not_repeat_what_is_of_no_use(gateway, upstream):
    upstream.answer = lambda _: Script(raw=b"{}", status=401, kind="application/json")
    with pytest.raises(openai.InternalServerError):
        client(gateway, max_retries=2).chat.completions.create(model="small", messages=QUESTION)
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 529])
def test_what_the_client_repeats_is_not_repeated_twice(status, gateway, upstream):
    upstream.requests.clear()
    upstream.answer = lambda _: Script(raw=b"", status=status, headers={"retry-after-ms": "1"})
    with pytest.raises(openai.APIStatusError) as caught:
        client(gateway, max_retries=2).chat.completions.create(model="small", messages=QUESTION)
    assert caught.value.status_code == status
    assert len(upstream.requests) == 3
    gateway.gateway.upstreams["default"].circuits.of("small").enter().succeeded()


def test_the_gateway_repeats_for_who_does_not(gateway, upstream, monkeypatch):
    monkeypatch.setattr("everalign.serving.upstream._FIRST_WAIT", 0.01)

    def post(*replies):
        upstream.requests.clear()
        found = iter(replies)
        upstream.answer = lambda _: next(found)
        body = {"model": "small", "messages": QUESTION}
        return HTTP.post(f"{gateway.url}/chat/completions", json=body).status_code, len(upstream.requests)

    away = Script(raw=b"", status=503)
    assert post(away, away, Script("4")) == (200, 3)
    assert post(away, away, away) == (503, 3)
    assert post(Script(raw=b"", status=429)) == (429, 1)


def test_a_pause_that_is_too_long_is_the_client_s_to_keep(gateway, upstream):
    upstream.answer = lambda _: Script(raw=b"", status=429, headers={"retry-after": "77"})
    with pytest.raises(openai.RateLimitError) as caught:
        ask(gateway)
    assert caught.value.response.headers["retry-after"] == "77"
    assert len(upstream.requests) == 1


def test_models_are_listed_and_found(gateway):
    assert [model.id for model in client(gateway).models.list()] == ["small", "small:aligned"]
    assert client(gateway).models.retrieve("small:aligned").id == "small:aligned"
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client(gateway).models.retrieve("large")


def test_several_upstreams_are_told_apart_by_name(upstream):
    from everalign.serving.settings import UpstreamSettings

    named = [UpstreamSettings(name, upstream.url, f"key-{name}") for name in ("here", "there")]
    with serving(*named, corrector=Fake()) as gateway:
        names = ["here/small", "there/small", "here/small:aligned", "there/small:aligned"]
        assert [model.id for model in client(gateway).models.list()] == names
        ask(gateway, "there/small")
        assert upstream.requests[-1].headers["authorization"] == "Bearer key-there"
        assert upstream.requests[-1].body["model"] == "small"
        with pytest.raises(openai.NotFoundError, match="here/MODEL, there/MODEL"):
            ask(gateway, "small")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_cancels_the_upstream(stream, gateway, upstream):
    upstream.answer = lambda _: Script("slow " * 50, delay=0 if stream else 1.2, drip=0.02)
    before = upstream.abandoned

    async def leave():
        asking = openai.AsyncOpenAI(base_url=gateway.url, api_key="none", max_retries=0)
        with pytest.raises((openai.APITimeoutError, asyncio.TimeoutError)):
            await asyncio.wait_for(asking.chat.completions.create(model="small", messages=QUESTION, stream=stream), 0.3)

    asyncio.run(leave())
    until = time.monotonic() + 2
    while (upstream.abandoned == before or gateway.gateway.limiter.in_flight) and time.monotonic() < until:
        time.sleep(0.01)
    assert upstream.abandoned == before + 1
    assert gateway.gateway.limiter.in_flight == 0


def test_many_async_clients_at_once(gateway):
    async def all_of_them():
        asking = openai.AsyncOpenAI(base_url=gateway.url, api_key="none")
        many = (asking.chat.completions.create(model="small", messages=QUESTION) for _ in range(40))
        return await asyncio.gather(*many)

    assert {found.choices[0].message.content for found in asyncio.run(all_of_them())} == {"It is 4. (fake)"}
