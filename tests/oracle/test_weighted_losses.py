"""The weighted likelihood and the self-normalised group loss: closed forms, gradients, extreme and bad inputs."""

import math
import re

import pytest
import torch

from everalign.objectives import dpo_loss, snkl_loss, token_nll, var_weights, weighted_nll
from everalign.objectives.partition_function import Segments

INF = math.inf


def fp64(*values):
    return torch.tensor(values, dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_weighted_nll_by_hand():
    assert weighted_nll(fp64(-8, -2, -6), fp64(0.5, 2, 0), 4).tolist() == [1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_of_one_are_plain_fine_tuning_bit_for_bit(dtype):
    logprobs = (-100 * draw(200).abs()).to(dtype)
    leaves = [logprobs.clone().requires_grad_() for _ in range(2)]
    weighted = weighted_nll(leaves[0], torch.ones(200, dtype=torch.float64), 1234)
    plain = token_nll(leaves[1], 1234)
    assert weighted.dtype == plain.dtype
    assert torch.equal(weighted, plain)
    weighted.sum().backward()
    plain.sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_shares_of_micro_batches_add_up_to_the_whole_step():
    logprobs, weights = -draw(8).abs() * 20, draw(8, seed=1).abs()
    whole = -(logprobs * weights).sum() / 91
    parts = zip(logprobs.split([1, 4, 3]), weights.split([1, 4, 3]), strict=True)
    torch.testing.assert_close(sum(weighted_nll(*part, 91).sum() for part in parts), whole, rtol=1e-14, atol=0)


def test_no_gradient_flows_through_the_weights():
    logprobs, weights = fp64(-3, -1).requires_grad_(), fp64(0.5, 2).requires_grad_()
    weighted_nll(logprobs, weights, 4).sum().backward()
    assert logprobs.grad.tolist() == [-0.125, -0.5]
    assert weights.grad is None


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_weights_and_log_probabilities_that_are_not_finite_are_named(bad):
    with pytest.raises(ValueError, match=f"weight must be finite: row 1 is {re.escape(str(bad))}"):
        weighted_nll(fp64(-1, -1), fp64(1, bad), 2)
    with pytest.raises(ValueError, match=f"log-probability must be finite: row 1 is {re.escape(str(bad))}"):
        weighted_nll(fp64(-1, bad), fp64(1, 1), 2)


def test_other_weights_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="at least 0: row 1 is negative"):
        weighted_nll(fp64(-1, -1), fp64(1, -0.1), 2)
    with pytest.raises(ValueError, match="weight must be finite: row 0 is inf"):
        weighted_nll(torch.tensor([-1.0]), fp64(1e200), 2)  # finite, but not in the loss's own type
    with pytest.raises(ValueError, match=r"weights \(2, 1\)"):
        weighted_nll(fp64(-1, -1), fp64([1], [1]), 2)
    with pytest.raises(ValueError, match="normaliser"):
        weighted_nll(fp64(-1), fp64(1), 0)


GROUPS = torch.tensor([4, 9, 4, 9, 9])


def test_the_group_loss_by_hand():
    rewards = fp64(1, 1, 3, 1, 2).log() * 0.5  # labels 1/4, 3/4 and 1/4, 1/4, 1/2 at temperature 0.5
    ratios = fp64(1, 6, 1, 3, 3).log()  # found 1/2, 1/2 and 1/2, 1/4, 1/4
    loss = snkl_loss(ratios - 2, torch.full((5,), -2.0), rewards, GROUPS, temperature=0.5)
    expected = fp64(
        0.25 * math.log(0.5) + 0.75 * math.log(1.5), 0.25 * math.log(0.5) + 0.25 * math.log(1) + 0.5 * math.log(2)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)


def test_the_group_loss_is_zero_where_the_policy_is_the_target_up_to_a_factor():
    rewards, reference = draw(5), draw(5, seed=1)
    offset = torch.where(GROUPS == 4, -30.0, 11.0)
    loss = snkl_loss(reference + rewards / 0.3 + offset, reference, rewards, GROUPS, 0.3)
    torch.testing.assert_close(loss, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-13)


def test_a_pair_with_a_certain_label_is_dpo_at_beta_one():
    policy, reference, groups = draw(6), draw(6, seed=1), torch.arange(6) // 2
    loss = snkl_loss(policy, reference, fp64(0, -INF, 0, -INF, 0, -INF), groups, 1.0)
    ratio = policy - reference
    torch.testing.assert_close(loss, dpo_loss(ratio[::2] - ratio[1::2]), rtol=1e-13, atol=0)


def test_the_group_losss_gradient_is_found_minus_wanted_and_flows_through_the_policy_only():
    policy, reference, rewards = (draw(5, seed=seed).requires_grad_() for seed in range(3))
    snkl_loss(policy, reference, rewards, GROUPS, 0.7).sum().backward()
    with torch.no_grad():
        found = var_weights(policy - reference, GROUPS).weights
        wanted = var_weights(rewards, GROUPS, temperature=0.7).weights
    sizes = torch.where(GROUPS == 4, 2.0, 3.0)
    torch.testing.assert_close(policy.grad, (found - wanted) / sizes, rtol=1e-12, atol=1e-15)
    assert reference.grad is None
    assert rewards.grad is None


def test_the_group_loss_gradcheck():
    policy = draw(5).requires_grad_()
    reference, rewards = draw(5, seed=1), draw(5, seed=2)
    assert torch.autograd.gradcheck(lambda p: snkl_loss(p, reference, rewards, GROUPS, 0.7), policy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_group_loss_survives_extremes_in_single_precision(dtype):
    policy = torch.tensor([-9e3, 0.0, -1.0, -9e3, -5.0], dtype=dtype).requires_grad_()
    loss = snkl_loss(policy, torch.zeros(5, dtype=dtype), fp64(1e6, -INF, -1e6, 1e6, 1e6), GROUPS, 1e-3)
    assert loss.dtype == torch.float32
    # The first group's wanted response is 9e3 - 1 nats behind; the second's labels are 0, 1/2, 1/2.
    nats = policy.detach().float()
    expected = torch.stack([nats[2] - nats[0], -(nats[3] + nats[4]) / 2 - math.log(2)])
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    loss.sum().backward()
    assert bool(torch.isfinite(policy.grad).all())


def test_a_group_without_a_possible_response_has_loss_zero_and_is_named():
    policy = draw(5).requires_grad_()
    rewards = fp64(-INF, 1, -INF, 2, 3)
    with pytest.warns(UserWarning, match=r"every reward of 1 group\(s\) is -inf.*: 4$") as caught:
        loss = snkl_loss(policy, draw(5, seed=1), rewards, GROUPS, 1.0)
    assert caught[0].filename == __file__
    assert loss[0].item() == 0
    assert loss[1].item() > 0
    loss.sum().backward()
    assert policy.grad[GROUPS == 4].tolist() == [0, 0]
    assert bool((policy.grad[GROUPS == 9] != 0).all())


def test_a_group_of_one_teaches_nothing_and_is_refused():
    with pytest.raises(ValueError, match=r"1 group\(s\) have one response.*: \[5\]$"):
        snkl_loss(draw(3), draw(3), draw(3), torch.tensor([5, 2, 2]), 1.0)


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_bad_values_of_the_group_loss_are_named(bad):
    fine, broken = draw(5), fp64(0, 0, bad, 0, 0)
    with pytest.raises(ValueError, match=f"log-ratio must be finite: row 2 is {bad}"):
        snkl_loss(broken, fine, fine, GROUPS, 1.0)
    with pytest.raises(ValueError, match="log-ratio must be finite: row 2 is"):
        snkl_loss(fine, broken, fine, GROUPS, 1.0)
    with pytest.raises(ValueError, match=f"reward other than -inf must be finite: row 2 is {bad}"):
        snkl_loss(fine, fine, broken, GROUPS, 1.0)
    with pytest.raises(ValueError, match="temperature"):
        snkl_loss(fine, fine, fine, GROUPS, bad)
    with pytest.raises(ValueError, match="same shape"):
        snkl_loss(fine, fine[:4], fine, GROUPS, 1.0)


def test_without_a_look_at_the_values_the_group_loss_is_the_same():
    policy, reference, rewards = draw(5), draw(5, seed=1), fp64(1, 0, -INF, 2, 3)
    expected = snkl_loss(policy, reference, rewards, GROUPS, 0.7)
    segments = Segments(torch.tensor([4, 9]), torch.tensor([0, 1, 0, 1, 1]), torch.tensor([2, 3]))
    found = snkl_loss(policy, reference, rewards, segments, 0.7, check_finite=False)
    assert torch.equal(found, expected)
    assert snkl_loss(policy * math.nan, reference, rewards, segments, 0.7, check_finite=False).isnan().all()
    with pytest.raises(ValueError, match="same shape"):
        snkl_loss(policy, reference[:4], rewards, segments, 0.7, check_finite=False)


def test_the_sign_of_a_pair():
    """The policy that already prefers the better response loses less."""
    rewards, groups = fp64(1, 0), torch.tensor([0, 0])
    right, wrong = (snkl_loss(policy, fp64(0, 0), rewards, groups, 0.1).item() for policy in (fp64(3, 0), fp64(0, 3)))
    assert right < wrong
    assert wrong - right == pytest.approx(3 * math.tanh(5), rel=1e-12)  # labels differ by tanh(1 / (2 * 0.1))
