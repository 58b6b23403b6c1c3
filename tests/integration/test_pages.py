"""The gateway's pages: what they show, what they keep, and what they say where something is missing."""

import json
import re

import pytest
from markupsafe import escape
from test_gateway_modes import MemoryStore

from everalign.errors import EveralignError
from everalign.serving.pages.playground import digest, figures
from everalign.serving.settings import Limits
from everalign.serving.store.database import FeedbackStore
from pages_for_tests import Browser, form_action, hidden, read
from upstream_for_tests import HTTP, QUICK, Fake, Script, UpstreamServer, UpstreamSettings, serving


@pytest.fixture(scope="module")
def upstream():
    with UpstreamServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _answers(upstream):
    upstream.answer = lambda _: Script("Boil them now.")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return FeedbackStore.open(f"sqlite:///{tmp_path_factory.mktemp('store')}/feedback.db")


@pytest.fixture(scope="module")
def gateway(upstream, store):
    corrector = Fake(lambda answer: answer.replace("now", "<later>"))
    with serving(upstream, corrector=corrector, store=store) as running:
        yield running


@pytest.fixture
def browser(gateway):
    with Browser(gateway) as found:
        yield found


def test_an_answer_beside_its_correction_and_what_it_took(browser, upstream):
    reply = browser.ask("How?", system="Be brief.")
    assert reply.status_code == 200
    assert "Boil them <del>now</del>." in reply.text
    assert "Boil them <ins>&lt;later&gt;</ins>." in reply.text
    for name, value in {
        "corrector's tokens": "4",
        "forward passes": "2",
        "draft tokens accepted": "3",
        "corrector": "v1",
        "template": "everalign-1",
    }.items():
        assert f"<dt>{escape(name)}</dt><dd>{value}</dd>" in reply.text
    assert re.search(r"<dt>seconds in the corrector</dt><dd>\d+\.\d\d\d</dd>", reply.text)
    asked = upstream.requests[-1].body
    assert asked["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}]
    assert asked["model"] == "small"


def test_a_conversation_goes_on(browser, upstream):
    first = browser.ask("How?", system="Be brief.")
    history = hidden(first, "history")
    assert json.loads(history) == [
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "Boil them <later>."},
    ]
    second = browser.ask("And then?", system="Be brief.", history=history)
    asked = upstream.requests[-1].body["messages"]
    assert [one["role"] for one in asked] == ["system", "user", "assistant", "user"]
    assert asked[2]["content"] == "Boil them <later>."
    assert len(json.loads(hidden(second, "history"))) == 4
    assert "You How? Answer Boil them <later>. You And then?" in read(second).replace("  ", " ")


@pytest.mark.parametrize(
    "history",
    [
        "{",
        "3",
        "[3]",
        '[{"role": "user", "content": "a"}]',
        '[{"role": "system", "content": "a"}, {"role": "user"}]',
        '[{"role": "user", "content": 1}, {"role": "assistant", "content": "b"}]',
    ],
)
def test_a_conversation_that_no_page_sent_is_refused(history, browser):
    reply = browser.ask("And then?", history=history)
    assert reply.status_code == 400
    assert "the conversation cannot be read: begin a new one" in read(reply)


def test_a_script_gets_the_answer_as_events_and_the_page_last(browser):
    fields = {"token": browser.token(), "model": "small", "question": "How?"}
    reply = browser.post("/", data=fields, headers={"accept": "text/event-stream"})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    found = [json.loads(event) for event in events if event != "[DONE]"]
    text = "".join(one["choices"][0]["delta"].get("content") or "" for one in found[:-1] if one.get("choices"))
    assert text == "Boil them <later>."
    assert "Boil them <ins>&lt;later&gt;</ins>." in found[-1]["page"]
    wrong = browser.post("/", data={**fields, "question": " "}, headers={"accept": "text/event-stream"})
    assert wrong.status_code == 400
    assert "the question is empty" in read(wrong)


def test_upstream_models_alone_are_offered(browser):
    found = re.findall(r"<option[^>]*>([^<]*)</option>", browser.get("/").text)
    assert found == ["small"]


def test_feedback_is_kept_and_shown(browser, store):
    asked = browser.ask()
    path, shown = form_action(asked), hidden(asked, "digest")
    fields = {"rating": "bad", "preferred": "corrected", "edited_text": "Boil them\r\nsoon.", "tags": "a, b,a"}
    reply = browser.submit(path, digest=shown, comment=" too late ", **fields)
    assert reply.status_code == 200
    assert "your feedback is kept. rated bad; preferred: corrected; edited; tags: a, b; commented." in read(reply)
    assert "Boil them<del> &lt;later&gt;</del><ins>\nsoon</ins>." in reply.text
    ((exchange, said),) = [pair for pair in store.feedback() if pair[0].id == path.rpartition("/")[2]]
    assert (said.rating, said.preferred, said.edited_text) == (-1, "corrected", "Boil them\nsoon.")
    assert (said.tags, said.comment, said.key_id) == (("a", "b"), "too late", "local")
    assert exchange.returned == "Boil them <later>."
    again = browser.submit(path, digest=shown, rating="good", edited_text="Boil them <later>.")
    assert "rated good; it replaces your earlier feedback" in read(again)
    ((_, said),) = [pair for pair in store.feedback() if pair[0].id == exchange.id]
    assert (said.rating, said.edited_text) == (1, None)


