"""Sums of response log-probabilities: what counts, what does not, and at which precision."""

import math

import pytest
import torch
import torch.nn.functional as F

from everalign.data.batches import pad_chosen, pad_pairs
from everalign.data.encoding import EncodedPair
from everalign.modeling.likelihood import LanguageHead
from models_for_tests import PAD, VOCABULARY, perturb, random_model, random_pairs, random_policy


@pytest.fixture(scope="module")
def policy():
    return perturb(random_policy())


def log_prob(policy, prompt, response):
    """One sequence alone, without padding or mask, one forward pass a token."""
    total = 0.0
    for i, token in enumerate(response):
        ids = torch.tensor([prompt + response[:i]])
        with torch.no_grad():
            logits = policy.peft(input_ids=ids).logits[0, -1]
        total += F.log_softmax(logits.double(), dim=-1)[token].item()
    return total


def test_sums_are_those_of_decoding_token_by_token(policy):
    pairs = random_pairs(4, seed=3)
    batch = pad_pairs(pairs, PAD)
    with torch.no_grad():
        sums, lengths = policy(batch["input_ids"], batch["attention_mask"], batch["response_mask"])
    expected = [log_prob(policy, p.prompt, p.chosen) for p in pairs]
    expected += [log_prob(policy, p.prompt, p.rejected) for p in pairs]
    assert sums.tolist() == pytest.approx(expected, abs=1e-5)
    assert lengths.tolist() == batch["response_mask"].sum(1).tolist()


def test_a_model_that_knows_nothing_gives_every_token_one_in_v():
    model = random_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    head = LanguageHead(model)
    batch = pad_chosen([EncodedPair("a", [3, 4], [5, 6, 7], [8], 1.0), EncodedPair("b", [3], [9], [8], 1.0)], PAD)
    sums, lengths = head.response_log_probs(batch["input_ids"], batch["attention_mask"], batch["response_mask"])
    assert sums.tolist() == pytest.approx([-3 * math.log(VOCABULARY), -math.log(VOCABULARY)], rel=1e-6)
    assert lengths.tolist() == [3, 1]


def test_a_sequence_without_a_response_has_sum_zero(policy):
    batch = pad_chosen(random_pairs(2, seed=3), PAD)
    mask = batch["response_mask"].clone()
    mask[0] = False
    sums, lengths = policy(batch["input_ids"], batch["attention_mask"], mask)
    assert sums[0].item() == 0.0
    assert lengths[0].item() == 0
    assert sums[1].item() < 0


def test_logits_are_of_the_response_alone(policy):
    pairs = random_pairs(3, seed=3)
    batch = pad_pairs(pairs, PAD)
    logits = policy.response_logits(batch["input_ids"], batch["attention_mask"], batch["response_mask"])
    count = sum(len(p.chosen) + len(p.rejected) for p in pairs)
    assert logits.shape == (count, VOCABULARY)
    assert logits.dtype == torch.float32


def test_the_head_runs_on_response_positions_alone(policy, monkeypatch):
    pairs = random_pairs(3, seed=3)
    batch = pad_pairs(pairs, PAD)
    rows = []
    hook = policy.peft.get_base_model().lm_head.register_forward_hook(lambda m, inputs, o: rows.append(inputs[0].shape))
    policy(batch["input_ids"], batch["attention_mask"], batch["response_mask"])
    hook.remove()
    assert rows == [(int(batch["response_mask"].sum()), 32)]


def test_long_sums_lose_nothing_to_bf16():
    """Summed in bf16, 200 tokens of about 4.5 nats would be off by whole nats."""
    policy = random_policy()
    policy.peft.get_base_model().bfloat16()
    response = random_pairs(1, seed=1, longest=200)[0].chosen * 200
    batch = pad_chosen([EncodedPair("a", [3], response[:200], [4], 1.0)], PAD)
    inputs = (batch["input_ids"], batch["attention_mask"], batch["response_mask"])
    sums, _ = policy(*inputs)
    tokens = F.log_softmax(policy.response_logits(*inputs).double(), -1)[range(200), response[:200]]
    assert sums.dtype == torch.float32
    assert sums.item() == pytest.approx(tokens.sum().item(), abs=1e-3)


def test_gradients_flow_to_every_adapter_matrix(policy):
    policy.zero_grad()
    batch = pad_pairs(random_pairs(3, seed=3), PAD)
    policy(batch["input_ids"], batch["attention_mask"], batch["response_mask"])[0].sum().backward()
    assert all(p.grad.abs().max() > 0 for p in policy.parameters() if p.requires_grad)
