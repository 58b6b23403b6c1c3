"""Weak to strong: a model learns what a corrector makes of its own answers, round after round."""

import json
from collections import Counter
from dataclasses import dataclass

import pytest

from everalign import AdapterOptions, TrainingOptions
from everalign.correction import NO_GUARDS, CorrectionOptions, Corrector
from everalign.data import ScoredSet, load_corrections
from everalign.demo.world import questions
from everalign.errors import EveralignError, InputError
from everalign.learning import task_training
from everalign.learning.options import DistillOptions
from everalign.learning.run_data import load_run
from everalign.learning.self_training import HELD_OUT, distill
from everalign.methods import ExperienceReplay, MultiTask, SingleTask
from everalign.storage import Journal
from learner_for_tests import (
    FAST,
    adapter_weights,
    held_out,
    make_learner,
    same_weights,
    save_answering_model,
    save_model,
    task_rows,
)
from tiers_for_tests import slow_but

LONG = TrainingOptions(**{**FAST, "max_length": 120, "tokens_per_batch": 480})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_answering_model(tmp_path_factory.mktemp("model"))


def prompts(count=6):
    return ScoredSet.of([{"prompt": f"q{i}?"} for i in range(count)], "prompts.jsonl")


@dataclass
class Rewritten:
    text: str
    changed: bool


class Fake:
    """Writes "yes" where the sum of an answer's bytes is even, and lets the others be; stops at its n-th call."""

    fingerprint = "even"

    def __init__(self, stops_at=0, rewrite=lambda answer: "yes" if sum(answer.encode()) % 2 == 0 else answer):
        self.calls, self.pairs, self._stops_at, self._rewrite = 0, [], stops_at, rewrite

    def correct_batch(self, pairs):
        self.calls += 1
        if self.calls == self._stops_at:
            raise KeyboardInterrupt
        self.pairs += pairs
        texts = [self._rewrite(answer) for _, answer in pairs]
        return [Rewritten(text, text != answer) for text, (_, answer) in zip(texts, pairs, strict=True)]


def run(model, output, corrector=None, labels="sft", rounds=1, rows=None, **arguments):
    options = DistillOptions(labels=labels, rounds=rounds, max_new_tokens=24)
    arguments.setdefault("training", LONG)
    arguments.setdefault("adapter", AdapterOptions(rank=4, alpha=8.0, targets="q_proj,v_proj"))
    rows = prompts() if rows is None else rows
    return distill(str(model), corrector or Fake(), rows, output, options=options, **arguments)


def replayed(output, version="001-round-1"):
    """Rows of a version that are replayed later: with replay 1, all of its rows."""
    return [json.loads(line) for line in (output / "versions" / version / "replay.jsonl").read_text().splitlines()]


# ---- what is learned ----


def test_corrected_answers_are_labels_changed_or_not(model, tmp_path):
    corrector = Fake()
    lines = []
    done = run(model, tmp_path / "run", corrector, method=ExperienceReplay(replay=1.0), log=lines.append)
    rows = load_corrections(tmp_path / "run/distill/round-1.jsonl")
    assert [(row.question, row.answer) for row in rows] == corrector.pairs
    (found,) = done.rounds
    assert (found.prompts, found.answers) == (6, len(rows))
    assert found.answers + found.unanswered == 6
    assert 0 < found.changed == sum(row.correction == "yes" for row in rows) < found.answers
    assert found.changed_share == found.changed / found.answers
    assert 0 < found.edit <= 1
    assert found.rows == found.answers
    learned = Counter((row["prompt"], *row["completions"], *row["weights"]) for row in replayed(tmp_path / "run"))
    assert learned == Counter((row.question, row.correction, 1.0) for row in rows)
    assert f"  {found.one_line()}" in lines
    assert json.loads((tmp_path / "run/distill/round-1.json").read_text())["changed"] == found.changed
    assert sorted(path.name for path in (tmp_path / "run/distill").iterdir()) == [
        "distill.json",
        "round-1.json",
        "round-1.jsonl",
    ]
    manifest = load_run(tmp_path / "run").versions[0].manifest
    assert (manifest.name, manifest.stages[0].rows) == ("round-1", found.rows)


@pytest.mark.parametrize("labels", slow_but(["dpo", "var"], ["dpo", "fpo", "var"]))
def test_other_labels_learn_from_changed_answers_alone(labels, model, tmp_path):
    done = run(model, tmp_path / "run", labels=labels, method=ExperienceReplay(replay=1.0))
    rows = [row for row in load_corrections(tmp_path / "run/distill/round-1.jsonl") if not row.is_identity]
    assert done.rounds[0].rows == len(rows) == done.rounds[0].changed
    learned = replayed(tmp_path / "run")
    if labels == "var":
        assert {tuple(row["rewards"]) for row in learned} == {(1.0, 0.0)}
        assert {tuple(row["completions"]) for row in learned} == {(row.correction, row.answer) for row in rows}
    else:
        assert {(row["chosen"], row["rejected"]) for row in learned} == {(row.correction, row.answer) for row in rows}
    assert load_run(tmp_path / "run").versions[0].manifest.stages[0].stage == labels


