"""What every method has to do: leave the base model alone, survive a kill, merge exactly, learn on any architecture."""

import json
import re
from dataclasses import replace

import pytest
import torch

from everalign.errors import InputError
from everalign.methods import METHODS, LifeAlign, SequentialFineTuning, make_method
from everalign.methods.base import Task
from learner_for_tests import (
    adapter_weights,
    held_out,
    make_learner,
    same_weights,
    save_answering_model,
    save_model,
    task_rows,
)
from models_for_tests import saved_model
from tiers_for_tests import slow_but

NAMES = [name for name in METHODS if name != "mtl"]  # learns all tasks at once
# Settings under which there is something of every part of a method, with ten rows a task.
SMALL = {
    "lifealign": {
        "space": "product",
        "replay": 0.5,
        "anchors": 0.1,
        "average": 0.8,
        "step": "fitted",
        "review": 0.25,
    },
    "er": {"replay": 0.5, "review": 0.25},
    "gem": {"replay": 0.5, "refresh": 2},
    "ogpsa": {"replay": 0.5, "refresh": 2},
    "copr": {"replay": 0.5},
    "gdumb": {"replay": 0.5},
    "ewc": {"fisher_rows": 4},
    "olora": {"shrinkage": 0.01},
    "l2p": {"pool_size": 4, "prompt_length": 2, "top_prompts": 2, "prompt_rate": 5.0},
    "lifealign-rf": {"own_answers": 0.5, "average": 0.8},
}
ZERO = {
    "ewc": {"strength": 0.0},
    "ogpsa": {"strength": 0.0},
    "cppo": {"strength": 0.0, "bound": 1e9},
    "er": {"replay": 0.0},
}
ARCHITECTURES = ("gemma3", "gpt2", "phi3", "qwen3", "llama")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_answering_model(tmp_path_factory.mktemp("model"), layers=1)


def method_of(name):
    return make_method(name, **SMALL.get(name, {}))


def learn(model, output, method, names=("warm", "brief"), resume=False, rows=10, **options):
    learner = make_learner(model, output, method, resume=resume, options=options)
    for name in names:
        learner.learn(task_rows(name, rows), name)
    return learner


@pytest.fixture(scope="module")
def learned(model, tmp_path_factory):
    """A run of two tasks with each method, undisturbed."""
    runs = {}

    def run(name):
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp(name) / "run"
            learn(model, runs[name], method_of(name), rows=60 if name == "lifealign" else 10)
        return runs[name]

    return run


@pytest.mark.parametrize("name", sorted(ZERO))
def test_without_strength_a_method_is_sequential_training(model, learned, tmp_path, name):
    learn(model, tmp_path / "run", make_method(name, **ZERO[name]))
    for index in (0, 1):
        assert same_weights(adapter_weights(tmp_path / "run", index), adapter_weights(learned("seqft"), index))


@pytest.mark.parametrize("name", ["gem", "ogpsa", "ewc", "cppo", "slao"])
def test_the_first_task_is_learned_as_by_sequential_training(learned, name):
    """What a method does to keep earlier tasks, it does where there are some."""
    assert same_weights(adapter_weights(learned(name), 0), adapter_weights(learned("seqft"), 0))
    assert not same_weights(adapter_weights(learned(name), 1), adapter_weights(learned("seqft"), 1))


def test_coprs_targets_are_of_the_runs_beta_also_behind_a_supervised_stage(model, tmp_path):
    targets = []
    for epochs in (0.0, 1.0):
        method = method_of("copr")
        learn(model, tmp_path / str(epochs), method, ("warm",), sft_epochs=epochs, beta=2.0)
        targets.append(method.state_dict())
    assert same_weights(*targets)


class KilledError(Exception):
    pass


def kill_at(method, step):
    """Lets the method end the second task's training after so many steps of it."""
    calls, after_step = [], method.after_step

    def counted(policy):
        after_step(policy)
        calls.append(policy)
        if len(calls) == step:
            raise KilledError

    method.after_step = counted
    return method


