"""Fused norms, gated layers and attention against the models' own."""

import pickle

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from everalign.data.layout import lay_out_pairs
from everalign.modeling.cpu_attention import CPU_ATTENTION, _Attention, use_cpu_attention
from everalign.modeling.fused_layers import fuse_layers
from models_for_tests import FAMILIES, random_model, random_pairs

DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)]


def gradients(module, x, learns):
    module.requires_grad_(learns)
    x = x.clone().requires_grad_()
    y = module(x)
    (y.float() * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    return y.detach(), x.grad, [p.grad for p in module.parameters() if learns]


def assert_fused_agrees(make, width, dtype, tolerance, learns):
    torch.manual_seed(0)
    own = make().to(dtype)
    fused = make().to(dtype)
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    fused.load_state_dict(own.state_dict())
    fuse_layers(fused)
    assert "forward" in vars(fused)
    x = torch.randn(3, 700, width).to(dtype)
    x[0, 0] = 0.0
    (y, dx, dw), (our_y, our_dx, our_dw) = (gradients(module, x, learns) for module in (own, fused))
    for theirs, ours in zip([y, dx, *dw], [our_y, our_dx, *our_dw], strict=True):
        assert ours.dtype == theirs.dtype
        size = theirs.float().abs().max()
        torch.testing.assert_close(ours.float() / size, theirs.float() / size, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("learns", [False, True])
def test_norms(dtype, tolerance, learns):
    assert_fused_agrees(lambda: LlamaRMSNorm(64, eps=1e-5), 64, dtype, tolerance, learns)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_gated_layers(dtype, tolerance):
    config = random_model("llama").config
    assert_fused_agrees(lambda: LlamaMLP(config), config.hidden_size, dtype, tolerance, False)


def test_a_norm_of_another_formula_stays_as_it_is():
    norm = Gemma2RMSNorm(16)
    torch.nn.init.normal_(norm.weight)
    fuse_layers(norm)
    assert "forward" not in vars(norm)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_compute_what_they_did(family):
    batch = lay_out_pairs(random_pairs(4), shared=False)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model = random_model(family)
    with torch.no_grad():
        before = model(**inputs).logits
        fuse_layers(model)
        torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=1e-4)


# ---- attention in bf16 ----


def loss_and_gradients(model, batch):
    model.zero_grad()
    model.requires_grad_(True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    logits = model(**inputs).logits.float()
    loss = logits.log_softmax(-1)[..., 5].mean()
    loss.backward()
    return loss.item(), {name: p.grad.float() for name, p in model.named_parameters() if "self_attn" in name}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("blocks", [False, True])
def test_cpu_attention_has_the_librarys_gradients(family, blocks):
    batch = lay_out_pairs(random_pairs(6, longest=40), shared=False)
    if blocks:
        length = batch["input_ids"].shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril() & (torch.rand(12, 1, length, length) < 0.7)
        batch["attention_mask"] = mask | torch.eye(length, dtype=torch.bool)
    model = random_model(family).bfloat16()
    loss, expected = loss_and_gradients(model, batch)
    use_cpu_attention(model)
    assert model.config._attn_implementation == CPU_ATTENTION
    found_loss, found = loss_and_gradients(model, batch)
    assert found_loss == pytest.approx(loss, rel=1e-2)
    for name, gradient in found.items():
        difference = (gradient - expected[name]).norm() / expected[name].norm()
        assert difference < 5e-2, name


def test_keys_with_a_large_mean_do_not_spoil_the_gradients():
    """Key biases, as in Qwen2, do not change the attention; of the query's gradient little must be left of them."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(1, 2, 200, 64, generator=generator) for _ in range(4))
    k = k + 10 * torch.randn(1, 2, 1, 64, generator=generator)
    mask = torch.ones(1, 1, 200, 200, dtype=torch.bool).tril()

    def gradient(function, dtype):
        inputs = [t.bfloat16().to(dtype).requires_grad_() for t in (q, k, v)]
        function(*inputs).backward(g.bfloat16().to(dtype))
        return inputs[0].grad.double()

    def library(*inputs):
        return torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask)

    exact = gradient(library, torch.float64)
    ours = gradient(lambda *inputs: _Attention.apply(*inputs, mask, 64**-0.5), torch.bfloat16)
    theirs = gradient(library, torch.bfloat16)
    errors = [float((found - exact).norm() / exact.norm()) for found in (ours, theirs)]
    assert errors[0] < 2 * errors[1]


def test_fp32_and_eager_models_keep_their_attention():
    model = random_model("llama")
    use_cpu_attention(model)
    assert model.config._attn_implementation == "sdpa"
    model = random_model("llama").bfloat16()
    model.set_attn_implementation("eager")
    use_cpu_attention(model)
    assert model.config._attn_implementation == "eager"


def test_models_that_ask_for_their_attention_by_name_keep_it():
    model = random_model("gpt2").bfloat16()
    use_cpu_attention(model)
    assert model.config._attn_implementation == "sdpa"


class Clamped(LlamaMLP):
    """A gated layer that clamps what is large."""

    def forward(self, x):
        gate, up = (layer(x).clamp(-10, 10) for layer in (self.gate_proj, self.up_proj))
        return self.down_proj(self.act_fn(gate) * up)


class Cast(LlamaRMSNorm):
    """A norm that returns its input's type whatever its weight's."""

    def forward(self, hidden_states):
        return super().forward(hidden_states).to(hidden_states.dtype)


def test_layers_that_differ_at_large_inputs_or_in_their_type_stay_as_they_are():
    for module in (Clamped(random_model("llama").config), Cast(16)):
        fuse_layers(module)
        assert "forward" not in vars(module)


def test_a_fused_model_can_be_pickled():
    model = random_model()
    fuse_layers(model)
    again = pickle.loads(pickle.dumps(model))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert again.model.norm.forward.args == (again.model.norm,)