def test_labels_are_learned_by_the_plain_negative_log_likelihood(model, tmp_path):
    """One weight-1 completion a row gives the very steps that sft gives on the same answers as chosen ones."""
    run(model, tmp_path / "run", Fake(rewrite=lambda answer: f"{answer} yes"), method=ExperienceReplay())
    rows = load_corrections(tmp_path / "run/distill/round-1.jsonl")
    pairs = [row.preference() for row in rows]
    learner = make_learner(model, tmp_path / "sft", ExperienceReplay(), "sft", training=LONG)
    learner.learn(pairs, "round-1")
    first, second = (load_run(tmp_path / name).versions[0].training for name in ("run", "sft"))
    assert [step.loss for step in first] == pytest.approx([step.loss for step in second], rel=1e-4)


def test_a_stronger_model_comes_to_answer_as_the_corrector_writes(tmp_path):
    """The embedded assistant is courteous about half of the time; a corrector that is more so teaches it."""

    def courteous(answer):
        return answer if "!" in answer else f"{answer.rstrip('.')}. Enjoy!"

    asked = [question.text for question in questions("kitchen") if not question.held_out][::30][:16]
    rows = ScoredSet.of([{"prompt": [{"role": "user", "content": text}]} for text in asked])
    training = {"learning_rate": 4e-3, "epochs": 4.0, "batch_size": 4, "max_length": 256}
    options = DistillOptions(rounds=2, max_new_tokens=64)
    done = distill(
        "tiny",
        Fake(rewrite=courteous),
        rows,
        tmp_path / "run",
        options=options,
        training=TrainingOptions(**training),
    )
    shares = [found.changed_share for found in done.rounds]
    assert shares[0] > 0.25
    assert shares[1] < 0.6 * shares[0]
    assert done.learner.run.versions[0].task == "round-1"


def test_a_corrector_with_another_tokenizer_takes_part(model, tmp_path):
    """Everything goes through text: the policy writes bytes, the corrector pieces of words."""
    weak = Corrector.from_pretrained(
        "tiny", template="everalign-1", options=CorrectionOptions(None, NO_GUARDS, max_new_tokens=12)
    )
    done = run(model, tmp_path / "run", weak)
    assert done.rounds[0].changed == done.rounds[0].answers == done.rounds[0].rows > 0
    found = json.loads((tmp_path / "run/distill/distill.json").read_text())
    assert found["corrector"] == weak.fingerprint


def test_rounds_end_when_the_corrector_changes_nothing_more(model, tmp_path):
    class Tired(Fake):
        def correct_batch(self, pairs):
            found = super().correct_batch(pairs)
            return found if self.calls == 1 else [Rewritten("ignored", False) for _ in pairs]

    tired, lines = Tired(), []
    done = run(model, tmp_path / "run", tired, rounds=3, log=lines.append)
    assert [found.rows > 0 for found in done.rounds] == [True, False]
    assert done.rounds[1].edit == 0.0
    assert len(load_run(tmp_path / "run").versions) == 1
    assert "  the corrector changed no answer: there is nothing left to learn from it" in lines
    again = run(model, tmp_path / "run", tired, rounds=3, resume=True)
    assert again.rounds == done.rounds
    assert tired.calls == 2


def test_held_out_pairs_are_scored_before_and_after_every_round(model, tmp_path):
    done = run(model, tmp_path / "run", rounds=2, test=held_out("warm"))
    found = load_run(tmp_path / "run")
    assert HELD_OUT in found.zero_shot
    assert all(HELD_OUT in version.scores for version in found.versions)
    assert done.learner.run.tasks == ["round-1", "round-2", HELD_OUT]


def test_weights_of_prompts_are_carried_along(model, tmp_path):
    rows = ScoredSet.of([{"prompt": f"q{i}?", "weight": 2.0} for i in range(6)])
    run(model, tmp_path / "run", rows=rows, method=ExperienceReplay(replay=1.0))
    assert {row["weight"] for row in replayed(tmp_path / "run")} == {2.0}


# ---- going on ----


def interrupt_training(monkeypatch):
    stage = task_training.train_stage

    def stopping(*_, **__):
        monkeypatch.setattr(task_training, "train_stage", stage)
        raise KeyboardInterrupt

    monkeypatch.setattr(task_training, "train_stage", stopping)


