"""The chunked head against the whole logits: values, gradients, and what is held in memory."""

import pytest
import torch
from torch import nn

from everalign.modeling.logprobs import LogitTransform, token_log_probs

ROWS, WIDTH, VOCABULARY = 23, 16, 50
SHAPES = [LogitTransform(), LogitTransform(scale=0.5), LogitTransform(softcap=3.0), LogitTransform(2.0, 5.0)]


def inputs(dtype=torch.float32, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = (spread * torch.randn(ROWS, WIDTH, generator=generator)).to(dtype).requires_grad_()
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    head.weight.data = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return hidden, head, targets


def direct(hidden, head, targets, shape):
    logits = shape.apply(hidden @ head.weight.T).float()
    return logits.log_softmax(-1)[torch.arange(len(targets)), targets]


def weigh(log_probs):
    return (log_probs * torch.linspace(-1, 2, ROWS)).sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 4, 23, 100])
@pytest.mark.parametrize("learns", [False, True])
def test_chunks_give_what_the_whole_gives(shape, rows, learns):
    hidden, head, targets = inputs()
    head.weight.requires_grad_(learns)
    wanted = [hidden, head.weight] if learns else [hidden]
    expected = direct(hidden, head, targets, shape)
    found = token_log_probs(hidden, head, targets, shape, chunk_rows=rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    gradients = zip(
        torch.autograd.grad(weigh(found), wanted), torch.autograd.grad(weigh(expected), wanted), strict=True
    )
    for ours, whole in gradients:
        assert whole.abs().max() > 0.1
        torch.testing.assert_close(ours, whole, rtol=0, atol=1e-5)


def test_gradients_equal_finite_differences():
    hidden, head, targets = inputs()
    shape = LogitTransform(0.7, 4.0)
    head.double().requires_grad_(False)
    hidden = hidden.detach().double()
    found = token_log_probs(hidden.requires_grad_(), head, targets, shape)
    (gradient,) = torch.autograd.grad(found.double().sum(), hidden)
    step = torch.zeros_like(hidden)
    step[3, 5] = 1e-4
    with torch.no_grad():
        sides = [direct(hidden + sign * step, head, targets, shape).double().sum() for sign in (1, -1)]
    assert gradient[3, 5].item() == pytest.approx(((sides[0] - sides[1]) / 2e-4).item(), abs=2e-3)


@pytest.mark.parametrize("learns", [False, True])
def test_no_more_than_a_chunk_of_logits_exists(learns):
    hidden, head, targets = inputs()
    head.weight.requires_grad_(learns)
    seen = []
    head.register_forward_hook(lambda module, given, logits: seen.append(logits.numel()))
    token_log_probs(hidden, head, targets, LogitTransform(), chunk_rows=4).sum().backward()
    assert max(seen) == 4 * VOCABULARY
    assert len(seen) == (12 if learns else 6)  # a head that learns is computed again in the backward pass


def test_extreme_logits_stay_finite_and_exact():
    hidden, head, targets = inputs(spread=1e3)
    head.requires_grad_(False)
    found = token_log_probs(hidden, head, targets, LogitTransform())
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    torch.testing.assert_close(found, direct(hidden, head, targets, LogitTransform()))
    assert torch.isfinite(gradient).all()


def test_bf16_sums_its_probabilities_in_fp32():
    hidden, head, targets = inputs(torch.bfloat16)
    head.requires_grad_(False)
    found = token_log_probs(hidden, head, targets, LogitTransform())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, direct(hidden, head, targets, LogitTransform()), rtol=0, atol=1e-5)
    assert torch.autograd.grad(found.sum(), hidden)[0].dtype == torch.bfloat16


def test_nothing_is_kept_without_gradients():
    hidden, head, targets = inputs()
    head.requires_grad_(False)
    with torch.no_grad():
        assert token_log_probs(hidden, head, targets, LogitTransform()).grad_fn is None
