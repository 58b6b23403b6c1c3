"""What is carried from task to task: identities between methods, replay, and the hooks."""

import inspect
import json
import math
from itertools import pairwise

import pytest
import torch

from everalign.data import ReplayBuffer
from everalign.errors import InputError
from everalign.methods import (
    METHODS,
    ExperienceReplay,
    LifeAlign,
    Method,
    MultiTask,
    SequentialFineTuning,
    SingleTask,
    make_method,
)
from everalign.methods.table import ENTRIES
from learner_for_tests import adapter_weights, make_learner, same_weights, save_model, task_rows, tasks


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(scope="module")
def learned(model, tmp_path_factory):
    """Learn tasks (two by default) with a method, without scoring them; the same is learned once."""
    runs = {}

    def learn(method, objective="dpo", *names, **arguments):
        key = repr((method.name, method.settings(), method.gamma, objective, names, arguments))
        if key in runs and type(method) in METHODS.values():
            return runs[key]
        output = tmp_path_factory.mktemp("learned") / "run"
        learner = make_learner(model, output, method, objective, **arguments)
        for name, rows, _ in tasks(*(names or ("warm", "brief"))):
            learner.learn(rows, name)
        if type(method) in METHODS.values():
            runs[key] = output
        return output

    return learn


def manifest(output, index=-1):
    folder = sorted((output / "versions").iterdir())[index]
    return json.loads((folder / "manifest.json").read_text())


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def dense(updates):
    return {name: update.dense() for name, update in updates.items()}


# ---- making methods ----


def test_every_method_is_made_by_its_name():
    assert set(METHODS) == {
        *(
            "lifealign",
            "seqft",
            "er",
            "mtl",
            "stl",
            "gem",
            "ewc",
            "olora",
            "l2p",
            "cppo",
            "copr",
            "ogpsa",
            "slao",
            "gdumb",
            "lifealign-rf",
            "experts",
        )
    }
    for name, kind in METHODS.items():
        assert type(make_method(name)) is kind
        assert kind.name == name
        entry = ENTRIES[name]
        assert set(entry.takes) == set(inspect.signature(kind).parameters)
        assert (entry.regime, entry.labelled) == (kind.regime, kind.labelled)


def test_lifealign_reviews_and_consolidates_nothing_by_default():
    method = make_method("lifealign")
    assert (method.gamma, method.consolidates, method.long_term) == (None, False, False)
    assert method.settings() == {"space": "none", "replay": 0.2, "capacity": 3000, "review": 0.3}


def test_without_replay_there_is_no_review():
    assert make_method("lifealign", replay=0.0).settings()["review"] == 0.0


@pytest.mark.parametrize(
    "given",
    [
        {"energy": 0.8},
        {"energy": 0.9},
        {"keep": 0.5},
        {"rank_cap": 8},
        {"rank_cap": 64},
        {"average": 0.9},
        {"step": "fitted"},
    ],
)
def test_what_is_for_consolidated_updates_is_refused_where_none_is(given):
    with pytest.raises(InputError, match=f"{next(iter(given))} is for consolidated updates, .* add space 'product'"):
        make_method("lifealign", **given)


def test_the_default_is_replay_with_a_review(learned):
    replay = learned(ExperienceReplay(review=0.3))
    for index in (0, 1):
        assert same_weights(adapter_weights(learned(LifeAlign()), index), adapter_weights(replay, index))


def test_consolidating_lifealign_has_the_papers_defaults():
    method = make_method("lifealign", space="product")
    assert method.gamma is None
    assert method.settings() == {
        "energy": 0.9,
        "keep": 0.5,
        "space": "product",
        "rank_cap": 64,
        "replay": 0.2,
        "capacity": 3000,
    }


@pytest.mark.parametrize(("wrong", "near"), [("lifalign", "lifealign"), ("seq", "seqft"), ("mlt", "mtl")])
def test_an_unknown_method_suggests_the_nearest(wrong, near):
    with pytest.raises(InputError, match=rf"unknown method '{wrong}' \(did you mean '{near}'\?\): choose one of life"):
        make_method(wrong)


def test_a_method_like_no_other_gets_the_list():
    with pytest.raises(InputError, match=r"unknown method 'quantum': choose one of lifealign, seqft, er, mtl, stl"):
        make_method("quantum")


