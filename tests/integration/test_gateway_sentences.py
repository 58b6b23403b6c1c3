"""Streams by sentence: corrected sentences leave while the upstream still writes, and nothing is ever taken back."""

import asyncio
import json
import threading
import time
from contextlib import contextmanager

import httpx
import openai
import pytest

from corrections_for_tests import corrector
from everalign.correction import Corrector
from everalign.errors import InputError
from everalign.serving.gateway import make_corrections
from everalign.serving.settings import GatewaySettings, Limits, Timeouts, UpstreamSettings
from everalign.serving.store.database import FeedbackStore
from pages_for_tests import Browser
from upstream_for_tests import HTTP, USAGE, Fake, Script, ServedUpstream, UpstreamServer, serving

QUESTION = [{"role": "user", "content": "What is it?"}]
FIRST, SECOND, THIRD = "It is surely an apple.", " Or else it is a pear 🍐.", "\n\nIch weiß es nicht genau."
ANSWER = FIRST + SECOND + THIRD
STEPS = f"{FIRST} Or", f"{SECOND[3:]}\n", THIRD[1:]  # a word more tells that the first sentence has ended
CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def shouted(answer):
    return answer.upper()


def mended(answer):
    return answer.replace("apple", "orange")


class SteppedUpstream(ServedUpstream):
    """Streams the deltas of a chat completion; before each but the first, it waits until `go` allows one more."""

    path = "/v1/chat/completions"

    def __init__(self, *deltas, finish="stop", cut=False):
        self.deltas, self.finish, self.cut = deltas, finish, cut
        self.go, self.gone = threading.Semaphore(0), threading.Event()
        super().__init__()

    def events(self):
        """Lists of events, each for a step."""
        for delta in self.deltas:
            delta = {"content": delta} if isinstance(delta, str) else delta
            yield [{"id": "up", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}]

    def last_events(self):
        yield {"id": "up", "choices": [{"index": 0, "delta": {}, "finish_reason": self.finish}]}
        yield {"id": "up", "choices": [], "usage": USAGE}

    async def app(self, scope, receive, send):
        while (await receive())["more_body"]:
            pass
        if scope["path"] != self.path:
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        watching = asyncio.ensure_future(self.watch(receive))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for number, events in enumerate(self.events()):
            while number and not self.go.acquire(blocking=False):
                if self.gone.is_set():
                    return
                await asyncio.sleep(0.005)
            await self.send_events(events, send)
        if self.cut:
            raise ConnectionError("cut by the test")
        await self.send_events(self.last_events(), send)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        watching.cancel()

    async def send_events(self, events, send):
        for event in events:
            data = b"data: %s\n\n" % json.dumps(event).encode()
            await send({"type": "http.response.body", "body": data, "more_body": True})

    async def watch(self, receive):
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone.set()


def by_sentence(upstream, fake, **settings):
    settings = {"corrector": fake, "stream_by": "sentence", **settings}
    return serving(upstream.settings if isinstance(upstream, ServedUpstream) else upstream, **settings)


class Reader:
    """A stream, read piece by piece."""

    def __init__(self, gateway, mode="correct", **body):
        self.text, self.chunks, self.error = "", [], None
        asked = {"model": "m", "messages": QUESTION, "stream": True, **body}
        self._stream = HTTP.stream(
            "POST", f"{gateway.url}/chat/completions", json=asked, headers={"x-everalign-mode": mode}
        )

    def __enter__(self):
        self.reply = self._stream.__enter__()
        self._lines = self.reply.iter_lines()
        return self

    def __exit__(self, *error):
        self._stream.__exit__(*error)

    def until(self, text):
        """Read on until the text so far is this one."""
        while self.text != text and self._read_line():
            assert text.startswith(self.text)
        assert self.text == text

    def rest(self):
        """Read to the end; returns what the last chunk says of the outcome."""
        while self._read_line():
            pass
        return next((chunk["everalign"] for chunk in self.chunks if "everalign" in chunk), None)

    def _read_line(self):
        line = next(self._lines, None)
        if line is None or line == "data: [DONE]":
            return False
        if line.startswith("data: "):
            event = json.loads(line[6:])
            self.error = event.get("error")
            self.chunks.append(event)
            for choice in event.get("choices", ()):
                self.text += choice["delta"].get("content") or ""
        return True


