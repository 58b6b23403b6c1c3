"""One stage: accumulation, penalty and gradient hooks, failures, resuming, bf16."""

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments

from everalign.data.collate import TrainingPlan, collate
from everalign.errors import EveralignError, InputError
from everalign.modeling.policy import Policy
from everalign.training.objectives import make_objective
from everalign.training.options import StageOptions
from everalign.training.trainer import Steps, Trainer, training_arguments
from models_for_tests import (
    perturb,
    random_model,
    random_pairs,
    random_policy,
    random_rows,
    random_targets,
    random_updates,
)
from stages_for_tests import difference, train, weights
from tiers_for_tests import slow_but

OBJECTIVES = ("sft", "dpo", "fpo")
ALL_OBJECTIVES = (*OBJECTIVES, "var", "snkl")


def weighted_pairs(count=20):
    return [dataclasses.replace(p, weight=0.25 + (i % 4) / 2) for i, p in enumerate(random_pairs(count, longest=30))]


def direct_gradients(policy, name, pairs, penalty=None):
    """Gradients of the whole batch's loss, written out from the formulas in one go."""
    batch = collate(pairs, shared=False)
    with torch.no_grad(), policy.as_base():
        base = policy(batch)
    policy.zero_grad()
    sums, lengths = policy(batch), batch["lengths"]
    chosen, rejected = sums.view(-1, 2).unbind(1)
    weight = torch.tensor([pair.weight for pair in pairs])
    if name == "sft":
        loss = -(weight * chosen).sum() / lengths[::2].sum()
    else:
        base_chosen, base_rejected = base.view(-1, 2).unbind(1)
        probability = torch.sigmoid(0.1 * ((chosen - base_chosen) - (rejected - base_rejected)))
        focus = 1.0 if name == "dpo" else (1 - probability) ** 2
        loss = (weight * focus * -probability.log()).mean()
    if penalty is not None:
        loss = loss + penalty(policy)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}
    policy.zero_grad()
    return loss.item(), gradients


class Recorder:
    """A gradient hook that keeps every step's gradients."""

    def __init__(self):
        self.gradients = []

    def __call__(self, policy):
        self.gradients.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad})


