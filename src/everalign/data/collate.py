"""Prefix-packed collation: each prompt once with all its responses, and batches under a token budget."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from everalign.data.tokenization import TargetGroup, TokenizedGroup, TokenizedPair

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


def training_plan(
    lengths: Sequence[int], batch_size: int, tokens_per_batch: int, epochs: float, seed: int, processes: int = 1
) -> TrainingPlan:
    """Plan a stage.

    Every row occurs once an epoch (in a last, partial epoch at most once); every step has `batch_size` rows but the
    last, which has what is left. The order depends on the arguments alone, and a step's rows on neither
    `tokens_per_batch` nor `processes`.

    Args:
        lengths: tokens of each row; rows of similar length share a batch.
        batch_size: rows an optimiser step sees, over all processes.
        tokens_per_batch: tokens that are computed at once at most, padding included.
        epochs: passes over the rows, fractions allowed.
        seed: seeds the order.
        processes: how many share the work.

    Raises:
        ValueError: there are no rows.
    """
    if not lengths:
        raise ValueError("a training plan needs at least one row")
    stream = _stream(lengths, batch_size, epochs, random.Random(seed))
    shares = []
    for start in range(0, len(stream), batch_size):
        # Dealt out longest first, so that the processes have about the same to compute.
        step = sorted(stream[start : start + batch_size], key=lambda i: -lengths[i])
        shares += [_cut(step[process::processes], lengths, tokens_per_batch) for process in range(processes)]
    return TrainingPlan(shares, processes)


def _stream(lengths: Sequence[int], batch_size: int, epochs: float, rng: random.Random) -> list[int]:
    total = max(1, round(epochs * len(lengths)))
    stream: list[int] = []
    while len(stream) < total:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        stream += _group_by_length(order[: total - len(stream)], lengths, batch_size, rng)
    return stream


def _group_by_length(order: list[int], lengths: Sequence[int], size: int, rng: random.Random) -> list[int]:
    window = _WINDOW_BATCHES * size
    batches = []
    for start in range(0, len(order), window):
        rows = sorted(order[start : start + window], key=lambda i: -lengths[i])
        batches += [rows[i : i + size] for i in range(0, len(rows), size)]
    rng.shuffle(batches)
    return [row for batch in batches for row in batch]


Batch = dict[str, Tensor]

_PREFIX = 1  # segment number of a group's prompt; its answers follow


def collate_pairs(pairs: Sequence[TokenizedPair], shared: bool) -> Batch:
    """Lay out B pairs; sequences 0 to B-1 are the chosen ones, B to 2B-1 the rejected ones.

    Args:
        pairs: B encoded pairs.
        shared: compute a prompt once for both answers, and put several groups into one row where they fit; else
            each (prompt, answer) is a row of its own.

    Returns:
        `weight` (B,) fp32 and, with R rows of T positions, S sequences and K response tokens in all:
        `input_ids` (R, T) int64, right-padded with token 0, on which no result depends; `predictors` (K,), the
        position in R·T whose hidden state predicts a response token; `targets` (K,), that token; `sequences` (K,),
        whose token it is; `lengths` (S,), response tokens of each sequence.
        Rows of one sequence each and without padding need no mask; unshared ones with padding have `attention_mask`
        (R, T), 1 where there is a token. Others have `position_ids`, `segments` and `prefixes` (R, T): a token sees
        what comes before it in its own segment and in the segment that `prefixes` names; segment 0 is padding.
    """
    count = len(pairs)
    if shared:
        groups = [_group(p.prompt, [(i, p.chosen), (count + i, p.rejected)]) for i, p in enumerate(pairs)]
    else:
        chosen = [_group(p.prompt, [(i, p.chosen)]) for i, p in enumerate(pairs)]
        groups = chosen + [_group(p.prompt, [(count + i, p.rejected)]) for i, p in enumerate(pairs)]
    return {**_lay_out(groups, shared), "weight": _weights(pairs)}


def collate_chosen(pairs: Sequence[TokenizedPair], shared: bool) -> Batch:
    """Lay out only the chosen sequences of B pairs, as `collate_pairs` does."""
    groups = [_group(p.prompt, [(i, p.chosen)]) for i, p in enumerate(pairs)]
    return {**_lay_out(groups, shared), "weight": _weights(pairs)}


def collate_groups(groups: Sequence[TokenizedGroup], shared: bool) -> Batch:
    """Lay out the responses that count of every group, as `collate_pairs` does; sequences go group by group.

    `weight` (S,) is fp32, one for each sequence. A response of weight 0 teaches nothing and is not computed.
    """
    weights = [weight for group in groups for weight in group.weights if weight > 0]
    return {**_lay_out_answers(groups, shared), "weight": torch.tensor(weights, dtype=torch.float32)}


def collate_targets(groups: Sequence[TargetGroup], shared: bool) -> Batch:
    """Lay out all responses of B groups, as `collate_pairs` does; sequences go group by group.

    `weight` is (B,). Besides, `groups` (S,) int64 is the place of each sequence's group, `sizes` (B,) the sequences of
    each group, `log_shares` (S,) fp32 the logarithm of the share wanted of each, -inf for 0; `best` and `worst` (B,)
    are the sequences of each group's largest and smallest share, the first of them where several are.
    """
    sizes = torch.tensor([len(group.responses) for group in groups])
    shares = torch.tensor([share for group in groups for share in group.shares], dtype=torch.float64)
    starts = (sizes.cumsum(0) - sizes).tolist()
    extremes = {
        name: torch.tensor([s + g.shares.index(pick(g.shares)) for s, g in zip(starts, groups, strict=True)])
        for name, pick in (("best", max), ("worst", min))
    }
    return {
        **_lay_out_answers(groups, shared),
        **extremes,
        "weight": _weights(groups),
        "groups": torch.arange(len(groups)).repeat_interleave(sizes),
        "sizes": sizes,
        "log_shares": shares.log().float(),
    }


def _lay_out_answers(groups: Sequence[TokenizedGroup | TargetGroup], shared: bool) -> Batch:
    answers = [_answers(group) for group in groups]
    numbers = iter(range(sum(len(part) for part in answers)))
    parts = [[(next(numbers), tokens) for tokens in part] for part in answers]
    prompts = [group.prompt for group in groups]
    if not shared:
        prompts = [prompt for prompt, part in zip(prompts, parts, strict=True) for _ in part]
        parts = [[answer] for part in parts for answer in part]
    return _lay_out([_group(prompt, part) for prompt, part in zip(prompts, parts, strict=True)], shared)


def _answers(row: TokenizedPair | TokenizedGroup | TargetGroup) -> Sequence[list[int]]:
    """Return the answers of a row that are computed."""
    if isinstance(row, TokenizedPair):
        return [row.chosen, row.rejected]
    if isinstance(row, TargetGroup):
        return row.responses
    return [r for r, weight in zip(row.responses, row.weights, strict=True) if weight > 0]


def _weights(rows: Sequence[TokenizedPair] | Sequence[TargetGroup]) -> Tensor:
    return torch.tensor([row.weight for row in rows], dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class _Group:
    """A prompt and the answers to it; positions and segments count from the group's own begin."""

    tokens: list[int]
    positions: list[int]
    segments: list[int]
    predictors: list[int]
    targets: list[int]
    sequences: list[int]


