"""Comparing runs: bootstrap intervals over runs and pairs, a paired permutation test, and Holm's correction.

Runs of two contenders are paired by order and seed, and all are scored on the same held-out pairs. So the pairs and the
runs are crossed, and both are drawn anew: an interval that holds one of them fixed is too narrow (Owen 2007, "The
pigeonhole bootstrap").
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import permutation_test

Array = NDArray[np.float64]

REPLICATES = 2000
PERMUTATIONS = 70_000
_BATCH = 250


class Interval(NamedTuple):
    """An estimate with the ends of its interval."""

    value: float
    low: float
    high: float


def crossed_bootstrap(
    tasks: Sequence[Array], shares: Array, *, confidence: float = 0.95, seed: int = 0, replicates: int = REPLICATES
) -> Interval:
    """Returns the mean over R runs of a weighted sum of task means, with a percentile interval.

    With d = tasks[t] it is (1/R) Σ_r Σ_t shares[r, t] · mean_p d[r, p].

    Args:
        tasks: for each of T tasks (R, P_t): what run r has on pair p.
        shares: (R, T) what task t counts for in run r.
        confidence: of the interval.
        seed: of the draws.
        replicates: how often runs and, within every task, pairs are drawn anew. A single run, or a single pair, is
            always drawn: then the interval tells of the other alone.

    Raises:
        ValueError: shapes do not fit, or there is no run, no task or no pair.
    """
    runs = len(shares)
    if not tasks or not runs or shares.shape != (runs, len(tasks)):
        raise ValueError(f"shares must be (runs, tasks), found {shares.shape} for {len(tasks)} tasks")
    if any(values.ndim != 2 or values.shape[0] != runs or not values.shape[1] for values in tasks):
        raise ValueError("every task needs (runs, pairs) values, at least one of each")
    weighted = [values * share[:, None] for values, share in zip(tasks, shares.T, strict=True)]
    value = sum(float(values.mean()) for values in weighted)
    rng = np.random.default_rng(seed)
    found: list[Array] = []
    for start in range(0, replicates, _BATCH):
        count = min(_BATCH, replicates - start)
        drawn = rng.multinomial(runs, np.full(runs, 1 / runs), size=count) / runs
        total = np.zeros(count)
        for values in weighted:
            pairs = values.shape[1]
            again = rng.multinomial(pairs, np.full(pairs, 1 / pairs), size=count) / pairs
            total += ((drawn @ values) * again).sum(axis=1)
        found.append(total)
    low, high = np.quantile(np.concatenate(found), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))


def crossed_statistic(
    runs: int,
    tasks: Sequence[int],
    statistic: Callable[[Array, Array], Array],
    *,
    confidence: float = 0.95,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Interval:
    """Returns any statistic of R runs on the rows of T tasks, with a percentile interval.

    Args:
        runs: R, at least 1.
        tasks: number of rows of each task, N in all.
        statistic: returns (B,) values for what each run (B, R) and each row, task by task, (B, N) counts. Both sum to
            1, and tasks count alike. NaN where it is not defined; such draws are left out.
        confidence: of the interval.
        seed: of the draws.
        replicates: how often runs and, within every task, rows are drawn anew.
    """
    value = float(statistic(np.full((1, runs), 1 / runs), equal_weights(tasks)[None])[0])
    rng = np.random.default_rng(seed)
    found: list[Array] = []
    for start in range(0, replicates, _BATCH):
        size = min(_BATCH, replicates - start)
        drawn = rng.multinomial(runs, np.full(runs, 1 / runs), size=size) / runs
        again = [rng.multinomial(rows, np.full(rows, 1 / rows), size=size) / rows / len(tasks) for rows in tasks]
        found.append(statistic(drawn, np.concatenate(again, axis=1)))
    low, high = np.nanquantile(np.concatenate(found), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))


def equal_weights(tasks: Sequence[int]) -> Array:
    """Returns (N,) weights of the rows of T tasks: rows of a task count alike, and so do tasks; they sum to 1."""
    return np.concatenate([np.full(rows, 1 / rows / len(tasks)) for rows in tasks])


def bootstrap(
    count: int,
    statistic: Callable[[Array], Array],
    *,
    confidence: float = 0.95,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Interval:
    """Returns a statistic of N rows with a percentile interval; of a single row the interval is that value.

    Args:
        count: N, at least 1.
        statistic: returns (B,) values for weights (B, N): how often each row counts.
        confidence: of the interval.
        seed: of the draws.
        replicates: how often the rows are drawn anew.
    """
    rng = np.random.default_rng(seed)
    value = float(statistic(np.ones((1, count)))[0])
    found: list[Array] = []
    for start in range(0, replicates, _BATCH):
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=min(_BATCH, replicates - start))
        found.append(statistic(drawn.astype(np.float64)))
    low, high = np.quantile(np.concatenate(found), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))


def bootstrap_mean(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Returns the mean of at least one value with its 95% percentile interval."""
    rows = np.asarray(values, dtype=np.float64)
    return bootstrap(len(rows), lambda weights: weights @ rows / len(rows), seed=seed)


def paired_permutation_test(differences: Sequence[float], *, seed: int = 0) -> float:
    """Returns the two-sided p-value that paired differences lie around 0, by changing their signs.

    It is exact for up to 16 differences; with more, signs are drawn. With R differences it is at least 2 / 2^R.

    Raises:
        ValueError: there are no differences, or one is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"differences must be finite numbers, at least one, found {differences}")
    if not values.any() or values.size == 1:
        return 1.0
    found = permutation_test(
        (values, np.zeros_like(values)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number by Holm (1979), in their order.

    The i-th smallest of m is multiplied by m − i + 1; none is made smaller than one before it, nor larger than 1.

    Raises:
        ValueError: one is no p-value.
    """
    if any(not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values lie between 0 and 1, found {list(p_values)}")
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def stars(p_value: float | None) -> str:
    """Returns the mark of a significant difference: * below 0.05, ** below 0.01, *** below 0.001."""
    if p_value is None:
        return ""
    return "***" if p_value < 0.001 else "**" if p_value < 0.01 else "*" if p_value < 0.05 else ""
