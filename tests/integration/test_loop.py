"""The whole loop on the tiny assistant: serve, collect feedback, learn it, promote or refuse, roll back."""

import json
import random
import time

import openai
import pytest

from cli_for_tests import run
from everalign import AdapterOptions, Learner, TrainingOptions
from everalign.correction import Corrector
from everalign.data import Correction, CorrectionSet, load_corrections
from everalign.demo.run import demo_answers
from everalign.demo.world import answer, questions
from everalign.errors import EveralignError, GateRefusedError, InputError
from everalign.learning.promotion import rollback
from everalign.learning.run_data import load_run
from everalign.methods import LifeAlign
from everalign.serving.corrector_reload import CorrectorReloader
from everalign.serving.corrector_service import CorrectionService
from everalign.serving.feedback.loop import learn_from_feedback
from everalign.serving.feedback.task import NextTaskOptions, NotEnoughFeedback
from everalign.serving.gateway import make_corrections
from everalign.serving.settings import GatewaySettings, UpstreamSettings
from everalign.serving.store import FeedbackStore
from learner_for_tests import make_learner, task_rows
from models_for_tests import saved_model
from stores_for_tests import exchange, feedback
from upstream_for_tests import HTTP, Fake, Script, UpstreamServer, serving

KEYS = tuple(f"key-number-{i}-of-four" for i in range(4))
STYLES = {question.text: question for question in questions("kitchen")}
TRAINING = TrainingOptions(learning_rate=4e-3, epochs=2.0, batch_size=4, max_length=256)
ADAPTER = AdapterOptions(rank=16, alpha=32.0)
ENOUGH = NextTaskOptions(minimum=40, held_out=0.2)


def styled(question, style, number=0):
    return answer(STYLES[question], style, random.Random(number))


def learner(path, **arguments):
    """Without damping and replay: with them LifeAlign hardly learns what undoes an earlier task."""
    return Learner(
        "tiny",
        LifeAlign(keep=1.0, replay=0.0, space="product"),
        "correction",
        path,
        training=TRAINING,
        adapter=ADAPTER,
        log=lambda _: None,
        gate=0.45,
        **arguments,
    )


def first_version(path):
    """A run that has learned courtesy from a few rows."""
    rows = [Correction(row.question.text, row.answer, row.correction) for row in demo_answers("train", 60)]
    test = [Correction(row.question.text, *row[1:]) for row in demo_answers("test", 40) if row.answer != row.correction]
    learner(path).learn(CorrectionSet(tuple(rows), "courtesy"), "courtesy", CorrectionSet(tuple(test), "held out"))


def asked(served, texts):
    """Exchanges of several clients: (client's number, question, completion, headers)."""
    clients = [openai.OpenAI(base_url=served.url, api_key=key, max_retries=0) for key in KEYS]
    for number, question in enumerate(texts):
        client = clients[number % len(clients)]
        made = client.chat.completions.with_raw_response.create(
            model="small", messages=[{"role": "user", "content": question}], store=True
        )
        yield number % len(clients), question, made.parse(), made.headers


def give(served, key, **feedback):
    found = HTTP.post(f"{served.url}/feedback", json=feedback, headers={"authorization": f"Bearer {KEYS[key]}"})
    assert found.status_code in (200, 201), found.text


def version_in_service(served):
    ((_, _, _, headers),) = asked(served, list(STYLES)[:1])
    return headers["x-everalign-corrector"]


def wait_for(served, version):
    until = time.monotonic() + 60
    while (found := version_in_service(served)) != version:
        assert time.monotonic() < until, f"{found} is still in service"
        time.sleep(0.1)


