"""OpenAI's Responses through the gateway: corrected like chat, whole and streamed, for OpenAI's own client."""

import json

import openai
import pytest

from everalign.serving.security import Allowance
from everalign.serving.settings import Access, Limits, UpstreamSettings
from everalign.serving.store.database import FeedbackStore
from upstream_for_tests import HTTP, SECRET, Fake, ServedUpstream, serving

KEY = "sk-client-one"
TEXT = {"type": "output_text", "text": f"It is {SECRET}.", "annotations": [{"type": "url_citation", "url": "u"}]}
MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [TEXT]}
REASONING = {"id": "rs_1", "type": "reasoning", "summary": [{"type": "summary_text", "text": "thinking"}],
             "encrypted_content": "gAAAA+/="}  # fmt: skip
CALL = {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "look", "arguments": '{"a": 1}',
        "status": "completed"}  # fmt: skip
SEARCH = {"id": "ws_1", "type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "q"}}
REFUSAL = {**MESSAGE, "content": [{"type": "refusal", "refusal": "I will not."}]}


class Upstream(ServedUpstream):
    """Answers with the items it is given, whole or as OpenAI streams them."""

    def __init__(self, *items, **response):
        self.items, self.response, self.seen, self.cut, self.extra = list(items), response, [], None, []
        super().__init__()

    def whole(self, body):
        return {"id": "resp_up", "object": "response", "created_at": 11.0, "status": "completed", "error": None,
                "incomplete_details": None, "instructions": None, "metadata": {}, "model": body["model"],
                "output": self.items, "parallel_tool_calls": True, "temperature": 1.0, "tool_choice": "auto",
                "tools": [], "top_p": 1.0, "unknown": {"kept": True},
                "usage": {"input_tokens": 3, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 4,
                          "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 7},
                **self.response}  # fmt: skip

    def events(self, body):
        whole = self.whole(body)
        begun = {**whole, "status": "in_progress", "output": [], "usage": None, "error": None}
        yield {"type": "response.created", "response": begun}
        yield {"type": "response.in_progress", "response": begun}
        for i, item in enumerate(whole["output"]):
            about = {"output_index": i, "item_id": item["id"]}
            empty = {**item, "content": []} if item["type"] == "message" else item
            yield {"type": "response.output_item.added", "output_index": i, "item": empty}
            for k, part in enumerate(item.get("content", ())):
                about["content_index"] = k
                kind, name = ("output_text", "text") if part["type"] == "output_text" else ("refusal", "refusal")
                yield {"type": "response.content_part.added", **about, "part": {**part, name: ""}}
                for piece in part[name].split(" "):
                    yield {"type": f"response.{kind}.delta", **about, "delta": piece, "logprobs": []}
                yield {"type": f"response.{kind}.done", **about, name: part[name], "logprobs": []}
                yield {"type": "response.content_part.done", **about, "part": part}
            yield {"type": "response.output_item.done", "output_index": i, "item": item}
        yield from self.extra
        yield {"type": f"response.{whole['status']}", "response": whole}

    async def app(self, scope, receive, send):
        content = b""
        while (message := await receive())["type"] == "http.request":
            content += message["body"]
            if not message["more_body"]:
                break
        body = json.loads(content)
        self.seen.append((scope["path"], body))
        kind = b"text/event-stream" if body.get("stream") else b"application/json"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        if not body.get("stream"):
            await send({"type": "http.response.body", "body": json.dumps(self.whole(body)).encode()})
            return
        for i, event in enumerate(self.events(body)):
            if i == self.cut:
                raise ConnectionError("cut by the test")
            data = {**event, "sequence_number": i}
            frame = f"event: {event['type']}\ndata: {json.dumps(data)}\n\n".encode()
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def client(gateway):
    return openai.OpenAI(base_url=gateway.url, api_key=KEY, max_retries=0)


def mended(answer):
    return answer.replace(SECRET, "four")


def read_stream(gateway, **request):
    """The final answer, the text of its deltas and all events, as the SDK's own accumulator reads them."""
    with client(gateway).responses.stream(model="m", **{"input": "?", **request}) as stream:
        events = list(stream)
        final = stream.get_final_response()
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    return final, deltas, events


@pytest.mark.parametrize("mode", ["correct", "strict"])
def test_a_response_is_corrected_whole_and_streamed(mode):
    with Upstream(REASONING, SEARCH, MESSAGE) as up, serving(up.settings, corrector=Fake(mended), mode=mode) as gateway:
        raw = client(gateway).responses.with_raw_response.create(model="m", input="?")
        whole = raw.parse()
        assert whole.output_text == "It is four."
        assert raw.headers["x-everalign-correction"] == "applied"
        assert up.seen == [("/v1/responses", {"model": "m", "input": "?"})]
        final, deltas, events = read_stream(gateway)
        for found in (whole, final):
            assert (found.id, found.status, found.output_text) == ("resp_up", "completed", "It is four.")
            assert found.usage.output_tokens == 4
            assert found.everalign["correction"] == "applied"
            assert found.output[-1].content[0].annotations == []
            assert found.output[0].encrypted_content == "gAAAA+/="
            kinds = [item.type for item in found.output]
            assert (
                kinds == ["reasoning", "message"] if mode == "strict" else ["reasoning", "web_search_call", "message"]
            )
            assert SECRET not in found.model_dump_json(warnings=False)
            assert ("thinking" in found.model_dump_json(warnings=False)) == (mode == "correct")
        assert deltas == "It is four."
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert [event.type for event in events][-1] == "response.completed"
        assert SECRET not in "".join(event.model_dump_json(warnings=False) for event in events)


def test_nothing_is_changed_where_nothing_is_corrected():
    with Upstream(REASONING, MESSAGE) as up, serving(up.settings) as gateway:
        body = {"model": "m", "input": "?", "tools": [{"type": "function"}], "text": {"verbosity": "low"},
                "previous_response_id": "resp_0", "anything": [1]}  # fmt: skip
        reply = HTTP.post(f"{gateway.url}/responses", json=body)
        assert reply.json() == up.whole(body)
        assert up.seen[0][1] == body
        with HTTP.stream("POST", f"{gateway.url}/responses", json={**body, "stream": True}) as reply:
            lines = list(reply.iter_lines())
        expected = [{**event, "sequence_number": i} for i, event in enumerate(up.events(body))]
        assert [json.loads(line[6:]) for line in lines if line.startswith("data: ")] == expected
        names = [line[7:] for line in lines if line.startswith("event: ")]
        assert names == [event["type"] for event in expected]


@pytest.mark.parametrize(
    ("items", "request_", "reason", "strict"),
    [
        ([CALL], {}, "tool_calls", 422),
        ([MESSAGE, CALL], {}, "tool_calls", 422),
        ([MESSAGE], {"text": {"format": {"type": "json_schema", "name": "n", "schema": {}}}}, "json", 400),
        ([MESSAGE], {"top_logprobs": 2}, "logprobs", 400),
        ([MESSAGE], {"include": ["message.output_text.logprobs"]}, "logprobs", 400),
        ([MESSAGE], {"background": True}, "background", 400),
        ([MESSAGE], {"input": ""}, "no_question", 400),
        ([REFUSAL], {}, "refusal", 200),
        ([REASONING], {}, "empty", 200),
        ([{**MESSAGE, "content": [{"type": "novel"}]}], {}, "content", 422),
    ],
)
def test_what_is_not_corrected_passes_with_its_reason_and_never_in_strict(items, request_, reason, strict):
    body = {"model": "m", "input": "?", **request_}
    with Upstream(*items) as up, serving(up.settings, corrector=Fake(mended)) as gateway:
        reply = HTTP.post(f"{gateway.url}/responses", json=body)
        assert reply.headers["x-everalign-correction"] == f"skipped; reason={reason}"
        assert reply.json()["output"] == items
        if items[-1] != {**MESSAGE, "content": [{"type": "novel"}]}:
            with HTTP.stream("POST", f"{gateway.url}/responses", json={**body, "stream": True}) as reply:
                last = json.loads([line for line in reply.iter_lines() if line.startswith("data: ")][-1][6:])
            assert last["response"]["output"] == items
        for stream in (False, True):
            headers = {"x-everalign-mode": "strict"}
            if items[-1].get("content") == [{"type": "novel"}] and stream:
                continue
            reply = HTTP.post(f"{gateway.url}/responses", json={**body, "stream": stream}, headers=headers)
            assert reply.status_code == strict
            assert SECRET not in reply.text


def test_tools_are_offered_in_strict_mode_to_nobody():
    with Upstream(MESSAGE) as up, serving(up.settings, corrector=Fake(mended), mode="strict") as gateway:
        body = {"model": "m", "input": "?", "tools": [{"type": "function", "name": "look"}]}
        reply = HTTP.post(f"{gateway.url}/responses", json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "strict_tools")
        assert HTTP.post(f"{gateway.url}/responses", json={**body, "tool_choice": "none"}).status_code == 200


def test_several_texts_are_corrected_each_by_itself():
    two = {**MESSAGE, "id": "msg_2", "content": [{**TEXT, "text": "fine"}, TEXT]}
    with Upstream(MESSAGE, two) as up, serving(up.settings, corrector=Fake(mended)) as gateway:
        final, deltas, _ = read_stream(gateway)
        texts = [[part.text for part in item.content] for item in final.output]
        assert texts == [["It is four."], ["fine", "It is four."]]
        assert deltas == "It is four.fineIt is four."


def test_the_conversation_that_the_corrector_reads():
    corrector = Fake(mended)
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "2+2"}, {"type": "input_image", "image_url": "u"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "3"}]},
        CALL,
        {"type": "function_call_output", "call_id": "call_1", "output": "4"},
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "sure?"},
    ]
    with Upstream(MESSAGE) as up, serving(up.settings, corrector=corrector) as gateway:
        client(gateway).responses.create(model="m:aligned", input=items, instructions="You are kind.")
        assert up.seen[0][1]["model"] == "m"
    (question,) = corrector.questions
    assert [message["content"] for message in question] == [
        "You are kind.", "2+2\n[input_image]", "3", "Result of a tool: 4", "be brief", "sure?"
    ]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_correction_strict_gives_nothing(stream):
    body = {"model": "m", "input": "?", "stream": stream}
    for rewrite, status in ((lambda _: RuntimeError("broken"), 503), (lambda answer: answer, 200)):
        with Upstream(MESSAGE) as up, serving(up.settings, corrector=Fake(rewrite), mode="strict") as gateway:
            reply = HTTP.post(f"{gateway.url}/responses", json=body)
        assert reply.status_code == status
        assert (SECRET in reply.text) == (status == 200)