@contextmanager
def reading(upstream, fake, body=(), **settings):
    """A stream through a gateway that streams by sentence; both run while the block does."""
    with upstream, by_sentence(upstream, fake, **settings) as gateway, Reader(gateway, **dict(body)) as reader:
        reader.upstream, reader.gateway = upstream, gateway
        yield reader


def test_a_sentence_leaves_corrected_while_the_upstream_still_writes():
    fake = Fake(mended)
    with reading(SteppedUpstream(*STEPS), fake, body={"stream_options": {"include_usage": True}}) as reader:
        reader.until("It is surely an orange.")
        assert reader.reply.headers["x-everalign-correction"] == "pending"
        reader.upstream.go.release()
        reader.until("It is surely an orange." + SECOND)
        reader.upstream.go.release()
        outcome = reader.rest()
    assert reader.text == mended(ANSWER)
    assert (outcome["correction"], outcome["reason"], outcome["corrector"]) == ("applied", None, "v1")
    assert [chunk["choices"][0]["finish_reason"] for chunk in reader.chunks[-2:-1]] == ["stop"]
    assert {chunk["id"] for chunk in reader.chunks} == {reader.reply.headers["x-everalign-id"]}
    # A pass for each of two sentences and the last one, each of which the fake counts as 4 tokens.
    assert fake.batches == [1, 1, 1]
    usage = reader.chunks[-1]["usage"]
    assert (usage["total_tokens"], usage["corrector"]["completion_tokens"]) == (12, 12)
    assert usage["corrector"]["completion_tokens_details"]["accepted_prediction_tokens"] == 9


def test_without_the_flag_nothing_leaves_before_the_answer_is_whole():
    with reading(SteppedUpstream(f"{FIRST} Or"), Fake(mended), stream_by="answer") as reader:
        assert reader.rest()["correction"] == "applied"
        assert reader.reply.headers["x-everalign-correction"] == "applied"


@pytest.mark.parametrize(
    "answer",
    [ANSWER, "Short.", FIRST, f"{FIRST} ", "a. b", "x" * 300, "```py\nprint(1). X\n```\n\nThat is how it is done. \n"],
)
@pytest.mark.parametrize("piece", [1, 7, 5000])
def test_an_unchanged_answer_passes_unchanged(answer, piece):
    script = Script(answer, piece=piece)
    with reading(UpstreamServer(lambda _: script), Fake(lambda text: text)) as reader:
        outcome = reader.rest()
    assert reader.text == answer
    assert (outcome["correction"], outcome["reason"]) == ("unchanged", None)


def test_the_gate_judges_each_sentence():
    script = Script(ANSWER, piece=4)
    with reading(UpstreamServer(lambda _: script), Fake(reason="gate")) as reader:
        outcome = reader.rest()
    assert (reader.text, outcome["correction"], outcome["reason"]) == (ANSWER, "unchanged", "gate")


def test_what_is_stored_and_counted(tmp_path):
    store = FeedbackStore.open(f"sqlite:///{tmp_path}/feedback.db")
    script = Script(ANSWER, piece=4, drip=0.002)
    with reading(UpstreamServer(lambda _: script), Fake(shouted), store=store, body={"store": True}) as reader:
        outcome = reader.rest()
        kept = store.exchange(reader.reply.headers["x-everalign-id"], "local")
        metrics = HTTP.get(f"{reader.gateway.url[:-3]}/metrics").text
    assert outcome["stored"]
    assert (kept.original, kept.returned, kept.outcome, kept.reason) == (ANSWER, shouted(ANSWER), "applied", None)
    assert kept.usage["total_tokens"] == 12
    tokens = kept.usage["corrector"]["completion_tokens"]
    assert tokens > 4
    assert f'everalign_draft_tokens_total{{verdict="accepted"}} {tokens / 4 * 3}' in metrics
    assert "everalign_edit_ratio_count 1.0" in metrics
    assert 'everalign_requests_total{mode="correct",outcome="applied",reason=""} 1.0' in metrics