# ---- accumulation ----


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_first_gradient_is_that_of_the_formula(name, tmp_path):
    pairs = weighted_pairs(8)
    policy = perturb(random_policy())
    loss, expected = direct_gradients(policy, name, pairs)
    recorder = Recorder()
    options = {"tokens_per_batch": 120, "max_grad_norm": 0.0}
    result = train(policy, name, pairs, tmp_path, hooks={"gradient_hook": recorder}, **options)
    assert len(recorder.gradients) == result.steps == 1
    for key, gradient in recorder.gradients[0].items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)
    assert result.curve[0]["loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("name", slow_but(["fpo"], OBJECTIVES))
def test_accumulated_micro_batches_equal_the_big_batch(name, tmp_path):
    """Two steps of 8 rows of very different lengths and weights, and a last one of 4."""
    results, curves = [], []
    for tokens in (10_000, 150, 1):
        policy = perturb(random_policy())
        start = weights(policy)
        result = train(policy, name, weighted_pairs(20), tmp_path / str(tokens), tokens_per_batch=tokens)
        assert result.steps == 3
        results.append(weights(policy))
        curves.append([(entry["loss"], entry["grad_norm"]) for entry in result.curve])
    assert difference(results[0], start) > 1e-2
    assert difference(results[0], results[1]) < 2e-6
    assert difference(results[0], results[2]) < 2e-6
    for curve in curves[1:]:
        assert torch.tensor(curve) == pytest.approx(torch.tensor(curves[0]), rel=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_weight_multiplies_its_row(name, tmp_path):
    """Weight 0 leaves no trace but in the count: the other rows' gradients are halved with half of all rows."""
    pairs = random_pairs(8, seed=4)
    rows = [dataclasses.replace(p, prompt=[3] * 4, responses=(p.chosen[:1], p.rejected)) for p in pairs]
    silent = [dataclasses.replace(p, weight=0.0 if i % 2 else 1.0) for i, p in enumerate(rows)]
    gradients = []
    for each in (silent, rows[::2]):
        recorder = Recorder()
        options = {"max_grad_norm": 0.0, "tokens_per_batch": 240}
        train(perturb(random_policy()), name, each, tmp_path, hooks={"gradient_hook": recorder}, **options)
        gradients.append(recorder.gradients[0])
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(2 * gradient, gradients[1][key], rtol=1e-4, atol=1e-6)


def test_every_row_is_seen_once_an_epoch(tmp_path):
    seen = []
    objective = make_objective("sft")
    collate = objective.collate
    objective.collate = lambda pairs, shared: seen.extend(p.id for p in pairs) or collate(pairs, shared)
    steps = Steps(random_pairs(3), TrainingPlan([[[2], [0]], [[1]]]), objective, True, None)
    arguments = training_arguments(
        tmp_path,
        StageOptions(learning_rate=0.1, scheduler="constant", max_grad_norm=0.0, logging_steps=1, checkpoint_steps=0),
        seed=0,
    )
    Trainer(random_policy(), objective, arguments, steps).train()
    assert seen == ["0002", "0000", "0001"]


def test_references_belong_to_their_rows():
    reference = list(torch.arange(10.0).reshape(5, 2))
    steps = Steps(random_pairs(5), TrainingPlan([[[4, 1], [0]]]), make_objective("dpo"), True, reference)
    assert [batch["reference"].tolist() for batch in steps[0]] == [[8.0, 9.0, 2.0, 3.0], [0.0, 1.0]]


def test_references_of_groups_are_laid_out_row_after_row():
    rows = random_targets(3)
    reference = [torch.full((len(row.responses),), float(i)) for i, row in enumerate(rows)]
    objective = make_objective("snkl")
    (batch,) = Steps(rows, TrainingPlan([[[2, 0]]]), objective, True, reference)[0]
    assert batch["reference"].tolist() == [2.0] * len(rows[2].responses) + [0.0] * len(rows[0].responses)
    (batch,) = Steps(rows, TrainingPlan([[]]), objective, True, reference)[0]
    assert (batch["count"].item(), batch["weight"].tolist()) == (0, [0.0])


def test_a_process_without_rows_in_a_step_computes_one_that_does_not_count():
    steps = Steps(random_pairs(2), TrainingPlan([[[1]], []], processes=2), make_objective("dpo"), True, None)
    (batch,) = steps[1]
    assert (batch["count"].item(), batch["weight"].tolist()) == (0, [0.0])


# ---- penalty and gradient hook ----


@pytest.mark.parametrize("tokens", [10_000, 150, 1])
def test_a_penalty_is_added_once_a_step(tokens, tmp_path):
    """Also in the last step, which has fewer micro-batches."""
    calls = []

    def penalty(policy):
        calls.append(policy)
        return 3.0 * sum(p.square().sum() for p in policy.parameters() if p.requires_grad)

    pairs = weighted_pairs(8)
    policy, recorder = perturb(random_policy()), Recorder()
    expected_loss, expected = direct_gradients(policy, "dpo", pairs, penalty)
    calls.clear()
    hooks = {"penalty": penalty, "gradient_hook": recorder}
    result = train(policy, "dpo", pairs, tmp_path, hooks=hooks, tokens_per_batch=tokens, max_grad_norm=0.0)
    assert calls == [policy]
    for key, gradient in recorder.gradients[0].items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-5)
    assert result.curve[0]["loss"] == pytest.approx(expected_loss, rel=1e-5)


def test_a_penalty_in_a_short_last_step_counts_in_full(tmp_path):
    """9 rows in steps of 8: the last step is a single micro-batch of what would be 8."""

    def penalty(policy):
        return sum(p.sum() for p in policy.parameters() if p.requires_grad)

    recorders = [Recorder(), Recorder()]
    for recorder, extra in zip(recorders, (None, penalty), strict=True):
        hooks = {"penalty": extra, "gradient_hook": recorder}
        options = {"tokens_per_batch": 60, "max_grad_norm": 0.0, "learning_rate": 1e-12}
        train(perturb(random_policy()), "dpo", weighted_pairs(9), tmp_path, hooks=hooks, **options)
    for without, having in zip(*(recorder.gradients for recorder in recorders), strict=True):
        for key in without:
            assert (having[key] - without[key]).flatten().tolist() == pytest.approx(
                [1.0] * having[key].numel(), abs=1e-5
            )


def test_a_penalty_of_none_changes_nothing(tmp_path):
    results = []
    for hooks in ({}, {"penalty": lambda policy: None}):
        policy = perturb(random_policy())
        train(policy, "dpo", random_pairs(8), tmp_path, hooks=hooks)
        results.append(weights(policy))
    assert difference(*results) == 0.0


def test_the_gradient_hook_decides_what_the_optimiser_sees(tmp_path):
    policy = perturb(random_policy())
    start = weights(policy)
    calls = []

    def freeze_all_but_one(given):
        calls.append(given)
        for name, parameter in given.named_parameters():
            if parameter.requires_grad and "layers.0.self_attn.q_proj.lora_B" not in name:
                parameter.grad.zero_()

    hooks = {"gradient_hook": freeze_all_but_one}
    train(policy, "dpo", random_pairs(20), tmp_path, hooks=hooks, tokens_per_batch=120)
    assert calls == [policy] * 3
    changed = [name for name, value in weights(policy).items() if not torch.equal(value, start[name])]
    assert len(changed) == 1
    assert "layers.0.self_attn.q_proj.lora_B" in changed[0]


# ---- what a stage does ----


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_lowers_the_loss(name, tmp_path):
    curve = train(random_policy(), name, random_pairs(8), tmp_path, epochs=20.0).curve
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]
    if name != "sft":
        assert curve[0]["margin"] == pytest.approx(0.0, abs=1e-5)
        assert curve[0]["loss"] == pytest.approx(math.log(2) * (1 if name == "dpo" else 0.25), abs=1e-5)
        assert curve[-1]["accuracy"] == 1.0
    else:
        assert curve[0]["nll"] > curve[-1]["nll"]


