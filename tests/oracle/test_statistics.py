"""Comparisons of runs: worked examples of Holm and of sign changes, and intervals that cover as often as they say."""

import itertools

import numpy as np
import pytest
from scipy.stats import wilcoxon

from everalign.evaluation.statistics import crossed_bootstrap, crossed_statistic, holm, paired_permutation_test, stars


def test_holm_on_a_worked_example():
    # Sorted .005, .01, .03, .04 times 4, 3, 2, 1: .02, .03, .06, .04 -> .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([1.2])


def test_holm_is_the_closed_test_of_bonferroni():
    """A hypothesis is rejected where every intersection that it is part of is, each by its smallest p-value."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.uniform(0, 0.1, 4)
        sets = [s for size in range(1, 5) for s in itertools.combinations(range(4), size)]
        closed = [max(min(1, len(s) * min(p[list(s)])) for s in sets if i in s) for i in range(4)]
        assert holm(list(p)) == pytest.approx(closed)


def test_permutation_test_is_the_enumeration_of_all_signs():
    differences = [0.4, -0.1, 0.3, 0.2, 0.6, -0.05]
    found = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=6)]
    exact = np.mean(np.array(found) >= abs(sum(differences)) - 1e-12)
    assert paired_permutation_test(differences) == pytest.approx(exact)


def test_permutation_test_agrees_with_wilcoxon_on_equal_sizes():
    """Where all differences are of one sign, both are 2 / 2^R."""
    differences = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert paired_permutation_test(differences) == pytest.approx(2 / 32)
    assert wilcoxon(differences).pvalue == pytest.approx(2 / 32)


@pytest.mark.parametrize(("differences", "p"), [([0.0, 0.0], 1.0), ([0.3], 1.0)])
def test_where_nothing_can_be_told_p_is_one(differences, p):
    assert paired_permutation_test(differences) == p


def test_any_statistic_has_the_interval_of_the_mean_where_it_is_the_mean():
    rng = np.random.default_rng(3)
    tasks = [rng.normal(size=(4, rows)) for rows in (7, 5)]
    values = np.concatenate(tasks, axis=1)
    found = crossed_statistic(4, [7, 5], lambda runs, rows: ((runs @ values) * rows).sum(axis=1))
    assert found == pytest.approx(crossed_bootstrap(tasks, np.full((4, 2), 0.5)))
    assert found.value == pytest.approx((tasks[0].mean() + tasks[1].mean()) / 2)


def test_draws_without_a_value_are_left_out():
    values = np.array([[1.0, np.nan]])

    def mean_of_known(runs, rows):
        known = (rows > 0) & ~np.isnan(values)
        return np.where(known.any(axis=1), 1.0, np.nan)

    assert crossed_statistic(1, [2], mean_of_known) == (1.0, 1.0, 1.0)


def test_what_is_no_difference_is_refused():
    for bad in ([], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="finite numbers"):
            paired_permutation_test(bad)


def test_the_estimate_is_the_weighted_sum_of_task_means():
    tasks = [np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])]
    found = crossed_bootstrap(tasks, np.array([[0.5, 0.5], [1.0, 0.0]]))
    # Run 1: .5 * .5 + .5 * 1/3, run 2: 1.
    assert found.value == pytest.approx((0.25 + 1 / 6 + 1) / 2)
    assert found.low <= found.value <= found.high


def test_constant_values_have_no_width():
    found = crossed_bootstrap([np.full((3, 4), 0.5)], np.ones((3, 1)))
    assert found == pytest.approx((0.5, 0.5, 0.5))


def test_intervals_cover_both_kinds_of_chance():
    """Runs and pairs both vary; an interval over pairs alone would cover far less than 95 %."""
    rng, hits, narrow = np.random.default_rng(1), 0, 0
    for number in range(100):
        values = rng.normal(0, 0.1, (12, 1)) + rng.normal(0, 0.5, (1, 80)) + rng.normal(0, 0.5, (12, 80))
        low, high = crossed_bootstrap([values], np.ones((12, 1)), seed=number, replicates=250)[1:]
        hits += low <= 0 <= high
        low, high = crossed_bootstrap([values.mean(axis=0)[None]], np.ones((1, 1)), seed=number, replicates=250)[1:]
        narrow += low <= 0 <= high
    assert 0.9 <= hits / 100 <= 1.0
    assert narrow < hits


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="shares must be"):
        crossed_bootstrap([np.ones((2, 3))], np.ones((2, 2)))
    with pytest.raises(ValueError, match="every task needs"):
        crossed_bootstrap([np.ones((2, 0))], np.ones((2, 1)))


def test_marks():
    assert [stars(p) for p in (None, 0.2, 0.04, 0.009, 0.0001)] == ["", "", "*", "**", "***"]