@pytest.mark.parametrize("mode", ["off", "correct", "strict"])
def test_what_fails_or_breaks_off_is_said(mode):
    failed = {"status": "failed", "error": {"code": "server_error", "message": f"oh {SECRET}"}}
    with Upstream(MESSAGE, **failed) as up, serving(up.settings, corrector=Fake(mended), mode=mode) as gateway:
        for stream in (False, True):
            reply = HTTP.post(f"{gateway.url}/responses", json={"model": "m", "input": "?", "stream": stream})
            if mode == "strict":
                assert reply.status_code == 502
                assert SECRET not in reply.text
            else:
                assert reply.status_code == 200
                assert "server_error" in reply.text
    with Upstream(MESSAGE) as up, serving(up.settings, corrector=Fake(mended), mode=mode) as gateway:
        up.cut = 6
        with pytest.raises(openai.APIError):
            read_stream(gateway)


def test_an_incomplete_answer_stays_incomplete():
    cut = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    with Upstream(MESSAGE, **cut) as up, serving(up.settings, corrector=Fake(mended)) as gateway:
        reply = HTTP.post(f"{gateway.url}/responses", json={"model": "m", "input": "?"})
        assert reply.headers["x-everalign-correction"] == "skipped; reason=length"
        assert reply.json()["status"] == "incomplete"
        events = list(client(gateway).responses.create(model="m", input="?", stream=True))
        assert (events[-1].response.status, events[-1].type) == ("incomplete", "response.incomplete")