def failing_from(count, error):
    """A rewrite that fails from its call of a number on."""
    calls = []

    def rewrite(answer):
        calls.append(answer)
        return error if len(calls) >= count else mended(answer)

    return rewrite


@pytest.mark.parametrize(("count", "text"), [(2, mended(ANSWER)), (3, mended(ANSWER))])
def test_when_the_corrector_fails_the_rest_is_passed_on_as_it_comes(count, text, tmp_path):
    store = FeedbackStore.open(f"sqlite:///{tmp_path}/feedback.db")
    fake = Fake(failing_from(count, RuntimeError("out of memory")))
    with reading(SteppedUpstream(*STEPS), fake, store=store, body={"store": True}) as reader:
        reader.until("It is surely an orange.")
        reader.upstream.go.release()
        reader.until("It is surely an orange." + SECOND + ("\n" if count == 2 else ""))
        reader.upstream.go.release()
        outcome = reader.rest()
        kept = store.exchange(reader.reply.headers["x-everalign-id"], "local")
    assert reader.text == text
    assert (outcome["correction"], outcome["reason"]) == ("applied", "corrector_error")
    assert (kept.returned, kept.outcome, kept.reason) == (text, "applied", "corrector_error")
    assert len(fake.batches) == count  # it is not asked again for this answer


def test_the_playground_says_which_part_is_corrected(tmp_path):
    store = FeedbackStore.open(f"sqlite:///{tmp_path}/feedback.db")
    fake = Fake(failing_from(2, RuntimeError("out of memory")))
    with reading(SteppedUpstream(*STEPS), fake, store=store, body={"store": True}) as reader:
        reader.upstream.go.release(2)
        reader.rest()
        with Browser(reader.gateway) as browser:
            page = browser.get(f"/answers/{reader.reply.headers['x-everalign-id']}").text
    assert "changed the beginning of the answer; the rest is the upstream&#39;s: the corrector failed." in page
    assert "<del>apple</del>" in page


def test_when_the_corrector_fails_at_first_the_answer_passes_as_it_is():
    fake = Fake(failing_from(1, RuntimeError("out of memory")))
    script = Script(ANSWER, piece=4, drip=0.002, message={"reasoning_content": "Hm."})
    with reading(UpstreamServer(lambda _: script), fake) as reader:
        outcome = reader.rest()
    assert (reader.text, outcome["correction"], outcome["reason"]) == (ANSWER, "skipped", "corrector_error")
    assert reader.chunks[0]["choices"][0]["delta"]["reasoning_content"] == "Hm."
    assert reader.reply.headers["x-everalign-correction"] == "skipped; reason=corrector_error"
    assert len(fake.batches) == 1


def test_unchanged_sentences_before_a_failure_are_no_correction():
    fake = Fake(failing_from(2, RuntimeError("out of memory")))
    with reading(SteppedUpstream("It is surely a pear. No", " doubt."), fake) as reader:
        reader.until("It is surely a pear.")
        reader.upstream.go.release()
        outcome = reader.rest()
    assert (reader.text, outcome["correction"]) == ("It is surely a pear. No doubt.", "skipped")
    assert outcome["reason"] == "corrector_error"


def test_on_failure_closed_ends_the_stream_with_an_error():
    fake = Fake(failing_from(2, RuntimeError("out of memory")))
    with reading(SteppedUpstream(*STEPS), fake, on_failure="closed") as reader:
        reader.until("It is surely an orange.")
        reader.upstream.go.release()
        assert reader.rest() is None
        assert reader.upstream.gone.wait(5)
    assert reader.error["code"] == "uncorrected_corrector_error"
    assert reader.text == "It is surely an orange."