@pytest.mark.parametrize(
    ("name", "argument"),
    [("seqft", "gamma"), ("er", "keep"), ("mtl", "replay"), ("stl", "capacity"), ("lifealign", "theta")],
)
def test_an_argument_that_a_method_would_ignore_is_refused(name, argument):
    with pytest.raises(InputError, match=f"^{argument} means nothing to the method '{name}'"):
        make_method(name, **{argument: 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"energy": 1.5}, "energy is a share"),
        ({"energy": math.nan}, "energy is a share"),
        ({"keep": -0.1}, "keep is a share"),
        ({"replay": 20}, "replay is a share"),
        ({"replay": -0.1}, "replay is a share"),
        ({"capacity": 0}, "replay capacity"),
        ({"space": "weights"}, "space is 'none', 'product' or 'factors', found 'weights'"),
        ({"rank_cap": 0}, "rank_cap is a rank of at least 1"),
        ({"space": "factors", "rank_cap": 8}, "rank_cap means nothing in the space 'factors'"),
        ({"gamma": -1.0}, "gamma is a number of at least 0"),
        ({"gamma": math.inf}, "gamma is a number of at least 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_trained(arguments, message):
    with pytest.raises(InputError, match=message):
        make_method("lifealign", **arguments)


@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_gamma_without_fpo_is_refused(model, tmp_path, objective):
    with pytest.raises(InputError, match=f"gamma is the focusing exponent of fpo, .*; the objective '{objective}'"):
        make_learner(model, tmp_path / "run", LifeAlign(gamma=2.0, space="product"), objective)
    assert not (tmp_path / "run").exists()


# ---- identities ----


def test_replay_of_nothing_is_sequential_fine_tuning(learned):
    replayed, sequential = learned(ExperienceReplay(replay=0.0)), learned(SequentialFineTuning())
    for index in (0, 1):
        assert same_weights(adapter_weights(replayed, index), adapter_weights(sequential, index))


def test_fpo_with_gamma_0_is_dpo(learned):
    focal, plain = learned(LifeAlign(gamma=0.0, space="product"), "fpo"), learned(LifeAlign(space="product"), "dpo")
    for index in (0, 1):
        assert same_weights(adapter_weights(focal, index), adapter_weights(plain, index))


def test_fpo_has_gamma_2_by_default(learned):
    default = learned(LifeAlign(space="product"), "fpo", "warm")
    assert same_weights(
        adapter_weights(default), adapter_weights(learned(LifeAlign(gamma=2.0, space="product"), "fpo", "warm"))
    )
    assert not same_weights(
        adapter_weights(default), adapter_weights(learned(LifeAlign(gamma=1.0, space="product"), "fpo", "warm"))
    )


def test_factors_with_everything_kept_are_experience_replay(learned):
    factors = learned(LifeAlign(energy=1.0, keep=1.0, space="factors"))
    replay = learned(ExperienceReplay())
    assert manifest(factors)["replay_ids"] == manifest(replay)["replay_ids"]
    for index in (0, 1):
        assert largest_difference(adapter_weights(factors, index), adapter_weights(replay, index)) < 1e-6


class FreshReplay(ExperienceReplay):
    """Experience replay whose adapter starts as LifeAlign's short-term one does."""

    def begin_task(self, policy, task):
        policy.start_short_term(task.seed)


class Watched(LifeAlign):
    """Keeps the policy's update before and after every consolidation."""

    def __init__(self, **arguments):
        super().__init__(**{"space": "product", **arguments})
        self.trained, self.consolidated = [], []

    def end_task(self, policy, task):
        self.trained.append(dense(policy.total()))
        records = super().end_task(policy, task)
        self.consolidated.append(dense(policy.total()))
        return records


def test_with_everything_kept_consolidation_changes_nothing(learned):
    """θ = λ = 1: the policy after a task is the trained one, and the first task's is experience replay's."""
    kept, replay = Watched(energy=1.0, keep=1.0), FreshReplay()
    learned(kept)
    output = learned(replay, "dpo", "warm")
    for trained, consolidated in zip(kept.trained, kept.consolidated, strict=True):
        assert max(float(matrix.norm()) for matrix in trained.values()) > 0.1
        assert largest_difference(trained, consolidated) < 1e-6
    weights = adapter_weights(output)
    for name, matrix in kept.trained[0].items():
        left, right = (weights[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
        assert float((matrix - 2.0 * left @ right).abs().max()) < 1e-6  # α/r = 2


@pytest.mark.parametrize("space", ["product", "factors"])
def test_consolidation_is_recorded_module_by_module(learned, space):
    method = Watched(space=space)
    output = learned(method)
    folders = sorted((output / "versions").iterdir())
    for index, folder in enumerate(folders):
        records = json.loads((folder / "consolidation.json").read_text())
        sides = 1 if space == "product" else 2
        assert len(records) == 4 * sides  # q_proj and v_proj of two layers
        for record in records:
            assert 0.9 <= record["energy_kept"] <= 1.0
            assert record["norm_before"] > 0.0
            assert (record["projected_energy"] > 0.0) == (index > 0)
            assert record["norm_after"] <= record["norm_before"] * (1 + 1e-6)
    assert largest_difference(method.trained[1], method.consolidated[1]) > 1e-4


def test_the_long_term_adapter_grows_to_its_cap(learned):
    output = learned(LifeAlign(energy=1.0, rank_cap=6, space="product"))
    records = [
        json.loads((folder / "consolidation.json").read_text()) for folder in sorted((output / "versions").iterdir())
    ]
    assert {record["memory_rank"] for record in records[0]} == {4}
    assert {record["memory_rank"] for record in records[1]} == {6}
    assert all(record["discarded_energy"] > 0 for record in records[1])
    assert adapter_weights(output)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (6, 32)


def test_single_task_training_forgets_the_earlier_tasks(learned):
    first, second = learned(SingleTask(), "dpo", "warm", "brief"), learned(SingleTask(), "dpo", "calm", "brief")
    assert not same_weights(adapter_weights(first, 0), adapter_weights(second, 0))
    assert same_weights(adapter_weights(first, 1), adapter_weights(second, 1))
    assert manifest(first)["parent"] == "000"


def test_sequential_training_depends_on_the_earlier_tasks(learned):
    first = learned(SequentialFineTuning(), "dpo", "warm", "brief")
    second = learned(SequentialFineTuning(), "dpo", "calm", "brief")
    assert not same_weights(adapter_weights(first, 1), adapter_weights(second, 1))
    assert manifest(first)["parent"] == "001-warm"


# ---- replay ----


class Seen(ExperienceReplay):
    """Keeps what it was asked for."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.replayed = []

    def rows(self, task):
        self.replayed.append(super().rows(task))
        return self.replayed[-1]


def test_rows_of_earlier_tasks_join_the_next_ones(learned):
    method = Seen(replay=0.3)
    output = learned(method, "dpo", "warm", "brief", "calm")
    ids = {name: {row.id for row in task_rows(name)} for name in ("warm", "brief", "calm")}
    assert [len(rows) for rows in method.replayed] == [0, 3, 6]
    assert {row.id for row in method.replayed[1]} <= ids["warm"]
    assert {row.id for row in method.replayed[2]} <= ids["warm"] | ids["brief"]
    assert [row.id for row in method.replayed[2][:3]] == [row.id for row in method.replayed[1]]
    for index, rows in enumerate(method.replayed):
        stage = manifest(output, index)["stages"][0]
        assert (stage["rows"], stage["replayed"]) == (10 + len(rows), len(rows))


@pytest.mark.parametrize("kind", [ExperienceReplay, LifeAlign])
def test_the_manifest_names_the_rows_of_the_buffer(learned, kind):
    output = learned(kind(replay=0.3, capacity=5))
    for index, folder in enumerate(sorted((output / "versions").iterdir())):
        buffer = ReplayBuffer.from_jsonl(folder / "replay.jsonl")
        assert manifest(output, index)["replay_ids"] == buffer.ids()
        assert len(buffer) == min(5, 3 * (index + 1))
    assert buffer.tasks() == {"warm": 2, "brief": 3}


def test_multi_task_training_pools_all_rows(model, tmp_path):
    learner = make_learner(model, tmp_path / "run", MultiTask())
    learner.learn_all(tasks())
    (version,) = learner.run.versions
    assert version.manifest.train.rows == 30
    assert version.manifest.train.source == "warm.jsonl + brief.jsonl + calm.jsonl"
    assert version.manifest.stages[0].rows == 30
    assert set(version.scores) == {"warm", "brief", "calm"}
    scores = learner.scores
    assert scores.regime == "joint"
    assert scores.last == pytest.approx(sum(score.accuracy for score in version.scores.values()) / 3)
    assert scores.backward_transfer is None


def test_multi_task_training_in_turn_starts_over_with_everything(learned):
    output = learned(MultiTask(), options={"reference": "base"})
    assert [manifest(output, i)["stages"][0]["rows"] for i in (0, 1)] == [10, 20]
    assert [manifest(output, i)["stages"][0]["step0_margin"] for i in (0, 1)] == [0.0, 0.0]
    assert sorted(manifest(output)["replay_ids"]) == sorted(row.id for n in ("warm", "brief") for row in task_rows(n))


# ---- hooks ----


class Pulled(SequentialFineTuning):
    """A penalty that outweighs the loss: the update must stay near zero."""

    def __init__(self, strength):
        self.strength, self.calls = strength, 0

    def penalty(self, policy):
        self.calls += 1
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        return self.strength * sum(parameter.square().sum() for parameter in trained)


class Frozen(SequentialFineTuning):
    """Gradients that are set to zero: nothing may be learned."""

    def __init__(self):
        self.norms = []

    def adjust_gradients(self, policy):
        gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
        self.norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
        for gradient in gradients:
            gradient.zero_()


def squared_norm(weights):
    return sum(float(tensor.square().sum()) for tensor in weights.values())


def test_the_penalty_joins_the_loss(learned):
    norms, methods = [], [Pulled(0.0), Pulled(100.0)]
    for method in methods:
        norms.append(squared_norm(adapter_weights(learned(method, "dpo", "warm"))))
    assert same_weights(
        adapter_weights(learned(Pulled(0.0), "dpo", "warm")),
        adapter_weights(learned(SequentialFineTuning(), "dpo", "warm")),
    )
    assert norms[1] < 0.8 * norms[0]
    assert [method.calls for method in methods] == [3, 3]  # 10 rows in steps of 4


def test_the_penalty_counts_once_a_step_whatever_the_micro_batch(learned):
    whole = learned(Pulled(1.0), "dpo", "warm")
    split = learned(Pulled(1.0), "dpo", "warm", options={"tokens_per_batch": 120})
    assert largest_difference(adapter_weights(whole), adapter_weights(split)) < 1e-5


def test_gradients_are_adjusted_once_a_step_when_they_are_complete(learned):
    method, split = Frozen(), Frozen()
    weights = adapter_weights(learned(method, "dpo", "warm"))
    learned(split, "dpo", "warm", options={"tokens_per_batch": 120})
    assert len(method.norms) == len(split.norms) == 3
    assert method.norms == pytest.approx(split.norms, rel=1e-4)
    assert min(method.norms) > 0
    assert all(not tensor.any() for name, tensor in weights.items() if "lora_B" in name)


class Diary(Method):
    """Notes every call."""

    name = "diary"

    def __init__(self):
        self.calls = []

    def begin_task(self, policy, task):
        self.calls.append(("begin", task.name, task.index, task.seed))

    def rows(self, task):
        self.calls.append(("rows", task.name))
        return []

    def adjust_gradients(self, policy):
        self.calls.append(("step",))

    def end_task(self, policy, task):
        self.calls.append(("end", task.name))
        return []

    def state_dict(self):
        return {"calls": torch.tensor(len(self.calls))}

    def load_state_dict(self, state):
        self.calls = [None] * int(state["calls"])


def test_hooks_are_called_in_order_and_the_state_survives(model, learned, tmp_path):
    diary = Diary()
    output = learned(diary)
    names = [call[0] for call in diary.calls]
    assert names == ["begin", "rows", *["step"] * 3, "end"] * 2
    assert [call[1] for call in diary.calls if call[0] == "end"] == ["warm", "brief"]
    seeds = [call[3] for call in diary.calls if call[0] == "begin"]
    assert all(after - before >= 1000 for before, after in pairwise(seeds))
    again = Diary()
    make_learner(model, output, again, resume=True)
    assert len(again.calls) == len(diary.calls)


def test_a_default_method_carries_nothing():
    method = Method()
    assert method.settings() == {}
    assert method.state_dict() == {}
    assert method.penalty(None) is None
    assert (method.buffer, method.gamma, method.consolidates, method.long_term) == (None, None, False, False)
