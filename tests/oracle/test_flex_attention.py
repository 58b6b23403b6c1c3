"""FlexAttention: the rule is the mask that everything else is tested with; on a GPU, the gradients too."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from everalign.data.collate import collate
from everalign.errors import InputError
from everalign.modeling import attention as flex_attention
from everalign.modeling.architecture import study
from everalign.modeling.attention import FLEX, bucket, compile_once, flex_inputs, use_flex_attention
from everalign.modeling.logprobs import Architecture, SequenceLogProbs, block_mask
from everalign.modeling.policy import Policy
from memory_for_tests import LiveTensors
from models_for_tests import perturb, random_model, random_pairs

PAIRS = random_pairs(7, longest=40)
BATCH = collate(PAIRS, shared=True)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward pass on a GPU only")


def test_the_rule_is_the_block_mask():
    """Of all rows in one, none of which sees another one; what is appended sees nothing else either."""
    inputs = flex_inputs(BATCH)
    mask, (rows, length) = inputs["attention_mask"], BATCH["input_ids"].shape
    position = torch.arange(mask.seq_lengths[0])
    zero = torch.tensor(0)
    allowed = mask.mask_mod(zero, zero, position[:, None], position[None, :])
    expected = torch.block_diag(*block_mask(BATCH["segments"], BATCH["prefixes"])[:, 0].float()).bool()
    assert torch.equal(allowed[: rows * length, : rows * length], expected)
    assert not allowed[rows * length :, : rows * length].any()
    assert not allowed[: rows * length, rows * length :].any()
    for name in ("input_ids", "position_ids"):
        assert torch.equal(inputs[name][0, : rows * length], BATCH[name].flatten())


@pytest.mark.parametrize("entries", [1, 200_000, 1 << 24])
def test_blocks_are_those_of_the_library_and_little_is_held_for_them(entries, monkeypatch):
    monkeypatch.setattr(flex_attention, "_ENTRIES_AT_ONCE", entries)
    batch = collate(random_pairs(3, longest=700), shared=True)
    with LiveTensors(lambda tensor: tensor.dtype == torch.bool) as live:
        mask = flex_inputs(batch)["attention_mask"]
    (length, _), library = mask.seq_lengths, create_block_mask(mask.mask_mod, 1, None, *mask.seq_lengths, device="cpu")
    for side in ("kv", "q"):
        for part in ("num_blocks", "indices"):
            for name in (f"{side}_{part}", f"full_{side}_{part}"):
                assert torch.equal(getattr(mask, name), getattr(library, name)), name
    assert mask.full_kv_num_blocks.sum() > 0
    # Counted in fours of bytes: three masks of the part that is looked at, and what is left of each block.
    assert 4 * live.most < 3.1 * max(entries, 128 * length) + 4 * (length / 128) ** 2


def test_rows_of_all_lengths_are_of_few_and_whole_blocks():
    found = {length: bucket(length) for length in range(1, 33_000)}
    assert all(size % 128 == 0 and size >= length for length, size in found.items())
    assert max(size / length for length, size in found.items() if length > 2048) <= 1.125
    assert len({size for length, size in found.items() if 8192 < length <= 16_384}) == 8


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_one_compilation_serves_batches_of_all_shapes():
    """Rows from one to thirty, of one block and of many; compiled to plain operations, which are quick to make."""
    from torch._dynamo.testing import CompileCounterWithBackend  # takes a worker half a second

    model = random_model()
    model.set_attn_implementation(FLEX)
    batches = [
        collate(random_pairs(count, seed=count, longest=longest), shared=True)
        for count, longest in ((1, 9), (5, 30), (9, 60), (30, 20), (1, 100), (7, 45), (2, 100))
    ]
    assert len({batch["input_ids"].shape for batch in batches}) == 7
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    try:
        compile_once(counter)
        head = SequenceLogProbs(model, Architecture(separate=True))
        with torch.no_grad():
            found = [head.response_logits(batch) for batch in batches]
        assert counter.frame_count == 1
    finally:
        torch._dynamo.reset()
        compile_once()
    model.set_attn_implementation("sdpa")
    head = SequenceLogProbs(model, Architecture(separate=True))
    for batch, logits in zip(batches, found, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits, head.response_logits(batch), rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_model_s_logits_are_those_of_the_block_mask(family):
    """Run step by step: compiling the kernel for a processor takes longer than all other tests."""
    model = random_model(family)
    with torch.no_grad():
        expected = SequenceLogProbs(model, study(model)).response_logits(BATCH)
        model.set_attn_implementation(FLEX)
        with torch.compiler.set_stance("force_eager"):
            head = SequenceLogProbs(model, study(model))
            found = head.response_logits(BATCH)
    assert (head.shared, head.separate) == (True, True)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_without_a_gpu_it_is_refused():
    with pytest.raises(InputError, match="attention flex needs a GPU, and the model is on cpu: use attention sdpa"):
        use_flex_attention(random_model())


@gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_on_a_gpu_log_probabilities_and_gradients_are_those_of_sdpa(dtype, tolerance):
    results = []
    for attention in ("sdpa", FLEX):
        model = random_model().to("cuda", dtype)
        if attention == FLEX:
            use_flex_attention(model)
        policy = perturb(Policy(model, 4, 8.0))
        sums = policy(policy.on_device(BATCH))
        sums.sum().backward()
        gradients = {name: p.grad.float() for name, p in policy.named_parameters() if p.requires_grad}
        results.append((sums.detach().float(), gradients))
    (expected, slopes), (found, others) = results
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    for name, slope in slopes.items():
        assert (others[name] - slope).norm() <= tolerance * slope.norm().clamp(min=1e-6), name


@gpu
def test_on_a_gpu_one_task_s_batches_are_compiled_for_once_each_way():
    """Forward and backward of many shapes; a limit of two compilations would be noticed as an error."""
    model = random_model().to("cuda", torch.bfloat16)
    use_flex_attention(model)
    policy = perturb(Policy(model, 4, 8.0))
    torch._dynamo.utils.counters.clear()
    for count, longest in ((1, 9), (5, 30), (9, 60), (30, 20), (1, 300)):
        batch = policy.on_device(collate(random_pairs(count, seed=count, longest=longest), shared=True))
        with torch.no_grad():
            policy(batch)
        policy(batch).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
