"""Held-out scores on cases that can be checked by hand, and against two separate models."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from everalign.data.tokenization import TokenizedRow
from everalign.errors import EveralignError
from everalign.evaluation import HeldOut, score_preferences
from everalign.evaluation.preference import mean_kl
from everalign.modeling import logprobs as token_log_probs
from everalign.modeling.policy import Policy
from everalign.training.reference import sequence_logprobs
from memory_for_tests import LiveTensors
from models_for_tests import (
    collate_chosen,
    perturb,
    random_model,
    random_pairs,
    random_policy,
    random_updates,
    scaled_by_itself,
)


class Table(torch.nn.Module):
    """A stand-in for a policy whose log-probability of a token is -token / 10, whatever comes before."""

    def __init__(self):
        super().__init__()
        self.head, self.prefix_length = SimpleNamespace(shared=True), 0

    def forward(self, batch):
        return torch.zeros(len(batch["lengths"])).index_add(0, batch["sequences"], batch["targets"] / -10)

    def on_device(self, batch):
        return batch

    def evaluating(self):
        return torch.no_grad()


def pair(chosen, rejected):
    return TokenizedRow.pair("x", [3], chosen, rejected, 1.0)


def score(policy, pairs, base=None, **arguments):
    base = torch.zeros(len(pairs), 2) if base is None else base
    return score_preferences(policy, HeldOut(pairs, base), tokens_per_batch=80, **arguments)


def test_accuracy_and_margin_are_per_token_and_ties_count_half():
    pairs = [
        pair([10], [20]),  # -1.0 against -2.0 a token: margin 1
        pair([10, 10, 10], [20]),  # -1.0 against -2.0 a token, though the sum is lower: margin 1
        pair([40, 20], [10]),  # -3.0 against -1.0: margin -2
        pair([20], [10, 30]),  # -2.0 against -2.0: a tie
    ]
    result = score(Table(), pairs)
    assert result.accuracy == (1 + 1 + 0 + 0.5) / 4
    assert result.margin == pytest.approx((1 + 1 - 2 + 0) / 4, abs=1e-6)
    assert result.pairs == 4
    assert result.kl_previous is None


def test_reward_accuracy_is_of_whole_responses_against_the_base():
    pairs = [pair([10], [20]), pair([10, 10, 10], [20]), pair([40], [10])]
    # log π is (-1, -2), (-3, -2), (-4, -1); gains of chosen over rejected: 0 + 0.5, 0 - 2, -1 + 1.
    base = torch.tensor([[-1.0, -1.5], [-3.0, -4.0], [-3.0, 0.0]])
    assert score(Table(), pairs, base).reward_accuracy == pytest.approx((1 + 0 + 0.5) / 3)


def test_the_base_model_itself_has_reward_accuracy_one_half():
    policy = random_policy()
    pairs = random_pairs(9)
    with policy.as_base():
        base = torch.stack(sequence_logprobs(policy, pairs, 80))
    result = score(policy, pairs, base, previous={})
    assert result.reward_accuracy == 0.5
    assert result.kl_previous == 0.0
    trained = score(perturb(policy), pairs, base, previous={})
    assert trained.reward_accuracy != 0.5
    assert trained.kl_previous > 0


def test_scores_are_those_of_the_whole_models_logits():
    policy, pairs = perturb(random_policy()), random_pairs(9)
    margins = []
    for each in pairs:
        means = []
        for response in (each.chosen, each.rejected):
            with torch.no_grad():
                logits = policy.peft(input_ids=torch.tensor([each.prompt + response])).logits[0].double()
            start = len(each.prompt) - 1
            log_probs = F.log_softmax(logits, -1)[range(start, start + len(response)), response]
            means.append(log_probs.mean().item())
        margins.append(means[0] - means[1])
    result = score(policy, pairs)
    assert result.margin == pytest.approx(sum(margins) / 9, abs=1e-5)
    assert result.accuracy == pytest.approx(sum(margin > 0 for margin in margins) / 9)


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_policy_as_it_was(training):
    policy = perturb(random_policy()).train(training)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    score(policy, random_pairs(5), previous=random_updates(policy))
    assert policy.training is training
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert set(policy.peft.peft_config) == {"stm"}


def test_a_policy_that_diverged_has_no_score():
    policy = random_policy()
    with torch.no_grad():
        next(p for p in policy.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(EveralignError, match="NaN or infinite log-probabilities"):
        score(policy, random_pairs(3))


# ---- KL from the policy before ----


def merged(updates):
    """A plain model with the updates added to its weights."""
    model = random_model()
    with torch.no_grad():
        for name, update in updates.items():
            model.get_submodule(name).weight += update.dense()
    return model


def direct_kl(now, before, pairs):
    """Mean over response positions of KL(now ‖ before), in fp64 from two separate models."""
    values = []
    for each in pairs:
        ids = torch.tensor([each.prompt + each.chosen])
        with torch.no_grad():
            p, q = (F.log_softmax(model(input_ids=ids).logits[0].double(), -1) for model in (now, before))
        start = len(each.prompt) - 1
        positions = slice(start, start + len(each.chosen))
        values.append((p.exp() * (p - q)).sum(-1)[positions])
    return torch.cat(values).mean().item()


def policy_in_task_two():
    policy = random_policy()
    policy.write_long_term(random_updates(policy))
    return perturb(policy)


@pytest.mark.parametrize("previous", ["base", "long-term memory", "something else"])
def test_kl_equals_that_of_two_separate_models(previous):
    policy, pairs = policy_in_task_two(), random_pairs(11)
    updates = {
        "base": {},
        "long-term memory": policy.long_term(),
        "something else": random_updates(policy, seed=8, rank=5),
    }[previous]
    expected = direct_kl(merged(policy.total()), merged(updates), pairs)
    assert mean_kl(policy, updates, pairs) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.05
    # The other way round it is another number.
    assert abs(direct_kl(merged(updates), merged(policy.total()), pairs) - expected) > 1e-3


def test_kl_from_itself_is_nearly_zero_and_never_negative():
    policy = policy_in_task_two()
    assert 0.0 <= mean_kl(policy, policy.total(), random_pairs(11)) < 1e-7


def test_kl_counts_positions_not_responses():
    policy, pairs = policy_in_task_two(), random_pairs(2)
    pairs = [pair(pairs[0].chosen[:1], [4]), pair(pairs[1].chosen * 9, [4])]
    parts = [mean_kl(policy, {}, [each]) * len(each.chosen) for each in pairs]
    total = sum(len(each.chosen) for each in pairs)
    assert mean_kl(policy, {}, pairs) == pytest.approx(sum(parts) / total, rel=1e-5)


def test_kl_is_measured_on_evenly_spaced_pairs():
    policy, pairs = policy_in_task_two(), random_pairs(10)
    assert score(policy, pairs, previous={}, kl_pairs=3).kl_previous == pytest.approx(
        mean_kl(policy, {}, [pairs[0], pairs[3], pairs[6]]), rel=1e-5
    )
    everything = score(policy, pairs, previous={}, kl_pairs=64).kl_previous
    assert everything == pytest.approx(mean_kl(policy, {}, pairs), rel=1e-5)


def test_a_nan_is_not_taken_for_no_drift():
    policy = policy_in_task_two()
    with torch.no_grad():
        next(p for p in policy.parameters() if p.requires_grad).fill_(float("nan"))
    assert math.isnan(mean_kl(policy, {}, random_pairs(3)))


def test_kl_positions_predict_the_chosen_response():
    """Changing what follows the last response token's prediction changes nothing."""
    policy, (each,) = policy_in_task_two(), random_pairs(1)
    last = TokenizedRow.pair("x", each.prompt, [*each.chosen[:-1], 7], each.rejected, 1.0)
    assert mean_kl(policy, {}, [last]) == pytest.approx(mean_kl(policy, {}, [each]), rel=1e-5)


