"""The learner's promises: every method with every objective, honest references, clean test sets."""

import json
import re
import shutil
from contextlib import nullcontext

import pytest
import torch
from filelock import FileLock

from everalign import AdapterOptions, Learner, TrainingOptions, load_preferences
from everalign.errors import EveralignError, InputError
from everalign.learning.run_data import load_run
from everalign.methods import METHODS, LifeAlign, SequentialFineTuning, SingleTask
from everalign.methods.base import Method
from everalign.storage import checksums
from everalign.training.reference import sequence_logprobs
from everalign.training.stage import train_stage
from learner_for_tests import FAST, adapter_weights, held_out, make_learner, same_weights, save_model, task_rows, tasks
from tiers_for_tests import slow_but

MAKERS = {
    **METHODS,
    "lifealign in product": lambda: LifeAlign(space="product"),
    "lifealign in factors": lambda: LifeAlign(space="factors"),
    "lifealign-rf": lambda: METHODS["lifealign-rf"](own_answers=0.0),  # random models do not end their answers
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run"


# ---- the contract of every method with every objective ----


@pytest.mark.parametrize("objective", ["fpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "dpo"))])
@pytest.mark.parametrize("kind", slow_but(["lifealign", "mtl", "stl"], MAKERS))
def test_every_method_learns_writes_versions_and_goes_on_after_a_resume(model, tmp_path, kind, objective):
    make = MAKERS[kind]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    first, second, third = tasks()
    learner = make_learner(model, whole, make(), objective)
    learner.learn(first[1], first[0], first[2])
    scores = learner.learn(second[1], second[0], second[2])
    check_versions(whole, make(), objective, scores)
    shutil.copytree(whole, resumed)

    learner.learn(third[1], third[0], third[2])
    again = make_learner(model, resumed, make(), objective, resume=True)
    assert [again.learn(rows, name, test) for name, rows, test in tasks()][1] == scores
    assert same_weights(adapter_weights(whole), adapter_weights(resumed))
    for name in ("003-calm/scores.json", "003-calm/replay.jsonl", "003-calm/method.safetensors"):
        files = [run / "versions" / name for run in (whole, resumed)]
        assert files[0].exists() == files[1].exists()
        assert not files[0].exists() or files[0].read_bytes() == files[1].read_bytes()
    assert learner.scores == again.scores


def test_a_learning_rate_that_teaches_nothing_is_said(model, tmp_path):
    lines: list[str] = []
    for name, rate in (("low", 1e-7), ("high", 3e-2)):
        options = {"learning_rate": rate, "logging_steps": 1, "epochs": 4.0}
        learner = make_learner(model, tmp_path / name, lines=lines, options=options)
        learner.learn(task_rows("warm"), "warm")
    (warning,) = load_run(tmp_path / "low").versions[0].manifest.warnings
    assert re.search(r"dpo taught next to nothing: after \d+ steps .* too low \(1e-07 now\)", warning)
    assert f"  warning: {warning}" in lines
    assert not load_run(tmp_path / "high").versions[0].manifest.warnings


def test_a_method_that_has_learned_in_another_run_is_refused(model, tmp_path):
    method = METHODS["er"]()
    make_learner(model, tmp_path / "first", method).learn(task_rows("warm"), "warm")
    with pytest.raises(InputError, match="has learned in another run already"):
        make_learner(model, tmp_path / "second", method)


def check_versions(output, method, objective, scores):
    run = load_run(output)
    assert [version.id for version in run.versions] == ["001-warm", "002-brief"]
    assert run.current == "002-brief"
    assert (run.facts.method.name, run.facts.objective) == (method.name, objective)
    assert set(run.zero_shot) == {"warm", "brief"}
    assert not (output / "work").exists()
    for version in run.versions:
        folder = output / "versions" / version.id
        expected = {"manifest.json", "scores.json", "training.jsonl", "method.safetensors"}
        if method.prompts is None:
            expected |= {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
        else:
            expected |= {"adapter/prompts.safetensors"}
        expected |= {"consolidation.json"} if method.consolidates else set()
        expected |= {"replay.jsonl"} if method.buffer is not None else set()
        found = checksums(folder)
        assert set(found) == expected
        assert {**version.manifest.files, "manifest.json": found["manifest.json"]} == found
        assert [stage.stage for stage in version.manifest.stages] == [objective]
        assert version.training[-1].step == version.manifest.stages[0].steps
        assert (version.before is not None) == method.consolidates
    assert {task: score.model_dump() for task, score in run.versions[1].scores.items()} == {
        task: {name: value for name, value in vars(score).items() if name != "outcomes"}
        for task, score in scores.items()
    }
    # Of methods with a policy for each label, only that of the task's own has moved.
    moved = ["brief"] if method.labelled else ["warm", "brief"]
    assert [task for task, score in scores.items() if score.kl_previous > 1e-6] == moved


def test_sft_and_a_preference_stage_make_one_task(model, output):
    learner = make_learner(model, output, SequentialFineTuning(), options={"sft_epochs": 2.0, "epochs": 1.0})
    learner.learn(task_rows("warm"), "warm")
    stages = learner.run.versions[0].manifest.stages
    assert [(stage.stage, stage.epochs, stage.steps, stage.reference) for stage in stages] == [
        ("sft", 2.0, 5, None),
        ("dpo", 1.0, 3, "stage_start"),
    ]
    assert [step.stage for step in learner.run.versions[0].training] == ["sft"] * 2 + ["dpo"] * 2


def test_the_objective_sft_takes_no_stage_before_it(model, output):
    with pytest.raises(InputError, match="with objective sft set epochs"):
        make_learner(model, output, objective="sft", options={"sft_epochs": 1.0})
    assert not output.exists()


def test_an_unknown_objective_is_refused(model, output):
    with pytest.raises(InputError, match=r"unknown objective 'ppo' .*: choose one of sft, dpo, fpo"):
        make_learner(model, output, objective="ppo")


def test_the_defaults_are_lifealign_and_fpo(model, output, capsys):
    learner = Learner(str(model), output=output, training=TrainingOptions(**FAST), adapter=AdapterOptions(rank=2))
    learner.learn(task_rows("warm"), "warm")
    facts = json.loads((output / "run.json").read_text())
    assert facts["method"]["name"] == "lifealign"
    assert facts["objective"] == "fpo"
    assert "task 1: warm" in capsys.readouterr().err


def test_progress_counts_the_steps_of_every_stage(model, output):
    seen = []
    learner = make_learner(model, output, options={"sft_epochs": 1.0}, progress=lambda *done: seen.append(done))
    learner.learn(task_rows("warm"), "warm", held_out("warm"))
    trained = [place for place in seen if place[0] in ("sft", "dpo")]
    assert trained == [(stage, step, 3) for stage in ("sft", "dpo") for step in (1, 2, 3)]
    # Passes over held-out rows and the reference's log-probabilities are counted in rows.
    rows, tests = len(task_rows("warm")), len(held_out("warm"))
    for stage, total in (("evaluating the base model", tests), ("reference", rows), ("evaluating warm", tests)):
        assert (stage, total, total) in seen


def test_truncation_is_announced(model, output):
    lines = []
    learner = make_learner(model, output, lines=lines, options={"max_length": 12})
    learner.learn(task_rows("brief"), "brief")
    assert any("prompts and" in line and "answers truncated" in line for line in lines)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(model, tmp_path):
    runs = [tmp_path / name for name in "abc"]
    for run, seed in zip(runs, (1, 1, 2), strict=True):
        make_learner(model, run, seed=seed).learn_all(tasks("warm", "brief"))
    assert same_weights(adapter_weights(runs[0]), adapter_weights(runs[1]))
    assert not same_weights(adapter_weights(runs[0]), adapter_weights(runs[2]))


# ---- references ----


@pytest.mark.parametrize("kind", [SequentialFineTuning, LifeAlign])
@pytest.mark.parametrize(
    ("reference", "sft", "zero"),
    [
        pytest.param("stage_start", 0.0, [True, True], marks=pytest.mark.slow),
        ("stage_start", 1.0, [True, True]),
        ("previous_task", 0.0, [True, True]),
        pytest.param("previous_task", 1.0, [False, False], marks=pytest.mark.slow),
        ("base", 0.0, [True, False]),
        pytest.param("base", 1.0, [False, False], marks=pytest.mark.slow),
    ],
)
def test_the_margin_at_step_0_is_zero_exactly_where_the_stage_starts_from_its_reference(
    model, output, kind, reference, sft, zero
):
    lines = []
    learner = make_learner(model, output, kind(), lines=lines, options={"reference": reference, "sft_epochs": sft})
    for name, rows, _ in tasks("warm", "brief"):
        learner.learn(rows, name)
    margins = [version.manifest.stages[-1].step0_margin for version in learner.run.versions]
    assert [margin == 0.0 for margin in margins] == zero
    said = [line for line in lines if "margin at step 0" in line]
    expected = [f"reference = {reference}, margin at step 0 = {margin:.6g}" for margin in margins]
    assert [line.split("), ")[1] for line in said] == expected
    assert all(version.manifest.stages[-1].reference == reference for version in learner.run.versions)


@pytest.mark.parametrize("name", ["slao", "stl", "mtl", "gdumb"])
def test_the_policy_before_a_task_is_the_one_that_the_method_has_not_begun_to_change(model, output, name, monkeypatch):
    """Of a method that starts each task from the base model that is the base model."""
    learner = make_learner(model, output, METHODS[name](), options={"reference": "previous_task", "sft_epochs": 1.0})
    learner.learn(task_rows("warm"), "warm")
    pairs, found = learner._setup.objective.tokenize_held_out(task_rows("brief"), learner._setup), {}
    with nullcontext() if name == "slao" else learner.policy.as_base():
        before = {
            row.id: value for row, value in zip(pairs, sequence_logprobs(learner.policy, pairs, 120), strict=True)
        }

    def recorded(*given, **arguments):
        if arguments["reference"] is not None:
            found.update(
                {row.id: value for row, value in zip(given[2], arguments["reference"]().logprobs, strict=True)}
            )
        return train_stage(*given, **arguments)

    monkeypatch.setattr("everalign.learning.task_training.train_stage", recorded)
    learner.learn(task_rows("brief"), "brief")
    assert found
    for id in found.keys() & before.keys():
        torch.testing.assert_close(found[id], before[id], rtol=1e-5, atol=1e-4)


def test_the_step_0_margin_against_the_base_model_is_the_policys_gain(model, output):
    """Measured by other means: the next task's rows as a test set of the policy as it was before."""
    learner = make_learner(model, output, SequentialFineTuning(), options={"reference": "base", "beta": 0.5})
    learner.learn(task_rows("warm"), "warm")
    pairs = learner._setup.objective.tokenize_held_out(task_rows("brief"), learner._setup)
    now = torch.stack(sequence_logprobs(learner.policy, pairs, 120))
    with learner.policy.as_base():
        base = torch.stack(sequence_logprobs(learner.policy, pairs, 120))
    gain = (now - base)[:, 0] - (now - base)[:, 1]
    learner.learn(task_rows("brief"), "brief")
    margin = learner.run.versions[1].manifest.stages[0].step0_margin
    assert margin == pytest.approx(0.5 * gain.mean().item(), rel=1e-4)


# ---- scores ----


def test_the_score_matrix_has_every_task_after_every_task(model, output):
    """Before its turn, too; with a test set that the base model ranks neither all right nor all wrong."""
    learner = make_learner(model, output, SequentialFineTuning(), options={"learning_rate": 2e-3})
    learner.learn_all([(name, rows, mixed(name)) for name, rows, _ in tasks()])
    scores, margins = learner.scores, learner.run.scores("margin")
    assert scores.tasks == ["warm", "brief", "calm"]
    assert len({value for row in margins.matrix for value in row}) == 9
    run = load_run(output)
    assert scores.zero_shot == [run.zero_shot[name].accuracy for name in scores.tasks]
    assert scores.matrix == [[version.scores[name].accuracy for name in scores.tasks] for version in run.versions]
    for found in (scores, margins):
        assert None not in [value for row in (found.zero_shot, *found.matrix) for value in row]
        diagonal = sum(found.matrix[i][i] for i in range(3)) / 3
        assert found.last == pytest.approx(diagonal + 2 / 3 * found.backward_transfer)
    assert all(score.kl_previous is None for score in run.zero_shot.values())
    assert all(score.reward_accuracy == 0.5 for score in run.zero_shot.values())


def mixed(name):
    """Held-out rows, every other one with its answers exchanged."""
    rows = [row.to_json() for row in held_out(name, 6)]
    for row in rows[::2]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return rows


def test_test_sets_may_be_announced_before_any_task(model, output):
    learner = make_learner(model, output)
    learner.register_test("brief", held_out("brief"))
    assert set(learner.learn(task_rows("warm"), "warm", held_out("warm"))) == {"brief", "warm"}
    learner.register_test("brief", held_out("brief"))
    learner.learn(task_rows("brief"), "brief")
    assert learner.run.versions[1].manifest.test.rows == 5
    assert learner.scores.forward_transfer is not None


def test_test_limit_takes_evenly_spaced_pairs_up_to_the_end(model, output):
    rows = held_out("warm", 10)
    learner = make_learner(model, output, options={"test_limit": 6})
    scores = learner.learn(task_rows("warm"), "warm", rows)
    assert scores["warm"].pairs == 6
    scored = [rows[place].id for place in (0, 1, 3, 5, 6, 8)]
    assert [pair.id for pair in learner._tests._held_out["warm"].pairs] == scored

    again = make_learner(model, output, options={"test_limit": 6}, resume=True)
    again.learn(task_rows("brief"), "brief")
    assert [pair.id for pair in again._tests._held_out["warm"].pairs] == scored
    # A run of before goes on with the rows that it has scored.
    file = output / "zero_shot.json"
    file.write_text(file.read_text().replace('"evenly": true', '"evenly": false'))
    older = make_learner(model, output, options={"test_limit": 6}, resume=True)
    older.learn(task_rows("calm"), "calm")
    assert [pair.id for pair in older._tests._held_out["warm"].pairs] == [row.id for row in rows[:6]]


def test_a_task_without_a_test_set_is_learned_and_not_scored(model, output):
    learner = make_learner(model, output)
    learner.learn(task_rows("warm"), "warm")
    learner.learn(task_rows("brief"), "brief", held_out("brief"))
    assert learner.run.versions[0].manifest.test is None
    assert learner.scores.matrix == [[None, None], [None, learner.scores.last]]


def test_a_learned_task_cannot_get_a_test_set_afterwards(model, output):
    """Its score right after learning could never be known."""
    learner = make_learner(model, output)
    learner.learn(task_rows("warm"), "warm")
    with pytest.raises(InputError, match="task 'warm' was learned without a test set"):
        learner.learn(task_rows("warm"), "warm", held_out("warm"))


def test_single_task_scores_are_the_diagonal(model, output):
    learner = make_learner(model, output, SingleTask())
    learner.learn_all(tasks("warm", "brief"))
    assert learner.scores.regime == "separate"
    assert learner.scores.matrix[0][1] is None


# ---- wrong data ----


def test_rows_in_both_training_and_test_set_are_refused_wherever_they_come_from(model, output):
    learner = make_learner(model, output)
    leaky = [*held_out("warm"), task_rows("warm")[3]]
    with pytest.raises(InputError, match="1 rows are in both the training and the test set"):
        learner.learn(task_rows("warm"), "warm", leaky)
    learner.learn(task_rows("warm"), "warm", held_out("warm"))
    with pytest.raises(InputError, match="in both"):  # an earlier task's training rows
        learner.learn(task_rows("brief"), "brief", [*held_out("brief"), task_rows("warm")[0]])
    with pytest.raises(InputError, match="in both"):  # an earlier task's test rows
        learner.learn([*task_rows("brief"), held_out("warm")[0]], "brief")
    with pytest.raises(InputError, match="in both"):
        learner.register_test("brief", task_rows("warm"))
    learner.learn(task_rows("brief"), "brief", held_out("brief"))  # what was refused has left no trace
    assert learner.scores.learned == ["warm", "brief"]


def test_learn_all_checks_everything_before_it_learns_anything(model, output):
    learner = make_learner(model, output)
    leaky = [("warm", task_rows("warm"), held_out("warm")), ("brief", [*task_rows("brief"), held_out("warm")[1]], None)]
    with pytest.raises(InputError, match=r"warm\.jsonl: 1 rows are in both"):
        learner.learn_all(leaky)
    assert load_run(output).versions == []
    assert load_run(output).zero_shot == {}


def test_an_overlap_can_be_allowed(model, output):
    learner = make_learner(model, output, allow_overlap=True)
    learner.learn(task_rows("warm"), "warm", task_rows("warm"))
    assert learner.run.versions[0].scores["warm"].pairs == 10


def test_a_name_belongs_to_its_rows(model, output):
    learner = make_learner(model, output)
    scores = learner.learn(task_rows("warm"), "warm", held_out("warm"))
    with pytest.raises(InputError, match="'warm' was learned from other rows already: give this task another name"):
        learner.learn(task_rows("brief"), "warm", held_out("warm"))
    assert learner.learn(task_rows("warm"), "warm", held_out("warm")) == scores
    assert len(learner.run.versions) == 1


def test_a_task_keeps_its_test_set(model, output):
    learner = make_learner(model, output)
    learner.register_test("warm", held_out("warm"))
    with pytest.raises(InputError, match=r"task 'warm' has other test rows in this run \(warm\.jsonl\)"):
        learner.learn(task_rows("warm"), "warm", held_out("warm", 4))


@pytest.mark.parametrize(
    ("rows", "name", "test", "message"),
    [
        ([], "warm", None, "task 'warm': its training set: memory: no rows in it"),
        (task_rows("warm"), "warm", [], "task 'warm': its test set: memory: no rows in it"),
        (task_rows("warm"), "", None, "a task needs a name"),
        (task_rows("warm"), " ", None, "a task needs a name"),
    ],
)
def test_tasks_without_rows_or_name_are_refused(model, output, rows, name, test, message):
    learner = make_learner(model, output)
    with pytest.raises(InputError, match=message):
        learner.learn(rows, name, test)
    with pytest.raises(InputError, match=message):
        learner.learn_all([(name, rows, test)])


def test_plain_rows_are_taken_too(model, output):
    learner = make_learner(model, output)
    learner.learn([row.to_json() for row in task_rows("warm")], "warm", [row.to_json() for row in held_out("warm")])
    assert learner.run.versions[0].manifest.train.source == "memory"


@pytest.mark.parametrize("together", [False, True])
def test_the_manifest_names_the_data(model, output, tmp_path, together):
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row.to_json()) + "\n" for row in task_rows("warm")))
    rows = load_preferences(source)
    learner = make_learner(model, output)
    if together:
        learner.learn_all([("warm", rows, held_out("warm"))])
    else:
        learner.learn(rows, "warm", held_out("warm"))
    manifest = learner.run.versions[0].manifest
    assert (manifest.train.source, manifest.train.rows) == (str(source), 10)
    assert manifest.train.fingerprint == rows.fingerprint
    assert manifest.test.fingerprint == held_out("warm").fingerprint


# ---- when something breaks ----


class Breaking(SequentialFineTuning):
    def end_task(self, policy, task):
        raise OSError("disk full")


def test_a_task_that_broke_off_is_not_continued_in_a_half_trained_policy(model, output):
    learner = make_learner(model, output, Breaking())
    with pytest.raises(OSError, match="disk full"):
        learner.learn(task_rows("warm"), "warm")
    with pytest.raises(EveralignError, match="continue with a new learner that resumes the run"):
        learner.learn(task_rows("brief"), "brief")
    again = make_learner(model, output, SequentialFineTuning(), resume=True)
    again.learn(task_rows("warm"), "warm")
    whole = make_learner(model, output.with_name("whole"), SequentialFineTuning())
    whole.learn(task_rows("warm"), "warm")
    assert same_weights(adapter_weights(output), adapter_weights(output.with_name("whole")))


class Exploding(SequentialFineTuning):
    """The gradients of a step become NaN."""

    def __init__(self, step):
        self.step, self.steps = step, 0

    def adjust_gradients(self, policy):
        self.steps += 1
        for parameter in policy.parameters():
            if parameter.grad is not None and self.steps == self.step:
                parameter.grad.fill_(float("nan"))


@pytest.mark.parametrize(("step", "message"), [(1, "^step 2: "), (3, "^dpo left NaN or infinite weights: ")])
def test_a_diverging_task_says_what_to_do_and_leaves_no_version(model, output, step, message):
    learner = make_learner(model, output, Exploding(step))  # in steps of 4 rows, the third is the last
    with pytest.raises(EveralignError, match=message + ".*lower the learning rate"):
        learner.learn(task_rows("warm"), "warm")
    assert load_run(output).versions == []
    assert not list(output.rglob("done"))


def test_the_method_is_a_stranger_to_the_command_line_and_works(model, output):
    class Mine(Method):
        name = "mine"

    learner = make_learner(model, output, Mine())
    learner.learn_all(tasks("warm", "brief"))
    assert learner.scores.regime == "sequential"


def test_two_processes_do_not_write_into_one_run(model, output):
    learner = make_learner(model, output)
    with FileLock(output / ".lock"), pytest.raises(InputError, match="another process is learning into this run"):
        learner.learn(task_rows("warm"), "warm")
    learner.learn(task_rows("warm"), "warm")


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(model, output):
    make_learner(model, output).learn(task_rows("warm"), "warm")
    facts = json.loads((output / "run.json").read_text())
    assert facts["settings"].pop("attention") == "sdpa"
    (output / "run.json").write_text(json.dumps(facts))
    make_learner(model, output, resume=True).learn(task_rows("brief"), "brief")
    facts["settings"]["attention"] = "flex"
    (output / "run.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"started with different settings \(attention: 'flex' then, 'sdpa' now\)"):
        make_learner(model, output, resume=True)


def test_a_run_goes_on_with_other_settings_that_change_no_result(model, output):
    whole = output.with_name("whole")
    make_learner(model, output, options={"checkpointing": "off"}).learn(task_rows("warm"), "warm")
    learner = make_learner(model, output, options={"checkpointing": "on"}, resume=True)
    learner.learn(task_rows("brief"), "brief")
    other = make_learner(model, whole)
    for name in ("warm", "brief"):
        other.learn(task_rows(name), name)
    assert same_weights(adapter_weights(whole), adapter_weights(output))


def test_a_learner_that_fell_behind_its_run_is_refused(model, output):
    make_learner(model, output).learn(task_rows("warm"), "warm")
    late = make_learner(model, output, resume=True)
    make_learner(model, output, resume=True).learn(task_rows("brief"), "brief")
    with pytest.raises(InputError, match="was continued by another learner: open it again"):
        late.learn(task_rows("calm"), "calm")
    assert [version.task for version in load_run(output).versions] == ["warm", "brief"]


def test_a_cleared_folder_is_usable(model, output):
    output.mkdir()
    (output / ".lock").touch()
    make_learner(model, output)


@pytest.mark.parametrize("name", slow_but(["lifealign", "stl"], METHODS))
def test_a_run_without_test_sets_can_be_read(model, output, name):
    # No answer of the random model to the second task's prompt ends in time.
    learner = make_learner(model, output, METHODS[name](**({"own_answers": 0.0} if name == "lifealign-rf" else {})))
    learner.learn_all([(task, rows, None) for task, rows, _ in tasks("warm", "brief")])
    assert load_run(output).versions
    assert all(value is None for row in learner.scores.matrix for value in row)