@pytest.mark.parametrize("text", ["\n first line", "a\r\nb\rc\n", "  spaces  ", "naïve 👩\u200d🚀"])
def test_an_answer_that_was_not_edited_is_no_edit(text, browser, upstream, store):
    upstream.answer = lambda _: Script(text)
    asked = browser.ask()
    area = re.search(r'<textarea id="edited_text"[^>]*>\n(.*?)</textarea>', asked.text, re.DOTALL)[1]
    # As HTML has it: all ends of lines are one sign, and are sent as two.
    sent = area.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\r\n")
    assert digest(sent) == hidden(asked, "digest")


@pytest.mark.parametrize("text", ["\ud800 half", "a\0b"])
def test_an_answer_that_no_database_keeps_is_shown_all_the_same(text, browser, upstream, gateway):
    upstream.answer = lambda _: Script(text)
    reply = browser.ask()
    assert reply.status_code == 200
    assert "The store could not keep this answer" in read(reply)
    body = {"model": "small", "messages": [{"role": "user", "content": "?"}], "store": True}
    assert HTTP.post(f"{gateway.url}/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "the feedback is empty"),
        ({"edited_text": "  "}, "edited_text"),
        ({"edited_text": "x" * 200_001}, "edited_text"),
        ({"comment": "x" * 5_001}, "comment"),
        ({"tags": ",".join("abcdefghijklmnopqrst")}, "tags"),
        ({"tags": "x" * 51}, "tags"),
        ({"preferred": "mine"}, "preferred"),
        ({"comment": "a\0b"}, "comment"),
    ],
    ids=lambda value: next(iter(value), "empty") if isinstance(value, dict) else None,
)
def test_feedback_that_is_refused_is_said_in_words_and_stays_in_the_form(fields, message, browser, store):
    asked = browser.ask()
    path = form_action(asked)
    sent = {"digest": hidden(asked, "digest"), "edited_text": "Boil them <later>.", **fields}
    reply = browser.submit(path, **sent)
    assert reply.status_code == 400
    assert re.search(rf'role="alert">[^<]*{message}', reply.text)
    if "comment" in fields:
        assert fields["comment"] in reply.text
    assert not [pair for pair in store.feedback() if pair[0].id == path.rpartition("/")[2]]


def test_an_answer_can_be_judged_later_by_its_own_key_alone(upstream, tmp_path):
    store = FeedbackStore.open(f"sqlite:///{tmp_path}/feedback.db")
    keys = ("one", "two")
    with (
        serving(upstream, corrector=Fake(), store=store, keys=keys) as gateway,
        Browser(gateway) as first,
        Browser(gateway) as second,
    ):
        for browser, key in zip((first, second), keys, strict=True):
            browser.sign_in(key)
        path = form_action(first.ask("Is it mine?"))
        assert "Is it mine?" in read(first.get(path))
        for reply in (second.get(path), second.submit(path, rating="good")):
            assert reply.status_code == 404
            assert "Is it mine?" not in reply.text
            assert "no answer with this id is stored for your key" in read(reply)


def test_what_an_answer_is_without_a_corrector(upstream):
    with serving(upstream, store=MemoryStore()) as gateway, Browser(gateway) as browser:
        assert "There is no corrector in service" in read(browser.get("/"))
        reply = browser.ask()
        assert "nothing was corrected" in read(reply)
        assert 'class="sides"' not in reply.text
        assert form_action(reply)


@pytest.mark.parametrize(
    ("store", "keep", "reason"),
    [(False, "opted-in", "the gateway has no store"), (True, "none", "was told to keep none")],
)
def test_feedback_is_off_where_nothing_is_kept(store, keep, reason, upstream):
    kept = MemoryStore() if store else None
    with serving(upstream, corrector=Fake(), store=kept, keep=keep) as gateway, Browser(gateway) as browser:
        assert reason in read(browser.get("/"))
        reply = browser.ask()
        assert "Boil them now. (fake)" in read(reply)
        assert "/answers/" not in reply.text
        assert kept is None or not kept.exchanges


def test_a_store_that_fails_costs_the_feedback_and_not_the_answer(upstream):
    store = MemoryStore()
    store.broken = True
    with serving(upstream, corrector=Fake(), store=store) as gateway, Browser(gateway) as browser:
        reply = browser.ask()
        assert reply.status_code == 200
        assert "The store could not keep this answer" in read(reply)


