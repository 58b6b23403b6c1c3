"""The fused adapted layer against peft's own."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from everalign.modeling import adapters
from everalign.modeling.fused_lora import fuse
from everalign.modeling.policy import Policy
from models_for_tests import perturb, random_model, random_policy, random_updates

SETTINGS = [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)]


class Two(nn.Module):
    """Two layers, with bias and without."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 7, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(dtype, fused):
    """A model with two active adapters, one of them frozen."""
    torch.manual_seed(0)
    model = get_peft_model(Two().to(dtype), LoraConfig(r=3, lora_alpha=5, target_modules=["first", "second"]), "one")
    model.add_adapter("two", LoraConfig(r=2, lora_alpha=7, target_modules=["first", "second"]))
    for layer in adapters.layers(model).values():
        layer.cast_input_dtype_enabled = dtype == torch.float32
        for name in ("one", "two"):
            nn.init.normal_(layer.lora_B[name].weight, std=0.3)
        if fused:
            fuse(layer)
    model.base_model.set_adapter(["one", "two"])
    model.base_model.set_requires_grad("two", False)
    return model


def results(dtype, autocast, fused):
    model = adapted(dtype, fused)
    torch.manual_seed(1)
    x = torch.randn(4, 5, 12).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = model(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y, x.grad, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "autocast"), SETTINGS)
def test_values_and_gradients_are_pefts(dtype, autocast):
    (ours, dx, gradients), (theirs, their_dx, their_gradients) = (results(dtype, autocast, f) for f in (True, False))
    tolerance = 5e-2 if autocast else 1e-5
    assert (ours.dtype, dx.dtype) == (theirs.dtype, their_dx.dtype)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dx, their_dx, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == their_gradients.keys()
    assert gradients
    for name, gradient in gradients.items():
        assert ".one." in name
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, their_gradients[name], rtol=tolerance, atol=tolerance)


def test_disabled_adapters_are_the_base_layer():
    model, x = adapted(torch.float32, True), torch.randn(3, 12)
    with model.disable_adapter():
        disabled = model(x)
    torch.manual_seed(0)
    assert torch.equal(disabled, Two()(x))


def test_no_rows_give_no_rows():
    layer = layer_of(random_policy())
    assert layer(torch.zeros(0, 32)).shape == (0, 48)


def test_other_layers_keep_pefts_forward():
    policy = random_policy("gpt2")
    assert all("forward" not in vars(layer) for layer in adapters.layers(policy.peft).values())
    policy = random_policy("llama")
    assert all("forward" in vars(layer) for layer in adapters.layers(policy.peft).values())


def test_a_policy_with_long_term_memory_computes_its_total():
    policy = random_policy()
    policy.write_long_term(random_updates(policy))
    perturb(policy)
    layer = adapters.layers(policy.peft)["model.layers.0.mlp.up_proj"]
    x = torch.randn(2, 32)
    dense = layer.base_layer.weight + policy.total()["model.layers.0.mlp.up_proj"].dense()
    torch.testing.assert_close(layer(x), x @ dense.T, rtol=0, atol=1e-5)


# ---- frozen adapters in the weight ----


def layer_of(policy):
    return adapters.layers(policy.peft)["model.layers.0.mlp.up_proj"]


def test_what_was_learned_before_is_added_to_a_copy_of_the_weight():
    policy = random_policy()
    layer, x = layer_of(policy), torch.randn(2, 32, requires_grad=True)
    base = layer.base_layer.weight.clone()
    for seed in (1, 2):
        policy.write_long_term(random_updates(policy, seed))
        layer(x).sum().backward()
        dense = base + policy.long_term()["model.layers.0.mlp.up_proj"].dense()
        torch.testing.assert_close(layer.folded, dense, rtol=0, atol=1e-6)
    assert torch.equal(layer.base_layer.weight, base)
    with policy.as_base():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, base))
    assert not any("folded" in name for name in policy.state_dict())


def test_in_bf16_it_stays_apart():
    policy = Policy(random_model().bfloat16(), 4, 8.0)
    policy.write_long_term(random_updates(policy))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer_of(policy)(torch.randn(2, 32, dtype=torch.bfloat16))
    assert not hasattr(layer_of(policy), "folded")


def test_beside_a_large_weight_it_stays_apart():
    layer = layer_of(random_policy())
    layer.base_layer = nn.Linear(600, 600, bias=False).requires_grad_(False)
    for name, shape in (("stm", 4), ("ltm", 8)):
        layer.lora_A[name], layer.lora_B[name] = nn.Linear(600, shape, bias=False), nn.Linear(shape, 600, bias=False)
        layer.scaling[name] = 1.0
    layer.lora_A["ltm"].requires_grad_(False)
    layer.lora_B["ltm"].requires_grad_(False)
    layer._active_adapter = ["ltm", "stm"]
    layer(torch.randn(2, 600))
    assert not hasattr(layer, "folded")
