"""The self-normalised objective in training: against the formula, against DPO, and against an optimum that is known."""

import dataclasses
import itertools

import pytest
import torch

from everalign.data.collate import collate, row_tokens
from everalign.data.tokenization import TokenizedRow
from everalign.modeling.policy import Policy
from everalign.training.objectives import make_objective
from everalign.training.reference import sequence_logprobs
from models_for_tests import perturb, random_model, random_pairs, random_policy, random_targets
from stages_for_tests import difference, train, weights

SNKL = make_objective("snkl")


def gradients_of(policy):
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.requires_grad}


def step(policy, rows, shared=True):
    """Loss and gradients of one batch against the base model."""
    with policy.as_base():
        reference = torch.cat(sequence_logprobs(policy, rows, 300))
    batch = {**SNKL.collate(rows, shared), "reference": reference}
    policy.zero_grad()
    loss, metrics = SNKL.loss(policy, batch, batch["count"])
    loss.backward()
    return loss.detach(), gradients_of(policy), metrics


def close(found, expected, tolerance=1e-5):
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm().clamp(min=1e-6), name


def alone(policy, prompt, response):
    """One sequence's log-probability, computed by itself."""
    return policy(collate([TokenizedRow.pair("x", prompt, response, response, 1.0)], shared=False))[0]


def written_out(policy, rows):
    """Loss and gradients from one sequence after the other."""
    policy.zero_grad()
    total = 0.0
    for row in rows:
        with torch.no_grad(), policy.as_base():
            base = torch.stack([alone(policy, row.prompt, response) for response in row.responses])
        found = (torch.stack([alone(policy, row.prompt, r) for r in row.responses]) - base).log_softmax(0)
        wanted = torch.tensor(row.weights)
        some = wanted > 0
        total = total + row.weight * (wanted[some] * (wanted[some].log() - found[some])).sum() / len(rows)
    total.backward()
    return total.detach(), gradients_of(policy)


@pytest.mark.parametrize("shared", [True, False])
def test_loss_and_gradients_are_those_of_the_formula(shared):
    policy, rows = perturb(random_policy()), random_targets(7, longest=20)
    assert any(0.0 in row.weights for row in rows)
    expected, slopes = written_out(policy, rows)
    loss, found, metrics = step(policy, rows, shared)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    close(found, slopes)
    assert {name: len(values) for name, values in metrics.items()} == {"kl": 7, "margin": 7, "accuracy": 7}


def test_a_certain_pair_is_dpo_at_beta_one():
    pairs, policy = random_pairs(6, longest=20), perturb(random_policy())
    rows = [TokenizedRow(p.id, p.prompt, (p.chosen, p.rejected), (1.0, 0.0), p.weight) for p in pairs]
    dpo = make_objective("dpo", beta=1.0)
    with policy.as_base():
        reference = torch.cat(sequence_logprobs(policy, pairs, 300))
    batch = {**dpo.collate(pairs, True), "reference": reference}
    policy.zero_grad()
    expected, wanted = dpo.loss(policy, batch, batch["count"])
    expected.backward()
    slopes = gradients_of(policy)
    loss, found, metrics = step(policy, rows)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    close(found, slopes)
    for name in ("margin", "accuracy"):
        torch.testing.assert_close(metrics[name], wanted[name], rtol=0, atol=1e-4)


def test_all_responses_are_laid_out_also_those_never_to_be_given():
    rows = [
        TokenizedRow("a", [3, 4], ([5, 6], [7, 8, 9]), (1.0, 0.0), 1.0),
        TokenizedRow("b", [3], ([5], [6], [7]), (0.25, 0.5, 0.25), 2.0),
    ]
    batch = SNKL.collate(rows, True)
    assert (batch["count"].item(), batch["weight"].tolist(), batch["sizes"].tolist()) == (2, [1.0, 2.0], [2, 3])
    assert batch["row"].tolist() == [0, 0, 1, 1, 1]
    assert batch["lengths"].tolist() == [2, 3, 1, 1, 1]
    assert (batch["best"].tolist(), batch["worst"].tolist()) == ([0, 3], [1, 2])
    assert batch["log_shares"].exp().tolist() == pytest.approx([1, 0, 0.25, 0.5, 0.25])
    assert [row_tokens(rows[0], shared) for shared in (True, False)] == [7, 10]
    assert len(collate(rows, False)["input_ids"]) == 5