def test_on_failure_closed_before_the_first_sentence_is_an_error_of_the_reply():
    fake = Fake(failing_from(1, RuntimeError("out of memory")))
    with reading(SteppedUpstream(f"{FIRST} Or", SECOND[3:]), fake, on_failure="closed") as reader:
        assert reader.reply.status_code == 503


def test_a_slow_corrector_is_given_up_and_a_later_sentence_is_not_held_up():
    def rewrite(answer):
        if "pear" in answer:
            time.sleep(2)
        return mended(answer)

    times = Timeouts(correction=0.8)
    with reading(SteppedUpstream(*STEPS), Fake(rewrite), timeouts=times) as reader:
        reader.upstream.go.release(2)
        outcome = reader.rest()
    assert reader.text == mended(ANSWER)
    assert (outcome["correction"], outcome["reason"]) == ("applied", "corrector_timeout")


def test_sentences_that_end_while_the_corrector_works_are_corrected_together():
    fake = Fake(lambda answer: (time.sleep(0.3), mended(answer))[1])
    text = f"{FIRST} " + "There is another one here. " * 20
    with reading(UpstreamServer(lambda _: Script(text, drip=0.001)), fake) as reader:
        reader.rest()
    assert reader.text == mended(text)
    assert 2 <= len(fake.batches) <= 8


def guarded(reason, when):
    """A corrector whose correction of a rest of an answer is rejected where a word is in it."""

    class Guarded(Fake):
        def _continued(self, question, answer, begun):
            found = super()._continued(question, answer, begun)
            if when not in answer[begun.covers :]:
                return found
            kept = begun.with_rest(answer)
            return type(found)(kept, kept != answer, reason, 2, 3, 1, 4)

    return Guarded(mended)


def test_a_rejected_sentence_waits_for_the_next_one():
    """A guard may find a link missing that the next pass keeps; at the end, the rest is the upstream's."""
    with reading(SteppedUpstream(*STEPS), guarded("url", "pear")) as reader:
        reader.upstream.go.release(2)
        outcome = reader.rest()
    assert reader.text == mended(ANSWER)
    assert (outcome["correction"], outcome["reason"]) == ("applied", "url")


def test_what_the_corrector_finds_too_long_is_passed_on():
    fake = guarded("too_long", "pear")
    with reading(SteppedUpstream(*STEPS), fake) as reader:
        reader.upstream.go.release()
        reader.until("It is surely an orange." + SECOND + "\n")
        reader.upstream.go.release()
        outcome = reader.rest()
    assert (outcome["correction"], outcome["reason"]) == ("applied", "too_long")
    assert len(fake.batches) == 2


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (Script(ANSWER, piece=4, finish="length"), "length"),
        (Script(ANSWER, piece=4, finish="content_filter"), "content_filter"),
        (Script(ANSWER, piece=4, finish="error"), "finish_reason"),
        (Script(ANSWER + " More of it." * 40, piece=4), "too_long"),
        (Script(ANSWER + " Half \ud800 is. " + FIRST, piece=4), "unreadable"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_an_answer_that_turns_out_not_to_be_corrected(script, reason):
    script.drip = 0.004
    limits = Limits(correction_characters=len(ANSWER) + 60)
    with reading(UpstreamServer(lambda _: script), Fake(mended), limits=limits) as reader:
        outcome = reader.rest()
    assert reader.text == mended(ANSWER) + script.text[len(ANSWER) :]
    assert (outcome["correction"], outcome["reason"]) == ("applied", reason)
    assert reader.chunks[-1]["choices"][0]["finish_reason"] == (None if script.finish == "error" else script.finish)


def test_a_broken_upstream_ends_the_stream_with_an_error():
    with reading(SteppedUpstream(f"{FIRST} Or", SECOND[3:], cut=True), Fake(mended)) as reader:
        reader.until("It is surely an orange.")
        reader.upstream.go.release()
        reader.rest()
    assert reader.text == "It is surely an orange."
    assert reader.error["code"] == "upstream_cut"


def test_what_the_upstream_calls_unasked_after_a_sentence_ends_the_stream_with_an_error():
    deltas = f"{FIRST} Or", {"tool_calls": [CALL]}
    with reading(SteppedUpstream(*deltas, finish="tool_calls"), Fake(mended)) as reader:
        reader.until("It is surely an orange.")
        reader.upstream.go.release()
        reader.rest()
    assert reader.error["code"] == "uncorrected_tool_calls"


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
        {"response_format": {"type": "json_object"}},
        {"n": 2},
        {"mode": "strict"},
        {"mode": "off"},
        {"stream": False},
    ],
    ids=str,
)
def test_what_is_not_streamed_by_sentence(body):
    """Its text is the same as at a gateway that streams by answer, and its corrector is asked once at most."""
    count = body.get("n", 1)
    script = Script([ANSWER] * count, piece=4, drip=0.002)
    found = []
    for stream_by in ("answer", "sentence"):
        fake = Fake(mended)
        with reading(UpstreamServer(lambda _: script), fake, stream_by=stream_by, body=body) as reader:
            found.append(reader.reply.read().decode().replace(reader.reply.headers["x-everalign-id"], "ID"))
        assert sum(fake.batches) <= count
    assert found[0] == found[1]


