"""The fused adapted layer against peft's own."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from everalign.data.collate import collate
from everalign.modeling import lora as adapters
from everalign.modeling.decoding import Decoder, continue_rows, pad_left
from everalign.modeling.lora import fuse
from everalign.modeling.policy import Policy
from memory_for_tests import Operations
from models_for_tests import perturb, random_model, random_pairs, random_policy, random_updates

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
        torch.testing.assert_close(layer.merged_weight, dense, rtol=0, atol=1e-6)
    assert torch.equal(layer.base_layer.weight, base)
    with policy.as_base():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, base))
    assert not any("merged_weight" in name for name in policy.state_dict())


def test_in_bf16_it_stays_apart():
    policy = Policy(random_model().bfloat16(), 4, 8.0)
    policy.write_long_term(random_updates(policy))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer_of(policy)(torch.randn(2, 32, dtype=torch.bfloat16))
    assert not hasattr(layer_of(policy), "merged_weight")


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
    assert not hasattr(layer, "merged_weight")


# ---- adapters at rest ----


def two_tasks(family="llama"):
    """A bf16 policy in its second task: two adapters, one of them frozen."""
    policy = Policy(random_model(family).bfloat16(), 4, 8.0)
    policy.write_long_term(random_updates(policy))
    return perturb(policy).eval()


def operations(compute):
    with torch.no_grad(), Operations() as seen:
        compute()
    return {name: seen.counts[name] for name in ("_to_copy", "cat", "mul")}


@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
def test_a_token_is_written_with_no_cast_more_than_the_base_model_s(family):
    policy, step = two_tasks(family), torch.tensor([3, 4])
    with policy.decoding(pad_left([[5, 6], [7]], 0)) as decoder:
        decoder.append(step)
        adapted = operations(lambda: decoder.append(step))
    with policy.as_base(), policy.decoding(pad_left([[5, 6], [7]], 0)) as decoder:
        decoder.append(step)
        assert operations(lambda: decoder.append(step)) == adapted


def test_evaluating_casts_once_however_many_batches_and_switches_there_are():
    policy, batch = two_tasks(), collate(random_pairs(4), shared=True)
    with policy.as_base():
        plain = operations(lambda: policy(batch))
    with torch.no_grad():
        expected = policy(batch)
    anew = operations(lambda: policy(batch))
    assert all(anew[name] > plain[name] for name in plain)
    with policy.as_snapshot(random_updates(policy, seed=9)) as switched, policy.evaluating():
        with switched():
            other = policy(batch)
        assert torch.equal(policy(batch), expected)
        assert operations(lambda: policy(batch)) == plain
        with switched():
            assert operations(lambda: policy(batch)) == plain
            assert torch.equal(policy(batch), other)
    assert not torch.equal(other, expected)
    # Forgotten afterwards: what an optimiser changes counts.
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B.stm" in name:
                parameter.data.zero_()
    with policy.evaluating():
        assert not torch.equal(policy(batch), expected)


def test_tokens_are_those_of_adapters_that_are_cast_anew():
    policy = two_tasks()
    prompt = [5, 6, 7]
    with policy.decoding(pad_left([prompt], 0)) as decoder:
        found = continue_rows(decoder, greedy, [], 12)[0]
        assert any(layer.cast_factors for layer in adapters.layers(policy.peft).values())
        for layer in adapters.layers(policy.peft).values():
            layer.cast_factors = None
        again = continue_rows(Decoder(policy.peft.get_base_model(), pad_left([prompt], 0), policy.head), greedy, [], 12)
    assert [found] == again
    assert all(layer.cast_factors is None for layer in adapters.layers(policy.peft).values())


def greedy(logits):
    return logits.argmax(-1)