@pytest.mark.parametrize("name", NAMES)
def test_killed_within_a_task_and_resumed_it_is_as_if_undisturbed(model, learned, tmp_path, name):
    rows = 60 if name == "lifealign" else 10
    learn(model, tmp_path / "run", method_of(name), ("warm",), rows=rows, checkpoint_steps=1)
    with pytest.raises(KilledError):
        learn(model, tmp_path / "run", kill_at(method_of(name), 2), resume=True, rows=rows, checkpoint_steps=1)
    learn(model, tmp_path / "run", method_of(name), resume=True, rows=rows, checkpoint_steps=1)
    assert same_weights(adapter_weights(tmp_path / "run"), adapter_weights(learned(name)))
    state, expected = (sorted((run / "versions").iterdir())[1] for run in (tmp_path / "run", learned(name)))
    assert (state / "method.safetensors").read_bytes() == (expected / "method.safetensors").read_bytes()


@pytest.mark.parametrize("name", slow_but(["lifealign", "ewc", "copr"], NAMES))
def test_a_stage_that_was_finished_before_the_kill_ends_the_task_alike(model, learned, tmp_path, name, monkeypatch):
    rows = 60 if name == "lifealign" else 10
    learn(model, tmp_path / "run", method_of(name), ("warm",), rows=rows)
    method = method_of(name)

    def dies(*_):
        raise KilledError

    method.end_task = dies
    with pytest.raises(KilledError):
        learn(model, tmp_path / "run", method, resume=True, rows=rows)
    learn(model, tmp_path / "run", method_of(name), resume=True, rows=rows)
    assert same_weights(adapter_weights(tmp_path / "run"), adapter_weights(learned(name)))


@pytest.mark.parametrize("name", slow_but(["cppo", "copr", "ewc"], NAMES))
def test_killed_in_the_stage_after_a_supervised_one_it_is_as_if_undisturbed(model, tmp_path, name):
    """What the supervised stage started from is known again, though that stage is not trained again."""
    rows = 60 if name == "lifealign" else 10
    settings = {"rows": rows, "sft_epochs": 1.0, "checkpoint_steps": 1}
    learn(model, tmp_path / "whole", method_of(name), **settings)
    learn(model, tmp_path / "run", method_of(name), ("warm",), **settings)
    steps = supervised_steps(tmp_path / "whole")
    with pytest.raises(KilledError):
        learn(model, tmp_path / "run", kill_at(method_of(name), steps + 1), resume=True, **settings)
    learn(model, tmp_path / "run", method_of(name), resume=True, **settings)
    assert same_weights(adapter_weights(tmp_path / "run"), adapter_weights(tmp_path / "whole"))


def supervised_steps(run):
    """The optimiser steps of the second task's supervised stage."""
    manifest = json.loads((sorted((run / "versions").iterdir())[1] / "manifest.json").read_text())
    assert [stage["stage"] for stage in manifest["stages"]] == ["sft", "dpo"]
    return manifest["stages"][0]["steps"]


@pytest.mark.parametrize("name", slow_but(["lifealign", "olora", "slao", "er"], NAMES))
def test_the_merged_model_is_the_learned_one_and_the_base_is_untouched(model, learned, tmp_path, name):
    """`export` compares the merged model's logits with the adapter's on the base as it is on disk."""
    learner = make_learner(model, learned(name), method_of(name), resume=True)
    with learner.policy.as_base(), torch.no_grad():
        ids = torch.arange(97, 113)[None]
        found = learner.policy.language_model(input_ids=ids).logits
    fresh = make_learner(model, tmp_path / "fresh", SequentialFineTuning())
    with torch.no_grad():
        assert torch.equal(found, fresh.policy.language_model(input_ids=ids).logits)
    if method_of(name).prompts is not None:
        # There is no merged model to compare: prompts are chosen for each question.
        with pytest.raises(InputError, match="no adapter and no merged model can hold them"):
            learner.export(tmp_path / "merged")
        return
    label = "brief" if name == "experts" else None  # a task's name where rows have no labels
    assert (learner.export(tmp_path / "merged", label=label) / "config.json").exists()