@pytest.mark.slow
def test_the_loop(tmp_path):
    path, style = tmp_path / "run", {"now": "plain"}
    first_version(path)
    reloader = CorrectorReloader(path, Corrector.from_pretrained, seconds=0.1, log=lambda _: None)
    corrector, version = reloader.load()
    assert version == "001-courtesy"

    def reply(body):
        return Script(styled(body["messages"][-1]["content"], style["now"]))

    with UpstreamServer(reply) as upstream, FeedbackStore.open(f"sqlite:///{tmp_path}/feedback.db") as store:
        settings = GatewaySettings(upstreams=(UpstreamSettings("default", upstream.url),), keys=KEYS)
        corrections = make_corrections(settings, corrector, version)
        with serving(upstream, store=store, corrections=corrections, reloader=reloader, keys=KEYS) as served:
            # A hundred answers; people edit them into courteous ones.
            with pytest.raises(NotEnoughFeedback):
                learn_from_feedback(store, learner(path, resume=True), ENOUGH)
            texts = list(STYLES)
            first = [text for number, text in enumerate(texts[:200]) if number % 8 < 4]
            for key, question, completion, headers in asked(served, first):
                assert headers["x-everalign-corrector"] == "001-courtesy"
                edited = styled(question, "courteous")
                if completion.choices[0].message.content == edited:
                    give(served, key, id=completion.id, rating=1)
                else:
                    give(served, key, id=completion.id, edited_text=edited)
            assert store.stats().waiting == 100

            # They are the next task, which the gate promotes; a client sees that while the gateway runs.
            learned = learn_from_feedback(store, learner(path, resume=True), ENOUGH)
            assert learned.refusal is None
            assert (learned.name, learned.version, learned.promoted) == ("feedback-1", "002-feedback-1", True)
            assert learned.report.rows >= 40
            wait_for(served, "002-feedback-1")

            # Edits that undo courtesy, of which all keys seem convinced: learned, measured, and refused.
            style["now"] = "courteous"
            for key, question, completion, _ in asked(served, texts[200:300]):
                give(served, key, id=completion.id, edited_text=styled(question, "plain"))
            refused = learn_from_feedback(store, learner(path, resume=True), ENOUGH)
            assert not refused.promoted
            assert isinstance(refused.refusal, GateRefusedError)
            assert "courtesy" in refused.refusal.fell
            assert load_run(path).current == "002-feedback-1"
            assert version_in_service(served) == "002-feedback-1"
            with pytest.raises(NotEnoughFeedback):  # nor is it learned again
                learn_from_feedback(store, learner(path, resume=True), ENOUGH)

            # Back to the version before, without a restart.
            assert rollback(path).current == "001-courtesy"
            wait_for(served, "001-courtesy")


def quick_learner(path, **arguments):
    options = {"max_length": 200, "tokens_per_batch": 1200}
    return make_learner(saved_model(), path, LifeAlign(space="product"), "correction", options=options, **arguments)


def filled(store, count=30, start=0):
    """Edited answers of four keys."""
    for i in range(start, start + count):
        key, answer = f"{i % 4:012d}", f"no {i}"
        asked = {"question": f"q{i}?", "corrector": None, "template": None}
        made = exchange(f"chatcmpl-{i}", key_id=key, original=answer, returned="no", **asked)
        store.add_exchange(made)
        store.add_feedback(feedback(made.id, key_id=made.key_id, edited_text=f"yes {i}"))


@pytest.fixture
def store(tmp_path):
    with FeedbackStore.open(f"sqlite:///{tmp_path}/feedback.db") as opened:
        yield opened


def test_a_killed_call_goes_on_with_the_same_rows(tmp_path, store, monkeypatch):
    options = NextTaskOptions(minimum=10, key_share=1.0)
    filled(store)
    with monkeypatch.context() as patched:
        patched.setattr(FeedbackStore, "mark_learned", killed)
        with pytest.raises(KeyboardInterrupt):
            learn_from_feedback(store, quick_learner(tmp_path / "run"), options)
    before = load_run(tmp_path / "run")
    assert [version.id for version in before.versions] == ["001-feedback-1"]
    filled(store, start=100)
    learned = learn_from_feedback(store, quick_learner(tmp_path / "run", resume=True), options)
    assert (learned.version, learned.promoted) == ("001-feedback-1", True)
    assert (learned.report.feedback, store.stats().waiting) == (30, 30)
    learned = learn_from_feedback(store, quick_learner(tmp_path / "run", resume=True), options)
    assert (learned.version, store.stats().waiting) == ("002-feedback-2", 0)
    assert not {row.id for row in rows_of_task(tmp_path, 1)} & {row.id for row in rows_of_task(tmp_path, 2)}