def _group(prompt: list[int], answers: Sequence[tuple[int, list[int]]]) -> _Group:
    """Put answers, each with the number of its sequence, behind their prompt and what they begin with alike."""
    common = _common_prefix([tokens for _, tokens in answers]) if len(answers) > 1 else 0
    prefix = prompt + answers[0][1][:common]
    group = _Group(list(prefix), list(range(len(prefix))), [_PREFIX] * len(prefix), [], [], [])
    for segment, (sequence, answer) in enumerate(answers, start=_PREFIX + 1):
        start, own = len(group.tokens), answer[common:]
        group.tokens.extend(own)
        group.positions.extend(range(len(prefix), len(prefix) + len(own)))
        group.segments.extend([segment] * len(own))
        group.predictors.extend(range(len(prompt) - 1, len(prefix)))
        group.predictors.extend(range(start, start + len(own) - 1))
        group.targets.extend(answer)
        group.sequences.extend([sequence] * len(answer))
    return group


def _common_prefix(answers: Sequence[list[int]]) -> int:
    """Return how much all answers begin with alike, short of the last token of the shortest."""
    longest = min(len(tokens) for tokens in answers) - 1
    return next((i for i in range(longest) if len({tokens[i] for tokens in answers}) > 1), longest)


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


def _lay_out(groups: Sequence[_Group], shared: bool) -> Batch:
    rows = _pack(groups) if shared else [[group] for group in groups]
    width = max(sum(len(group.tokens) for group in row) for row in rows)
    starts = [i * width + start for i, row in enumerate(rows) for start in _starts(row)]
    ordered = list(chain.from_iterable(rows))
    sequences = torch.tensor(_joined(group.sequences for group in ordered))
    shifted = ([start + p for p in group.predictors] for start, group in zip(starts, ordered, strict=True))
    batch = {
        "input_ids": _padded([_joined(group.tokens for group in row) for row in rows], width),
        "predictors": torch.tensor(_joined(shifted)),
        "targets": torch.tensor(_joined(group.targets for group in ordered)),
        "sequences": sequences,
        "lengths": torch.bincount(sequences),
    }
    return {**batch, **_masks(rows, width, shared)}