@pytest.mark.parametrize(
    ("name", "family"),
    [
        pytest.param(name, family, marks=[] if i % 3 == 0 and (i + j) % len(ARCHITECTURES) == 0 else pytest.mark.slow)
        for i, name in enumerate(NAMES)
        for j, family in enumerate(ARCHITECTURES)
    ],
)
def test_two_tasks_are_learned_on_any_architecture(tmp_path, name, family):
    # Random models do not end their answers.
    method = make_method(name, own_answers=0.0) if name == "lifealign-rf" else method_of(name)
    learner = make_learner(saved_model(family), tmp_path / "run", method, adapter=None)
    for task in ("warm", "brief"):
        scores = learner.learn(task_rows(task), task, held_out(task))
    assert set(scores) == {"warm", "brief"}
    assert len(learner.run.versions) == 2


def test_lifealign_with_its_parts_switched_off_is_what_it_was(learned, model, tmp_path):
    learn(model, tmp_path / "on", LifeAlign(anchors=0.0, average=0.0, step="fixed", space="product"))
    learn(model, tmp_path / "off", LifeAlign(space="product"))
    assert same_weights(adapter_weights(tmp_path / "on"), adapter_weights(tmp_path / "off"))


def test_what_the_policy_answers_before_a_task_is_learned_beside_it_and_nothing_is_kept(tmp_path):
    model = save_answering_model(tmp_path / "model")
    learner = make_learner(model, tmp_path / "run", make_method("lifealign-rf", own_answers=0.5))
    for name in ("warm", "brief"):
        learner.learn(task_rows(name, 20), name)
    stages = [version.manifest.stages[0] for version in learner.run.versions]
    assert stages[0].replayed == 0
    assert 0 < stages[1].replayed <= 10
    assert (sorted((tmp_path / "run" / "versions").iterdir())[1] / "replay.jsonl").read_text() == ""


def test_own_answers_that_do_not_end_are_counted_and_warned_of_where_none_is_left(model, tmp_path):
    lines = []
    learner = make_learner(model, tmp_path / "run", make_method("lifealign-rf", own_answers=1.0), lines=lines)
    for name in ("warm", "brief"):
        learner.learn(task_rows(name), name)
    learned = learner.run.versions[1].manifest.stages[0].replayed
    assert 0 < learned < 10
    said = (
        r"  (\d) of 10 prompts are answered .*: (\d) answers did not end within 32 tokens, or are empty, and 0 prompts"
    )
    (found,) = [match for line in lines if (match := re.match(said, line))]
    assert (int(found[1]), int(found[1]) + int(found[2])) == (learned, 10)

    lines.clear()
    silent = make_learner(save_model(tmp_path / "model"), tmp_path / "silent", make_method("lifealign-rf"), lines=lines)
    for name in ("warm", "brief"):
        silent.learn(task_rows(name), name)
    assert silent.run.versions[1].manifest.stages[0].replayed == 0
    (warning,) = silent.run.versions[1].manifest.warnings
    assert warning.startswith("nothing keeps the policy from forgetting in this task: none of its own answers to 1 ")
    assert f"  warning: {warning}" in lines


def test_own_answers_that_the_task_rejects_leave_nothing_either():
    rows = task_rows("warm", 4)
    method = make_method("lifealign-rf", own_answers=1.0)
    task = Task("t", rows, 2, seed=0, answer=lambda prompts, seed: [])
    asked = {str(row.prompt): row for row in rows}
    rejecting = replace(
        task, answer=lambda prompts, seed: [(n, asked[str(prompt)].rejected) for n, prompt in enumerate(prompts)]
    )
    for one in (task, rejecting):
        assert method.rows(one) == []
        assert "own answers to 4 prompts" in method.warning(one, [])
    assert method.warning(task, list(rows)) is None
    assert method.warning(replace(task, index=1), []) is None


def test_its_own_answers_are_their_likelihood_alone():
    method = make_method("lifealign-rf", strength=2.0)
    batch = {"own_answer": torch.tensor([0.0, 0.0, 1.0, 0.0]), "lengths": torch.tensor([2, 3, 4, 5])}
    batch |= {"row": torch.tensor([0, 0, 1, 1]), "weight": torch.tensor([1.0, 0.0])}
    assert method.row_loss(torch.tensor([-1.0, -2.0, -6.0, -9.0]), batch).tolist() == [0.0, 3.0]