def killed(*_):
    raise KeyboardInterrupt


def rows_of_task(tmp_path, number):
    return load_corrections(tmp_path / f"run/feedback/feedback-{number}/train.jsonl")


def test_a_damaged_task_is_named(tmp_path, store, monkeypatch):
    filled(store)
    with monkeypatch.context() as patched:
        patched.setattr(FeedbackStore, "mark_learned", killed)
        with pytest.raises(KeyboardInterrupt):
            learn_from_feedback(
                store, quick_learner(tmp_path / "run"), NextTaskOptions(minimum=10, held_out=0.3, key_share=1.0)
            )
    folder = tmp_path / "run/feedback/feedback-1"
    (folder / "task.json").write_text('{"kind": "corrections"}')
    with pytest.raises(InputError, match=r"task.json: was changed since it was written .*restore the file"):
        learn_from_feedback(store, quick_learner(tmp_path / "run", resume=True))


def test_a_run_that_is_no_corrector_is_not_followed(tmp_path):
    make_learner(saved_model(), tmp_path / "run").learn(task_rows("warm"), "warm")
    with pytest.raises(InputError, match="learns dpo, so it is not a corrector: serve its export as the upstream"):
        CorrectorReloader(tmp_path / "run", Corrector.from_pretrained)


def test_a_version_that_cannot_be_loaded_leaves_the_former_one_in_service(tmp_path, store):
    filled(store)
    learn_from_feedback(
        store, quick_learner(tmp_path / "run"), NextTaskOptions(minimum=10, held_out=0.3, key_share=1.0)
    )
    lines, loaded = [], []

    def load(folder):
        if loaded:
            raise EveralignError("the disk is gone")
        loaded.append(folder)
        return Fake()

    reloader = CorrectorReloader(tmp_path / "run", load, seconds=0.02, log=lines.append)
    corrector, version = reloader.load()
    with UpstreamServer() as upstream:
        settings = GatewaySettings(upstreams=(UpstreamSettings("default", upstream.url),))
        corrections = make_corrections(settings, corrector, version)
        with serving(upstream, corrections=corrections, reloader=reloader) as served:
            filled(store, start=100)
            learn_from_feedback(
                store,
                quick_learner(tmp_path / "run", resume=True),
                NextTaskOptions(minimum=10, held_out=0.3, key_share=1.0),
            )
            until = time.monotonic() + 20
            while not lines and time.monotonic() < until:
                time.sleep(0.02)
            time.sleep(0.1)
            assert version_in_service(served) == "001-feedback-1"
    assert lines == ["002-feedback-2 cannot be served, 001-feedback-1 goes on: the disk is gone"]


def promoted_run(path, store):
    """A quick run with one promoted version, and what loads it."""
    filled(store)
    learn_from_feedback(store, quick_learner(path), NextTaskOptions(minimum=10, held_out=0.3, key_share=1.0))
    return lambda _: Fake()


