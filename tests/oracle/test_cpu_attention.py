"""Attention over packed rows on a CPU against the library's, and policies that use it against plain peft."""

from functools import partial

import pytest
import torch

from everalign.data.collate import collate
from everalign.modeling import attention as cpu_kernels
from everalign.modeling.attention import CPU_ATTENTION, _Attention, _mask_of, use_cpu_attention
from everalign.modeling.logprobs import _in_one_row, block_mask
from everalign.modeling.policy import Policy
from models_for_tests import perturb, random_model, random_pairs, random_updates


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


@pytest.mark.parametrize(("block", "entries"), [(32, 1), (256, 4_194_304)])
def test_attention_over_runs_has_the_librarys_gradients(block, entries, monkeypatch):
    """Also where the rows behind a prefix come in parts."""
    monkeypatch.setattr(cpu_kernels, "_BLOCK_ROWS", block)
    monkeypatch.setattr(cpu_kernels, "_BLOCK_SCORES", entries)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "shared", "own", "additive"])
@pytest.mark.parametrize("keys", [2, 6])
def test_one_token_attends_as_in_the_library(dtype, mask, keys):
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(5, n, m, 16, generator=generator).to(dtype) for n, m in ((6, 1), (keys, 40), (keys, 40))]
    allowed = None
    if mask != "none":
        allowed = torch.rand(1 if mask == "shared" else 5, 1, 1, 40, generator=generator) < 0.7
    if mask == "additive":
        allowed = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

    def library(kind):
        q, k, v = (tensor.to(kind) for tensor in states)
        seen = allowed.to(kind) if mask == "additive" else allowed
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.2, enable_gqa=True)

    output, _ = cpu_kernels._attention(torch.nn.Module(), *states, allowed, scaling=0.2)
    assert output.shape == (5, 1, 6, 16)
    exact = library(torch.float64)
    assert (output.transpose(1, 2) - exact).norm() <= 1.1 * (library(dtype) - exact).norm() + 1e-6


def test_runs_say_what_the_layout_says():
    batch = collate(random_pairs(6, longest=40), shared=True)
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
    batch = collate(random_pairs(6, longest=40), shared=True)

    def results(computed):
        policy = Policy(random_model(family).to(dtype).to(computed), 4, 8.0)
        if learned_before:
            policy.write_long_term(random_updates(policy))
        perturb(policy)
        values = policy(batch)
        # Chosen answers against rejected ones, as in a loss.
        (values.view(-1, 2).T.flatten() * torch.linspace(-1, 2, len(values))).sum().backward()
        return policy, values.detach(), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}

    policy, values, gradients = results(dtype)
    fused = {type(m).__name__[-3:] for m in policy.modules() if isinstance(vars(m).get("forward"), partial)}
    assert fused == ({"ear"} if family == "gemma3" else {"ear", "orm", "MLP"})
    assert policy.peft.config._attn_implementation == CPU_ATTENTION
    for name in ("fuse", "use_cpu_attention", "use_lean_layers"):
        monkeypatch.setattr(f"everalign.modeling.policy.{name}", lambda model: None)
    # The same weights in fp32, free of rounding, and how far plain peft itself is from that in this precision.
    policy, expected, expected_gradients = results(torch.float32)
    plain = results(dtype)[2]
    assert not any("forward" in vars(module) for module in policy.modules())
    torch.testing.assert_close(values, expected, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        exact = expected_gradients[name]
        allowed = max(tolerance * exact.norm(), 1.5 * (plain[name] - exact).norm())
        assert (gradient - exact).norm() <= allowed, name


def test_eager_models_and_models_that_ask_for_their_attention_by_name_keep_it():
    model = random_model("llama")
    model.set_attn_implementation("eager")
    for other in (model, random_model("gpt2")):
        before = other.config._attn_implementation
        use_cpu_attention(other)
        assert other.config._attn_implementation == before
