"""Where weighted fine-tuning ends: policies whose every response is listed, so that the target is known exactly."""

import itertools
import math

import pytest
import torch

from everalign.objectives import snkl_loss, token_nll, var_weights, weighted_nll
from policies_for_tests import (
    LENGTHS,
    PROMPTS,
    RESPONSES,
    all_tuples,
    divergence,
    minimise,
    optimal_logprobs,
    random_logits,
    sequence_logprobs,
    weighted_counts,
)

TEMPERATURE = 0.7
REFERENCE = sequence_logprobs(random_logits(0))
SAMPLER = sequence_logprobs(random_logits(1))
REWARDS = torch.randn(PROMPTS, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
TARGET = optimal_logprobs(REFERENCE, REWARDS, TEMPERATURE)
GROUPS = torch.arange(PROMPTS).repeat_interleave(15)

# Rewards of two draws a prompt: any number, independent of the responses, only scales the prompt's weights.
DRAWN = torch.tensor([[0.3, -1.0], [1.0, 0.8]], dtype=torch.float64)

# A single prompt with four responses, for enumerating whole groups of draws.
FOUR = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
FOUR_REWARDS = torch.tensor([-1.0, 0.5, 0.0, 1.5], dtype=torch.float64)
FOUR_TARGET = optimal_logprobs(FOUR.log(), FOUR_REWARDS, TEMPERATURE)


def weights_of(**options):
    options = {"estimator": "reference", "reference_rewards": DRAWN} | options
    return var_weights(REWARDS.flatten(), GROUPS, temperature=TEMPERATURE, **options).weights


def fitted(sampler, weights, lengths=None):
    """The policy that minimises the expected weighted loss over responses with log-probabilities `sampler`."""

    def expected_loss(logits):
        logprobs = sequence_logprobs(logits).flatten()
        logprobs = logprobs if lengths is None else logprobs / lengths
        return weighted_nll(logprobs, sampler.exp().flatten() * weights, normaliser=1.0).sum()

    return sequence_logprobs(minimise(expected_loss, torch.zeros(2, 7, 3, dtype=torch.float64)))


def test_the_policy_is_one():
    assert len(set(RESPONSES)) == 15
    torch.testing.assert_close(REFERENCE.exp().sum(-1), torch.ones(2, dtype=torch.float64))


def test_responses_of_the_reference_teach_the_optimum_whatever_the_scale_of_a_prompt():
    weights = weights_of()
    means = (REFERENCE.exp() * weights.unflatten(0, (2, 15))).sum(-1)
    assert means[0] / means[1] > 3  # the prompts do not count alike
    assert divergence(TARGET, fitted(REFERENCE, weights)) < 1e-10


def test_responses_of_another_policy_need_its_probabilities():
    ratio = {"reference_logprobs": REFERENCE.flatten(), "sampler_logprobs": SAMPLER.flatten()}
    assert divergence(TARGET, fitted(SAMPLER, weights_of(**ratio))) < 1e-10
    assert divergence(TARGET, fitted(SAMPLER, weights_of())) > 0.1


def test_listed_responses_need_the_reference_and_sampled_ones_count_it_twice_with_it():
    weights = weights_of(estimator="support", reference_logprobs=REFERENCE.flatten(), reference_rewards=None)
    torch.testing.assert_close(weights, 15 * TARGET.exp().flatten(), rtol=1e-12, atol=0)
    assert divergence(TARGET, fitted(torch.zeros(2, 15), weights)) < 1e-10
    found = fitted(REFERENCE, weights)
    assert divergence(optimal_logprobs(2 * REFERENCE, REWARDS, TEMPERATURE), found) < 1e-8
    assert divergence(TARGET, found) > 1e-2


def test_a_mean_over_each_responses_tokens_aims_at_shorter_responses():
    found = fitted(REFERENCE, weights_of(), lengths=LENGTHS.repeat(2))
    assert divergence((TARGET - LENGTHS.log()).log_softmax(-1), found) < 1e-8
    assert divergence(TARGET, found) > 1e-2
    assert ((found.exp() * LENGTHS).sum(-1) < (TARGET.exp() * LENGTHS).sum(-1)).all()


def test_a_cap_moves_the_optimum_to_the_capped_target():
    cap = 1.5
    log_z = (DRAWN / TEMPERATURE).logsumexp(-1, keepdim=True) - math.log(2)
    capped = (REFERENCE + (REWARDS / TEMPERATURE).clamp(max=math.log(cap) + log_z)).log_softmax(-1)
    found = fitted(REFERENCE, weights_of(weight_cap=cap))
    assert divergence(capped, found) < 1e-10
    assert divergence(TARGET, found) > 1e-3


def optimum(size, **options):
    groups, actions, probabilities = all_tuples(FOUR, size)
    weights = var_weights(FOUR_REWARDS[actions], groups, temperature=TEMPERATURE, **options).weights
    return weighted_counts(groups, actions, probabilities, weights)


def soft_best_of(size):
    """Draw `size` responses, pick one by a softmax of its reward; by counts, not by tuples."""
    picked = torch.zeros(4, dtype=torch.float64)
    for counts in itertools.product(range(size + 1), repeat=4):
        if sum(counts) == size:
            ways = math.factorial(size) / math.prod(map(math.factorial, counts))
            counts = torch.tensor(counts, dtype=torch.float64)
            share = counts * (FOUR_REWARDS / TEMPERATURE).exp()
            picked += ways * FOUR.pow(counts).prod() * share / share.sum()
    return picked.log()


@pytest.mark.parametrize("size", range(1, 9))
def test_group_weights_teach_the_soft_best_of_the_group(size):
    torch.testing.assert_close(optimum(size), soft_best_of(size), rtol=1e-12, atol=1e-12)


def test_group_weights_come_closer_to_the_optimum_the_larger_the_group():
    distances = [divergence(FOUR_TARGET, optimum(size)) for size in range(1, 9)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] == pytest.approx(divergence(FOUR_TARGET, FOUR.log()))
    assert distances[3] > 1e-2  # which is what small groups cost


@pytest.mark.parametrize("size", [2, 3, 4])
def test_leaving_one_out_reaches_the_optimum_with_any_group(size):
    assert abs(divergence(FOUR_TARGET, optimum(size, estimator="group_loo"))) < 1e-12


def test_leaving_one_out_reaches_it_with_another_samplers_responses():
    other = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    groups, actions, probabilities = all_tuples(other, 3)
    weights = var_weights(
        FOUR_REWARDS[actions],
        groups,
        estimator="group_loo",
        temperature=TEMPERATURE,
        reference_logprobs=FOUR.log()[actions],
        sampler_logprobs=other.log()[actions],
    ).weights
    assert abs(divergence(FOUR_TARGET, weighted_counts(groups, actions, probabilities, weights))) < 1e-12


def test_leaving_one_out_with_sampled_responses():
    prompts, size = 5000, 8
    actions = torch.multinomial(FOUR, prompts * size, replacement=True, generator=torch.Generator().manual_seed(4))
    groups = torch.arange(prompts).repeat_interleave(size)
    rewards = FOUR_REWARDS[actions] + torch.randn(prompts, generator=torch.Generator().manual_seed(5))[groups] * 9
    everywhere = torch.ones(prompts, dtype=torch.float64)

    def distance(estimator):
        weights = var_weights(rewards, groups, estimator=estimator, temperature=TEMPERATURE).weights
        found = weighted_counts(groups, actions, everywhere, weights)
        return (found.exp() - FOUR_TARGET.exp()).abs().sum().item() / 2

    assert distance("group_loo") < 0.02
    assert distance("group") > 0.03


def batch_optimum(rewards, groups, actions, probabilities, prompts, size, **options):
    """Both prompts' optima of weights that are computed batch by batch; each batch holds `size` draws a prompt."""
    found = []
    weights = torch.stack(
        [
            var_weights(batch, groups, estimator="in_batch", temperature=TEMPERATURE, **options).weights
            for batch in rewards.unflatten(0, (-1, prompts * size))
        ]
    )
    for prompt in range(prompts):
        rows = (torch.arange(len(actions)) % (prompts * size)) // size == prompt
        batches = torch.arange(len(actions)) // (prompts * size)
        found.append(weighted_counts(batches[rows], actions[rows], probabilities, weights.flatten()[rows]))
    return torch.stack(found)


BOTH_REWARDS = torch.stack([FOUR_REWARDS, FOUR_REWARDS.flip(0) * 0.8 + 4.0])
BOTH_TARGETS = optimal_logprobs(FOUR.log(), BOTH_REWARDS, TEMPERATURE)


@pytest.mark.parametrize("size", [1, 2])
def test_in_batch_weights_reach_the_optimum_when_a_prompt_does_not_normalise_itself(size):
    _, actions, probabilities = all_tuples(FOUR, 2 * size)
    groups = torch.arange(2).repeat_interleave(size)
    rewards = BOTH_REWARDS[groups.repeat(len(probabilities)), actions]
    batches = (rewards, groups, actions, probabilities, 2, size)
    baselines = {"baselines": BOTH_REWARDS.mean(-1)} if size == 1 else {}
    assert abs(divergence(BOTH_TARGETS, batch_optimum(*batches, **baselines))) < 1e-12
    assert divergence(BOTH_TARGETS, batch_optimum(*batches, **baselines, include_own=True)) > 1e-2


@pytest.mark.parametrize("sampler", [REFERENCE[0], SAMPLER[0], torch.full((15,), -math.log(15))])
def test_the_self_normalised_loss_reaches_the_optimum_whoever_wrote_the_responses(sampler):
    groups, actions, probabilities = all_tuples(sampler.double().exp(), 2)

    def expected_loss(logits):
        logprobs = sequence_logprobs(logits)[0]
        losses = snkl_loss(logprobs[actions], REFERENCE[0][actions], REWARDS[0][actions], groups, TEMPERATURE)
        return (probabilities * losses).sum()

    found = sequence_logprobs(minimise(expected_loss, torch.zeros(2, 7, 3, dtype=torch.float64)))[:1]
    assert abs(divergence(TARGET[:1], found)) < 1e-10


def test_the_self_normalised_loss_reaches_it_with_groups_of_three():
    groups, actions, probabilities = all_tuples(torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64), 3)

    def expected_loss(logits):
        logprobs = logits.log_softmax(-1)
        losses = snkl_loss(logprobs[actions], FOUR.log()[actions], FOUR_REWARDS[actions], groups, TEMPERATURE)
        return (probabilities * losses).sum()

    found = minimise(expected_loss, torch.zeros(4, dtype=torch.float64)).log_softmax(-1)
    assert abs(divergence(FOUR_TARGET, found)) < 1e-12


def test_groups_of_one_are_plain_fine_tuning():
    logprobs = sequence_logprobs(random_logits(6)).flatten().float()
    weights = var_weights(REWARDS.flatten(), torch.arange(30)).weights
    assert torch.equal(weights, torch.ones(30, dtype=torch.float64))
    assert torch.equal(weighted_nll(logprobs, weights, 77), token_nll(logprobs, 77))
