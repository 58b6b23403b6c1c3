"""JSON and calls of tools in strict mode: refused, passed if they are what was asked for, or corrected text by text."""

import json
import time

import openai
import pytest

from everalign.serving.errors import GatewayError
from everalign.serving.structured import MOST_TEXTS, fits, prose_of, with_prose
from upstream_for_tests import HTTP, SECRET, Fake, Script, UpstreamServer, serving

ASK = [{"role": "user", "content": "?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "summary": {"type": "string"},
        "kind": {"enum": ["a long kind of thing", "b"]},
        "items": {"type": "array", "items": {"$ref": "#/$defs/item"}},
    },
    "required": ["summary"],
    "$defs": {"item": {"type": "object", "properties": {"text": {"type": "string", "maxLength": 60}}}},
}
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": PARAMETERS}}]


def call(name="look", arguments='{"city": "Rome"}', **more):
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}, **more}


@pytest.fixture(scope="module")
def upstream():
    with UpstreamServer() as server:
        yield server


def mended(answer):
    return answer.replace(SECRET, "plum")


@pytest.fixture(scope="module", params=["pass", "correct-strings"])
def gateway(upstream, request):
    with serving(upstream, corrector=Fake(mended), mode="strict", strict_structured=request.param) as running:
        yield running


def ask(gateway, *, stream=False, **more):
    body = {"model": "m", "messages": ASK, "stream": stream, **more}
    return HTTP.post(f"{gateway.url}/chat/completions", json=body)


def content_of(reply):
    """The text of a whole or a streamed reply."""
    if not reply.headers["content-type"].startswith("text/event-stream"):
        return reply.json()["choices"][0]["message"]["content"]
    frames = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
    choices = [choice for frame in frames for choice in json.loads(frame)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def test_by_default_strict_refuses_both(upstream):
    with serving(upstream, corrector=Fake(mended), mode="strict") as gateway:
        for more, code in (({"response_format": FORM}, "strict_json"), ({"tools": TOOLS}, "strict_tools")):
            reply = ask(gateway, **more)
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, code)


@pytest.mark.parametrize("stream", [False, True])
def test_json_that_is_what_was_asked_for(gateway, upstream, stream):
    answer = {"summary": f"One {SECRET} for you", "kind": "a long kind of thing",
              "items": [{"text": f"a {SECRET} in here"}, {"text": SECRET}], "extra": [1, None]}  # fmt: skip
    upstream.answer = lambda _: Script(json.dumps(answer))
    reply = ask(gateway, stream=stream, response_format=FORM)
    assert reply.status_code == 200
    found = json.loads(content_of(reply))
    if gateway.gateway.settings.strict_structured == "pass":
        assert found == answer
        assert reply.headers["x-everalign-correction"] == "skipped; reason=json"
    else:
        assert reply.headers["x-everalign-correction"] == "applied"
        # A single word is no prose: a name, an id.
        assert found == {
            **answer,
            "summary": "One plum for you",
            "items": [{"text": "a plum in here"}, {"text": SECRET}],
        }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "form"),
    [
        (f"{SECRET} is no JSON", FORM),
        (f'{{"kind": "{SECRET}"}}', FORM),
        (f'{{"summary": "{SECRET}", "x": NaN}}', FORM),
        (f'["{SECRET}"]', {"type": "json_object"}),
        (f'{{"summary": "{SECRET}"', FORM),
        ("[" * 5000 + "]" * 5000, FORM),
    ],
)
def test_json_that_is_something_else(gateway, upstream, text, form, stream):
    upstream.answer = lambda _: Script(text)
    reply = ask(gateway, stream=stream, response_format=form)
    assert (reply.status_code, reply.json()["error"]["code"]) == (422, "uncorrected_json")
    assert SECRET not in reply.text


def test_a_text_that_cannot_be_corrected_stops_the_answer(upstream):
    answer = json.dumps({"summary": "one two three", "items": [{"text": "four five six"}]})
    upstream.answer = lambda _: Script(answer)
    for rewrite, code in (
        (lambda _: RuntimeError("broken"), "uncorrected_corrector_error"),
        (lambda text: text * 9, "uncorrected_json"),  # longer than the schema's maxLength
    ):
        with serving(upstream, corrector=Fake(rewrite), mode="strict", strict_structured="correct-strings") as gateway:
            reply = ask(gateway, response_format=FORM)
            assert reply.json()["error"]["code"] == code


def test_calls_that_were_offered(gateway, upstream):
    upstream.answer = lambda _: Script(
        f"Let me look, {SECRET}.", message={"tool_calls": [call()], "reasoning": SECRET}, finish="tool_calls"
    )
    client = openai.OpenAI(base_url=gateway.url, api_key="none", max_retries=0)
    whole = client.chat.completions.create(model="m", messages=ASK, tools=TOOLS)
    choice = whole.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Rome"}'
    assert SECRET not in whole.model_dump_json()
    with client.chat.completions.stream(model="m", messages=ASK, tools=TOOLS) as stream:
        final = stream.get_final_completion().choices[0]
    assert (final.finish_reason, final.message.tool_calls[0].function.name) == ("tool_calls", "look")
    assert SECRET not in final.model_dump_json()


