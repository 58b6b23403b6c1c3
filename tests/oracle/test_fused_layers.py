"""Fused norms, gated layers and attention against the models' own."""

import pickle
from functools import partial

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from everalign.data.collate import collate_pairs
from everalign.modeling import cpu_kernels as cpu_attention
from everalign.modeling.cpu_kernels import CPU_ATTENTION, _Attention, _mask_of, fuse_layers, use_cpu_attention
from everalign.modeling.logprobs import _in_one_row, block_mask
from everalign.modeling.policy import Policy
from models_for_tests import FAMILIES, perturb, random_model, random_pairs, random_updates

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
    batch = collate_pairs(random_pairs(4), shared=False)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model = random_model(family)
    with torch.no_grad():
        before = model(**inputs).logits
        fuse_layers(model)
        torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=1e-4)


# ---- attention over runs ----


def values_and_gradients(function, dtype, *tensors):
    """What a function makes of tensors, and the gradients for the last one as upstream gradient, in fp64."""
    *inputs, upstream = (t.to(dtype) for t in tensors)
    inputs = [t.requires_grad_() for t in inputs]
    values = function(*inputs)
    values.backward(upstream)
    return [values.detach().double(), *(t.grad.double() for t in inputs)]


def random_states(length, heads=6, keys=2, width=16):
    """Query, key, value and upstream gradient (T, H, D), rounded to bf16."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, heads, width), *[(length, keys, width)] * 2, (length, heads, width)]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def library(mask):
    def attend(*states):
        q, k, v = (t.transpose(0, 1)[None] for t in states)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    return attend


# A prompt with its first answer, a second answer, and another group whose third answer sees its prompt alone.
RUNS = [[0, 70, 0, 0], [70, 25, 0, 50], [95, 300, 0, 0], [395, 1, 95, 270], [396, 40, 95, 270]]


@pytest.mark.parametrize("block", [32, 256])
def test_attention_over_runs_has_the_librarys_gradients(block, monkeypatch):
    monkeypatch.setattr(cpu_attention, "_BLOCK_ROWS", block)
    states, mask = random_states(436), _mask_of(RUNS, 436)
    exact = values_and_gradients(library(mask), torch.float64, *states)
    for dtype, rounding in ((torch.float32, 1e-6), (torch.bfloat16, 0.0)):
        found = values_and_gradients(lambda *inputs: _Attention.apply(*inputs, RUNS, 16**-0.5), dtype, *states)
        others = values_and_gradients(library(mask), dtype, *states)
        for ours, theirs, right in zip(found, others, exact, strict=True):
            assert (ours - right).norm() <= 1.5 * (theirs - right).norm() + rounding * right.norm()


def test_keys_with_a_large_mean_do_not_spoil_the_gradients():
    """Key biases, as in Qwen2, do not change the attention; of the query's gradient little must be left of them."""
    q, k, v, g = random_states(200, heads=2, width=64)
    k = k + 10 * torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    causal = torch.ones(200, 200, dtype=torch.bool).tril()

    def ours(*inputs):
        return _Attention.apply(*inputs, [[0, 200, 0, 0]], 64**-0.5)

    exact = values_and_gradients(library(causal), torch.float64, q, k, v, g)[1]
    errors = [
        float((values_and_gradients(function, torch.bfloat16, q, k, v, g)[1] - exact).norm())
        for function in (ours, library(causal))
    ]
    assert errors[0] < 2 * errors[1]


def test_runs_say_what_the_layout_says():
    batch = collate_pairs(random_pairs(6, longest=40), shared=True)
    row = _in_one_row(batch)
    padded, kept = block_mask(batch["segments"], batch["prefixes"]), (batch["segments"] > 0)
    mask = _mask_of(row["runs"][0, 0].tolist(), row["input_ids"].shape[1])[0, 0]
    start = 0
    for allowed, tokens in zip(padded, kept, strict=True):
        end = start + int(tokens.sum())
        assert torch.equal(mask[start:end, start:end], allowed[0][tokens][:, tokens])
        assert not mask[start:end, :start].any()
        assert not mask[start:end, end:].any()
        start = end
    assert row["input_ids"].shape[1] % 64 == 0
    assert torch.equal(row["input_ids"][0, :start], batch["input_ids"][kept])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "mistral"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("learned_before", [False, True])
def test_policies_learn_what_plain_peft_does(family, dtype, tolerance, learned_before, monkeypatch):
    batch = collate_pairs(random_pairs(6, longest=40), shared=True)

    def results():
        policy = Policy(random_model(family).to(dtype), 4, 8.0)
        if learned_before:
            policy.write_long_term(random_updates(policy))
        perturb(policy)
        values = policy(batch)
        (values * torch.linspace(-1, 2, len(values))).sum().backward()
        return policy, values.detach(), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}

    policy, values, gradients = results()
    fused = {type(m).__name__[-3:] for m in policy.modules() if isinstance(vars(m).get("forward"), partial)}
    # Gemma's norms and activations are others.
    assert fused == {"ear", "ion", *(["MLP", "orm"] if family != "gemma3" else [])}
    assert policy.peft.config._attn_implementation == CPU_ATTENTION
    for name in ("fuse", "fuse_layers", "use_cpu_attention"):
        monkeypatch.setattr(f"everalign.modeling.policy.{name}", lambda model: None)
    policy, expected, expected_gradients = results()
    assert not any("forward" in vars(module) for module in policy.modules())
    torch.testing.assert_close(values, expected, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() <= tolerance * expected_gradients[name].norm(), name


def test_attention_is_fused_by_what_it_computes_and_not_by_its_rounding():
    """Weights so large that in bf16 rounding alone gives another softmax; layers without angles are others."""
    model = random_model("llama").bfloat16()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.weight, std=20.0)
    other = model.model.layers[1].self_attn
    other.__class__ = Unrotated
    fuse_layers(model)
    assert [isinstance(vars(layer.self_attn).get("forward"), partial) for layer in model.model.layers] == [True, False]


def test_eager_models_and_models_that_ask_for_their_attention_by_name_keep_it():
    model = random_model("llama")
    model.set_attn_implementation("eager")
    for other in (model, random_model("gpt2")):
        before = other.config._attn_implementation
        use_cpu_attention(other)
        assert other.config._attn_implementation == before


class Unrotated(LlamaAttention):
    """An attention that knows no positions, as some layers of SmolLM3."""

    def forward(self, hidden_states, position_embeddings, *arguments, **keywords):
        cos, sin = position_embeddings
        angles = torch.ones_like(cos), torch.zeros_like(sin)
        return super().forward(hidden_states, angles, *arguments, **keywords)


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