def _masks(rows: Sequence[Sequence[_Group]], width: int, shared: bool) -> Batch:
    plain = all(len(row) == 1 and row[0].segments[-1] <= _PREFIX + 1 for row in rows)
    if plain and all(len(row[0].tokens) == width for row in rows):
        return {}
    # transformers looks at the values of a mask of two dimensions, for which a GPU would have to be waited for.
    return _blocks(rows, width) if shared else _plain_mask(rows, width)


def _starts(row: Sequence[_Group]) -> list[int]:
    starts = [0]
    for group in row[:-1]:
        starts.append(starts[-1] + len(group.tokens))
    return starts


def _plain_mask(rows: Sequence[Sequence[_Group]], width: int) -> Batch:
    return {"attention_mask": _padded([[1] * len(row[0].tokens) for row in rows], width)}


def _blocks(rows: Sequence[Sequence[_Group]], width: int) -> Batch:
    segments: list[list[int]] = []
    prefixes: list[list[int]] = []
    for row in rows:
        before = 0
        segments.append([])
        prefixes.append([])
        for group in row:
            segments[-1].extend(before + segment for segment in group.segments)
            prefixes[-1].extend([before + _PREFIX] * len(group.tokens))
            before += group.segments[-1]
    return {
        "position_ids": _padded([_joined(group.positions for group in row) for row in rows], width),
        "segments": _padded(segments, width),
        "prefixes": _padded(prefixes, width),
    }


def _joined(lists: Iterable[Sequence[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def _padded(rows: Sequence[list[int]], width: int) -> Tensor:
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def rows_of_one_kind(batch: Batch, kind: Callable[[int], tuple[int, ...]]) -> list[tuple[Batch, Tensor]]:
    """Cut a batch into batches whose sequences are of one kind each, by their number of tokens, prompt included.

    Args:
        batch: with or without shared prompts.
        kind: of a sequence of this many tokens.

    Returns:
        Batches that cover the batch's sequences, with what their rows are computed from, and the numbers (K',) of the
        response tokens in each. A batch of one kind is left as it is; the rows of others hold one sequence each.
    """
    tokens, starts = _tokens_of_sequences(batch)
    kinds = [kind(len(prompt) + len(own)) for prompt, own in tokens]
    if len(set(kinds)) < 2:
        return [(batch, torch.arange(len(batch["targets"]), device=batch["targets"].device))]
    found = []
    for wanted in sorted(set(kinds)):
        chosen = [i for i, own in enumerate(kinds) if own == wanted]
        groups = [_group(prompt, [(place, own)]) for place, (prompt, own) in enumerate(tokens[i] for i in chosen)]
        numbers = torch.cat([starts[i] for i in chosen])
        part = {name: value.to(numbers.device) for name, value in _lay_out(groups, shared=False).items()}
        found.append((part, numbers))
    return found


def _tokens_of_sequences(batch: Batch) -> tuple[list[tuple[list[int], list[int]]], list[Tensor]]:
    """Return each sequence's prompt and response, and the numbers of its response tokens."""
    flat, width = batch["input_ids"].flatten(), batch["input_ids"].shape[1]
    positions = batch["position_ids"].flatten() if "position_ids" in batch else None
    tokens, numbers = [], []
    for sequence in range(len(batch["lengths"])):
        own = (batch["sequences"] == sequence).nonzero()[:, 0]
        last = batch["predictors"][own[0]]
        place = last % width if positions is None else positions[last]
        tokens.append((flat[last - place : last + 1].tolist(), batch["targets"][own].tolist()))
        numbers.append(own)
    return tokens, numbers


def largest_token(row: TokenizedPair | TokenizedGroup | TargetGroup) -> int:
    """Return the largest number of a token in a row's prompt and answers."""
    return max(max(tokens, default=0) for tokens in (row.prompt, *_answers(row)))


def row_tokens(row: TokenizedPair | TokenizedGroup | TargetGroup, shared: bool) -> int:
    """Return the tokens that a row takes in a batch: its prompt once where it is shared, else once an answer."""
    answers = _answers(row)
    if shared:
        return len(row.prompt) + sum(len(answer) for answer in answers)
    return len(answers) * (len(row.prompt) + max(len(answer) for answer in answers))
