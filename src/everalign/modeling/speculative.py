"""Speculative decoding from drafts: verify the draft first, then decode greedily only what differs from it.

    1. One forward pass over prompt and draft gives what the model would have written at every position. As far as that
       is the draft, it is accepted; a draft that is accepted with its end is done.
    2. Behind the first difference stands the model's own token. From there on, prompt lookup guesses what follows, and
       each forward pass verifies a guess and writes one token more.

Whatever is guessed, the tokens are those of plain greedy decoding, up to the rounding of the logits.

Source: speculative edits, as in EfficientEdit (Wang et al., arXiv 2506.02780).
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from everalign.deadlines import current
from everalign.errors import InputError
from everalign.modeling.decoding import FINISHED_SHARE, RaggedModel, RaggedRows

MAX_GUESS = 512
"""Tokens guessed at once, at most."""

# The last tokens written are looked for near the place in the draft where the row stands: three of them at most so many
# tokens ahead, two or one of them less far, where they mean less; and a little behind it, for inserted tokens.
_REACH, _BACK = {3: 24, 2: 8, 1: 4}, 2
# How often a guessed token is right before any was checked, and how many checked ones this weighs as much as.
_PRIOR, _PRIOR_WEIGHT = 0.6, 1.0
# By what factor the first token of a guess is less likely after each miss in a row.
_AFTER_A_MISS = 0.8
# A draft that was right for so many tokens, and never wrong, will probably stay as it is.
_CERTAIN = 16
_SEPARATOR = -1


class PromptLookup:
    """Guesses for one row.

    Args:
        draft: tokens that the row resembles.
        prompt: tokens that the row may quote.
    """

    def __init__(self, draft: list[int], prompt: list[int]) -> None:
        # Everything that may be copied, one text after the other, and where each run of up to three tokens ends in it.
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = defaultdict(list)
        self._draft, self._prompt = draft, prompt
        # Where the draft goes on, if the row does as it does, and whether the row's last token was in its place there.
        self._place, self._follows = 0, False
        self._guess, self._start = draft, 0  # the last guess, and where in the text it begins
        self._right, self._tried, self._misses = 0.0, 0.0, 0

    @property
    def rate(self) -> float:
        """Estimated probability that a guessed token is right if those before it are."""
        if self._right == self._tried >= _CERTAIN:
            return 1.0
        return (self._right + _PRIOR * _PRIOR_WEIGHT) / (self._tried + _PRIOR_WEIGHT)

    @property
    def first(self) -> float:
        """Estimated probability that the first token of a guess is right: lower after each miss in a row."""
        return self.rate * _AFTER_A_MISS**self._misses

    def propose(self, written: Sequence[int]) -> list[int]:
        """Return what may follow the tokens written so far, at most `MAX_GUESS` tokens.

        Args:
            written: at least one token; those of the last call and the ones written since.
        """
        if not self._text:
            self._extend([*self._draft, _SEPARATOR, *self._prompt])
        behind = len(self._draft) + 1 + len(self._prompt)
        self._extend(written[len(self._text) - behind :])
        self._start = self._find(written)
        self._guess = self._text[self._start : self._start + MAX_GUESS]
        if _SEPARATOR in self._guess:
            self._guess = self._guess[: self._guess.index(_SEPARATOR)]
        return self._guess

    def update(self, written: Sequence[int]) -> None:
        """Compare the last guess, or the draft at first, with the tokens written since, checked or not."""
        pairs = zip(self._guess, written, strict=False)
        compared = min(len(self._guess), len(written))
        right = next((i for i, (guessed, found) in enumerate(pairs) if guessed != found), compared)
        drafted = self._start < len(self._draft)
        if self._guess:
            # What was before a wrong guess counts half.
            kept = 0.5 if right < compared else 1.0
            self._right, self._tried = self._right * kept + right, self._tried * kept + right + (right < compared)
            self._misses = 0 if right else self._misses + 1
        self._follows = drafted and right > 0
        # A token that differs takes the place of the draft's.
        self._place = self._start + len(written) if self._follows else self._place + len(written)

    def _find(self, written: Sequence[int]) -> int:
        """Return where in the text the row's last tokens stand: near its place in the draft, else anywhere."""
        runs = {length: self._ends.get(tuple(written[-length:]), []) for length in _REACH}
        for length, reach in _REACH.items():
            ends = runs[length]
            near = bisect_right(ends, self._place - 1 - _BACK)
            if near < len(ends) and ends[near] < min(self._place + reach, len(self._draft)):
                return ends[near]
        if not self._follows:
            for length in (3, 2):
                if runs[length]:
                    return runs[length][-1]
        return min(self._place, len(self._draft))

    def _extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            # Runs are entered once something follows them.
            end = len(self._text)
            for length in range(1, min(3, end) + 1):
                run = tuple(self._text[end - length :])
                if _SEPARATOR not in run:
                    self._ends[run].append(end)
            self._text.append(token)


