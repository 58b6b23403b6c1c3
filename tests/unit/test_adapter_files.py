"""Adapters on disk: plain peft loads them, they come back to the bit, and damaged ones are refused."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from everalign.errors import InputError
from everalign.modeling.policy import Policy
from models_for_tests import (
    logits_of,
    perturb,
    random_model,
    random_pairs,
    random_policy,
    random_updates,
    saved_model,
    trainable,
)

PAIRS = random_pairs(3)
IDS = torch.arange(3, 13).reshape(2, 5)
ATTENTION = torch.ones_like(IDS)


@pytest.fixture
def policy():
    return random_policy()


def plain_peft(folder, model="llama"):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved_model(model)), folder).eval()


def saved_policy(rank=4, alpha=12.0, **arguments):
    """A policy over the saved model, as peft will find it."""
    model = AutoModelForCausalLM.from_pretrained(saved_model())
    model.requires_grad_(False)
    return Policy(model, rank, alpha, **arguments)


@pytest.mark.parametrize("where", ["short", "long"])
def test_plain_peft_loads_what_was_saved(tmp_path, where):
    policy = perturb(saved_policy())
    if where == "long":
        policy.write_long_term(random_updates(policy, rank=5))
        policy.start_short_term(1)
    policy.save_adapter(tmp_path)
    with warnings.catch_warnings():
        # peft warns of weights that it does not find.
        warnings.simplefilter("error", UserWarning)
        loaded = plain_peft(tmp_path)
    with torch.no_grad():
        ours = policy.peft(input_ids=IDS, attention_mask=ATTENTION).logits
        torch.testing.assert_close(loaded(input_ids=IDS, attention_mask=ATTENTION).logits, ours, rtol=0, atol=1e-5)
        with loaded.disable_adapter():
            assert (loaded(input_ids=IDS, attention_mask=ATTENTION).logits - ours).abs().max() > 0.1
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["inference_mode"] is True
    assert config["r"] == (4 if where == "short" else 5)
    assert config["base_model_name_or_path"] == str(saved_model())
    assert trainable(policy)["stm"] == {True}


def test_a_short_term_adapter_is_restored_bit_for_bit(tmp_path):
    policy = perturb(saved_policy())
    policy.save_adapter(tmp_path)
    other = saved_policy(seed=9)
    other.write_long_term(random_updates(other))
    other.load_adapter(tmp_path, long_term=False, seed=5)
    assert torch.equal(logits_of(other, PAIRS), logits_of(policy, PAIRS))
    assert other.long_term() == {}
    for name, (left, right) in policy.factors().items():
        assert torch.equal(other.factors()[name][0], left)
        assert torch.equal(other.factors()[name][1], right)
    assert trainable(other) == {"stm": {True}, "base": {False}}


def test_long_term_memory_is_restored_bit_for_bit(tmp_path):
    policy = saved_policy()
    policy.write_long_term(random_updates(policy))
    policy.start_short_term(5)
    policy.save_adapter(tmp_path)
    other = saved_policy(seed=9)
    other.load_adapter(tmp_path, long_term=True, seed=5)
    assert torch.equal(logits_of(other, PAIRS), logits_of(policy, PAIRS))
    assert all(torch.equal(other.factors()[name][1], right) for name, (_, right) in policy.factors().items())
    assert trainable(other) == {"stm": {True}, "ltm": {False}, "base": {False}}


def test_an_adapter_of_any_scale_becomes_long_term_memory(tmp_path):
    policy = perturb(saved_policy(rank=4, alpha=12.0))
    policy.save_adapter(tmp_path)
    other = saved_policy(rank=2, alpha=2.0)
    other.load_adapter(tmp_path, long_term=True, seed=0)
    torch.testing.assert_close(logits_of(other, PAIRS), logits_of(policy, PAIRS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rank", "alpha"), [(8, 12.0), (2, 12.0), (4, 8.0)])
def test_an_adapter_of_another_shape_is_refused_as_short_term_memory(tmp_path, rank, alpha):
    perturb(saved_policy(rank, alpha)).save_adapter(tmp_path)
    with pytest.raises(InputError, match=rf"an adapter of rank {rank} and alpha {alpha:g}, .* rank 4 and alpha 12"):
        saved_policy().load_adapter(tmp_path, long_term=False, seed=0)


def test_unconsolidated_updates_are_not_lost_in_saving(policy, tmp_path):
    policy.write_long_term(random_updates(policy))
    perturb(policy)
    with pytest.raises(RuntimeError, match="not consolidated"):
        policy.save_adapter(tmp_path)


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("long_term", [True, False])
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), r"no adapter here"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors: no such file"),
        (lambda folder: _cut(folder / "adapter_model.safetensors"), r"adapter_model\.safetensors: .* damaged"),
        (lambda folder: _cut(folder / "adapter_config.json"), r"adapter_config\.json: damaged"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), r"adapter_config\.json: damaged"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), r"adapter_config\.json: damaged"),
    ],
)
def test_damaged_adapters_are_refused_and_the_policy_is_as_it_was(tmp_path, spoil, named, long_term):
    policy = perturb(saved_policy())
    policy.save_adapter(tmp_path)
    before = logits_of(policy, PAIRS)
    spoil(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}.*{named}" if "here" not in named else named):
        policy.load_adapter(tmp_path, long_term, seed=0)
    assert torch.equal(logits_of(policy, PAIRS), before)


def test_a_folder_without_an_adapter_is_named(policy, tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}/nowhere: no adapter here"):
        policy.load_adapter(tmp_path / "nowhere", long_term=True, seed=0)


def test_adapters_of_another_model_are_refused(policy, tmp_path):
    perturb(random_policy("gpt2")).save_adapter(tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"no adapter of module model\.layers\.0\.self_attn\.q_proj: saved for"):
        policy.load_adapter(tmp_path / "gpt2", long_term=True, seed=0)
    narrow = random_model()
    narrow.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 40, bias=False)
    narrow.model.layers[0].mlp.gate_proj = torch.nn.Linear(32, 40, bias=False)
    narrow.model.layers[0].mlp.down_proj = torch.nn.Linear(40, 32, bias=False)
    Policy(narrow, 4, 8.0).save_adapter(tmp_path / "narrow")
    with pytest.raises(InputError, match="another shape: saved for another model"):
        policy.load_adapter(tmp_path / "narrow", long_term=True, seed=0)


def test_a_saved_adapter_holds_two_fp32_matrices_a_module(policy, tmp_path):
    policy.save_adapter(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert len(state) == 2 * len(policy.factors())
    assert all(value.dtype == torch.float32 for value in state.values())
