"""Prefix-packed collation: each prompt once with all its responses, and batches under a token budget."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from everalign.data.tokenization import TokenizedRow

# Pairs are sorted by length within windows of this many batches: little padding, and still a random order.
_WINDOW_BATCHES = 32


def batches_by_length(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Group all indices into batches of similar length, longest first (memory shows its peak at once).

    Padded to its longest row, a batch has at most `tokens_per_batch` tokens, unless a single row has more.
    """
    return _cut(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)), lengths, tokens_per_batch)


def _cut(rows: Sequence[int], lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Cut rows, longest first, into consecutive batches under the budget."""
    batches: list[list[int]] = []
    for row in rows:
        if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > tokens_per_batch:
            batches.append([])
        batches[-1].append(row)
    return batches


@dataclass(frozen=True)
class TrainingPlan:
    """A stage's optimiser steps in order, each as the shares of the processes.

    Args:
        shares: step after step and process after process, that process's micro-batches (row indices) of the step;
            empty where a step has fewer rows than there are processes.
        processes: how many share the work.
    """

    shares: list[list[list[int]]]
    processes: int = 1

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return len(self.shares) // self.processes


@dataclass(frozen=True)
class Review:
    """The end of a stage, in which every group of rows is seen equally often.

    Args:
        groups: row indices, at least one group of at least one.
        share: of the stage's steps, between 0 and 1.
    """

    groups: Sequence[Sequence[int]]
    share: float

    def draw(self, count: int, rng: random.Random) -> list[int]:
        """Return `count` rows, the groups by turns, each in random order and over again where it is used up."""
        left: list[list[int]] = [[] for _ in self.groups]  # the last one is the next
        found = []
        for place in range(count):
            turn = place % len(left)
            if not left[turn]:
                left[turn] = rng.sample(self.groups[turn], len(self.groups[turn]))[::-1]
            found.append(left[turn].pop())
        return found


def training_plan(
    lengths: Sequence[int],
    batch_size: int,
    tokens_per_batch: int,
    epochs: float,
    seed: int,
    processes: int = 1,
    review: Review | None = None,
) -> TrainingPlan:
    """Plan a stage.

    Every row occurs once an epoch (in a last, partial epoch at most once), but for a review's part; every step has
    `batch_size` rows but the last, which has what is left. The order depends on the arguments alone, and a step's rows
    on neither `tokens_per_batch` nor `processes`.

    Args:
        lengths: tokens of each row; rows of similar length share a batch.
        batch_size: rows an optimiser step sees, over all processes.
        tokens_per_batch: tokens that are computed at once at most, padding included.
        epochs: passes over the rows, fractions allowed.
        seed: seeds the order.
        processes: how many share the work.
        review: what takes the place of the last steps; None for nothing.

    Raises:
        ValueError: there are no rows.
    """
    if not lengths:
        raise ValueError("a training plan needs at least one row")
    rng = random.Random(seed)
    total, window = max(1, round(epochs * len(lengths))), _WINDOW_BATCHES * batch_size
    stream: list[int] = []
    while len(stream) < total:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        order = order[: total - len(stream)]
        batches = []
        for start in range(0, len(order), window):
            rows = sorted(order[start : start + window], key=lambda i: -lengths[i])
            batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        stream += [row for batch in batches for row in batch]
    if review is not None:
        kept = total - round(review.share * total)
        stream = [*stream[:kept], *review.draw(total - kept, rng)]
    shares = []
    for start in range(0, len(stream), batch_size):
        # Dealt out longest first, so that the processes have about the same to compute.
        step = sorted(stream[start : start + batch_size], key=lambda i: -lengths[i])
        shares += [_cut(step[process::processes], lengths, tokens_per_batch) for process in range(processes)]
    return TrainingPlan(shares, processes)


Batch = dict[str, Tensor]

# Beside tokens and positions, what a batch says of each of its places.
_LAYOUT = ("segments", "prefixes", "attention_mask")
_PREFIX = 1  # segment number of a group's prompt; its answers follow


def collate(rows: Sequence[TokenizedRow], shared: bool) -> Batch:
    """Lay out all responses of B rows as tensors; sequences go row by row, so a preference's are 2i and 2i + 1.

    Args:
        rows: B tokenised rows.
        shared: compute a prompt once for all its responses, and pack several rows into one where they fit; else each
            (prompt, response) is a row of its own.

    Returns:
        With S sequences, K response tokens in all, and R computed rows of T positions:

        `weight` (B,) fp32, the rows' own; `row` (S,), whose response a sequence is; `weights` (S,) fp32, a response's
        weight times its row's; `sizes` (B,), responses of each row; `lengths` (S,), tokens of each response.

        `input_ids` (R, T) int64, right-padded with token 0, on which no result depends; `predictors` (K,), the
        position in R·T whose hidden state predicts a response token; `targets` (K,), that token; `sequences` (K,),
        the sequence it belongs to.

        Rows of one sequence each and without padding need no mask; unshared ones with padding have `attention_mask`
        (R, T), 1 where there is a token. Others have `position_ids`, `segments` and `prefixes` (R, T): a token sees
        what comes before it in its own segment and in the segment that `prefixes` names; segment 0 is padding.
    """
    groups, sequence = [], 0
    for row in rows:
        answers = list(enumerate(row.responses, start=sequence))
        sequence += len(answers)
        groups += [_group(row.prompt, part) for part in ([answers] if shared else [[one] for one in answers])]
    sizes = torch.tensor([len(row.responses) for row in rows])
    weights = [row.weight * weight for row in rows for weight in row.weights]
    return {
        **_layout(groups, shared),
        "weight": torch.tensor([row.weight for row in rows], dtype=torch.float32),
        "weights": torch.tensor(weights, dtype=torch.float32),
        "row": torch.arange(len(rows)).repeat_interleave(sizes, output_size=sequence),
        "sizes": sizes,
    }


@dataclass(frozen=True, slots=True)
class _Group:
    """A prompt and the answers to it; positions and segments count from the group's own start."""

    tokens: list[int]
    positions: list[int]
    segments: list[int]
    predictors: list[int]
    targets: list[int]
    sequences: list[int]


def _group(prompt: list[int], answers: Sequence[tuple[int, list[int]]]) -> _Group:
    """Put answers, each with the number of its sequence, behind their prompt and their common prefix."""
    common = 0
    if len(answers) > 1:
        # Short of the last token of the shortest, so that every answer keeps a token of its own.
        longest = min(len(tokens) for _, tokens in answers) - 1
        common = next((i for i in range(longest) if len({tokens[i] for _, tokens in answers}) > 1), longest)
    prefix = prompt + answers[0][1][:common]
    group = _Group(list(prefix), list(range(len(prefix))), [_PREFIX] * len(prefix), [], [], [])
    for segment, (sequence, answer) in enumerate(answers, start=_PREFIX + 1):
        start, own = len(group.tokens), answer[common:]
        group.tokens.extend(own)
        group.positions.extend(range(len(prefix), len(prefix) + len(own)))
        group.segments.extend([segment] * len(own))
        # The common prefix is predicted once for every answer; then each answer's own tokens.
        group.predictors.extend(range(len(prompt) - 1, len(prefix)))
        group.predictors.extend(range(start, start + len(own) - 1))
        group.targets.extend(answer)
        group.sequences.extend([sequence] * len(answer))
    return group


def _pack(groups: Sequence[_Group]) -> list[list[_Group]]:
    """Distribute groups over rows of the longest one's length: longest first, each into the first row with room."""
    width = max(len(group.tokens) for group in groups)
    rows: list[list[_Group]] = []
    room: list[int] = []
    for group in sorted(groups, key=lambda group: -len(group.tokens)):
        row = next((i for i, left in enumerate(room) if left >= len(group.tokens)), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(group)
        room[row] -= len(group.tokens)
    return rows


def _layout(groups: Sequence[_Group], shared: bool) -> Batch:
    rows = _pack(groups) if shared else [[group] for group in groups]
    width = max(sum(len(group.tokens) for group in row) for row in rows)
    names = ("input_ids", "position_ids", "segments", "prefixes", "attention_mask")
    padded: dict[str, list[list[int]]] = {name: [] for name in names}
    predictors: list[int] = []
    targets: list[int] = []
    sequences: list[int] = []
    for number, row in enumerate(rows):
        columns: dict[str, list[int]] = {name: [] for name in names}
        before = 0  # segments of the groups to the left
        for group in row:
            start = number * width + len(columns["input_ids"])
            predictors += [start + place for place in group.predictors]
            targets += group.targets
            sequences += group.sequences
            columns["input_ids"] += group.tokens
            columns["position_ids"] += group.positions
            columns["segments"] += [before + segment for segment in group.segments]
            columns["prefixes"] += [before + _PREFIX] * len(group.tokens)
            columns["attention_mask"] += [1] * len(group.tokens)
            before += group.segments[-1]
        for name, values in columns.items():
            padded[name].append(values + [0] * (width - len(values)))
    whose = torch.tensor(sequences)
    batch = {
        "input_ids": torch.tensor(padded["input_ids"]),
        "predictors": torch.tensor(predictors),
        "targets": torch.tensor(targets),
        "sequences": whose,
        "lengths": torch.bincount(whose),
    }
    one_sequence_each = all(len(row) == 1 and row[0].segments[-1] <= _PREFIX + 1 for row in rows)
    if one_sequence_each and all(len(row[0].tokens) == width for row in rows):
        return batch
    # transformers looks at the values of a mask of two dimensions, for which a GPU would have to be waited for.
    masks = ("position_ids", "segments", "prefixes") if shared else ("attention_mask",)
    return {**batch, **{name: torch.tensor(padded[name]) for name in masks}}


def prompt_places(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Find the G prompts of a collated batch; one that is laid out for each of its responses counts as often.

    Returns:
        Where in R·T positions each prompt starts and where it ends, both (G,), and the number (S,) of each sequence's.
    """
    sequences, predictors, width = batch["sequences"], batch["predictors"], batch["input_ids"].shape[1]
    first = torch.full_like(batch["lengths"], len(sequences))
    first.scatter_reduce_(0, sequences, torch.arange(len(sequences), device=sequences.device), "amin")
    # A sequence's first token is predicted at the end of its prompt.
    last, whose = torch.unique(predictors[first], return_inverse=True)
    place = batch["position_ids"].flatten()[last] if "position_ids" in batch else last % width
    return last - place, last + 1, whose


def sequence_ends(batch: Batch) -> Tensor:
    """Find where in R·T positions the last token of each sequence is, (S,), in a batch that shares prompts."""
    width = batch["input_ids"].shape[1]
    if "segments" in batch:
        segments, prefixes = (F.pad(batch[name], (0, 1)) for name in ("segments", "prefixes"))
        last = (segments != segments.roll(-1, dims=1)) & (segments != prefixes)
        rows, columns = last.nonzero(as_tuple=True)
        places = rows * width + columns
    else:  # rows of one sequence each, without padding
        places = torch.arange(width - 1, batch["input_ids"].numel(), width, device=batch["input_ids"].device)
    ends = torch.empty_like(batch["lengths"])
    ends[torch.unique_consecutive(batch["sequences"])] = places
    return ends


def with_prefix(batch: Batch, length: int, first: int) -> Batch:
    """Put tokens of their own in front of each prompt of a collated batch.

    Args:
        batch: as `collate` lays it out.
        length: how many.
        first: the first of them; the next prompt's follow its last.

    Returns:
        The batch in rows of more positions, with the same sequences and response tokens in the same order.
    """
    starts, _, _ = prompt_places(batch)
    rows, width = batch["input_ids"].shape
    device = starts.device
    # Each position moves to the right by the prefixes of the prompts that start at or before it.
    before = torch.zeros(rows * width, dtype=torch.long, device=device)
    before[starts] = 1
    before = before.view(rows, width).cumsum(1)
    wider = width + length * int(before[:, -1].max())
    row, column = torch.arange(rows, device=device)[:, None], torch.arange(width, device=device)
    moved = (row * wider + column + length * before).flatten()
    places = moved[starts][:, None] + torch.arange(-length, 0, device=device)  # (G, length)
    own = {
        "input_ids": first + torch.arange(places.numel(), device=device).view_as(places),
        "position_ids": torch.arange(length, device=device).expand_as(places),
        **{name: batch[name].flatten()[starts][:, None].expand_as(places) for name in _LAYOUT if name in batch},
    }
    changed = {"predictors": moved[batch["predictors"]]}
    for name in own.keys() & batch.keys():
        values = batch[name].flatten()
        if name == "position_ids":
            values = torch.where(batch["segments"].flatten() > 0, values + length, values)
        changed[name] = values.new_zeros(rows * wider).index_copy_(0, moved, values)
        changed[name] = changed[name].index_copy_(0, places.flatten(), own[name].flatten()).view(rows, wider)
    return {**batch, **changed}


def split_by_length(batch: Batch, kind: Callable[[int], tuple[int, ...]]) -> list[tuple[Batch, Tensor]]:
    """Split a batch into batches whose sequences are of one kind each, by their number of tokens, prompt included.

    Args:
        batch: with or without shared prompts.
        kind: of a sequence of this many tokens.

    Returns:
        Batches that cover the batch's sequences, with what their rows are computed from, and the numbers (K',) of the
        response tokens in each. A batch of one kind is left as it is; the rows of others hold one sequence each.
    """
    flat, (starts, ends, whose) = batch["input_ids"].flatten(), prompt_places(batch)
    parts: dict[tuple[int, ...], list[tuple[list[int], list[int], Tensor]]] = {}
    for sequence, group in enumerate(whose.tolist()):
        numbers = (batch["sequences"] == sequence).nonzero()[:, 0]
        prompt, response = flat[starts[group] : ends[group]].tolist(), batch["targets"][numbers].tolist()
        parts.setdefault(kind(len(prompt) + len(response)), []).append((prompt, response, numbers))
    if len(parts) < 2:
        return [(batch, torch.arange(len(batch["targets"]), device=batch["targets"].device))]
    found = []
    for _, part in sorted(parts.items()):
        groups = [_group(prompt, [(place, response)]) for place, (prompt, response, _) in enumerate(part)]
        every = torch.cat([numbers for _, _, numbers in part])
        found.append(({name: value.to(every.device) for name, value in _layout(groups, shared=False).items()}, every))
    return found


def row_tokens(row: TokenizedRow, shared: bool, prefix: int = 0) -> int:
    """Return the tokens that a row takes in a batch: its prompt once where it is shared, else once a response.

    Args:
        row: the row.
        shared: whether its prompt is computed once for all its responses.
        prefix: tokens that are put in front of every prompt.
    """
    prompt = prefix + len(row.prompt)
    if shared:
        return prompt + sum(map(len, row.responses))
    return len(row.responses) * (prompt + max(map(len, row.responses)))