# What a row, and each guessed token of a row, cost in a forward pass, as shares of the pass's fixed cost. All constants
# of this file that stand for time were measured on a CPU alone, with a model of 6.5 million parameters on one core.
# Those of a GPU are guessed: it takes dozens of tokens in the time of one (`bench/gpu.py` measures what they should
# be). No constant changes what is written, only how many passes it takes.
_COSTS = {"cpu": (0.15, 0.05)}
_ACCELERATED_COSTS = (0.004, 0.004)
# So much of each draft is verified beside the prompts, if a second pass for the rest adds at most this share to what
# prompts and drafts cost: a batch of rewritten answers then spends little on drafts of which nothing is kept.
_FIRST_SLICE, _SECOND_PASS_SHARE = 16, 0.05
# What a row may spend on guesses, in its shares of plain passes: so many at first, a share of each one that it took
# part in, and all that its guesses have saved. That bounds what wrong guesses can cost, whatever the text.
_INITIAL_BUDGET, _BUDGET_GROWTH = 1.0, 0.02


@dataclass(frozen=True)
class Verified:
    """What the first pass says of a draft.

    Args:
        row: which draft.
        length: its tokens, as far as they were verified.
        accepted: how many of them, from the first on, the model would have written.
        log_likelihood: mean log-probability of its tokens given those before them, in nats per token.
        margin: by how much the first token is more likely than any other one, in nats; negative if one is more likely.
        gap: by how much, at most, another token is more likely than the draft's, in nats; 0 if none is anywhere.
    """

    row: int
    length: int
    accepted: int
    log_likelihood: float
    margin: float
    gap: float


@dataclass
class DraftedRow:
    """A row while it is decoded, and when it is done.

    Attributes:
        tokens: what the model wrote, its end token included.
        ended: whether there is an end token; else the row was stopped at its limit.
        accepted_by_gate: whether a gate let the draft pass as it is; `tokens` are not decoded then.
        passes: forward passes that the row took part in.
        accepted: tokens of the draft, or guessed later, that the model would have written.
        rejected: tokens that it would not have written, or that stand behind such a one.
        budget: what may be spent on guesses, in plain passes of the row.
    """

    prompt: list[int] = field(repr=False)
    draft: list[int] = field(repr=False)
    limit: int
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    accepted_by_gate: bool = False
    passes: int = 0
    accepted: int = 0
    rejected: int = 0
    budget: float = field(default=_INITIAL_BUDGET, repr=False)

    @property
    def done(self) -> bool:
        """Whether nothing more will be written."""
        return self.ended or self.accepted_by_gate or len(self.tokens) == self.limit


