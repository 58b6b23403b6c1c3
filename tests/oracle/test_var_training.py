"""Reward-weighted training: against the formula, against plain fine-tuning, and against an optimum that is known."""

import dataclasses
import itertools

import pytest
import torch

from everalign.data.collate import collate
from everalign.data.tokenization import TokenizedRow
from everalign.modeling.policy import Policy
from everalign.objectives import var_weights
from everalign.training.objectives import make_objective
from models_for_tests import perturb, random_groups, random_model, random_pairs, random_policy
from stages_for_tests import difference, train, weights

VAR, SFT = make_objective("var"), make_objective("sft")


def step(policy, objective, rows, shared=True):
    """Loss and gradients of one batch."""
    batch = objective.collate(rows, shared)
    policy.zero_grad()
    loss, metrics = objective.loss(policy, batch, batch["count"])
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.requires_grad}, metrics


def close(found, expected, tolerance=1e-5):
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm().clamp(min=1e-6), name


def written_out(policy, groups):
    """Loss and gradients from one sequence after the other."""
    tokens = sum(len(response) for group in groups for response in group.responses)
    policy.zero_grad()
    total = 0.0
    for group in groups:
        for response, weight in zip(group.responses, group.weights, strict=True):
            pair = TokenizedRow.pair("x", group.prompt, response, response, 1.0)
            total = total - weight * policy(collate([pair], shared=False))[0] / tokens
    total.backward()
    return total.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("shared", [True, False])
def test_loss_and_gradients_are_those_of_the_formula(shared):
    policy, groups = perturb(random_policy()), random_groups(9, longest=20)
    expected, slopes = written_out(policy, groups)
    loss, found, metrics = step(policy, VAR, groups, shared)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    close(found, slopes)
    assert len(metrics["nll"]) == sum(weight > 0 for group in groups for weight in group.weights)


@pytest.mark.parametrize("shared", [True, False])
def test_weights_of_one_are_plain_fine_tuning_bit_for_bit(shared):
    pairs, policy = random_pairs(8, longest=20), perturb(random_policy())
    groups = [TokenizedRow(p.id, p.prompt, (p.chosen,), (1.0,)) for p in pairs]
    (loss, found, _), (expected, slopes, _) = step(policy, VAR, groups, shared), step(policy, SFT, pairs, shared)
    assert torch.equal(loss, expected)
    assert all(torch.equal(found[name], slopes[name]) for name in slopes)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("left", [True, False])
def test_weights_of_one_are_the_loss_that_transformers_computes(shared, left):
    """Its labels are -100 on prompts and padding: every response token counts, the end too, and nothing else.

    Padded on either side; the rounding of another order of operations is all that differs.
    """
    groups, policy = random_groups(7, longest=20), perturb(random_policy())
    groups = [dataclasses.replace(group, weights=(1.0,) * len(group.responses)) for group in groups]
    sequences = [(group.prompt, response) for group in groups for response in group.responses]
    width = max(len(prompt) + len(response) for prompt, response in sequences)

    def padded(tokens, filling):
        space = [filling] * (width - len(tokens))
        return space + tokens if left else tokens + space

    ids = torch.tensor([padded(prompt + response, 0) for prompt, response in sequences])
    labels = torch.tensor([padded([-100] * len(prompt) + response, -100) for prompt, response in sequences])
    mask = torch.tensor([padded([1] * (len(prompt) + len(response)), 0) for prompt, response in sequences])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    policy.zero_grad()
    expected = policy.peft(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels).loss
    expected.backward()
    slopes = {n: p.grad.clone() for n, p in policy.named_parameters() if p.requires_grad}
    loss, found, _ = step(policy, VAR, groups, shared)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    close(found, slopes)


def test_a_response_of_weight_0_is_counted_and_not_computed():
    groups = [TokenizedRow("a", [3, 4], ([5, 6], [7, 8, 9, 10]), (1.0, 0.0))]
    batch = VAR.collate(groups, True)
    assert (batch["count"].item(), batch["input_ids"].tolist()) == (6, [[3, 4, 5, 6]])
    assert [VAR.tokens(groups[0], shared) for shared in (True, False)] == [4, 4]
    assert VAR.tokens(dataclasses.replace(groups[0], weights=(1.0, 0.5)), False) == 12


def test_accumulated_micro_batches_equal_the_big_batch(tmp_path):
    results, curves = [], []
    for tokens in (10_000, 150, 1):
        policy = perturb(random_policy())
        start = weights(policy)
        rows = random_groups(20, longest=30)
        result = train(policy, "var", rows, tmp_path / str(tokens), tokens_per_batch=tokens)
        assert result.steps == 3
        results.append(weights(policy))
        curves.append([entry["loss"] for entry in result.curve])
    assert difference(results[0], start) > 1e-2
    assert max(difference(results[0], other) for other in results[1:]) < 2e-6
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_training_reaches_the_optimum_of_a_reward(tmp_path):
    """All 64 answers of 3 tokens are known, and so is pi*: a transformer trained on weighted samples gets there.

    10,000 times 64 samples of the reference, weighed group by group with the estimator that is exact; then equal
    answers are put together.
    """
    generator = torch.Generator().manual_seed(0)
    policy = Policy(random_model(vocabulary=4), 16, 32.0)
    answers = list(itertools.product(range(4), repeat=3))
    everything = [TokenizedRow("all", [1, 2], tuple(list(a) for a in answers), (1.0,) * 64)]
    batch = VAR.collate(everything, True)

    def log_probs():
        with torch.no_grad():
            return policy(batch).double()

    reference = log_probs()
    assert reference.exp().sum().item() == pytest.approx(1.0, abs=1e-4)
    rewards = torch.tensor([1.0 * a.count(3) + (a[0] == a[2]) - 0.8 * (a[1] == 0) for a in answers]).double()
    optimum = (reference + rewards).softmax(0)
    drawn = torch.multinomial(reference.exp(), 10_000 * 64, replacement=True, generator=generator)
    found = var_weights(rewards[drawn], torch.arange(10_000).repeat_interleave(64), estimator="group_loo").weights
    shares = torch.zeros(64, dtype=torch.float64).index_add(0, drawn, found) / 10_000
    group = dataclasses.replace(everything[0], weights=tuple(shares.tolist()))
    options = {"learning_rate": 1e-2, "batch_size": 1, "epochs": 60.0, "tokens_per_batch": 4000}
    train(policy, "var", [group], tmp_path, scheduler="cosine", **options)
    reached = log_probs().exp()
    started = 0.5 * (reference.exp() - optimum).abs().sum().item()
    assert started > 0.3
    distance = 0.5 * (reached - optimum).abs().sum().item()
    assert distance < 0.05
    assert (reached @ rewards).item() == pytest.approx((optimum @ rewards).item(), rel=0.02)
