"""Which modules are adapted: those that were asked for, and what stays frozen is said."""

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma3Config,
    MixtralConfig,
    Qwen2MoeConfig,
)

from everalign import AdapterOptions
from everalign.errors import InputError
from everalign.modeling.policy import Policy
from models_for_tests import SHAPE, perturb, random_model, random_policy, random_updates

SMALL = {**SHAPE, "vocab_size": 96}
TOKENS = torch.tensor([[3, 4, 5, 6, 7, 8]])


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def qwen2_moe():
    return model_of(
        Qwen2MoeConfig(
            **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24
        )
    )


def leaves(policy):
    return {name.rpartition(".")[-1] for name in policy.factors()}


# ---- names ----


def test_a_name_that_no_module_has_is_refused_beside_one_that_has():
    with pytest.raises(InputError, match=r"cannot adapt v_prj: no module .* did you mean v_proj"):
        random_policy(targets=["q_proj", "v_prj"])


def test_an_expression_that_fits_nothing_is_refused():
    with pytest.raises(InputError, match=r"cannot adapt \.\*attn: no module"):
        random_policy(targets=".*attn")


def test_an_expression_means_the_linear_modules_that_it_fits():
    assert leaves(random_policy(targets=r".*mlp.*")) == {"gate_proj", "up_proj", "down_proj"}


def test_options_tell_names_from_expressions():
    assert AdapterOptions(targets="q_proj, layers.1.mlp.up_proj").module_names() == ["q_proj", "layers.1.mlp.up_proj"]
    assert AdapterOptions(targets=r".*\.(q|v)_proj{1,2}").module_names() == r".*\.(q|v)_proj{1,2}"
    assert AdapterOptions().module_names() == "all-linear"


def test_what_is_no_expression_is_refused():
    with pytest.raises(InputError, match=r"cannot adapt \*: it is not a regular expression"):
        random_policy(targets="*")


# ---- experts ----


def test_routed_experts_that_stay_frozen_are_named():
    policy = Policy(model_of(MixtralConfig(**SMALL, num_local_experts=4, sliding_window=None)), 2, 4.0)
    (note,) = policy.notes
    assert "routed experts are not adapted: 4 in each of 2 layers (model.layers.#.mlp.experts) stay frozen" in note
    assert leaves(policy) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert random_policy().notes == []


def test_stacked_experts_as_targets_are_refused_with_the_reason():
    with pytest.raises(InputError, match="gate_up_proj holds the matrices of all routed experts in one parameter"):
        Policy(qwen2_moe(), 2, 4.0, ["q_proj", "gate_up_proj"])


def test_the_gate_of_a_shared_expert_is_a_router_and_left_as_it_is():
    assert "shared_expert_gate" not in leaves(Policy(qwen2_moe(), 2, 4.0))


@pytest.mark.parametrize("targets", ["all-linear", ["up_proj"], ["shared_expert.down_proj", "q_proj"]])
def test_matrices_named_as_experts_once_were_are_adapted_and_reloaded(targets, tmp_path):
    policy = perturb(Policy(qwen2_moe(), 2, 4.0, targets))
    policy.write_long_term(random_updates(policy))
    policy.start_short_term(0)
    assert set(policy.long_term()) == set(policy.short_term())
    policy.save_adapter(tmp_path)
    with torch.no_grad():
        expected = policy.peft(input_ids=TOKENS, use_cache=False).logits
        served = PeftModel.from_pretrained(qwen2_moe(), tmp_path).eval()
        torch.testing.assert_close(served(input_ids=TOKENS).logits, expected, rtol=0, atol=1e-5)
        merged = served.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=TOKENS).logits, expected, rtol=0, atol=1e-5)
        assert (expected - qwen2_moe()(input_ids=TOKENS).logits).abs().max() > 0.01


# ---- what is none of the language model ----


def gemma3():
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    text = {**SMALL, "sliding_window": 6, "query_pre_attn_scalar": 8}
    return model_of(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=90))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_a_vision_tower_is_not_adapted(targets):
    policy = Policy(gemma3(), 2, 4.0, targets)
    assert all(name.startswith("model.language_model.") for name in policy.factors())
    (note,) = policy.notes
    assert "not adapted, since no text passes through them as through a matrix" in note
    assert "vision_tower" in note


def test_a_vision_tower_is_adapted_where_it_is_asked_for():
    policy = Policy(gemma3(), 2, 4.0, ["vision_tower.encoder.layers.0.self_attn.q_proj", "o_proj"])
    assert {name.partition(".layers")[0] for name in policy.factors()} == {
        "model.language_model",
        "model.vision_tower.encoder",
    }
    assert "adapted, but no text passes through them, so they learn nothing" in policy.notes[-1]


# ---- what peft refuses ----


def falcon_h1():
    return model_of(
        FalconH1Config(
            **SMALL,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_n_groups=1,
            mamba_d_state=8,
            mamba_chunk_size=8,
        )
    )


def test_matrices_that_kernels_read_past_adapters_are_no_targets():
    assert "out_proj" not in leaves(Policy(falcon_h1(), 2, 4.0))
    with pytest.raises(InputError, match=r"cannot adapt .*out_proj: .*incompatible with Mamba"):
        Policy(falcon_h1(), 2, 4.0, ["out_proj"])


def test_an_adapter_that_cannot_sit_where_it_was_meant_to_is_no_adapter(monkeypatch):
    policy = random_policy()
    monkeypatch.setattr(policy.peft.base_model, "inject_adapter", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="adapter ltm does not sit on the modules"):
        policy.write_long_term(random_updates(policy))


def test_the_model_that_was_asked_for_is_as_it_was():
    model = random_model()
    with pytest.raises(InputError):
        Policy(model, 2, 4.0, ["q_proj", "nonesuch"])
    assert not any("lora" in name for name, _ in model.named_parameters())
