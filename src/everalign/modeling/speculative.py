"""Greedy decoding of rows that resemble a draft: the draft is verified first, and only what differs is decoded.

    1. One forward pass over prompt and draft says what the model would have written at every position. As far as that
       is the draft, it is accepted; a draft that is accepted with its end is done. In large batches of long drafts the
       first pass takes a slice of each, so that little is lost where nothing of them is kept.
    2. Behind the first difference stands the model's own token. From there on what may come next is guessed from the
       rest of the draft and from the prompt, and each forward pass checks a guess and writes one token more.

Whatever is guessed, the tokens are those of plain greedy decoding, up to the rounding of the logits.

Source: speculative edits, as in EfficientEdit (Wang et al., arXiv 2506.02780).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from everalign.deadlines import check_deadline
from everalign.errors import InputError
from everalign.modeling.decoding import FINISHED_SHARE, Predicted, RaggedModel, RaggedRows
from everalign.modeling.prompt_lookup import Proposals

# What a row, and each guessed token of a row, cost in a forward pass, as shares of the pass's fixed cost (measured on a
# model of 6.5 million parameters on one core). A GPU takes dozens of tokens in the time of one.
_COSTS = {"cpu": (0.15, 0.05)}
_ACCELERATED_COSTS = (0.004, 0.004)
# So much of each draft is verified beside the prompts, if a second pass for the rest adds at most this share to what
# prompts and drafts cost: a batch of rewritten answers then spends little on drafts that come to nothing.
_FIRST_SLICE, _SECOND_PASS_SHARE = 16, 0.05
# What a row may spend on guesses, in its shares of plain passes: so many at first, a share of each one that it took
# part in, and all that its guesses have saved. What guesses can lose is bounded by that, whatever the text.
_CREDIT, _INTEREST = 1.0, 0.02


@dataclass(frozen=True)
class Verified:
    """What the first pass says of a draft.

    Args:
        row: which draft.
        length: its tokens, as far as they were verified.
        accepted: how many of them, from the first on, the model would have written.
        log_likelihood: mean log-probability of its tokens given those before them, in nats per token.
        margin: by how much the first token is more likely than any other one, in nats; negative if one is more likely.
    """

    row: int
    length: int
    accepted: int
    log_likelihood: float
    margin: float


@dataclass
class DraftedRow:
    """A row while it is decoded, and when it is done.

    Attributes:
        tokens: what the model wrote, its end token included.
        ended: whether there is an end token; else the row was stopped at its limit.
        kept: whether a gate kept the draft; `tokens` are not decoded then.
        passes: forward passes that the row took part in.
        accepted: tokens of the draft, or guessed later, that the model would have written.
        rejected: tokens that it would not have written, or that stand behind such a one.
        credit: what may be spent on guesses, in plain passes of the row.
    """

    prompt: list[int] = field(repr=False)
    draft: list[int] = field(repr=False)
    limit: int
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    kept: bool = False
    passes: int = 0
    accepted: int = 0
    rejected: int = 0
    credit: float = field(default=_CREDIT, repr=False)

    @property
    def over(self) -> bool:
        """Whether nothing more will be written."""
        return self.ended or self.kept or len(self.tokens) == self.limit

    @property
    def cached(self) -> int:
        """Tokens whose keys and values count: all but the last one, which is to be fed."""
        return len(self.prompt) + len(self.tokens) - 1


class DraftDecoder:
    """Decodes a batch of rows, pass by pass.

    Args:
        model: the model, made ready.
        prompts: tokens of R prompts, at least one each.
        drafts: tokens that each row may come out as, the end token included; may be empty.
        ends: tokens that end a row.
        limits: most tokens of each row.
        gate: called with what the first pass says of each draft; where it returns True the draft is kept as it is.

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
        self._batch = [(row, Proposals(row.draft, row.prompt)) for row in self.rows]
        self._cache = RaggedRows(model, len(self.rows))
        self._costs = _COSTS.get(model.device.type, _ACCELERATED_COSTS)

    @property
    def passes(self) -> int:
        """Forward passes of the batch so far."""
        return self._cache.passes

    @property
    def over(self) -> bool:
        """Whether all rows are."""
        return all(row.over for row, _ in self._batch)

    def run(self) -> list[DraftedRow]:
        """Decode all rows to their ends; returns them."""
        while not self.over:
            self.step()
        return self.rows

    def step(self) -> None:
        """Verify the drafts, or what is guessed of each row: every row that is not over grows, or is kept.

        Raises:
            DeadlineOver: this thread's work has a deadline, and it is over.
        """
        check_deadline()
        if self._cache.passes == 0:
            first = self._first_slice()
            verified = [self._cut(row, row.draft)[:first] for row, _ in self._batch]
            self._feed([row.prompt for row, _ in self._batch], verified, self._gate)
            self._drop(0.0)
        else:
            self._feed([row.tokens[-1:] for row, _ in self._batch], self._guesses(), None)
            self._drop(FINISHED_SHARE)

    def _first_slice(self) -> int | None:
        """How much of each draft to verify in the first pass; None for all of it, which a gate has to see."""
        row_cost, token_cost = self._costs
        tokens = len(self.rows) * max(len(row.prompt) + len(row.draft) for row in self.rows)
        sliced = 1 + row_cost * len(self.rows) <= _SECOND_PASS_SHARE * token_cost * tokens
        return _FIRST_SLICE if sliced and self._gate is None else None

    def _guesses(self) -> list[list[int]]:
        """Guess each row's next tokens, as many as pay in the batch."""
        guesses = [[] if row.over else self._cut(row, proposals.propose(row.tokens)) for row, proposals in self._batch]
        price = self._price()
        guesses = [guess[: int(row.credit / price)] for (row, _), guess in zip(self._batch, guesses, strict=True)]
        rates = [
            (proposals.first, proposals.rate, len(guess))
            for (_, proposals), guess in zip(self._batch, guesses, strict=True)
        ]
        width = best_width(rates, *self._costs)
        return [guess[:width] for guess in guesses]

    def _price(self) -> float:
        """What a guessed token costs, in a row's shares of plain passes."""
        row_cost, token_cost = self._costs
        return token_cost / (1 / len(self._batch) + row_cost)

    def _cut(self, row: DraftedRow, guess: list[int]) -> list[int]:
        """As much of a guess as the row can become: through its first end, within the limit."""
        guess = guess[: row.limit - len(row.tokens)]
        end = next((i for i, token in enumerate(guess, start=1) if token in self._ends), len(guess))
        return guess[:end]

    def _feed(
        self, unfed: Sequence[list[int]], guesses: Sequence[list[int]], gate: Callable[[Verified], bool] | None
    ) -> None:
        """Feed the tokens that are not in the cache with a guess behind them, and accept what is right of it."""
        tokens, wanted, targets = [], [], []
        for (row, _), head, guess in zip(self._batch, unfed, guesses, strict=True):
            # A row that is over goes on as padding until it is dropped.
            closed = row.over or self._closes(row, guess)
            tokens.append(head + (guess[:-1] if closed else guess))
            wanted.append(len(guess) + (not closed))
            targets.append(guess if closed else [*guess, 0])
        compared = targets if any(guesses) else None
        found, passes = self._cache.append(tokens, wanted, compared, scored=bool(compared) and gate is not None)
        for number, ((row, proposals), guess) in enumerate(zip(self._batch, guesses, strict=True)):
            if row.over:
                continue
            row.passes += passes[number]
            before = len(row.tokens)
            accepted = self._accept(row, guess, found[number].tokens)
            # A draft that was verified with the prompts is no guess; that it was right says how it may go on.
            spent = 0.0 if before == 0 else len(guess) * self._price()
            row.credit += accepted - spent + _INTEREST
            proposals.learn(row.tokens[before:], len(guess), found[number].tokens, found[number].gaps)
            if gate is not None and guess and not row.ended:
                row.kept = gate(_verified(number, found[number], len(guess), accepted))
                if row.kept:
                    row.tokens = []
        self._cache.lengths = [row.cached for row, _ in self._batch]

    def _closes(self, row: DraftedRow, guess: list[int]) -> bool:
        """Whether nothing can come behind a guess, so that its last token need not be fed."""
        return bool(guess) and (guess[-1] in self._ends or len(row.tokens) + len(guess) == row.limit)

    def _accept(self, row: DraftedRow, guess: list[int], expected: list[int]) -> int:
        """Write the tokens of a guess that are the expected ones, and the one expected behind them."""
        pairs = zip(guess, expected, strict=False)
        accepted = next((i for i, (found, wanted) in enumerate(pairs) if found != wanted), len(guess))
        row.tokens += expected[: accepted + 1]
        row.accepted += accepted
        row.rejected += len(guess) - accepted
        row.ended = row.tokens[-1] in self._ends
        return accepted

    def _drop(self, share: float) -> None:
        """Drop the rows that are over, if they are more than this share of the batch."""
        going = [i for i, (row, _) in enumerate(self._batch) if not row.over]
        if len(self._batch) - len(going) > share * len(self._batch):
            self._cache.select(going)
            self._batch = [self._batch[i] for i in going]


def best_width(guesses: Sequence[tuple[float, float, int]], row_cost: float, token_cost: float) -> int:
    """Return how many guessed tokens a row to check in a pass, so that most tokens are written for what it costs.

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

    def yields(width: int) -> float:
        written = sum(1 + _expected(first, rate, min(width, length)) for first, rate, length in guesses)
        return written / (1 + len(guesses) * (row_cost + token_cost * width))

    return max(widths, key=yields)


def _expected(first: float, rate: float, length: int) -> float:
    """How many of `length` guessed tokens are right on average, when the first wrong one ends them."""
    return first * (float(length) if rate >= 1 else (1 - rate**length) / (1 - rate))


def _verified(row: int, found: Predicted, length: int, accepted: int) -> Verified:
    return Verified(row, length, accepted, sum(found.log_probs[:length]) / length, found.margins[0])
