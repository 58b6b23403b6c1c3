"""Rows of different lengths that grow by different numbers of tokens in a forward pass, and can be shortened again."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everalign.errors import EveralignError, InputError
from everalign.modeling.architecture import study
from everalign.modeling.grouped_attention import grouped_attention
from everalign.modeling.likelihood import LanguageHead
from everalign.modeling.slot_cache import SlotCache, windows_of

TOKENS_PER_PASS = 16_384
_LOGITS_AT_ONCE = 1 << 24
# The head is computed for so many of a row's positions at first, and then for twice as many as before.
_FIRST_SLICE = 32
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
_ATTENTIONS = ("sdpa", "eager")


@dataclass(frozen=True)
class Predicted:
    """What a model expects at K positions of a row.

    Args:
        tokens: the most likely ones.
        behind: by how much less likely the target is, in nats: 0 where it is the same token; empty without targets.
        log_probs: of the targets, in nats; empty where they were not asked for.
        margins: by how much targets are more likely than the most likely other token, in nats; likewise.
    """

    tokens: list[int]
    behind: list[float]
    log_probs: list[float]
    margins: list[float]


class RaggedModel:
    """A model made ready to compute rows of different lengths.

    Args:
        model: a Hugging Face causal language model, in evaluation mode.
        tokens_per_pass: tokens computed at once at most, padding included; longer inputs take several passes.

    Raises:
        InputError: the model cannot: it keeps something else than keys and values of its past, or does not follow an
            attention mask that is given to it.
    """

    def __init__(self, model: Any, tokens_per_pass: int = TOKENS_PER_PASS) -> None:
        if tokens_per_pass < 1:
            raise InputError(f"tokens per pass: must be at least 1, found {tokens_per_pass}")
        config = model.config.get_text_config()
        windows = windows_of(model)
        if windows is None:
            raise InputError(
                f"drafts cannot be verified by a {config.model_type} model: it keeps more of its past than attention"
            )
        self.model, self.windows, self.tokens_per_pass = model, windows, tokens_per_pass
        self.device, self.dtype = model.device, next(model.parameters()).dtype
        self.kinds = getattr(config, "layer_types", None) or [None] * len(windows)
        attention = getattr(config, "_attn_implementation", "sdpa")
        if attention not in _ATTENTIONS:
            raise InputError(f"drafts cannot be verified with {attention} attention: load the model with sdpa or eager")
        self._additive = attention == "eager"
        architecture = study(model)
        self.head = LanguageHead(model, architecture)
        if architecture.unshared_because:
            # Some models restrict what a token sees inside of their layers, where no mask of ours reaches.
            raise InputError(f"{self._name}: {architecture.unshared_because}")
        self._check()

    def masks(self, slots: Tensor, used: int) -> Any:
        """Return what tokens in `slots` (R, Q) see of `used` slots: (R, 1, Q, used), one for each kind of layer.

        None where it is what a model sees without a mask.
        """
        found: dict[Any, Tensor] = {}
        for kind, window in zip(self.kinds, self.windows, strict=True):
            if kind not in found:
                found[kind] = self._mask(slots, used, window)
        return found if len(found) > 1 else next(iter(found.values()))

    def _mask(self, slots: Tensor, used: int, window: int | None) -> Tensor:
        seen, own = torch.arange(used, device=slots.device), slots[:, None, :, None]
        allowed = seen <= own
        if window is not None:
            allowed &= seen > own - window
        if not self._additive:
            return allowed
        return torch.zeros_like(allowed, dtype=self.dtype).masked_fill(~allowed, torch.finfo(self.dtype).min)

    def _check(self) -> None:
        """Compare logits of a row that is computed in two passes beside another one with those of the row alone."""
        vocabulary = self.model.config.get_text_config().vocab_size
        row, other = ([(start + 5 * i) % vocabulary for i in range(8)] for start in (1, 3))
        try:
            with torch.no_grad():
                alone = self.model(input_ids=torch.tensor([row], device=self.device), use_cache=False).logits[0, 4:]
                rows = RaggedRows(self, 2)
                # The shorter row, so that its place in the cache is not the one that a model would think of.
                rows.feed([row[:4], other[:6]], [0, 0])
                found = rows.logits([row[4:], other[6:7]], [4, 0])
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{self._name}: takes no attention mask of its own ({type(error).__name__})") from error
        difference = (alone.float() - found).abs().max()
        if not difference <= _TOLERANCES[self.dtype] * alone.float().abs().max().clamp(min=1.0):
            raise InputError(f"{self._name}: its layers do not follow an attention mask that is given to them")

    @property
    def _name(self) -> str:
        return f"drafts cannot be verified by a {self.model.config.get_text_config().model_type} model"


class RaggedRows:
    """R rows, empty at first.

    Attributes:
        lengths: tokens of each row whose keys and values count. Setting one back takes back the row's last tokens.
        passes: forward passes so far.
    """

    def __init__(self, model: RaggedModel, rows: int) -> None:
        self._model, self._cache = model, SlotCache(len(model.windows))
        self.lengths = [0] * rows
        self.passes = 0

    def take(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        self.lengths = [self.lengths[row] for row in rows]
        if rows:
            self._cache.select(torch.tensor(rows, device=self._model.device), max(self.lengths))

    def feed(
        self,
        tokens: Sequence[list[int]],
        wanted: Sequence[int],
        targets: Sequence[list[int]] | None = None,
        scored: bool = False,
    ) -> tuple[list[Predicted], list[int]]:
        """Write tokens behind each row.

        Args:
            tokens: of each row, at least one.
            wanted: behind how many of each row's last tokens the next one is predicted.
            targets: tokens of each row, as many as wanted, that the predictions are compared with.
            scored: whether log-probabilities and margins of all targets are asked for; else nothing more of a row is
                predicted once most predictions are no targets, which with a large vocabulary saves much of a pass.

        Returns:
            The predictions of each row, and in how many forward passes each row took part.

        Raises:
            EveralignError: a logit is NaN.
            InputError: a row becomes longer than the model can read, or can write with the same positions throughout.
        """
        longest = max(length + len(new) for length, new in zip(self.lengths, tokens, strict=True))
        self._model.head.lengths.check_written(longest, "shorten it")
        hidden, places = self._states(tokens, wanted)
        numbers: list[list[int]] = [[] for _ in tokens]
        for number, (row, _) in enumerate(places):
            numbers[row].append(number)
        found = [Predicted([], [], [], []) for _ in tokens]
        start, end = 0, max(wanted) if scored or targets is None else _FIRST_SLICE
        going = [row for row, count in enumerate(wanted) if count]
        while going:
            part = [(row, number) for row in going for number in numbers[row][start:end]]
            asked = None if targets is None else [token for row in going for token in targets[row][start:end]]
            order = [number for _, number in part]
            states = hidden if order == list(range(len(hidden))) else hidden[order]
            for (row, _), values in zip(part, self._predict(states, asked, scored), strict=True):
                row_found = found[row]
                row_found.tokens.append(values[0])
                if targets is not None:
                    row_found.behind.append(values[1])
                if scored:
                    row_found.log_probs.append(values[2])
                    row_found.margins.append(values[3])
            going = [
                row
                for row in going
                if end < wanted[row] and (targets is None or scored or _on_course(found[row].behind[start:]))
            ]
            start, end = end, end + 2 * (end - start)
        width = self._width(len(tokens))
        return found, [-(-len(row) // width) for row in tokens]

    def logits(self, tokens: Sequence[list[int]], wanted: Sequence[int]) -> Tensor:
        """Write tokens behind each row as `feed` does; returns the logits (K, V) fp32 themselves."""
        return self._head(self._states(tokens, wanted)[0])

    def _width(self, rows: int) -> int:
        return max(1, self._model.tokens_per_pass // rows)

    @torch.no_grad()
    def _states(self, tokens: Sequence[list[int]], wanted: Sequence[int]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Return hidden states (or logits) of the K tokens behind which is predicted, and those's rows and columns."""
        longest, width = max(map(len, tokens)), self._width(len(tokens))
        parts, places = [], []
        for start in range(0, longest, width):
            end = min(start + width, longest)
            here = [
                (row, column)
                for row, (ids, count) in enumerate(zip(tokens, wanted, strict=True))
                for column in range(max(start, len(ids) - count), min(end, len(ids)))
            ]
            parts.append(self._pass(tokens, start, end, here))
            places += here
        self.lengths = [length + len(ids) for length, ids in zip(self.lengths, tokens, strict=True)]
        return torch.cat(parts), places

    def _pass(self, tokens: Sequence[list[int]], start: int, end: int, wanted: list[tuple[int, int]]) -> Tensor:
        """Compute columns `start` to `end` of the tokens, shorter rows padded on the right."""
        model, self.passes = self._model, self.passes + 1
        padded = [ids[start:end] + [0] * (end - start - len(ids[start:end])) for ids in tokens]
        slots = self._cache.place([length + start for length in self.lengths], end - start, model.device)
        positions = slots
        if any(len(ids) < end for ids in tokens):
            # Padding must not stand where a model has no position any more.
            last = [[length + len(ids) - 1] for length, ids in zip(self.lengths, tokens, strict=True)]
            positions = torch.minimum(slots, torch.tensor(last, device=model.device))
        inputs = {
            "input_ids": torch.tensor(padded, device=model.device),
            "attention_mask": self._mask(slots, start, end),
            "position_ids": positions,
            "past_key_values": self._cache,
            "use_cache": True,
        }
        everything = len(wanted) == len(padded) * (end - start)
        if not everything:
            rows, columns = torch.tensor(wanted, dtype=torch.long, device=model.device).reshape(-1, 2).unbind(1)
        if model.head.chunked:
            with nullcontext() if inputs["attention_mask"] is None else grouped_attention(model.model):
                states: Tensor = model.model.base_model(**inputs).last_hidden_state
            return states.flatten(0, 1) if everything else states[rows, columns - start]
        if everything:
            every: Tensor = model.model(**inputs).logits
            return every.flatten(0, 1)
        kept, places = torch.unique(columns - start, return_inverse=True)
        if len(kept) == 0:
            kept = torch.zeros(1, dtype=torch.long, device=model.device)
        logits: Tensor = model.model(**inputs, logits_to_keep=kept).logits
        return logits[rows, places]

    def _mask(self, slots: Tensor, start: int, end: int) -> Any:
        """None where the model's own causal mask is right, which is faster: equal rows that begin or grow by one."""
        first = start + max(self.lengths)
        simple = all(window is None for window in self._model.windows) and min(self.lengths) == max(self.lengths)
        if simple and (first == 0 or end - start == 1):
            return None
        return self._model.masks(slots, first + end - start)

    def _head(self, hidden: Tensor) -> Tensor:
        return self._model.head.logits(hidden).float()

    @torch.no_grad()
    def _predict(self, hidden: Tensor, targets: list[int] | None, scored: bool) -> Iterator[tuple[Any, ...]]:
        """Yield token, behind, and where scored log-probability and margin, at K positions; some of them at a time."""
        vocabulary = self._model.model.config.get_text_config().vocab_size
        size = max(1, _LOGITS_AT_ONCE // vocabulary)
        for start in range(0, len(hidden), size):
            logits = self._head(hidden[start : start + size])
            largest, best = logits.max(-1)
            # No NaN equals itself.
            if any(value != value for value in largest.tolist()):
                raise EveralignError("the model's logits are NaN: its weights are damaged, or its precision too low")
            if targets is None:
                yield from zip(best.tolist())
                continue
            asked = torch.tensor(targets[start : start + size], device=logits.device)[:, None]
            of_asked = logits.gather(1, asked)[:, 0]
            values = [best, largest - of_asked]
            if scored:
                values.append(of_asked - logits.logsumexp(-1))
                values.append(of_asked - logits.scatter(1, asked, float("-inf")).amax(-1))
            yield from zip(*(value.tolist() for value in values), strict=True)


def _on_course(behind: Sequence[float]) -> bool:
    """Whether at least half of the predictions are the targets."""
    return 2 * sum(value == 0 for value in behind) >= len(behind)