class DraftDecoder:
    """Decodes a batch of rows, pass by pass.

    Args:
        model: the model, checked for rows of different lengths.
        prompts: tokens of R prompts, at least one each.
        drafts: tokens that each row may come out as, the end token included; may be empty.
        ends: tokens that end a row.
        limits: most tokens of each row.
        gate: called with what the first pass says of each draft; where it returns True the draft passes as it is.

    Attributes:
        rows: the rows in the order given; they grow with every `step`.

    Raises:
        InputError: a prompt is empty, or a limit is below 1.
    """

    def __init__(
        self,
        model: RaggedModel,
        prompts: Sequence[list[int]],
        drafts: Sequence[list[int]],
        ends: Sequence[int],
        limits: Sequence[int],
        gate: Callable[[Verified], bool] | None = None,
    ) -> None:
        for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True), start=1):
            if not prompt:
                raise InputError(f"prompt {number} has no tokens: give at least one")
            if limit < 1:
                raise InputError(f"limit {number} must be at least 1, found {limit}")
        self._ends, self._gate = frozenset(ends), gate
        self.rows = [DraftedRow(*row) for row in zip(prompts, drafts, limits, strict=True)]
        self._batch = [(row, PromptLookup(row.draft, row.prompt)) for row in self.rows]
        self._cache = RaggedRows(model, len(self.rows))
        self._costs = _COSTS.get(model.device.type, _ACCELERATED_COSTS)

    @property
    def passes(self) -> int:
        """Forward passes of the batch so far."""
        return self._cache.passes

    @property
    def done(self) -> bool:
        """Whether all rows are."""
        return all(row.done for row, _ in self._batch)

    def run(self) -> list[DraftedRow]:
        """Decode all rows to their ends; returns them."""
        while not self.done:
            self.step()
        return self.rows

    def step(self) -> None:
        """Verify the drafts, or a guess for each row; every row that is not done grows, or passes the gate.

        Raises:
            DeadlineOver: this thread's work has a deadline, and it is over.
        """
        if (deadline := current()) is not None:
            deadline.check()
        first = self._cache.passes == 0
        if first:
            row_cost, token_cost = self._costs
            computed = len(self.rows) * max(len(row.prompt) + len(row.draft) for row in self.rows)
            # A gate has to see the whole draft.
            sliced = 1 + row_cost * len(self.rows) <= _SECOND_PASS_SHARE * token_cost * computed and self._gate is None
            most = _FIRST_SLICE if sliced else None
            self._verify([row.prompt for row, _ in self._batch], [self._cut(r, r.draft)[:most] for r, _ in self._batch])
        else:
            # As many tokens are guessed as pay in the batch, and as a row has budget for.
            guesses, rates = list[list[int]](), []
            for row, lookup in self._batch:
                guess = [] if row.done else self._cut(row, lookup.propose(row.tokens))
                guesses.append(guess[: int(row.budget / self._token_cost)])
                rates.append((lookup.first, lookup.rate, len(guesses[-1])))
            width = best_width(rates, *self._costs)
            self._verify([row.tokens[-1:] for row, _ in self._batch], [guess[:width] for guess in guesses])
        going = [i for i, (row, _) in enumerate(self._batch) if not row.done]
        if len(self._batch) - len(going) > (0 if first else FINISHED_SHARE) * len(self._batch):
            self._cache.select(going)
            self._batch = [self._batch[i] for i in going]

    @property
    def _token_cost(self) -> float:
        """What a guessed token costs, in a row's shares of plain passes."""
        row_cost, token_cost = self._costs
        return token_cost / (1 / len(self._batch) + row_cost)

    def _cut(self, row: DraftedRow, guess: list[int]) -> list[int]:
        """As much of a guess as the row can become: through its first end, within the limit."""
        guess = guess[: row.limit - len(row.tokens)]
        end = next((i for i, token in enumerate(guess, start=1) if token in self._ends), len(guess))
        return guess[:end]

    def _verify(self, pending: Sequence[list[int]], guesses: Sequence[list[int]]) -> None:
        """Feed each row the tokens that are not in the cache yet with a guess behind them; accept what is right."""
        tokens, wanted, targets = [], [], []
        for (row, _), head, guess in zip(self._batch, pending, guesses, strict=True):
            # Nothing can follow a guess that ends the row, so that its last token need not be fed. A row that is done
            # goes on as padding until it is dropped.
            closed = bool(guess) and (guess[-1] in self._ends or len(row.tokens) + len(guess) == row.limit)
            closed = closed or row.done
            tokens.append(head + (guess[:-1] if closed else guess))
            wanted.append(len(guess) + (not closed))
            targets.append(guess if closed else [*guess, 0])
        compared = targets if any(guesses) else None
        # The first pass alone compares drafts that a gate is to decide on.
        gate = self._gate if self._cache.passes == 0 else None
        token_cost = self._token_cost
        found, passes = self._cache.append(tokens, wanted, compared, scored=compared is not None and gate is not None)
        for number, ((row, lookup), guess) in enumerate(zip(self._batch, guesses, strict=True)):
            if row.done:
                continue
            expected, before = found[number].tokens, len(row.tokens)
            pairs = zip(guess, expected, strict=False)
            accepted = next((i for i, (guessed, token) in enumerate(pairs) if guessed != token), len(guess))
            row.tokens += expected[: accepted + 1]
            row.passes += passes[number]
            row.accepted += accepted
            row.rejected += len(guess) - accepted
            row.ended = row.tokens[-1] in self._ends
            # A draft that was verified with the prompt is no guess; that it was right says how it may go on.
            row.budget += accepted + _BUDGET_GROWTH - (len(guess) * token_cost if before else 0.0)
            lookup.update(row.tokens[before:])
            if gate is not None and guess and not row.ended:
                likelihood = sum(found[number].log_probs[: len(guess)]) / len(guess)
                margins = found[number].margins[: len(guess)]
                gap = max(0.0, -min(margins))
                row.accepted_by_gate = gate(Verified(number, len(guess), accepted, likelihood, margins[0], gap))
                if row.accepted_by_gate:
                    row.tokens = []
        # All tokens but the last one, which is fed with the next guess.
        self._cache.lengths = [len(row.prompt) + len(row.tokens) - 1 for row, _ in self._batch]


def best_width(guesses: Sequence[tuple[float, float, int]], row_cost: float, token_cost: float) -> int:
    """Return how many guessed tokens a row to verify in a pass, so that most tokens are written for what it costs.

    Args:
        guesses: of each row, the probability that the first guessed token is right, that of each further one if those
            before it are, and how many are guessed.
        row_cost: of a row in a pass, as a share of the pass's fixed cost.
        token_cost: of one guessed token, likewise.
    """
    longest = max(length for _, _, length in guesses)
    if not longest:
        return 0
    powers = [1 << i for i in range(longest.bit_length())]
    widths = sorted({0, longest, *powers, *(power + power // 2 for power in powers if power + power // 2 < longest)})

    def tokens_for_cost(width: int) -> float:
        written = float(len(guesses))
        for first, rate, length in guesses:
            # The first wrong token ends a guess: Σ first·rateⁱ for i below its length.
            length = min(width, length)
            written += first * (length if rate >= 1 else (1 - rate**length) / (1 - rate))
        return written / (1 + len(guesses) * (row_cost + token_cost * width))

    return max(widths, key=tokens_for_cost)
