"""Numbers of a bench on made-up values: answers without a KL, bars over few runs, runs in which nothing varies."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t

from everalign.bench.answers import Said, measure_said, measure_tasks
from everalign.bench.report import _averaged


def said(seed, kl, sizes, learns=True, reward=None):
    count = sum(sizes.values())
    values = {"kl": np.array(kl), "unfinished": np.zeros(count), "length": np.arange(count) + 1.0}
    if reward is not None:
        values["reward"] = np.array(reward, dtype=float)
    return Said((tuple(sizes), seed), sizes, [f"{seed} {i} {reward}" for i in range(count)], values, None, learns)


def test_tasks_count_alike_however_many_of_their_answers_have_a_kl():
    nan = math.nan
    one = said(0, [10.0, *[nan] * 9, *[0.0] * 10, nan], {"a": 10, "b": 10, "c": 1})
    kl = measure_said({"x": [one]}, None)["x"]["kl"]
    assert kl.mean == pytest.approx(5)
    assert measure_tasks([one], [], "kl") == {"a": 10, "b": 0, "c": None}
    two = [said(0, [1.0, nan, 4.0], {"a": 2, "b": 1}), said(1, [3.0, 5.0, nan], {"a": 2, "b": 1})]
    assert measure_said({"x": two}, None)["x"]["kl"].mean == pytest.approx((3 + 4) / 2)
    nothing = said(0, [nan, nan], {"a": 1, "b": 1})
    assert measure_said({"x": [nothing]}, None)["x"]["kl"].mean is None


@pytest.mark.parametrize(("learns", "tested"), [((False, False), False), ((False, True), True), ((True, True), True)])
def test_answers_of_what_learns_nothing_are_compared_without_a_test(learns, tested):
    """They are the same with every seed: as many equal differences as one likes would say nothing."""
    runs = [
        [said(seed, [0.1 * level] * 4, {"a": 4}, one, [level] * 4) for seed in range(6)]
        for level, one in zip((1, 2), learns, strict=True)
    ]
    found = measure_said({"base": runs[0], "x": runs[1]}, "base")["x"]
    for measure in ("kl", "reward", "reward_win_rate"):
        assert (found[measure].p_value is not None) == (found[measure].p_holm is not None) == tested
    assert found["reward"].difference.value == pytest.approx(1)


def test_perplexity_counts_every_token_alike_and_runs_before_exp():
    """As computed by hand: two rows of 1 and 9 tokens with 10 and 2 nats in all, and a second run with 20 and 4."""
    tokens = [1.0, 9.0]
    runs = [
        replace(
            said(seed, [], {"a": 0}),
            chat=np.array([[total / n for total, n in zip(sums, tokens, strict=True)], tokens]),
        )
        for seed, sums in enumerate([(10, 2), (20, 4)])
    ]
    one = measure_said({"x": runs[:1]}, None)["x"]["perplexity"]
    assert one.mean == pytest.approx(math.exp(12 / 10))
    both = measure_said({"x": runs}, None)["x"]["perplexity"]
    assert both.mean == pytest.approx(math.exp((12 + 24) / 20))
    assert both.mean == pytest.approx(math.sqrt(math.exp(1.2) * math.exp(2.4)))
    assert both.low <= both.mean <= both.high
    assert both.deviation == pytest.approx((math.exp(2.4) - math.exp(1.2)) / math.sqrt(2))


def test_bars_over_few_runs_hold_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    for count in (2, 3, 5):
        drawn = [_averaged([{0: float(value)} for value in rng.normal(size=count)])[0] for _ in range(800)]
        assert 0.92 < np.mean([abs(mean) <= bar for mean, bar in drawn]) < 0.98
    mean, bar = _averaged([{0: 1.0, 1: 2.0}, {0: 3.0}])[0]
    assert (mean, bar) == pytest.approx((2.0, t.ppf(0.975, 1) * 1.0))
    assert math.isnan(_averaged([{0: 1.0, 1: 2.0}, {0: 3.0}])[1][1])