def test_a_call_that_an_offered_tool_gets_is_as_without_the_flag():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    script = Script(ANSWER, piece=4, message={"tool_calls": [CALL]}, finish="tool_calls")
    with reading(UpstreamServer(lambda _: script), Fake(mended), body={"tools": tools}) as reader:
        outcome = reader.rest()
    assert (reader.text, outcome["correction"], outcome["reason"]) == (ANSWER, "skipped", "tool_calls")
    assert any(chunk["choices"][0]["delta"].get("tool_calls") for chunk in reader.chunks)


def test_a_client_that_goes_cancels_upstream_and_corrections():
    with SteppedUpstream(*STEPS) as upstream, by_sentence(upstream, Fake(mended)) as gateway:
        with Reader(gateway) as reader:
            reader.until("It is surely an orange.")
        assert upstream.gone.wait(5)
        until = time.monotonic() + 5
        while gateway.gateway.limiter.in_flight and time.monotonic() < until:
            time.sleep(0.01)
        assert gateway.gateway.limiter.in_flight == 0
        assert gateway.gateway.corrections.depth == 0


def test_an_answer_is_corrected_to_its_end_by_the_corrector_that_began():
    with reading(SteppedUpstream(f"{FIRST} Or", SECOND[3:]), Fake(mended)) as reader:
        reader.until("It is surely an orange.")
        reader.gateway.gateway.corrections.swap(Fake(shouted), "v2")
        reader.upstream.go.release()
        outcome = reader.rest()
    assert (reader.text, outcome["corrector"]) == (mended(FIRST + SECOND), "v1")


def test_openai_s_client_reads_it():
    script = Script(ANSWER, piece=4, drip=0.002)
    with UpstreamServer(lambda _: script) as upstream, by_sentence(upstream, Fake(mended)) as gateway:
        client = openai.OpenAI(base_url=gateway.url, api_key="none", max_retries=0)
        with client.chat.completions.stream(model="m", messages=QUESTION) as stream:
            events = list(stream)
            final = stream.get_final_completion()
        chunks = [event.chunk for event in events if event.type == "chunk"]
    assert final.choices[0].message.content == mended(ANSWER)
    assert final.choices[0].finish_reason == "stop"
    assert chunks[-1].everalign["correction"] == "applied"


