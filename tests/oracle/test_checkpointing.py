"""Activations that are computed again: the same losses and gradients, and far less kept in between."""

import subprocess
import sys

import pytest
import torch

from everalign.data.collate import collate
from everalign.errors import InputError
from everalign.modeling import runtime
from everalign.modeling import runtime as checkpointing_module
from everalign.modeling.policy import Policy
from everalign.modeling.runtime import SavedBytes, recomputable_layers, recomputing
from everalign.modeling.trainable import FullModel
from everalign.training import stage
from everalign.training.objectives import make_objective
from everalign.training.options import StageOptions
from memory_for_tests import saved_bytes
from models_for_tests import FAMILIES, perturb, random_groups, random_model, random_pairs, random_updates
from tiers_for_tests import slow_but


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
@pytest.mark.parametrize(
    "family", slow_but(["llama", "gemma3", "gpt2", "mixtral"], [*FAMILIES, "bloom", "gpt_neo", "mixtral"])
)
def test_losses_and_gradients_are_the_same(family, shared):
    """With two adapters, one of them frozen."""
    policy = Policy(random_model(family), 4, 8.0)
    policy.write_long_term(random_updates(policy))
    perturb(policy).train()
    if shared and not policy.head.shared:
        pytest.skip("has no shared rows")
    assert_equal(*both(policy, collate(long_pairs(), shared)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", slow_but(["gpt2"], ["llama", "gpt2", "gemma2"]))
def test_a_fifth_is_kept_of_a_deep_model(family, dtype):
    policy = perturb(Policy(random_model(family, layers=10).to(dtype), 4, 8.0)).train()
    plain, again = both(policy, collate(long_pairs(), policy.head.shared))
    assert_equal(plain, again)
    assert again[1] < plain[1] / 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "masks"), [("gpt2", 1), ("olmo3", 2)])
def test_one_mask_is_kept_for_all_layers_of_a_kind(family, masks, dtype):
    """The library would keep a copy for each layer: 61 GiB for a row of 32,768 tokens in 32 layers."""
    policy = Policy(random_model(family, layers=8).to(dtype), 2, 4.0).train()
    batch = collate(long_pairs(1, 50), shared=True)
    length, kept = batch["input_ids"].shape[1], {}

    def pack(tensor):
        if tensor.shape[-2:] == (length, length):
            kept[tensor.untyped_storage()._cdata] = tensor.dtype
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = policy(batch).sum()
    assert list(kept.values()) == [dtype] * masks
    loss.backward()


# ---- when ----


def test_what_is_counted_is_what_is_kept():
    policy = perturb(Policy(random_model(layers=4), 4, 8.0)).train()
    batch = collate(long_pairs(), shared=True)
    for layers in ([], recomputable_layers(policy)):
        with recomputing(layers):
            _, kept = saved_bytes(lambda: policy(batch).sum(), policy.parameters())
            with SavedBytes(policy) as counted:
                policy(batch).sum()
        assert counted.total == pytest.approx(kept, rel=0.02)
        assert counted.total > 10_000


def trained(checkpointing, folder, free=None, model=None):
    """Final weights, curve, what was said, and how often layers were computed again."""
    policy = perturb(Policy(model or random_model(layers=4), 4, 8.0))
    said, again = [], []
    compute = checkpointing_module.checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing_module, "checkpoint", lambda *a, **k: again.append(1) or compute(*a, **k))
        if free is not None:
            patch.setattr(stage, "free_memory", lambda device: free)
        options = StageOptions(learning_rate=1e-2, batch_size=4, tokens_per_batch=200, checkpointing=checkpointing)
        result = stage.train_stage(
            policy, make_objective("sft"), long_pairs(8), options, folder, seed=0, log=said.append
        )
    assert said.pop(0).startswith("  sft: 8 rows")
    return policy.factors(), [entry["loss"] for entry in result.curve], said, len(again)


def test_training_ends_with_the_same_weights_and_auto_goes_by_the_free_memory(tmp_path):
    off = trained("off", tmp_path / "off")
    assert off[2:] == ([], 0)
    on = trained("on", tmp_path / "on")
    assert on[2] == []
    assert on[3] > 0
    plenty = trained("auto", tmp_path / "plenty", free=1 << 40)
    assert plenty[2:] == ([], 0)
    short = trained("auto", tmp_path / "short", free=1 << 20)
    assert short[3] == on[3]
    (line,) = short[2]
    assert "0.0 are free: activations are computed again" in line
    for other in (on, plenty, short):
        assert other[1] == off[1]
        for name, factors in off[0].items():
            assert all(torch.equal(*pair) for pair in zip(factors, other[0][name], strict=True))


def test_layers_that_nobody_knows_are_said_so(tmp_path, monkeypatch):
    model = random_model()
    monkeypatch.setattr(stage, "recomputable_layers", lambda model: [])
    with pytest.raises(InputError, match=r"checkpointing on: the layers of this LlamaForCausalLM are not known"):
        trained("on", tmp_path, model=model)
    _, _, said, again = trained("auto", tmp_path, free=1 << 10)
    assert again == 0
    assert "set a smaller tokens_per_batch" in said[0]


def test_a_setting_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="checkpointing must be one of auto, on, off, found 'yes'"):
        StageOptions(learning_rate=1e-2, checkpointing="yes")


# ---- models that are trained whole ----


def test_a_whole_model_and_a_reward_model_are_the_same_too():
    whole = FullModel(random_model("qwen2", layers=10)).train()
    plain, again = both(whole, collate(random_groups(6, longest=40), shared=True))
    assert_equal(plain, again)
    assert again[1] < plain[1] / 4


def test_what_a_container_may_take_counts(tmp_path):
    assert runtime._free_in_container(tmp_path) == sys.maxsize
    for name, text in (("max", "1000"), ("current", "700"), ("stat", "anon 500\ninactive_file 120\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert runtime._free_in_container(tmp_path) == 420
    (tmp_path / "memory.max").write_text("max\n")
    assert runtime._free_in_container(tmp_path) == sys.maxsize
    assert 0 < runtime.free_memory(torch.device("cpu")) < 1 << 50


FREED = """
import psutil, torch
from everalign.modeling.runtime import free_memory, prepare_process

prepare_process()
held = [torch.ones(1 << 18) for _ in range(400)]  # a MiB each
some = held[::40]  # so that what is freed does not end where the heap does
del held
before = psutil.Process().memory_info().rss
free_memory(torch.device("cpu"))
print((before - psutil.Process().memory_info().rss) >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_what_the_process_has_freed_itself_is_free():
    """A second stage of training finds what the first one has left, and need not compute activations twice for it."""
    found = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert int(found.stdout) > 300
