"""Completions sampled chunk after chunk, each on disk before the next begins: a kill costs one chunk at most."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from everalign.data.messages import Prompt
from everalign.modeling.policy import Policy
from everalign.modeling.sampling import Samples, SamplingOptions, check_prompts, sample_completions
from everalign.storage import Journal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prompts sampled between two writes.
_CHUNK = 256


def sample_kept(
    policy: Policy,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    journal: Journal,
    *,
    seed: int,
    tokens_per_batch: int = 16384,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Samples]:
    """Draw K completions for every prompt, as `sample_completions` does, and keep them.

    Args:
        policy: as it is switched now.
        tokenizer: the model's.
        prompts: text, or chat messages.
        options: how.
        journal: what it holds is taken as it is, by the number of a chunk's first prompt. It has to be of these
            arguments alone.
        seed: seeds the draw, which does not depend on where an earlier call was broken off.
        tokens_per_batch: tokens held at once.
        progress: called with ("sampling", prompts done, prompts in all).

    Raises:
        InputError: a prompt cannot be rendered or is too long, or what the journal holds is damaged.
    """
    starts = range(0, len(prompts), _CHUNK)
    found = _read(journal, starts, len(prompts))
    if len(found) < len(starts):
        # All of them, by their numbers in all: not chunk by chunk, hours apart.
        check_prompts(tokenizer, prompts, options)
    for start in (start for start in starts if start not in found):
        chunk = prompts[start : start + _CHUNK]
        drawn = sample_completions(
            policy, tokenizer, chunk, options, seed=(seed + start) % 2**31, tokens_per_batch=tokens_per_batch
        )
        journal.put({start: [[list(samples.texts), samples.unfinished] for samples in drawn]})
        found[start] = drawn
        progress("sampling", sum(map(len, found.values())), len(prompts))
    return [samples for start in starts for samples in found[start]]


def _read(journal: Journal, starts: range, prompts: int) -> dict[int, list[Samples]]:
    """Return the chunks that are there, by the number of their first prompt."""
    kept: dict[int, Any] = journal.read(starts)
    try:
        found = {
            start: [Samples(tuple(texts), unfinished) for texts, unfinished in chunk] for start, chunk in kept.items()
        }
    except (TypeError, ValueError):
        raise journal.damaged() from None
    if any(len(chunk) != min(_CHUNK, prompts - start) for start, chunk in found.items()):
        raise journal.damaged()
    return found