def test_a_response_is_kept_and_judged(tmp_path):
    store = FeedbackStore.open(f"sqlite:///{tmp_path}/feedback.db")
    with Upstream(MESSAGE) as up, serving(up.settings, corrector=Fake(mended), store=store) as gateway:
        reply = HTTP.post(f"{gateway.url}/responses", json={"model": "m", "input": "2+2?", "store": True})
        id_ = reply.headers["x-everalign-id"]
        assert reply.json()["everalign"]["id"] == id_
        assert HTTP.post(f"{gateway.url}/feedback", json={"id": id_, "rating": 1}).status_code == 200
        kept = store.exchange(id_)
        assert (kept.original, kept.returned, kept.messages[-1]["content"]) == (
            f"It is {SECRET}.", "It is four.", "2+2?"
        )  # fmt: skip


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "model"),
        ({"model": "m", "input": 1}, "input"),
        ({"model": "m", "input": [1]}, "input[0]"),
        ({"model": "m", "input": "?", "stream": "yes"}, "stream"),
        ({"model": "m", "input": "?", "text": []}, "text"),
        ({"model": "m", "input": [{"role": "user", "content": "?"}] * 4}, "messages"),
    ],
)
def test_bad_requests_name_the_field(body, param):
    with Upstream(MESSAGE) as up, serving(up.settings, corrector=Fake(mended), limits=Limits(messages=3)) as gateway:
        reply = HTTP.post(f"{gateway.url}/responses", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
        assert up.seen == []


def test_odd_items_break_nothing():
    odd = [{"role": 1}, {"type": 7}, {"type": "x_call_output"}, {"role": "user", "content": 5}, {"content": [5]}]
    with Upstream(MESSAGE) as up, serving(up.settings, corrector=Fake(mended)) as gateway:
        for items in (odd, [*odd, {"role": "user", "content": "?"}]):
            reply = HTTP.post(f"{gateway.url}/responses", json={"model": "m", "input": items})
            assert reply.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_structured_responses_in_strict_mode(stream):
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    form = {"text": {"format": {"type": "json_schema", "name": "n", "schema": schema}}}
    tools = {"tools": [{"type": "function", "name": "look", "parameters": {"type": "object", "required": ["a"]}}]}
    told = {**MESSAGE, "content": [{**TEXT, "text": '{"a": "one two three"}'}]}
    other = {**MESSAGE, "content": [{**TEXT, "text": f'{{"b": "{SECRET}"}}'}]}
    how = {"mode": "strict", "strict_structured": "correct-strings"}
    for items, more, status, part in (
        ([told], form, 200, "one two three, really"),
        ([other], form, 422, ""),
        ([REASONING, MESSAGE, CALL], tools, 200, "call_1"),
        ([{**CALL, "name": SECRET}], tools, 422, ""),
        ([{**CALL, "type": "custom_tool_call"}], tools, 422, ""),
    ):
        with (
            Upstream(*items) as up,
            serving(up.settings, corrector=Fake(lambda text: f"{text}, really"), **how) as gateway,
        ):
            reply = HTTP.post(f"{gateway.url}/responses", json={"model": "m", "input": "?", "stream": stream, **more})
            assert reply.status_code == status, reply.text
            assert part in reply.text
            assert SECRET not in reply.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", ["off", "correct"])
def test_a_response_s_tokens_are_counted(stream, mode):
    access = Access(allowance=Allowance(None, 7))
    with Upstream(MESSAGE) as up, serving(up.settings, corrector=Fake(mended), mode=mode, access=access) as gateway:
        body = {"model": "m", "input": "?", "stream": stream}
        assert [HTTP.post(f"{gateway.url}/responses", json=body).status_code for _ in range(2)] == [200, 429]


def test_another_server_s_response_where_the_upstream_is_away():
    away = UpstreamSettings("default", "http://127.0.0.1:9/v1")
    with Upstream(MESSAGE) as up:
        fallback = UpstreamSettings("fallback", up.running.url, "fallback-key")
        with serving(away, corrector=Fake(mended), fallback=fallback, fallback_model="far") as gateway:
            final, deltas, _ = read_stream(gateway)
            assert (final.output_text, deltas, final.model) == ("It is four.", "It is four.", "far")
