"""Rows of tokens: what is laid out where, which token sees which, and what is predicted from where."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everalign.data.collate import collate, row_tokens, with_prefix
from everalign.data.tokenization import TokenizedRow
from models_for_tests import collate_chosen, random_groups, random_pairs

SHORT = TokenizedRow.pair("a", [5], [6], [7, 8], 1.0)
LONG = TokenizedRow.pair("b", [11, 12, 13], [14, 15], [16], 0.5)
LAYOUT = ("input_ids", "position_ids", "segments", "prefixes", "attention_mask")
ALIKE = TokenizedRow.pair("c", [9], [1, 2, 3, 4], [1, 2, 5], 1.0)


def test_separate_sequences_go_row_by_row_and_are_padded_on_the_right():
    batch = collate([SHORT, LONG], shared=False)
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0, 0], [5, 7, 8, 0, 0], [11, 12, 13, 14, 15], [11, 12, 13, 16, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1] * 5, [1, 1, 1, 1, 0]]
    assert batch["predictors"].tolist() == [0, 5, 6, 12, 13, 17]
    assert batch["targets"].tolist() == [6, 7, 8, 14, 15, 16]
    assert batch["sequences"].tolist() == [0, 1, 1, 2, 2, 3]
    assert batch["lengths"].tolist() == [1, 2, 2, 1]
    assert batch["weight"].tolist() == [1.0, 0.5]
    assert batch["weights"].tolist() == [1.0, 1.0, 0.5, 0.5]
    assert (batch["row"].tolist(), batch["sizes"].tolist()) == ([0, 0, 1, 1], [2, 2])
    assert batch["input_ids"].dtype == torch.int64


def test_a_prompt_is_shared_and_positions_restart():
    batch = collate([LONG], shared=True)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 14, 15, 16]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch["segments"].tolist() == [[1, 1, 1, 2, 2, 3]]
    assert batch["prefixes"].tolist() == [[1] * 6]
    assert batch["predictors"].tolist() == [2, 3, 2]
    assert batch["targets"].tolist() == [14, 15, 16]
    assert batch["sequences"].tolist() == [0, 0, 1]


def test_what_answers_begin_with_alike_is_computed_once_and_counted_for_both():
    batch = collate([ALIKE], shared=True)
    assert batch["input_ids"].tolist() == [[9, 1, 2, 3, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch["segments"].tolist() == [[1, 1, 1, 2, 2, 3]]
    assert batch["predictors"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch["targets"].tolist() == [1, 2, 3, 4, 1, 2, 5]
    assert batch["lengths"].tolist() == [4, 3]


@pytest.mark.parametrize(("chosen", "rejected"), [([1, 2], [1, 2]), ([1], [1, 2]), ([1, 2, 3], [1]), ([4], [4])])
def test_every_answer_keeps_a_token_of_its_own(chosen, rejected):
    batch = collate([TokenizedRow.pair("d", [9], chosen, rejected, 1.0)], shared=True)
    assert {2, 3} <= set(batch["segments"].flatten().tolist())
    assert batch["targets"].tolist() == chosen + rejected


def test_short_groups_fill_the_row_of_the_longest():
    pairs = [TokenizedRow.pair("long", [1] * 4, [2] * 3, [3] * 3, 1.0)] + [SHORT] * 4
    batch = collate(pairs, shared=True)
    assert batch["input_ids"].shape == (3, 10)
    assert batch["input_ids"][1].tolist() == [5, 6, 7, 8, 5, 6, 7, 8, 0, 0]
    assert batch["segments"][1].tolist() == [1, 2, 3, 3, 4, 5, 6, 6, 0, 0]
    assert batch["prefixes"][1].tolist() == [1, 1, 1, 1, 4, 4, 4, 4, 0, 0]
    assert batch["position_ids"][1].tolist() == [0, 1, 1, 2, 0, 1, 1, 2, 0, 0]


def test_padded_rows_of_one_sequence_have_the_mask_that_their_model_takes():
    pairs = [TokenizedRow.pair("long", [1] * 2, [2] * 2, [3], 1.0), TokenizedRow.pair("mid", [4] * 2, [5], [6], 1.0)]
    assert collate_chosen(pairs, shared=True)["segments"].tolist() == [[1, 1, 2, 2], [1, 1, 2, 0]]
    assert collate_chosen(pairs, shared=False)["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_rows_of_one_sequence_and_one_length_need_no_mask():
    batch = collate_chosen([SHORT, SHORT], shared=True)
    assert batch["input_ids"].tolist() == [[5, 6], [5, 6]]
    assert not {"attention_mask", "position_ids", "segments", "prefixes"} & set(batch)
    assert batch["weight"].tolist() == [1.0, 1.0]


def test_chosen_sequences_are_packed_where_they_fit():
    pairs = [TokenizedRow.pair("long", [1] * 2, [2] * 2, [3], 1.0), SHORT, SHORT]
    packed = collate_chosen(pairs, shared=True)
    assert packed["input_ids"].tolist() == [[1, 1, 2, 2], [5, 6, 5, 6]]
    assert packed["segments"].tolist() == [[1, 1, 2, 2], [1, 2, 3, 4]]
    assert len(collate_chosen(pairs, shared=False)["input_ids"]) == 3


def test_a_pair_costs_its_prompt_once_or_twice():
    assert [row_tokens(LONG, True), row_tokens(LONG, False)] == [6, 10]


tokens = st.lists(st.integers(1, 3), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.builds(TokenizedRow.pair, st.just("x"), tokens, tokens, tokens, st.just(1.0)), min_size=1, max_size=6)
)
def test_every_token_sees_its_own_past_and_nothing_else(pairs):
    """Walking back from each predictor through what the mask allows gives the prompt and answer so far."""
    batch = collate(pairs, shared=True)
    ids, positions = batch["input_ids"].flatten(), batch["position_ids"].flatten()
    width = batch["input_ids"].shape[1]
    sequences = [p.prompt + tokens for p in pairs for tokens in p.responses]
    starts = [len(p.prompt) for p in pairs for _ in range(2)]
    seen = [0] * len(sequences)
    for flat, target, sequence in zip(
        batch["predictors"].tolist(), batch["targets"].tolist(), batch["sequences"].tolist(), strict=True
    ):
        row, column = divmod(flat, width)
        segments, prefixes = batch["segments"][row], batch["prefixes"][row]
        past = [row * width + k for k in range(column + 1) if segments[k] in (segments[column], prefixes[column])]
        end = starts[sequence] + seen[sequence]
        assert ids[past].tolist() == sequences[sequence][:end]
        assert positions[past].tolist() == list(range(end))
        assert target == sequences[sequence][end]
        seen[sequence] += 1
    assert seen == batch["lengths"].tolist() == [len(s) - b for s, b in zip(sequences, starts, strict=True)]


def seen(batch, predictor):
    """The tokens that a predictor sees, itself included, in the order of their positions."""
    width = batch["input_ids"].shape[1]
    row, column = divmod(predictor, width)
    tokens = batch["input_ids"][row].tolist()[: column + 1]
    if "segments" not in batch:
        assert "attention_mask" not in batch or batch["attention_mask"][row, : column + 1].all()
        return tokens
    segments, prefixes, places = (batch[name][row].tolist() for name in ("segments", "prefixes", "position_ids"))
    found = [i for i, segment in enumerate(segments) if i <= column and segment in (segments[column], prefixes[column])]
    assert [places[i] for i in found] == list(range(len(found)))
    return [tokens[i] for i in found]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "rows", [random_groups(9, seed=3), random_pairs(6), [SHORT], [SHORT.only([0]), LONG.only([1])]]
)
def test_what_is_put_in_front_of_prompts_is_seen_before_them(rows, shared):
    plain = collate(rows, shared)
    batch = with_prefix(plain, 2, 1000)
    assert {name for name in plain if not torch.equal(plain[name], batch[name])} <= {*LAYOUT, "predictors"}
    responses = [response for row in rows for response in row.responses]
    written, fronts = [0] * len(responses), {}
    for predictor, target, sequence in zip(
        *(batch[k].tolist() for k in ("predictors", "targets", "sequences")), strict=True
    ):
        row = int(batch["row"][sequence])
        first, second, *tokens = seen(batch, predictor)
        assert second == first + 1
        assert tokens == rows[row].prompt + responses[sequence][: written[sequence]]
        assert target == responses[sequence][written[sequence]]
        written[sequence] += 1
        # Prompts of their own have tokens of their own.
        assert fronts.setdefault(row if shared else sequence, first) == first
    assert sorted(fronts.values()) == list(range(1000, 1000 + 2 * len(fronts), 2))
    assert int((batch["input_ids"] >= 1000).sum()) == 2 * len(fronts)
    if "segments" in batch:
        padding = batch["segments"] == 0
        assert int(padding.sum()) == batch["input_ids"].numel() - int((plain["segments"] > 0).sum()) - 2 * len(fronts)


def test_nothing_is_moved_by_nothing_in_front():
    batch = collate(random_groups(5), shared=True)
    moved = with_prefix(batch, 0, 1000)
    assert all(torch.equal(batch[name], moved[name]) for name in batch)