# ---- the KL within memory ----


def whole_kl(policy, updates, pairs):
    """Mean KL over all response positions, with the logits of all of them at once."""
    batch = collate_chosen(pairs, policy.head.shared)
    with torch.no_grad(), policy.as_snapshot(updates) as switched:
        now = F.log_softmax(policy.response_logits(batch), -1)
        with switched():
            before = F.log_softmax(policy.response_logits(batch), -1)
    return F.kl_div(before, now, log_target=True, reduction="none").sum(-1).double().mean().item()


@pytest.mark.parametrize("head", ["apart", "its own", "apart, in bf16", "adapted", "soft-capped"])
def test_the_kl_holds_few_logits_and_is_that_of_all_at_once(head, monkeypatch):
    vocabulary, limit = 500, 60_000
    family = {"its own": "gpt2", "soft-capped": "gemma2"}.get(head, "qwen2")
    model = random_model(family, vocabulary=vocabulary)
    if head == "its own":
        model = scaled_by_itself(model)
    if head.endswith("bf16"):
        model = model.bfloat16()
    policy = perturb(Policy(model, 4, 8.0, ["q_proj", "lm_head"] if head == "adapted" else "all-linear"))
    assert (policy.head.separate, policy.head.chunked) == (head != "its own", True)
    pairs = random_pairs(24, longest=60, vocabulary=vocabulary)
    positions = sum(len(each.chosen) for each in pairs)
    updates = random_updates(policy, seed=8)
    expected = whole_kl(policy, updates, pairs)
    monkeypatch.setattr(token_log_probs, "_LIVE_LOGITS", limit)
    # Contiguous ones: the transposed weights of the head are no logits.
    with LiveTensors(lambda tensor: tensor.shape[-1:] == (vocabulary,) and tensor.is_contiguous()) as live:
        found = mean_kl(policy, updates, pairs)
    assert found == pytest.approx(expected, rel=1e-6)
    assert expected > 1e-3
    # All at once they would be at least four times the positions.
    assert 0 < live.most <= limit < positions * vocabulary / 3
