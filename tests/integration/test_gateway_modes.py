"""Modes, rules, what is said of an answer, what is kept of it, feedback, metrics, and a corrector that is exchanged."""

import asyncio
import json
import threading
import time

import pytest

from corrections_for_tests import corrector
from everalign.correction import Corrector
from everalign.correction.engines import EngineOutput
from everalign.correction.templates import get_template
from everalign.errors import EveralignError
from everalign.serving.corrector_service import CorrectionService
from everalign.serving.settings import MODES
from everalign.serving.store.records import UnknownExchange
from upstream_for_tests import HTTP, Fake, Script, UpstreamServer, serving

ASKED = [{"role": "user", "content": "What is 2 + 2?"}]


class MemoryStore:
    """A store that forgets."""

    def __init__(self):
        self.exchanges, self.said, self.closed, self.broken = {}, {}, False, False

    def add_exchange(self, exchange):
        if self.broken:
            raise EveralignError("the disk is full")
        self.exchanges[exchange.id] = exchange

    def add_feedback(self, feedback):
        kept = self.exchanges.get(feedback.exchange)
        if kept is None or kept.key_id != feedback.key_id:
            raise UnknownExchange("no such exchange")
        name = (feedback.exchange, feedback.key_id, feedback.user)
        new = name not in self.said
        self.said[name] = feedback
        return new

    def exchange(self, id, key_id=None):
        return self.exchanges.get(id)

    def close(self):
        self.closed = True


@pytest.fixture(scope="module")
def upstream():
    with UpstreamServer(lambda _: Script("It is 4.")) as server:
        yield server


def post(gateway, path="/chat/completions", mode=None, key=None, **body):
    headers = {} if mode is None else {"x-everalign-mode": mode}
    headers |= {} if key is None else {"authorization": f"Bearer {key}"}
    content = {"model": "small", "messages": ASKED, **body} if path == "/chat/completions" else body
    return HTTP.post(f"{gateway.url}{path}", json=content, headers=headers)


def told(reply):
    return reply.headers["x-everalign-mode"], reply.headers["x-everalign-correction"]


@pytest.mark.parametrize("default", MODES)
def test_which_mode_a_request_has(default, upstream):
    upstream.answer = lambda _: Script("It is 4.")
    with serving(upstream, corrector=Fake(), mode=default) as gateway:
        assert post(gateway).headers["x-everalign-mode"] == default
        aligned = post(gateway, model="small:aligned").headers["x-everalign-mode"]
        assert aligned == ("strict" if default == "strict" else "correct")
        assert upstream.requests[-1].body["model"] == "small"
        for mode in MODES:
            reply = post(gateway, mode=mode, model="small:aligned")
            if default == "strict" and mode != "strict":
                assert (reply.status_code, reply.json()["error"]["code"]) == (400, "mode_refused")
            else:
                assert reply.headers["x-everalign-mode"] == mode
        assert post(gateway, mode="loud").json()["error"]["code"] == "unknown_mode"


def test_a_server_without_a_corrector(upstream):
    with serving(upstream) as gateway:
        assert told(post(gateway)) == ("off", "skipped; reason=off")
        assert post(gateway, mode="correct").json()["error"]["code"] == "no_corrector"
        assert post(gateway, model="small:aligned").status_code == 404
        assert [m["id"] for m in HTTP.get(f"{gateway.url}/models").json()["data"]] == ["small"]


@pytest.mark.parametrize("stream", [False, True])
def test_off_and_shadow_hand_on_what_comes(stream, upstream):
    upstream.answer = lambda _: Script("It is 4.", message={"reasoning_content": "Hm."})
    fake = Fake()
    with serving(upstream, corrector=fake) as gateway:
        for mode in ("off", "shadow"):
            reply = post(gateway, mode=mode, stream=stream)
            assert told(reply) == (mode, f"skipped; reason={mode}")
            assert "(fake)" not in reply.text
            assert "reasoning_content" in reply.text
            assert reply.headers["x-everalign-id"] in reply.text
            assert "usage" not in reply.text or not stream
        # Counted after the answer has left.
        counted, until = 'everalign_shadow_corrections_total{outcome="applied",reason=""} 1.0', time.monotonic() + 10
        while counted not in metrics(gateway) and time.monotonic() < until:
            time.sleep(0.01)
        assert counted in metrics(gateway)
        assert len(fake.questions) == 1


def metrics(gateway):
    return HTTP.get(f"{gateway.url[:-3]}/metrics").text


@pytest.mark.parametrize(
    ("fake", "expected"),
    [
        (Fake(lambda answer: answer), "unchanged"),
        (Fake(reason="gate"), "unchanged; reason=gate"),
        (Fake(reason="not_better"), "unchanged; reason=not_better"),
        (Fake(reason="growth"), "skipped; reason=growth"),
        (Fake(reason="too_long"), "skipped; reason=too_long"),
    ],
)
def test_what_the_corrector_finds_is_said(fake, expected, upstream):
    upstream.answer = lambda _: Script("It is 4.")
    with serving(upstream, corrector=fake) as gateway:
        reply = post(gateway)
        assert told(reply) == ("correct", expected)
        assert reply.json()["choices"][0]["message"]["content"] == "It is 4."
        strict = post(gateway, mode="strict")
        assert strict.status_code == (200 if expected.startswith("unchanged") else 503)