def test_equal_shares_pull_towards_the_reference_and_have_no_margin():
    policy = perturb(random_policy())
    rows = [
        dataclasses.replace(row, weights=(1 / len(row.responses),) * len(row.responses)) for row in random_targets(4)
    ]
    loss, slopes, metrics = step(policy, rows)
    assert loss.item() > 1e-3
    assert max(slope.abs().max() for slope in slopes.values()) > 1e-3
    assert metrics["margin"].tolist() == [0.0] * 4
    fresh = random_policy()
    loss, slopes, _ = step(fresh, rows)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert max(slope.abs().max() for slope in slopes.values()) < 1e-4


def test_accumulated_micro_batches_equal_the_big_batch(tmp_path):
    results, curves = [], []
    for tokens in (10_000, 150, 1):
        policy = perturb(random_policy())
        start = weights(policy)
        result = train(policy, "snkl", random_targets(20, longest=30), tmp_path / str(tokens), tokens_per_batch=tokens)
        assert result.steps == 3
        results.append(weights(policy))
        curves.append([entry["loss"] for entry in result.curve])
    assert difference(results[0], start) > 1e-2
    assert max(difference(results[0], other) for other in results[1:]) < 2e-6
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_a_weight_multiplies_its_row():
    policy, (first, second) = perturb(random_policy()), random_targets(2)
    losses = [step(policy, [row])[0].item() / row.weight for row in (first, second)]
    rows = [dataclasses.replace(first, weight=3.0), dataclasses.replace(second, weight=0.5)]
    loss, _, _ = step(policy, rows)
    assert loss.item() == pytest.approx((3.0 * losses[0] + 0.5 * losses[1]) / 2, rel=1e-5)


def test_a_killed_stage_ends_with_the_same_bits(tmp_path):
    class StopError(Exception):
        pass

    def stop(done, total):
        if done == 4:
            raise StopError

    rows, options = random_targets(20), {"checkpoint_steps": 2, "epochs": 2.0, "tokens_per_batch": 150}
    whole, resumed = random_policy(), random_policy()
    train(whole, "snkl", rows, tmp_path / "whole", **options)
    with pytest.raises(StopError):
        train(random_policy(), "snkl", rows, tmp_path / "cut", hooks={"progress": stop}, **options)
    steps = []
    train(resumed, "snkl", rows, tmp_path / "cut", hooks={"progress": lambda done, _: steps.append(done)}, **options)
    assert steps[0] > 1
    assert difference(weights(whole), weights(resumed)) == 0.0


@pytest.mark.slow
def test_training_reaches_the_optimum_whoever_wrote_the_responses(tmp_path):
    """All 256 answers of 4 tokens are known, and so is pi*; the groups are drawn uniformly, far from the reference."""
    generator = torch.Generator().manual_seed(0)
    policy = Policy(random_model(vocabulary=4), 16, 32.0)
    answers = [list(answer) for answer in itertools.product(range(4), repeat=4)]
    everything = [TokenizedRow("all", [1, 2], tuple(answers), (1 / 256,) * 256, 1.0)]

    def log_probs():
        return sequence_logprobs(policy, everything, 4000)[0].double()

    reference = log_probs()
    rewards = torch.tensor([1.0 * a.count(3) + (a[0] == a[3]) - 0.8 * (a[1] == 0) for a in answers]).double()
    optimum = (reference + rewards).softmax(0)
    rows = []
    for number in range(24):
        drawn = torch.randperm(256, generator=generator)[:64]
        shares = tuple(rewards[drawn].softmax(0).tolist())
        rows.append(TokenizedRow(str(number), [1, 2], tuple(answers[i] for i in drawn.tolist()), shares, 1.0))
    options = {"learning_rate": 1e-2, "batch_size": 4, "epochs": 30.0, "tokens_per_batch": 4000}
    train(policy, "snkl", rows, tmp_path, scheduler="cosine", **options)
    reached = log_probs().exp()
    assert 0.5 * (reference.exp() - optimum).abs().sum().item() > 0.3
    assert 0.5 * (reached - optimum).abs().sum().item() < 0.05
    assert (reached @ rewards).item() == pytest.approx((optimum @ rewards).item(), rel=0.02)
