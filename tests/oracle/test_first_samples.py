"""Answers that are sampled further only where the first rewards disagree: what is then learned, every draw counted.

One prompt, three answers with known chances. All draws of the first answers and of the rest are gone through by the
rule and the weights of the library; the optimum of the weighted likelihood is what each answer then counts on average.
"""

import itertools
import math

import pytest
import torch

from everalign.data.tokenization import TokenizedRow
from everalign.learning.rollouts import disagreeing
from everalign.objectives import var_weights
from everalign.training.objectives import make_objective
from models_for_tests import perturb, random_policy

CHANCES, REWARDS = torch.tensor([0.8, 0.15, 0.05], dtype=torch.float64), [0.0, 0.4, 1.0]


def draws(count):
    """All that can be drawn, as places of answers, with the chance of each."""
    for places in itertools.combinations_with_replacement(range(3), count):
        numbers = [places.count(place) for place in range(3)]
        ways = math.factorial(count) // math.prod(map(math.factorial, numbers))
        yield list(places), ways * math.prod(CHANCES[place].item() for place in places)


def optimum(first, samples, temperature, tolerance=0.0, alike=False, estimator="group"):
    """What is learned, (3,), and the answers drawn on average; `alike` lets prompts count alike instead of answers."""
    learned, drawn = torch.zeros(3, dtype=torch.float64), 0.0

    def learn(places, chance):
        nonlocal learned, drawn
        rewards = torch.tensor([REWARDS[place] for place in places])
        found = var_weights(rewards, torch.zeros(len(places)).long(), estimator=estimator, temperature=temperature)
        factor = chance * (samples / len(places) if alike else 1.0)
        learned = learned.index_add(0, torch.tensor(places), factor * found.weights)
        drawn += chance * len(places)

    for some, chance in draws(first):
        if first < samples and disagreeing([[REWARDS[place] for place in some]], tolerance):
            for rest, further in draws(samples - first):
                learn(some + rest, chance * further)
        else:
            learn(some, chance)
    return learned / learned.sum(), drawn


def distance(found, temperature):
    """KL(pi* || found)."""
    tilted = CHANCES * (torch.tensor(REWARDS, dtype=torch.float64) / temperature).exp()
    best = tilted / tilted.sum()
    return (best * (best / found).log()).sum().item()


@pytest.mark.parametrize(("first", "tolerance"), [(2, 0.0), (3, 0.0), (2, 0.5)])
@pytest.mark.parametrize("estimator", ["group", "group_loo"])
def test_without_a_reward_that_counts_the_policy_itself_is_learned(first, tolerance, estimator):
    """At a boundless temperature all weights are 1: which prompts are sampled further must not show."""
    found, drawn = optimum(first, 6, 1e9, tolerance, estimator=estimator)
    assert torch.allclose(found, CHANCES, atol=1e-7)
    assert first < drawn < 6


def test_were_prompts_to_count_alike_rare_good_answers_would_be_unlearned():
    """Why the answers of a prompt that stopped are not weighed up."""
    found, _ = optimum(2, 6, 1e9, alike=True)
    assert found[2] < 0.7 * CHANCES[2]
    assert found[0] > CHANCES[0] + 0.04


@pytest.mark.parametrize("temperature", [0.2, 0.5, 1.0])
def test_the_optimum_lies_between_those_of_few_and_of_all_answers(temperature):
    few, adaptive, every = (optimum(*counts, temperature) for counts in ((2, 2), (2, 6), (6, 6)))
    assert distance(every[0], temperature) < distance(adaptive[0], temperature) < distance(few[0], temperature)
    # Closer to pi* than as many answers to every prompt would be: 3.3 on average, by the rule, against 4.
    assert adaptive[1] < 4
    assert distance(adaptive[0], temperature) < distance(optimum(4, 4, temperature)[0], temperature)


def test_leaving_one_out_is_no_longer_exact_but_nearly():
    assert distance(optimum(4, 4, 0.5, estimator="group_loo")[0], 0.5) < 1e-9
    assert 1e-6 < distance(optimum(4, 6, 0.5, estimator="group_loo")[0], 0.5) < 0.01


def test_how_many_answers_a_row_has_changes_nothing_of_what_each_counts():
    """A row of six answers is three rows of two, with the same weights: loss and gradients."""
    policy, objective = perturb(random_policy()), make_objective("var")
    answers, weights = tuple([5 + i, 6, 7 + i] for i in range(6)), (0.5, 1.5, 1.0, 0.2, 2.0, 0.8)
    whole = [TokenizedRow("a", [3, 4], answers, weights)]
    parts = [TokenizedRow(f"a{i}", [3, 4], answers[i : i + 2], weights[i : i + 2]) for i in (0, 2, 4)]
    found = []
    for rows in (whole, parts):
        batch = objective.collate(rows, True)
        policy.zero_grad()
        loss, _ = objective.loss(policy, batch, batch["count"])
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in policy.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_prompts_with_too_few_rewards_do_not_agree():
    assert disagreeing([[], [1.0], [1.0, 1.0], [1.0, 1.5], [1.0, 1.6]], 0.5) == [0, 1, 4]
