"""Batches under a budget of tokens, and the plan of a stage."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everalign.data.collate import Review, batches_by_length, training_plan


def rows_of(plan):
    """Each step's rows, over all processes and micro-batches."""
    shares = [plan.shares[i : i + plan.processes] for i in range(0, len(plan.shares), plan.processes)]
    return [[row for share in step for rows in share for row in rows] for step in shares]


def test_batches_by_length_start_with_the_longest_and_keep_to_the_budget():
    assert batches_by_length([1, 9, 3, 9, 2], 18) == [[1, 3], [2, 4, 0]]
    assert batches_by_length([1, 9, 3, 9, 2], 17) == [[1], [3], [2, 4, 0]]
    assert batches_by_length([], 2) == []


def test_a_row_above_the_budget_is_a_batch_of_its_own():
    assert batches_by_length([5, 1, 1, 7], 3) == [[3], [0], [1, 2]]


def test_a_plan_without_rows_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        training_plan([], 4, 2, 1.0, 0)


def test_a_plan_in_numbers():
    plan = training_plan([5] * 10, batch_size=4, tokens_per_batch=15, epochs=1.5, seed=0)
    assert [[len(rows) for rows in share] for share in plan.shares] == [[3, 1], [3, 1], [3, 1], [3]]
    assert plan.steps == 4


def test_processes_share_every_step():
    plan = training_plan([5] * 10, batch_size=4, tokens_per_batch=5, epochs=1.0, seed=0, processes=3)
    assert [[len(rows) for rows in share] for share in plan.shares] == [[1, 1], [1], [1]] * 2 + [[1], [1], []]
    assert plan.steps == 3


def test_another_seed_gives_another_order_and_every_epoch_its_own():
    plans = [rows_of(training_plan([5] * 16, 4, 20, 2.0, seed)) for seed in (0, 1)]
    assert plans[0] != plans[1]
    assert plans[0][:4] != plans[0][4:]


def test_budget_and_processes_leave_the_rows_of_every_step_alone():
    lengths = [(7 * i) % 30 + 1 for i in range(50)]
    whole = rows_of(training_plan(lengths, 8, 999, 1.0, seed=3))
    for tokens, processes in ((1, 1), (40, 1), (100, 2), (999, 3)):
        plan = training_plan(lengths, 8, tokens, 1.0, 3, processes)
        assert list(map(sorted, rows_of(plan))) == list(map(sorted, whole))


def test_rows_of_similar_length_share_a_batch():
    lengths = [(37 * i) % 101 + 1 for i in range(320)]
    steps = rows_of(training_plan(lengths, 8, 999, 1.0, seed=0))
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in steps)
    assert padded < 1.1 * sum(lengths)
    assert steps != sorted(steps, key=lambda rows: -lengths[rows[0]])


def test_a_review_takes_the_last_steps_and_gives_every_group_equally_many_rows():
    # 60 rows of a new task, 12 and 3 of earlier ones: the last fifth is shared out evenly, the rest is as it was.
    groups, lengths = [range(60), range(60, 72), range(72, 75)], [5] * 75
    plain = [row for step in rows_of(training_plan(lengths, 15, 999, 2.0, seed=1)) for row in step]
    plan = training_plan(lengths, 15, 999, 2.0, seed=1, review=Review(groups, 0.2))
    rows = [row for step in rows_of(plan) for row in step]
    assert len(rows) == len(plain) == 150
    assert rows[:120] == plain[:120]
    seen = [Counter(row for row in rows[120:] if row in group) for group in groups]
    assert [sum(times.values()) for times in seen] == [10, 10, 10]
    # Without repetition where a group has enough rows, equally often where it does not.
    assert [set(times.values()) for times in seen] == [{1}, {1}, {3, 4}]
    assert plan == training_plan(lengths, 15, 999, 2.0, seed=1, review=Review(groups, 0.2))


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=70),
    batch_size=st.integers(1, 20),
    tokens=st.integers(1, 500),
    epochs=st.floats(0.05, 3.4),
    seed=st.integers(0, 2**32),
    processes=st.integers(1, 3),
)
def test_every_row_once_an_epoch(lengths, batch_size, tokens, epochs, seed, processes):
    plan = training_plan(lengths, batch_size, tokens, epochs, seed, processes)
    assert plan == training_plan(lengths, batch_size, tokens, epochs, seed, processes)
    steps = rows_of(plan)
    count, total = len(lengths), max(1, round(epochs * len(lengths)))
    assert sum(map(len, steps)) == total
    times = Counter(row for step in steps for row in step)
    assert set(times.values()) <= {total // count, -(-total // count)}
    for rows in (rows for share in plan.shares for rows in share):
        assert len(rows) * max(lengths[row] for row in rows) <= tokens or len(rows) == 1
    assert len(steps) == plan.steps == -(-total // batch_size)
    assert all(len(step) == batch_size for step in steps[:-1])
