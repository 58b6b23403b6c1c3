"""Long rows: nothing of a training step has the square of a row's length, or its length times the vocabulary."""

import pytest
import torch

from everalign.data.collate import collate
from everalign.data.tokenization import TokenizedRow
from everalign.modeling.policy import Policy
from everalign.modeling.runtime import recomputable_layers, recomputing
from memory_for_tests import LiveTensors
from models_for_tests import perturb, random_model

VOCABULARY = 16_384


def long_pair(prompt, answer):
    """A pair of so many tokens in the prompt and in each answer."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(3, VOCABULARY, (size,), generator=generator).tolist() for size in (prompt, answer, answer)]
    return TokenizedRow.pair("long", *parts)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(("prompt", "answer"), [(4000, 64), (512, 3000)])
def test_no_tensor_of_a_step_grows_with_the_square_of_a_row(prompt, answer, again):
    """Forward and backward, for long prompts and for long answers that share a prompt."""
    policy = perturb(Policy(random_model(vocabulary=VOCABULARY), 4, 8.0)).train()
    batch = collate([long_pair(prompt, answer)], shared=True)
    least = (prompt + answer) // 2
    squares = LiveTensors(lambda tensor: sum(size >= least for size in tensor.shape) > 1)
    with squares, recomputing(recomputable_layers(policy) if again else []):
        chosen, rejected = policy(batch).view(-1, 2).T
        (chosen - rejected).sum().backward()
    assert squares.most == 0