def test_each_of_several_answers_is_corrected(upstream):
    upstream.answer = lambda _: Script(["One.", "Two.", "Three."])
    fake = Fake()
    with serving(upstream, corrector=fake) as gateway:
        found = post(gateway, n=3).json()
        texts = [choice["message"]["content"] for choice in found["choices"]]
        assert texts == ["One. (fake)", "Two. (fake)", "Three. (fake)"]
        assert found["usage"]["corrector"]["completion_tokens"] == 12
        assert sum(fake.batches) == 3


def test_the_corrector_reads_the_conversation_as_text(upstream):
    upstream.answer = lambda _: Script("It is 4.")
    fake = Fake()
    picture = [{"type": "text", "text": "And this?"}, {"type": "image_url", "image_url": {"url": "data:secret"}}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "4", "tool_call_id": "x"},
        {"role": "user", "content": picture},
    ]
    with serving(upstream, corrector=fake) as gateway:
        post(gateway, messages=messages)
    assert fake.questions == [
        (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Add."},
            {"role": "user", "content": "Result of a tool: 4"},
            {"role": "user", "content": "And this?\n[image_url]"},
        )
    ]


def test_what_is_kept(upstream):
    upstream.answer = lambda _: Script("It is 4.")
    for keep, kept in (("opted-in", [True]), ("all", [None, True]), ("none", [])):
        store = MemoryStore()
        with serving(upstream, corrector=Fake(), store=store, keep=keep) as gateway:
            asked = {}
            for stored in (None, True, False):
                for stream in (False, True):
                    reply = post(gateway, store=stored, stream=stream, mode="correct" if stored else "off")
                    asked[reply.headers["x-everalign-id"]] = stored
            assert {asked[id] for id in store.exchanges} == set(kept)
            assert len(store.exchanges) == 2 * len(kept)
        assert store.closed
        for exchange in store.exchanges.values():
            assert (exchange.original, exchange.key_id, exchange.messages) == ("It is 4.", "local", tuple(ASKED))
            assert exchange.usage["total_tokens"] == 12
            applied = exchange.mode == "correct"
            assert exchange.returned == ("It is 4. (fake)" if applied else "It is 4.")
            assert (exchange.outcome, exchange.corrector) == (("applied", "v1") if applied else ("skipped", None))


def test_an_answer_does_not_depend_on_the_store(upstream):
    store = MemoryStore()
    store.broken = True
    with serving(upstream, store=store, keep="all") as gateway:
        assert post(gateway).status_code == 200
        assert "everalign_unkept_exchanges_total 1.0" in metrics(gateway)


def test_feedback(upstream):
    store = MemoryStore()
    with serving(upstream, corrector=Fake(), store=store, keep="all", keys=("one", "two")) as gateway:
        id = post(gateway, key="one").json()["id"]
        said = {"id": id, "rating": 1, "preferred": "corrected", "tags": ["a"], "user": "u"}
        assert post(gateway, "/feedback", key="one", **said).json() == {"id": id, "new": True}
        assert post(gateway, "/feedback", key="one", **{**said, "rating": 0}).json() == {"id": id, "new": False}
        assert [one.rating for one in store.said.values()] == [0]
        for reply in (
            post(gateway, "/feedback", key="two", **said),
            post(gateway, "/feedback", key="one", id="x", rating=1),
        ):
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "unknown_exchange")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "id"),
        ({"id": "x"}, None),
        ({"id": 7, "rating": 1}, "id"),
        ({"id": "x", "rating": 2}, "rating"),
        ({"id": "x", "rating": True}, "rating"),
        ({"id": "x", "preferred": "mine"}, "preferred"),
        ({"id": "x", "edited_text": " "}, "edited_text"),
        ({"id": "x", "edited_text": "a\0b"}, "edited_text"),
        ({"id": "x", "comment": "\ud800"}, "comment"),
        ({"id": "x", "comment": "a" * 5001}, "comment"),
        ({"id": "x", "tags": ["a"] * 21}, "tags"),
        ({"id": "x", "tags": "a"}, "tags"),
        ({"id": "x", "ratng": 1}, "ratng"),
    ],
)
def test_bad_feedback_names_the_field(body, param, upstream):
    with serving(upstream, store=MemoryStore()) as gateway:
        content = json.dumps(body)
        headers = {"content-type": "application/json"}
        reply = HTTP.post(f"{gateway.url}/feedback", content=content, headers=headers)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_feedback_without_a_store(upstream):
    with serving(upstream) as gateway:
        reply = post(gateway, "/feedback", id="x", rating=1)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_store")
        assert "--store" in reply.json()["error"]["message"]


