"""Server-sent events: however the network cuts them, the same data comes out."""

import json
import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everalign.serving.chat_answer import ChatAnswer
from everalign.serving.errors import GatewayError
from everalign.serving.sse import DONE, BrokenEvents, EventParser, data_frame
from upstream_for_tests import Script


def parsed(content, cuts=(), largest=1000):
    parser, found, start = EventParser(largest), [], 0
    for cut in (*sorted(cuts), len(content)):
        found += parser.feed(content[start:cut])
        start = cut
    return found


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"data: a\n\ndata:b\n\n", ["a", "b"]),
        (b"data: a\r\rdata: b\r\r", ["a", "b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]),
        (b"data: a\r\n\ndata: b\n\r\n", ["a", "b"]),
        (b": ping\n\ndata: a\n: more\n\n", ["a"]),
        (b"event: x\nid: 7\nretry: 1\ndata: a\n\n", ["a"]),
        (b"data: a\ndata: b\n\n", ["a\nb"]),
        (b"data\n\ndata:\n\n", ["", ""]),
        (b"data:  a \n\n", [" a "]),
        (b"\xef\xbb\xbfdata: a\n\n", ["a"]),
        (b"\n\n\r\r\r\n", []),
        (b"data: cut off", []),
        (b"data: cut off\n", []),
        ("data: 日本語\n\n".encode(), ["日本語"]),
        ("data: a\u2028b\n\n".encode(), ["a\u2028b"]),
        (b"datum: a\n\n", []),
    ],
)
def test_events_are_read_wherever_they_are_cut(content, expected):
    assert parsed(content) == expected
    assert parsed(content, range(1, len(content))) == expected
    for cut in range(1, len(content)):
        assert parsed(content, [cut]) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=5), st.sampled_from([b"\n", b"\r", b"\r\n"]), st.randoms())
def test_what_is_written_is_read_again(texts, end, draw):
    content = b"".join(data_frame({"text": text}).replace(b"\n", end) for text in texts)
    cuts = [draw.randrange(len(content) + 1) for _ in range(6)]
    assert [json.loads(data)["text"] for data in parsed(content, cuts)] == texts


def test_half_a_surrogate_pair_can_be_written():
    assert data_frame({"a": "\ud800"}) == b'data: {"a":"\\ud800"}\n\n'
    assert DONE == b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    "content", [b"data: " + b"x" * 2000, b"data: " + b"x" * 900 + b"\ndata: " + b"x" * 900 + b"\n\n"]
)
def test_an_event_without_end_is_refused(content):
    with pytest.raises(BrokenEvents, match="larger than 1000 bytes"):
        parsed(content)
    with pytest.raises(BrokenEvents):
        parsed(content, range(1, len(content)))


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(BrokenEvents, match="UTF-8"):
        parsed(b"data: \xff\n\n")


def answer_to_be_corrected():
    return ChatAnswer(SimpleNamespace(id="chatcmpl-1", mode="correct", streams=True, payload={}), relayed=False)


def test_whole_and_chunked_answers_are_found_to_be_the_same():
    draw = random.Random(0)
    for _ in range(50):
        texts = ["".join(draw.choices("ab é\n", k=draw.randrange(9))) for _ in range(draw.randrange(1, 4))]
        calls = [{"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]}]
        message = draw.choice([{}, {"refusal": "No."}, {"audio": {"data": "x"}}, {"function_call": {}}, *calls])
        script = Script(texts, message=message, finish=draw.choice(["stop", "length"]))
        whole, chunked = answer_to_be_corrected(), answer_to_be_corrected()
        whole.add(script.whole({}))
        for chunk in script.chunks({"stream_options": {"include_usage": True}}):
            chunked.add(chunk)
        whole.end()
        chunked.end()
        assert whole.choices == chunked.choices
        assert whole.usage == chunked.usage
        assert [one.text for one in whole.choices] == texts


@pytest.mark.parametrize(
    "answer",
    [{"choices": [1]}, {"choices": [{"message": "text"}]}, {"choices": [{"message": None}]},
     {"choices": [{"index": "0", "message": {}}]}, {"choices": [{"delta": []}]}],
)  # fmt: skip
def test_what_is_no_choice(answer):
    with pytest.raises(GatewayError, match="no choices that could be read") as raised:
        answer_to_be_corrected().add(answer)
    assert raised.value.code == "upstream_malformed"
