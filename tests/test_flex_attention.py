"""FlexAttention: the rule is the mask that everything else is tested with; on a GPU, the gradients too."""

import pytest
import torch

from everalign.data.layout import lay_out_pairs
from everalign.errors import InputError
from everalign.modeling.architecture import study
from everalign.modeling.flex_attention import FLEX, flex_block_mask, use_flex_attention
from everalign.modeling.likelihood import LanguageHead, block_mask
from everalign.modeling.policy import Policy
from models_for_tests import perturb, random_model, random_pairs

PAIRS = random_pairs(7, longest=40)
BATCH = lay_out_pairs(PAIRS, shared=True)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward pass on a GPU only")


def test_the_rule_is_the_block_mask():
    segments, prefixes = BATCH["segments"], BATCH["prefixes"]
    (rows, length), mask = segments.shape, flex_block_mask(segments, prefixes)
    row, position = torch.arange(rows)[:, None, None], torch.arange(length)
    allowed = mask.mask_mod(row, torch.tensor(0), position[None, :, None], position[None, None, :])
    assert torch.equal(allowed, block_mask(segments, prefixes)[:, 0])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_model_s_logits_are_those_of_the_block_mask(family):
    """Run step by step: compiling the kernel for a processor takes longer than all other tests."""
    model = random_model(family)
    with torch.no_grad():
        expected = LanguageHead(model, study(model)).response_logits(BATCH)
        model.set_attn_implementation(FLEX)
        with torch.compiler.set_stance("force_eager"):
            head = LanguageHead(model, study(model))
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
