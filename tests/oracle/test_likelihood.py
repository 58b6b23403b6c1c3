"""Sums of response log-probabilities: what counts, what does not, and at which precision."""

import math

import pytest
import torch
import torch.nn.functional as F

from everalign.data.collate import collate
from everalign.data.tokenization import TokenizedRow
from everalign.modeling.architecture import study
from everalign.modeling.logprobs import SequenceLogProbs
from models_for_tests import VOCABULARY, collate_chosen, perturb, random_model, random_pairs, random_policy


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


@pytest.mark.parametrize("shared", [True, False])
def test_sums_are_those_of_decoding_token_by_token(policy, shared):
    pairs = [*random_pairs(4, seed=3), TokenizedRow.pair("alike", [9], [5, 6, 7], [5, 6], 1.0)]
    with torch.no_grad():
        sums = policy(collate(pairs, shared))
    expected = [log_prob(policy, p.prompt, tokens) for p in pairs for tokens in p.responses]
    assert sums.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_model_that_knows_nothing_gives_every_token_one_in_v():
    model = random_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    pairs = [TokenizedRow.pair("a", [3, 4], [5, 6, 7], [8], 1.0), TokenizedRow.pair("b", [3], [9], [8], 1.0)]
    sums = SequenceLogProbs(model, study(model)).response_log_probs(collate_chosen(pairs, shared=True))
    assert sums.tolist() == pytest.approx([-3 * math.log(VOCABULARY), -math.log(VOCABULARY)], rel=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_logits_are_of_the_response_alone(policy, shared):
    pairs = random_pairs(3, seed=3)
    logits = policy.response_logits(collate(pairs, shared))
    count = sum(len(p.chosen) + len(p.rejected) for p in pairs)
    assert logits.shape == (count, VOCABULARY)
    assert logits.dtype == torch.float32


def test_the_head_runs_on_response_positions_alone(policy):
    batch = collate(random_pairs(3, seed=3), shared=True)
    rows = []
    hook = policy.peft.get_base_model().lm_head.register_forward_hook(lambda m, inputs, o: rows.append(inputs[0].shape))
    policy(batch)
    hook.remove()
    wanted = len(batch["targets"])
    assert rows == [(wanted + -wanted % 32, 32)]


def test_long_sums_lose_nothing_to_bf16():
    """Summed in bf16, 200 tokens of about 4.5 nats would be off by whole nats."""
    policy = random_policy()
    policy.peft.get_base_model().bfloat16()
    response = random_pairs(1, seed=1, longest=200)[0].chosen * 200
    batch = collate_chosen([TokenizedRow.pair("a", [3], response[:200], [4], 1.0)], shared=True)
    sums = policy(batch)
    tokens = F.log_softmax(policy.response_logits(batch).double(), -1)[range(200), response[:200]]
    assert sums.dtype == torch.float32
    assert sums.item() == pytest.approx(tokens.sum().item(), abs=1e-3)


def test_gradients_flow_to_every_adapter_matrix(policy):
    policy.zero_grad()
    policy(collate(random_pairs(3, seed=3), shared=True)).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in policy.parameters() if p.requires_grad)


class Recurrent(torch.nn.Module):
    """Mixes every token into all later ones, whatever the mask says."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, *args, **kwargs):
        return self.inner(hidden_states.cumsum(dim=1), *args, **kwargs)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("bloom", "takes no block"), ("mamba", "linear_attention"), ("gpt_neo", "do not follow")],
)
def test_a_model_for_which_shared_rows_would_be_wrong_computes_them_apart(family, reason):
    model = random_model(family)
    head = SequenceLogProbs(model, study(model))
    assert not head.shared
    assert reason in head.why_no_prefix_sharing
    pairs = random_pairs(4, seed=3)
    with torch.no_grad():
        sums = head.response_log_probs(collate(pairs, head.shared))
        alone = [head.response_log_probs(collate([pair], False)) for pair in pairs]
    torch.testing.assert_close(sums, torch.cat(alone), rtol=0, atol=1e-4)


def test_layers_that_mix_tokens_past_the_mask_are_found():
    model = random_model()
    model.model.layers[0].mlp = Recurrent(model.model.layers[0].mlp)
    assert "do not follow" in SequenceLogProbs(model, study(model)).why_no_prefix_sharing


def test_eager_attention_shares_too():
    model = random_model()
    expected = SequenceLogProbs(model, study(model)).response_log_probs(collate(random_pairs(4), False))
    model.set_attn_implementation("eager")
    head = SequenceLogProbs(model, study(model))
    assert head.shared
    torch.testing.assert_close(head.response_log_probs(collate(random_pairs(4), True)), expected)
