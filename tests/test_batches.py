"""Padding of pairs and the plan of micro-batches."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everalign.data.batches import batches_by_length, pad_chosen, pad_pairs, pair_length, training_plan
from everalign.data.encoding import EncodedPair

SHORT = EncodedPair("a", [5], [6], [7, 8], 1.0)
LONG = EncodedPair("b", [11, 12, 13], [14, 15], [16], 0.5)


def test_pairs_are_laid_out_chosen_first_and_padded_on_the_right():
    batch = pad_pairs([SHORT, LONG], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 9, 9, 9], [11, 12, 13, 14, 15], [5, 7, 8, 9, 9], [11, 12, 13, 16, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1] * 5, [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert batch["response_mask"].int().tolist() == [
        [0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
    ]
    assert batch["weight"].tolist() == [1.0, 0.5]
    assert (batch["input_ids"].dtype, batch["response_mask"].dtype) == (torch.int64, torch.bool)


def test_chosen_alone_are_padded_to_their_own_longest():
    batch = pad_chosen([SHORT, SHORT], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6], [5, 6]]
    assert batch["response_mask"].tolist() == [[False, True]] * 2
    assert batch["weight"].tolist() == [1.0, 1.0]


def test_a_token_that_equals_the_padding_counts_where_it_is_part_of_an_answer():
    batch = pad_pairs([EncodedPair("c", [9], [9, 9], [9], 1.0)], pad_id=9)
    assert batch["response_mask"].tolist() == [[False, True, True], [False, True, False]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_pair_is_as_long_as_its_longer_sequence():
    assert [pair_length(SHORT), pair_length(LONG)] == [3, 5]


def test_batches_by_length_start_with_the_longest():
    assert batches_by_length([1, 9, 3, 9, 2], 2) == [[1, 3], [2, 4], [0]]
    assert batches_by_length([], 2) == []


def test_a_plan_without_rows_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        training_plan([], 4, 2, 1.0, 0)


def test_a_plan_in_numbers():
    plan = training_plan([5] * 10, batch_size=4, micro_batch_size=3, epochs=1.5, seed=0)
    assert plan.accumulation == 2
    assert [len(rows) for rows in plan.micro_batches] == [2, 2, 2, 2, 2, 2, 1, 2]
    assert plan.steps == 4


def test_a_last_short_step_has_fewer_micro_batches_and_none_is_empty():
    plan = training_plan([5] * 9, batch_size=8, micro_batch_size=1, epochs=1.0, seed=0)
    assert [len(rows) for rows in plan.micro_batches] == [1] * 9
    assert (plan.accumulation, plan.steps) == (8, 2)


def test_another_seed_gives_another_order_and_every_epoch_its_own():
    plans = [training_plan([5] * 16, 4, 4, 2.0, seed).micro_batches for seed in (0, 1)]
    assert plans[0] != plans[1]
    assert plans[0][:4] != plans[0][4:]


def test_micro_batch_size_leaves_the_rows_of_every_step_alone():
    lengths = [(7 * i) % 30 + 1 for i in range(50)]
    whole = training_plan(lengths, 8, 8, 1.0, seed=3)
    for micro in (1, 2, 3, 5, 8, 99):
        plan = training_plan(lengths, 8, micro, 1.0, seed=3)
        for step, rows in enumerate(whole.micro_batches):
            parts = plan.micro_batches[step * plan.accumulation : (step + 1) * plan.accumulation]
            assert [row for part in parts for row in part] == rows


def test_rows_of_similar_length_share_a_batch():
    lengths = [(37 * i) % 101 + 1 for i in range(320)]
    plan = training_plan(lengths, 8, 8, 1.0, seed=0)
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in plan.micro_batches)
    assert padded < 1.1 * sum(lengths)
    assert plan.micro_batches != sorted(plan.micro_batches, key=lambda rows: -lengths[rows[0]])


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=70),
    batch_size=st.integers(1, 20),
    micro=st.integers(1, 24),
    epochs=st.floats(0.05, 3.4),
    seed=st.integers(0, 2**32),
)
def test_every_row_once_an_epoch(lengths, batch_size, micro, epochs, seed):
    plan = training_plan(lengths, batch_size, micro, epochs, seed)
    assert plan == training_plan(lengths, batch_size, micro, epochs, seed)
    stream = [row for rows in plan.micro_batches for row in rows]
    count = len(lengths)
    assert len(stream) == max(1, round(epochs * count))
    for start in range(0, len(stream), count):
        epoch = Counter(stream[start : start + count])
        assert max(epoch.values()) == 1
        assert len(epoch) == min(count, len(stream) - start)
    assert all(1 <= len(rows) <= micro for rows in plan.micro_batches)
    steps = [
        plan.micro_batches[i : i + plan.accumulation] for i in range(0, len(plan.micro_batches), plan.accumulation)
    ]
    assert len(steps) == plan.steps
    assert all(sum(map(len, step)) == batch_size for step in steps[:-1])
    assert 1 <= sum(map(len, steps[-1])) <= batch_size