def test_metrics(upstream):
    upstream.answer = lambda _: Script("It is 4.")
    with serving(upstream, corrector=Fake()) as gateway:
        post(gateway)
        post(gateway, response_format={"type": "json_object"}, stream=True)
        text = metrics(gateway)
        for line in (
            'everalign_requests_total{mode="correct",outcome="applied",reason=""} 1.0',
            'everalign_requests_total{mode="correct",outcome="skipped",reason="json"} 1.0',
            "everalign_edit_ratio_sum 0.3333333333333333",
            'everalign_draft_tokens_total{verdict="accepted"} 3.0',
            'everalign_upstream_seconds_count{upstream="default"} 2.0',
            "everalign_overhead_seconds_count 2.0",
            "everalign_in_flight 0.0",
            "everalign_correction_queue 0.0",
            'everalign_circuit_state{of="upstream:default"} 0.0',
            'everalign_circuit_state{of="corrector"} 0.0',
        ):
            assert line in text, line
        ready = HTTP.get(f"{gateway.url[:-3]}/ready").json()
        assert (ready["status"], ready["corrector"]) == ("ready", "v1")


def test_another_corrector_takes_over_under_load_and_no_request_is_dropped(upstream):
    upstream.answer = lambda _: Script("It is 4.")

    def slow(name):
        return Fake(lambda answer: (time.sleep(0.01), f"{answer} ({name})")[1])

    with serving(upstream, corrector=slow("v1")) as gateway:
        found, failed = [], []

        def ask():
            for stream in (False, True) * 5:
                reply = post(gateway, stream=stream)
                if reply.status_code != 200:
                    failed.append(reply.text)
                elif stream:
                    events = [json.loads(e[6:]) for e in reply.text.strip().split("\n\n")[:-1]]
                    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
                    found.append((text, events[-1]["everalign"]["corrector"]))
                else:
                    found.append(
                        (reply.json()["choices"][0]["message"]["content"], reply.headers["x-everalign-corrector"])
                    )

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for number in range(2, 6):
            time.sleep(0.08)
            gateway.gateway.corrections.swap(slow(f"v{number}"), f"v{number}")
        for thread in threads:
            thread.join()
        assert not failed
        assert len(found) == 80
        assert all(text == f"It is 4. ({version})" for text, version in found)
        assert len({version for _, version in found}) > 2


def test_answers_that_wait_are_corrected_together_and_one_cannot_spoil_the_others():
    def rewrite(answer):
        return RuntimeError("bad") if answer == "7" else f"{answer}!"

    async def all_of_them():
        fake = Fake(rewrite)
        service = CorrectionService(fake, batch=8)
        asked = (service.correct("q", str(number)) for number in range(12))
        found = await asyncio.gather(*asked, return_exceptions=True)
        await service.close()
        return found, fake.batches

    found, batches = asyncio.run(all_of_them())
    assert [getattr(one, "text", None) for one in found] == [f"{n}!" if n != 7 else None for n in range(12)]
    assert found[7].reason == "corrector_error"
    assert max(batches) > 1


@pytest.mark.parametrize("answer", ["no 7", "yes 3"])
def test_a_real_corrector_gives_streams_and_whole_answers_the_same_text(answer, upstream):
    real = Corrector.from_pretrained(corrector().path)
    upstream.answer = lambda _: Script(answer)
    expected = real.correct("7?", answer).text
    with serving(upstream, corrector=real) as gateway:
        question = [{"role": "user", "content": "7?"}]
        whole = post(gateway, messages=question).json()
        events = post(gateway, messages=question, stream=True).text.strip().split("\n\n")[:-1]
        chunks = [json.loads(event[6:])["choices"][0]["delta"] for event in events]
        assert whole["choices"][0]["message"]["content"] == expected
        assert "".join(chunk.get("content", "") for chunk in chunks) == expected
        assert whole["usage"]["corrector"]["forward_passes"] >= 1


class SlowEngine:
    """Writes what it is given word by word, with more time between two words than a reply's headers are held back."""

    template, fingerprint = get_template("everalign-1"), "slow"

    def __init__(self, text):
        self.text = text

    def write(self, pairs, gate, limit):
        return [EngineOutput(self.text) for _ in pairs]

    def stream_events(self, pair, gate, limit):
        words = self.text.split(" ")
        for count in range(1, len(words)):
            yield " ".join(words[:count])
            time.sleep(0.12)
        yield EngineOutput(self.text)


@pytest.mark.parametrize(
    ("correction", "header"),
    [("Four, as far as I know.", "applied"), ("It is 5, as far as I know.", "pending"), ("It is 4.", "pending")],
)
def test_a_stream_s_header_names_the_outcome_if_nothing_was_sent_before_it(correction, header, upstream):
    """With the default output checks no changed text leaves before its verdict; what equals the answer does."""
    upstream.answer = lambda _: Script("It is 4.")
    with serving(upstream, corrector=Corrector(SlowEngine(correction))) as gateway:
        reply = post(gateway, stream=True)
    assert reply.headers["x-everalign-correction"] == header
    chunks = [json.loads(event[6:]) for event in reply.text.strip().split("\n\n")[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == correction
    assert chunks[-1]["everalign"]["correction"] == ("unchanged" if correction == "It is 4." else "applied")