@pytest.mark.parametrize(
    "calls",
    [
        [call("other")],
        [call(arguments='{"town": "Rome"}')],
        [call(arguments=f"{SECRET}")],
        [call(arguments='["Rome"]')],
        [call(), call("other")],
        [{"id": "1", "type": "custom", "custom": {"name": "look", "input": SECRET}}],
        ["nonsense"],
    ],
)
def test_calls_that_were_not_offered(gateway, upstream, calls):
    upstream.answer = lambda _: Script(None, message={"tool_calls": calls}, finish="tool_calls")
    for stream in (False, True):
        reply = ask(gateway, stream=stream, tools=TOOLS)
        assert (reply.status_code, reply.json()["error"]["code"]) == (422, "uncorrected_tool_calls")
        assert SECRET not in reply.text


def test_streamed_calls_come_in_pieces(gateway, upstream):
    head = {"id": "up-1", "object": "chat.completion.chunk", "created": 11, "model": "m"}
    parts = [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": ""}}]
    parts += [{"index": 0, "function": {"arguments": piece}} for piece in ('{"ci', 'ty": ', '"Rome"}')]
    deltas = [{"delta": {"tool_calls": [part]}, "finish_reason": None} for part in parts]
    frames = [
        {**head, "choices": [{"index": 0, **one}]} for one in [*deltas, {"delta": {}, "finish_reason": "tool_calls"}]
    ]
    raw = b"".join(b"data: %s\n\n" % json.dumps(frame).encode() for frame in frames) + b"data: [DONE]\n\n"
    upstream.answer = lambda _: Script(raw=raw)
    reply = ask(gateway, stream=True, tools=TOOLS)
    assert reply.status_code == 200
    assert json.dumps('{"city": "Rome"}')[1:-1] in reply.text


def test_an_answer_without_calls_is_corrected(gateway, upstream):
    upstream.answer = lambda _: Script(f"No {SECRET}.")
    reply = ask(gateway, tools=TOOLS)
    assert content_of(reply) == "No plum."
    assert reply.headers["x-everalign-correction"] == "applied"


@pytest.mark.parametrize(
    ("more", "status", "code"),
    [
        ({"guided_regex": "a+"}, 400, "strict_json"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, 400, "strict_tools"),
        ({"functions": [{"name": "x"}]}, 400, "strict_tools"),
        ({"response_format": {"type": "grammar"}}, 400, "strict_json"),
        ({"logprobs": True, "tools": TOOLS}, 400, "strict_logprobs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}}}, 400, "invalid_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}}, 400, "schema"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": 1}}]}, 400, "schema"),
    ],
)
def test_what_nobody_can_check_stays_refused(gateway, upstream, more, status, code):
    upstream.answer = lambda _: Script(json.dumps({"summary": "x"}))
    reply = ask(gateway, **more)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


def test_a_refusal_and_an_empty_answer_pass_as_ever(gateway, upstream):
    upstream.answer = lambda _: Script(None, message={"refusal": "no"})
    assert ask(gateway, response_format=FORM).json()["choices"][0]["message"]["refusal"] == "no"
    upstream.answer = lambda _: Script('{"summary": "cut', finish="length")
    assert ask(gateway, response_format=FORM).json()["error"]["code"] == "uncorrected_length"


def test_a_call_of_a_function_whose_parameters_are_no_schema(gateway, upstream):
    upstream.answer = lambda _: Script(None, message={"tool_calls": [call()]}, finish="tool_calls")
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"required": 1}}}]
    assert ask(gateway, tools=tools).json()["error"]["code"] == "invalid_schema"


# --- schemas that take ever longer


def laughing(depth):
    names = [f"d{i}" for i in range(depth)]
    defs = {name: {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i, name in enumerate(names)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{depth}": {"type": "object"}}}


@pytest.mark.parametrize(
    "schema",
    [
        laughing(60),
        {"$ref": "#"},
        {"$ref": "https://schema.example/x"},
        {"$ref": "#/$defs/none"},
        {"$dynamicRef": "#x", "$dynamicAnchor": "x"},
        {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
    ],
)
def test_schemas_without_an_end_are_given_up(schema):
    started = time.process_time()
    assert not fits({"a": "b"}, schema)
    assert time.process_time() - started < 5


def test_no_regular_expression_of_a_request_is_run():
    slow = {"type": "string", "pattern": "^(a+)+$", "format": "regex"}
    dialect = {"$schema": "http://json-schema.org/draft-07/schema#", "$ref": "#/$defs/a", "$defs": {"a": slow}}
    started = time.process_time()
    for schema in (slow, {"properties": {"x": slow}}, {"patternProperties": {"(a+)+$": {}}}, dialect):
        for value in ("a" * 5000 + "!", {"a" * 5000 + "!": 1, "x": "a" * 5000 + "!"}):
            fits(value, schema)
    assert time.process_time() - started < 2


def test_what_is_prose():
    schema = {"properties": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/t"}]}, "b": {"format": "uri"}},
              "$defs": {"t": {"properties": {"id": {"const": "one two three"}}}}}  # fmt: skip
    value = {"a": {"id": "one two three", "text": "one two three"}, "b": "one two three", "c": ["one two", " x y z "]}
    found = prose_of(value, schema)
    assert found == [(("a", "text"), "one two three"), (("c", 1), " x y z ")]
    assert with_prose(value, {("c", 1): "new"})["c"] == ["one two", "new"]
    with pytest.raises(GatewayError):
        prose_of(["a b c"] * (MOST_TEXTS + 1), None)