@pytest.mark.parametrize(("on_rollback", "reason"), [("uncorrected", "rolled_back"), ("stop", "stopped")])
def test_a_rollback_to_the_base_model_reaches_the_gateway(tmp_path, store, on_rollback, reason):
    load, lines = promoted_run(tmp_path / "run", store), []
    reloader = CorrectorReloader(tmp_path / "run", load, on_rollback, seconds=0.02, log=lines.append)

    def waited(line):
        until = time.monotonic() + 20
        while not lines and time.monotonic() < until:
            time.sleep(0.01)
        assert lines.pop() == line

    def asked_once(served, mode="correct"):
        body = {"model": "small", "messages": [{"role": "user", "content": "hi"}]}
        return HTTP.post(f"{served.url}/chat/completions", json=body, headers={"x-everalign-mode": mode})

    with UpstreamServer() as upstream:
        settings = GatewaySettings(upstreams=(UpstreamSettings("default", upstream.url),))
        corrections = make_corrections(settings, *reloader.load())
        with serving(upstream, corrections=corrections, reloader=reloader) as served:
            assert asked_once(served).headers["x-everalign-correction"] == "applied"
            assert rollback(tmp_path / "run").current == "000"
            outcome = {"uncorrected": "answers are given uncorrected", "stop": "no answers are given"}[on_rollback]
            waited(f"000 is current, the base model, which corrects nothing: {outcome}")
            found, strict = asked_once(served), asked_once(served, "strict")
            if on_rollback == "uncorrected":
                assert found.headers["x-everalign-correction"] == f"skipped; reason={reason}"
                assert found.json()["choices"][0]["message"]["content"] == "ok"
            else:
                assert (found.status_code, found.json()["error"]["code"]) == (503, f"uncorrected_{reason}")
            assert (strict.status_code, strict.json()["error"]["code"]) == (503, f"uncorrected_{reason}")
            assert asked_once(served, "off").status_code == 200
            rollback(tmp_path / "run", "001-feedback-1")
            waited("001-feedback-1 is in service")
            assert asked_once(served).headers["x-everalign-correction"] == "applied"


def test_a_gateway_that_starts_with_the_base_model_current_is_one_that_was_rolled_back(tmp_path, store):
    load = promoted_run(tmp_path / "run", store)
    rollback(tmp_path / "run")
    reloader = CorrectorReloader(tmp_path / "run", load)
    assert reloader.is_rolled_back
    service = CorrectionService()
    reloader.withdraw(service)
    assert (service.version, service.withdrawn) == ("000", True)
    with pytest.raises(InputError, match="on-rollback: must be uncorrected or stop, found 'halt'"):
        CorrectorReloader(tmp_path / "run", load, "halt")


def test_the_command_line(tmp_path, store, capsys):
    filled(store)
    flags = ["learn", "--model", str(saved_model()), "--objective", "dpo", "--output", str(tmp_path / "run")]
    flags += ["--from-feedback", f"sqlite:///{tmp_path}/feedback.db", "--no-report", "--json"]
    small = ["--max-length", "200", "--tokens-per-batch", "1200", "--minimum", "10"]
    # Eight held-out rows show nothing, and it is said before anything is learned.
    code, _, error = run(capsys, *flags, *small)
    assert code == 4
    assert "not enough evidence: 8 held-out rows" in error
    assert "at least 52 are needed to tell" in error
    assert not load_run(tmp_path / "run").all_versions
    assert store.stats().waiting == 30
    code, out, _ = run(capsys, *flags[:1], *flags[5:], *small, "--gate", "1")
    assert code == 0
    assert [version["task"] for version in json.loads(out)["versions"]] == ["feedback-1"]
    for more, status, said in (
        ((), 4, "feedback"),
        (("--task", "a=b.jsonl"), 2, "--task: what is learned from feedback is the only task"),
        (("--from-feedback", f"sqlite:///{tmp_path}/none.db"), 2, "no such store"),
        (("--minimum", "0"), 2, "--minimum must be a whole number of at least 1"),
    ):
        code, _, error = run(capsys, *flags, *small, *more)
        assert code == status
        assert said in error
    code, _, error = run(capsys, *flags[:7], "--task", "a=b.jsonl", "--minimum", "10")
    assert code == 2
    assert "--minimum: is for feedback; name its store with --from-feedback" in error
