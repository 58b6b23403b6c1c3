"""Activations that are computed again: the same losses and gradients, and far less kept in between."""

import pytest
import torch
from torch import nn

from everalign.data.layout import lay_out_groups, lay_out_pairs
from everalign.errors import InputError
from everalign.modeling.checkpointing import SavedBytes, check_checkpointing, recomputable_layers, recomputing
from everalign.modeling.policy import Policy
from everalign.modeling.whole_model import WholeModel
from memory_for_tests import saved_bytes
from models_for_tests import FAMILIES, perturb, random_groups, random_model, random_pairs, random_updates


def long_pairs(count=6, longest=40):
    return random_pairs(count, longest=longest)


def gradients(model, batch):
    """The loss in which every sequence counts differently, what is kept for its gradients, and these."""
    model.zero_grad()

    def loss():
        sums = model(batch)
        return (sums * torch.arange(1.0, len(sums) + 1)).mean() / len(sums)

    found, kept = saved_bytes(loss, model.parameters())
    found.backward()
    return found.item(), kept, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def both(model, batch):
    plain = gradients(model, batch)
    with recomputing(recomputable_layers(model)):
        again = gradients(model, batch)
    assert gradients(model, batch)[1] == plain[1]  # undone
    return plain, again


def assert_equal(plain, again):
    assert again[0] == plain[0]
    for name, gradient in plain[2].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(again[2][name], gradient), name


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, "bloom", "gpt_neo"])
def test_losses_and_gradients_are_the_same(family, shared):
    """With two adapters, one of them frozen."""
    policy = Policy(random_model(family), 4, 8.0)
    policy.write_long_term(random_updates(policy))
    perturb(policy).train()
    if shared and not policy.head.shared:
        pytest.skip("has no shared rows")
    assert_equal(*both(policy, lay_out_pairs(long_pairs(), shared)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_fifth_is_kept_of_a_deep_model(family, dtype):
    policy = perturb(Policy(random_model(family, layers=10).to(dtype), 4, 8.0)).train()
    plain, again = both(policy, lay_out_pairs(long_pairs(), policy.head.shared))
    assert_equal(plain, again)
    assert again[1] < plain[1] / 5