def test_a_store_that_fails_when_it_is_told_something(browser, gateway, monkeypatch):
    def broken(*_):
        raise EveralignError("postgresql://me:secret@host: cannot be reached")

    path = form_action(browser.ask())
    id = path.rpartition("/")[2]
    for method in ("add_feedback", "exchange"):
        monkeypatch.setattr(FeedbackStore, method, broken)
        reply = browser.submit(path, rating="good")
        assert reply.status_code == 503
        assert re.search(r"the store cannot be (read|written) \(EveralignError\)", read(reply))
        assert "secret" not in reply.text
    assert HTTP.post(f"{gateway.url}/feedback", json={"id": id, "rating": 1}).status_code == 503


def test_an_upstream_that_is_down_is_said_in_words():
    down = UpstreamSettings("default", "http://127.0.0.1:9/v1")
    with serving(down, corrector=Fake(), timeouts=QUICK, retries=0) as gateway, Browser(gateway) as browser:
        page = browser.get("/")
        assert page.status_code == 200
        assert "The upstream does not list its models" in read(page)
        assert '<input id="model" name="model" required' in page.text
        reply = browser.ask("Is it lost?")
        assert reply.status_code == 502
        assert re.search(r'role="alert"><strong>No answer:</strong> [^<]*upstream', reply.text)
        assert "Is it lost?</textarea>" in reply.text


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (Script("x", finish="length"), "the answer was cut at the limit of tokens"),
        (Script(""), "there was nothing to correct"),
        (Script(status=500), "No answer:"),
        (Script(raw=b"{"), "No answer:"),
    ],
)
def test_what_became_of_an_answer_is_said_in_words(script, words, browser, upstream):
    upstream.answer = lambda _: script
    assert words in read(browser.ask())


def test_a_corrector_that_leaves_the_answer_as_it_was(upstream):
    with serving(upstream, corrector=Fake(lambda answer: answer)) as gateway, Browser(gateway) as browser:
        reply = browser.ask()
        assert "The corrector left the answer as it was." in read(reply)
        assert "<del>" not in reply.text


def test_a_strict_server_shows_nothing_that_is_uncorrected(upstream):
    upstream.answer = lambda _: Script("persimmon")
    store = MemoryStore()
    for rewrite in (lambda _: "a plum", lambda _: RuntimeError("broken")):
        corrector = Fake(rewrite)
        with serving(upstream, corrector=corrector, store=store, mode="strict") as gateway, Browser(gateway) as browser:
            reply = browser.ask()
            pages = [reply, browser.get("/"), browser.get(f"/answers/{next(iter(store.exchanges))}")]
            assert not any("persimmon" in page.text for page in pages)
            assert reply.status_code == (200 if "a plum" in reply.text else 503)
    ((kept),) = store.exchanges.values()
    assert (kept.mode, kept.original) == ("strict", "persimmon")


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"question": " "}, "the question is empty"), ({"model": ""}, "model"), ({"model": "small:aligned:x/"}, None)],
)
def test_a_question_that_cannot_be_asked(fields, words, browser):
    reply = browser.ask(**fields)
    assert reply.status_code in ((400,) if words else (200, 404))
    assert words is None or words in read(reply)


def test_a_form_is_no_larger_than_a_request(upstream):
    with serving(upstream, limits=Limits(body_bytes=2_000)) as gateway, Browser(gateway) as browser:
        reply = browser.ask("x" * 3_000)
        assert reply.status_code == 413
        assert "larger than 2000 bytes" in read(reply)
        assert gateway.gateway.limiter.in_flight == 0


def test_where_too_much_is_under_way_it_is_said(upstream):
    with serving(upstream, limits=Limits(concurrency=1)) as gateway, Browser(gateway) as browser:
        token = browser.token()
        ticket = gateway.gateway.limiter.enter("another")
        reply = browser.ask("Is there room?", token=token)
        assert reply.status_code == 503
        assert "1 requests are under way already" in read(reply)
        ticket.close()
        assert browser.ask(token=token).status_code == 200


def test_feedback_of_a_page_and_of_the_api_are_one(browser, gateway, store):
    path = form_action(browser.ask())
    id = path.rpartition("/")[2]
    assert HTTP.post(f"{gateway.url}/feedback", json={"id": id, "rating": 1}).json() == {"id": id, "new": True}
    assert "it replaces your earlier feedback" in read(browser.submit(path, rating="bad"))


def test_what_nobody_tells_is_a_dash_and_what_is_no_number_too():
    usage = {"prompt_tokens": "<b>", "corrector": {"completion_tokens": None, "forward_passes": True}}
    found = dict(figures(usage, {"seconds": 1.234, "none": None}, "v1", None))
    assert found == {
        "corrector's tokens": "–",
        "draft tokens accepted": "–",
        "draft tokens rejected": "–",
        "forward passes": "–",
        "seconds": "1.234",
        "tokens of the question": "–",
        "corrector": "v1",
    }
    assert figures(None, {}, None, None) == []
