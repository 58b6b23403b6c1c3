"""Every response as an answer to every prompt of the batch, and what summed log-probabilities do to such weights."""

import math

import pytest
import torch

from everalign.objectives import cross_weights


def ids(*values):
    return torch.tensor(values)


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_cross_weights_against_the_loop():
    rewards, reference, lengths = draw(6, 6), 3 * draw(6, 6, seed=1), ids(3, 9, 1, 4, 4, 12)
    for own_lengths in (lengths, None):
        found = cross_weights(rewards, reference, own_lengths, temperature=0.6, reward_scale=2.0).weights
        for i in range(6):
            terms = [
                math.exp(rewards[i, j] / 1.2 + reference[i, j] / (1 if own_lengths is None else lengths[j]))
                for j in range(6)
            ]
            assert found[i].item() == pytest.approx(terms[i] / sum(terms), rel=1e-13)


def test_cross_weights_do_not_feel_the_offset_of_a_prompt():
    rewards, reference = draw(5, 5), draw(5, 5, seed=1)
    found = cross_weights(rewards, reference, None).weights
    moved = cross_weights(rewards + draw(5, 1, seed=2), reference + draw(5, 1, seed=3), None).weights
    torch.testing.assert_close(moved, found, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("batch", "degenerate"), [(4, 0.99), (8, 0.97)])
def test_summed_log_probabilities_make_every_response_its_own_prompts_choice(batch, degenerate):
    """Responses of 150 tokens, at -1.0 nats each to their own prompt and at -2.2 to another's."""
    own, generator = torch.eye(batch, dtype=torch.bool), torch.Generator().manual_seed(0)
    raw, normalised = [], []
    for _ in range(50):
        noise = torch.randn(batch, batch, dtype=torch.float64, generator=generator)
        reference = 150 * torch.where(own, -1.0 + 0.25 * noise, -2.2 + 0.35 * noise)
        rewards = torch.randn(batch, batch, dtype=torch.float64, generator=generator)
        raw.append(cross_weights(rewards, reference, None).weights)
        normalised.append(cross_weights(rewards, reference, torch.full((batch,), 150)).weights)
    assert torch.stack(raw).mean() > degenerate
    assert 0.1 < torch.stack(normalised).mean() < 0.7


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_reward_is_named_by_its_row(bad):
    with pytest.raises(ValueError, match=f"reward other than -inf must be finite: row 1 is {bad}"):
        cross_weights(torch.tensor([[0.0, bad], [0.0, 0.0]]), torch.zeros(2, 2), None)
    with pytest.raises(ValueError, match="must be a square matrix"):
        cross_weights(torch.zeros(2, 3), torch.zeros(2, 3), None)


def test_a_response_never_to_be_given_weighs_nothing():
    rewards = torch.tensor([[-math.inf, -math.inf], [0.0, 0.0]])
    assert cross_weights(rewards, torch.zeros(2, 2), None).weights.tolist() == [0.0, 0.5]