def test_only_the_short_term_adapter_learns(tmp_path):
    policy = random_policy()
    policy.write_long_term(random_updates(policy))
    frozen = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
    train(policy, "dpo", random_pairs(8), tmp_path)
    parameters = dict(policy.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    assert all(p.grad is None for p in parameters.values())


def test_a_stage_of_one_step_learns_despite_a_warm_up(tmp_path):
    policy = random_policy()
    start = weights(policy)
    result = train(policy, "dpo", random_pairs(4), tmp_path, warmup=0.5)
    assert result.steps == 1
    assert difference(weights(policy), start) > 1e-3


def test_every_stage_has_a_fresh_optimiser(tmp_path):
    """Adam's first step has size lr whatever the gradient; with old moments it would not."""
    policy = random_policy()
    for stage in range(2):
        before = weights(policy)
        train(policy, "sft", random_pairs(8, seed=stage), tmp_path / str(stage), learning_rate=1e-3)
        moved = [
            (value - before[name]).abs().max().item() for name, value in weights(policy).items() if "lora_B" in name
        ]
        assert moved == pytest.approx([1e-3] * len(moved), rel=1e-3)


def test_the_curve_and_the_result_of_a_stage(tmp_path):
    steps = []
    hooks = {"progress": lambda done, total: steps.append((done, total))}
    result = train(random_policy(), "dpo", random_pairs(20), tmp_path, hooks=hooks, epochs=1.5, logging_steps=3)
    assert (result.steps, result.epochs) == (4, 1.5)
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [(entry["step"], entry["epoch"]) for entry in result.curve] == [(1, 0.375), (3, 1.125), (4, 1.5)]
    assert all({"loss", "learning_rate", "grad_norm", "margin", "accuracy"} <= entry.keys() for entry in result.curve)
    assert not any(tmp_path.iterdir())


def test_the_seed_decides_the_order(tmp_path):
    results = []
    for seed in (0, 0, 1):
        policy = random_policy()
        torch.manual_seed(len(results))
        train(policy, "dpo", random_pairs(20), tmp_path, seed=seed)
        results.append(weights(policy))
    assert difference(results[0], results[1]) == 0.0
    assert difference(results[0], results[2]) > 0.0


# ---- failures ----


@pytest.mark.parametrize("name", ALL_OBJECTIVES)
def test_a_nan_stops_training_and_names_the_step(name, tmp_path):
    policy = random_policy()

    def spoil(given):
        next(p for p in given.parameters() if p.requires_grad).grad.fill_(float("nan"))

    with pytest.raises(EveralignError, match=r"^step 2: .*nan.*: lower the learning rate, or train in fp32"):
        train(policy, name, random_rows(name, 20), tmp_path, hooks={"gradient_hook": spoil})


class Waits(TorchDispatchMode):
    """Counts what would make the processor wait for a GPU: reading a value, or a size that depends on values."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found, self.calls = [], 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        self.calls += 1
        self.found += [name for name in self.names if operation.overloadpacket.__name__ == name]
        return operation(*arguments, **(keywords or {}))


@pytest.mark.parametrize("name", [*OBJECTIVES, "snkl"])
def test_no_micro_batch_waits_for_the_device(name, tmp_path, monkeypatch):
    waits, inner = Waits(), Trainer.training_step

    def watched(self, *arguments):
        with waits:
            return inner(self, *arguments)

    with waits:
        assert bool(torch.ones(1).isfinite().all())
    assert waits.found == ["_local_scalar_dense"]
    waits.found.clear()
    monkeypatch.setattr(Trainer, "training_step", watched)
    # As on a GPU: a processor's attention reads what it goes over.
    monkeypatch.setattr("everalign.modeling.policy.use_cpu_attention", lambda model: None)
    assert train(random_policy(), name, random_rows(name, 20), tmp_path, tokens_per_batch=150).steps == 3
    assert (waits.calls > 100, waits.found) == (True, [])


def test_a_nan_is_found_before_a_checkpoint_holds_it(tmp_path):
    """Losses are looked at when something is logged or saved: here the checkpoint comes first."""

    def spoil(given):
        next(p for p in given.parameters() if p.requires_grad).grad.fill_(float("nan"))

    options = {"logging_steps": 100, "checkpoint_steps": 2}
    with pytest.raises(EveralignError, match=r"^step 2: the loss became nan"):
        train(random_policy(), "dpo", random_pairs(40), tmp_path, hooks={"gradient_hook": spoil}, **options)
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_an_infinite_penalty_stops_training(tmp_path):
    hooks = {"penalty": lambda policy: torch.tensor(float("inf"))}
    with pytest.raises(EveralignError, match=r"^step 1: the loss became inf: lower the learning rate"):
        train(random_policy(), "dpo", random_pairs(4), tmp_path, hooks=hooks)


def test_objectives_are_made_by_name():
    assert [make_objective(name).name for name in OBJECTIVES] == list(OBJECTIVES)
    assert [make_objective(name).needs_reference for name in OBJECTIVES] == [False, True, True]
    with pytest.raises(InputError, match=r"unknown objective 'ppo' .*: choose one of sft, dpo, fpo"):
        make_objective("ppo")
    with pytest.raises(InputError, match="the objective 'dpo' would ignore it"):
        make_objective("dpo", gamma=1.0)


def test_gamma_of_the_objective_reaches_the_loss():
    reference = torch.zeros(3, 2)
    batch = {**make_objective("fpo").collate(random_pairs(3), shared=True), "reference": reference}
    policy = perturb(random_policy())
    losses = {
        gamma: make_objective("fpo", gamma=gamma).loss(policy, batch, batch["count"])[0].item()
        for gamma in (None, 0.0, 2.0)
    }
    dpo = make_objective("dpo").loss(policy, batch, batch["count"])[0].item()
    assert losses[None] == losses[2.0] < losses[0.0] == pytest.approx(dpo, rel=1e-6)


# ---- bf16 ----


@pytest.mark.parametrize("name", slow_but(["fpo", "var", "snkl"], ALL_OBJECTIVES))
def test_bf16_training_stays_near_fp32(name, tmp_path):
    curves = []
    for dtype in (torch.float32, torch.bfloat16):
        policy = Policy(random_model().to(dtype), 4, 8.0)
        curves.append(train(policy, name, random_rows(name, 8), tmp_path, epochs=10.0).curve)
        assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
        assert all(torch.isfinite(value).all() for value in weights(policy).values())
    exact, mixed = ([entry["loss"] for entry in curve] for curve in curves)
    # At β = 1 a loss feels ten times more of the rounding of log-probabilities than at 0.1.
    assert mixed == pytest.approx(exact, rel=0.15, abs=0.05 if name == "snkl" else 0.02)
    assert mixed != exact


def test_several_gpus_in_one_process_do_not_share_a_batch(tmp_path, monkeypatch):
    """transformers would split it between them, and with it a pair."""

    def found(arguments):
        arguments._n_gpu = 4
        return torch.device("cuda", 0)

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(found))
    arguments = training_arguments(
        tmp_path,
        StageOptions(learning_rate=1e-4, scheduler="linear", max_grad_norm=1.0, logging_steps=1, checkpoint_steps=0),
        seed=0,
    )
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == 1