@pytest.mark.parametrize(
    "where", slow_but(["training", "second round"], ["first correction", "later batch", "training", "second round"])
)
def test_a_run_interrupted_anywhere_ends_the_same(where, model, tmp_path, monkeypatch):
    from everalign.learning import self_training as module

    monkeypatch.setattr(module, "_PER_BATCH", 2)
    whole = Fake()
    expected = run(model, tmp_path / "whole", whole, rounds=2)
    per_round = whole.calls // 2
    stops = {"first correction": 1, "later batch": 2, "training": 0, "second round": per_round + 2}[where]
    stopping, rest = Fake(stops), Fake()
    if where == "training":
        interrupt_training(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "parts", stopping, rounds=2)
    found = run(model, tmp_path / "parts", rest, rounds=2, resume=True)
    assert found.rounds == expected.rounds
    assert stopping.pairs + rest.pairs == whole.pairs
    assert same_weights(adapter_weights(tmp_path / "whole"), adapter_weights(tmp_path / "parts"))


def test_more_rounds_go_on_from_the_last_one(model, tmp_path):
    run(model, tmp_path / "whole", rounds=2)
    run(model, tmp_path / "parts", rounds=1)
    corrector = Fake()
    run(model, tmp_path / "parts", corrector, rounds=2, resume=True)
    assert corrector.calls == 1
    assert same_weights(adapter_weights(tmp_path / "whole"), adapter_weights(tmp_path / "parts"))


# ---- what is refused ----


def test_a_run_goes_on_only_with_what_it_was_begun_with(model, tmp_path):
    run(model, tmp_path / "run")
    other = Fake()
    other.fingerprint = "other"
    with pytest.raises(InputError, match=r"was started with a different corrector \('even' then, 'other' now\)"):
        run(model, tmp_path / "run", other, resume=True)
    with pytest.raises(InputError, match="was started with different prompts"):
        run(model, tmp_path / "run", rows=prompts(5), resume=True)
    with pytest.raises(InputError, match="holds a run already"):
        run(model, tmp_path / "run")
    with pytest.raises(InputError, match=r"a different objective \('var' then, 'dpo' now\)"):
        run(model, tmp_path / "run", labels="dpo", resume=True)
    with pytest.raises(InputError, match=r"different labels \('sft' then, 'var' now\)"):
        run(model, tmp_path / "run", labels="var", resume=True)


def test_a_run_of_other_tasks_is_left_alone(model, tmp_path):
    make_learner(model, tmp_path / "run", None, "dpo", training=LONG).learn(task_rows("warm"), "a")
    with pytest.raises(InputError, match="holds a run of other tasks"):
        run(model, tmp_path / "run", labels="dpo", resume=True)


def test_a_corrector_that_changes_nothing_is_an_error(model, tmp_path):
    with pytest.raises(EveralignError, match=r"prompts\.jsonl: the corrector changed none of \d answers"):
        run(model, tmp_path / "run", Fake(rewrite=lambda answer: answer))


def test_answers_that_never_end_are_an_error_with_advice(tmp_path):
    endless = save_model(tmp_path / "endless")
    options = DistillOptions(max_new_tokens=1)
    with pytest.raises(EveralignError, match="no sampled answer ends within max_new_tokens 1: raise it"):
        distill(str(endless), Fake(), prompts(2), tmp_path / "run", options=options, training=LONG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": prompts(0)}, "prompts.jsonl: no rows in it"),
        ({"method": MultiTask()}, "mtl does not go on from round to round"),
        ({"method": SingleTask()}, "stl does not go on"),
        ({"training": TrainingOptions(max_length=24)}, "max_new_tokens is 24 and max_length 24, which leaves no room"),
        ({"rows": ScoredSet.of([{"prompt": "q" * 100}])}, "prompt 1 has 100 tokens"),
        ({"test": task_rows("warm")[:0]}, "has no rows"),
    ],
)
def test_what_cannot_be_learned_is_refused(arguments, message, model, tmp_path):
    with pytest.raises(InputError, match=message):
        run(model, tmp_path / "run", **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "ppo"}, "labels must be one of sft, dpo, fpo, var, found 'ppo'"),
        ({"rounds": 0}, "rounds must be a whole number of at least 1, found 0"),
        ({"sampling_temperature": 0.0}, "temperature must be a number above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        DistillOptions(**options)


def test_damaged_corrections_of_an_earlier_call_are_refused(model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "run", Fake(1))
    Journal(tmp_path / "run/distill/round-1.corrected.partial").put({0: 1})
    with pytest.raises(InputError, match="the results kept by an earlier run are damaged"):
        run(model, tmp_path / "run", resume=True)