def test_many_answers_at_once():
    """Corrected in batches, each gets its own text."""
    fake = Fake(mended)
    numbered = UpstreamServer(lambda body: Script(f"{ANSWER} This is number {body['number']}.", piece=5))
    with numbered as upstream, by_sentence(upstream, fake) as gateway:
        texts = {}

        def ask(number):
            with httpx.Client(trust_env=False, timeout=30) as client:
                body = {"model": "m", "messages": QUESTION, "stream": number % 4 > 0, "number": number}
                reply = client.post(f"{gateway.url}/chat/completions", json=body)
                if number % 4:
                    lines = [json.loads(e[6:]) for e in reply.text.strip().split("\n\n")[:-1]]
                    texts[number] = "".join(e["choices"][0]["delta"].get("content", "") for e in lines)
                else:
                    texts[number] = reply.json()["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts == {number: mended(f"{ANSWER} This is number {number}.") for number in range(24)}


def test_a_real_corrector_continues_what_left():
    real = Corrector.from_pretrained(corrector().path)
    script = Script("no 3, as I would say. yes 7, as they all say. no", piece=2, drip=0.01)
    asked = {"messages": [{"role": "user", "content": "q3?"}]}
    with reading(UpstreamServer(lambda _: script), real, body=asked) as reader:
        outcome = reader.rest()
    *begun, result = real.stream_by_sentence("q3?", list(script.text))
    assert result.text.startswith("".join(begun))
    assert (reader.text, outcome["reason"]) == (result.text, result.reason)


# ---- Responses ----


class SteppedResponses(SteppedUpstream):
    """Streams reasoning and then messages, each a list of texts; a text is a list of steps."""

    path = "/v1/responses"

    def events(self):
        yield [
            {"type": "response.created", "response": self.whole("in_progress", [])},
            {"type": "response.output_item.added", "output_index": 0, "item": self.output()[0]},
            {"type": "response.output_item.done", "output_index": 0, "item": self.output()[0]},
        ]
        for index, message in enumerate(self.output()[1:], start=1):
            waiting = [
                {"type": "response.output_item.added", "output_index": index, "item": {**message, "content": []}}
            ]
            for part, steps in enumerate(self.deltas[index - 1]):
                about = {"item_id": message["id"], "output_index": index, "content_index": part}
                whole = message["content"][part]
                waiting.append({"type": "response.content_part.added", **about, "part": {**whole, "text": ""}})
                for step in steps:
                    yield [*waiting, {"type": "response.output_text.delta", **about, "delta": step, "logprobs": []}]
                    waiting = []
                text = {"text": whole["text"], "logprobs": []}
                waiting.append({"type": "response.output_text.done", **about, **text})
                waiting.append({"type": "response.content_part.done", **about, "part": whole})
            yield [*waiting, {"type": "response.output_item.done", "output_index": index, "item": message}]

    def last_events(self):
        yield {"type": f"response.{self.status}", "response": self.whole(self.status, self.output())}

    @property
    def status(self):
        return "incomplete" if self.finish == "length" else "completed"

    def output(self):
        reasoning = {"id": "rs_1", "type": "reasoning", "summary": [{"type": "summary_text", "text": "thinking"}]}
        found = [reasoning]
        for number, texts in enumerate(self.deltas):
            parts = [{"type": "output_text", "text": "".join(steps), "annotations": []} for steps in texts]
            about = {"id": f"msg_{number}", "type": "message", "role": "assistant", "status": "completed"}
            found.append({**about, "content": parts})
        return found

    def whole(self, status, output):
        return {"id": "resp_up", "object": "response", "created_at": 11.0, "status": status, "error": None,
                "incomplete_details": None, "instructions": None, "metadata": {}, "model": "m", "output": output,
                "parallel_tool_calls": True, "temperature": 1.0, "tool_choice": "auto", "tools": [], "top_p": 1.0,
                "usage": {"input_tokens": 3, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 4,
                          "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 7}}  # fmt: skip


def read_response(gateway, upstream, first, steps):
    """The final answer, and each event of OpenAI's client, whose first text has to come before the steps are taken."""
    client = openai.OpenAI(base_url=gateway.url, api_key="none", max_retries=0)
    events, text = [], ""
    upstream.go.release()  # the first step of the first text
    with client.responses.stream(model="m", input="?") as stream:
        for event in stream:
            events.append(event)
            if event.type == "response.output_text.delta":
                text += event.delta
                if text == first:
                    upstream.go.release(steps)
    return events[-1].response, events


@pytest.mark.parametrize(
    "messages",
    [
        [[[f"{FIRST} Or", SECOND[3:], THIRD]]],
        [[[f"{FIRST} Or", SECOND[3:]], ["An apple", " again."]]],
        [[[f"{FIRST} Or", SECOND[3:]]], [["An apple again."], ["And an apple."]]],
    ],
    ids=["one text", "two texts", "two messages"],
)
def test_a_response_leaves_by_sentence(messages):
    with SteppedResponses(*messages) as upstream, by_sentence(upstream, Fake(mended)) as gateway:
        final, events = read_response(gateway, upstream, "It is surely an orange.", 20)
    expected = [["".join(mended("".join(steps)) for steps in [text]) for text in message] for message in messages]
    assert [[part.text for part in item.content] for item in final.output[1:]] == expected
    assert (final.id, final.status, final.usage.output_tokens) == ("resp_up", "completed", 4)
    assert final.output[0].summary[0].text == "thinking"
    assert (final.everalign["correction"], final.everalign["reason"]) == ("applied", None)
    assert final.usage.corrector["completion_tokens"] >= 8
    texts = {}
    for event in events:
        if event.type == "response.output_text.delta":
            place = event.output_index - 1, event.content_index
            texts[place] = texts.get(place, "") + event.delta
    assert texts == {(i, k): text for i, message in enumerate(expected) for k, text in enumerate(message)}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds.count("response.output_item.done") == len(final.output)
    assert kinds.count("response.output_text.done") == sum(map(len, messages))
    assert kinds[-1] == "response.completed"


def test_a_response_that_is_cut_keeps_its_sentences():
    message = [[f"{FIRST} Or", " an apple, or"]]
    with SteppedResponses(message, finish="length") as upstream, by_sentence(upstream, Fake(mended)) as gateway:
        final, _ = read_response(gateway, upstream, "It is surely an orange.", 20)
    assert (final.status, final.output_text) == ("incomplete", "It is surely an orange. Or an apple, or")
    assert (final.everalign["correction"], final.everalign["reason"]) == ("applied", "length")


def test_when_the_corrector_fails_a_response_goes_on_as_it_comes():
    fake = Fake(failing_from(2, RuntimeError("out of memory")))
    message = [[f"{FIRST} Or", SECOND[3:], THIRD]]
    with SteppedResponses(message) as upstream, by_sentence(upstream, fake) as gateway:
        final, events = read_response(gateway, upstream, "It is surely an orange.", 20)
    assert final.output_text == mended(ANSWER)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == mended(ANSWER)
    assert (final.everalign["correction"], final.everalign["reason"]) == ("applied", "corrector_error")


def test_a_response_that_is_not_what_was_streamed_ends_with_an_error():
    class Changing(SteppedResponses):
        def last_events(self):
            output = self.output()
            output[1]["content"][0]["text"] = "Something else."
            yield {"type": "response.completed", "response": self.whole("completed", output)}

    upstream = Changing([[f"{FIRST} Or", SECOND[3:]]])
    changed = pytest.raises(openai.APIError, match="is not what it streamed")
    with upstream, by_sentence(upstream, Fake(mended)) as gateway, changed:
        read_response(gateway, upstream, "It is surely an orange.", 20)


# ---- at the start ----


def test_strict_and_approvers_are_refused_at_the_start():
    upstreams = (UpstreamSettings("default", "http://127.0.0.1:9/v1"),)
    with pytest.raises(InputError, match="--stream-by sentence: is not for --mode strict"):
        GatewaySettings(upstreams=upstreams, mode="strict", stream_by="sentence")
    with pytest.raises(InputError, match="stream_by must be one of answer, sentence"):
        GatewaySettings(upstreams=upstreams, stream_by="word")
    judged = Corrector.from_pretrained(corrector().path, approver=object())
    with pytest.raises(InputError, match="an approver judges whole answers"):
        make_corrections(GatewaySettings(upstreams=upstreams, stream_by="sentence"), judged, "v1")
