"""Texts made to take long: whatever is looked for in what a user sends, the time grows no faster than the text."""

import asyncio
import threading
import time
from contextlib import suppress

import pytest

from everalign.correction import Guards, get_template
from everalign.correction.edits import word_diff
from everalign.evaluation.judge import read_score
from everalign.serving.chat_request import read_json
from everalign.serving.decide import unordered_edit_share
from everalign.serving.errors import GatewayError
from everalign.serving.limits import AT_ONCE, aside
from everalign.serving.sse import EventParser
from everalign.serving.store import Redaction
from everalign.text import folded, nfkc, shown, topic_of

TEMPLATE = get_template("everalign-1")
LARGE = 100_000
GROWING_FENCES = "\n".join("`" * n + "\nx" for n in range(3, 450))
REDACTION = Redaction()


def guarded(text):
    Guards().first_violation(text, text + "x", True, TEMPLATE)
    Guards().first_violation(text, "x" * len(text), True, TEMPLATE)


def compared(text):
    word_diff(text, text[::-1])
    word_diff(text, text[len(text) // 3 :] + "x" + text[: len(text) // 3])


def read(text):
    with suppress(GatewayError):
        read_json(text.encode())


WORK = {
    "guards": guarded,
    "word diff": compared,
    "words counted": lambda text: unordered_edit_share(text, text[::-1]),
    "redaction": REDACTION,
    "what a judge is shown": shown,
    "what a judge says": lambda text: read_score(text, (1, 10)),
    "one way to write it": lambda text: (nfkc(text), folded(text), topic_of(text)),
    "marks of the template": lambda text: (TEMPLATE.marks_in(text), TEMPLATE.neutralised(text)),
    "a body": read,
    "events": lambda text: EventParser().feed(text.encode()),
}
TEXTS = {
    "growing fences": GROWING_FENCES,
    "opened fences": "```\nx\n````x\n",
    "closed fences": "```\nx\n```\n",
    "fence and spaces": "```\n" + " " * LARGE,
    "backticks": "`",
    "tildes": "~",
    "spaces": " ",
    "less and spaces": "<" + " " * LARGE,
    "lines": "\n",
    "addresses": "http://a.",
    "few words often": " ".join(str(i * 7 % 101) for i in range(2000)),
    "few lines often": "\n".join(str(i * 7 % 101) for i in range(2000)),
    "one sign": "語",
    "combining marks": "\u0301\u0316",
    "tokens": "eyJ-",
    "mails": "a@a.",
    "numbers": "+1 (1",
    "keys": "-----BEGIN PRIVATE KEY-----",
    "quotes": '"\\',
    "brackets": "[",
    "objects": '{"a":',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_no_text_takes_long(work, text):
    long = (text * (LARGE // len(text) + 1))[:LARGE]
    started = time.process_time()
    work(long)
    assert time.process_time() - started < 1.5


# ---- bodies whose values are many ----


def body_of(values):
    return b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "x": [' + values + b"]}"


@pytest.mark.parametrize(
    "values", [b"[],", b"1,", b"{},", b'"",', b"[[]],", b'{"a":1},', b'"\\"",'], ids=lambda value: value.decode()
)
def test_a_body_of_very_many_values_is_refused_before_it_is_read(values):
    content = body_of((values * (8_000_000 // len(values)))[:-1])
    started = time.process_time()
    with pytest.raises(GatewayError, match="more than 500000 values") as caught:
        read_json(content)
    assert caught.value.status == 413
    assert time.process_time() - started < 2


@pytest.mark.parametrize("text", [b"a, [b] {c} ", b'\\", [{ \\\\'], ids=["prose", "escapes"])
def test_a_long_text_is_one_value(text):
    content = body_of(b'"' + text * (8_000_000 // len(text)) + b'"')
    assert isinstance(read_json(content)["x"][0], str)


def test_other_encodings_are_no_json():
    with pytest.raises(GatewayError, match="not valid JSON"):
        read_json(body_of(b"1").decode().encode("utf-16"))


@pytest.mark.parametrize(("size", "beside"), [(AT_ONCE, False), (AT_ONCE + 1, True)])
def test_a_large_body_is_read_beside_the_event_loop(size, beside):
    found = asyncio.run(aside(b"a" * size, threading.get_ident))
    assert (found != threading.get_ident()) == beside
