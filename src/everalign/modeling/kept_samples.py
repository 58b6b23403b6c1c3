"""Completions sampled chunk after chunk, each on disk before the next begins: a kill costs one chunk at most."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from everalign.data.messages import Prompt
from everalign.line_store import LineStore
from everalign.modeling.policy import Policy
from everalign.modeling.sampling import Samples, SamplingOptions, check_prompts, sample_completions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prompts sampled between two writes.
_CHUNK = 256


def sample_kept(
    policy: Policy,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    store: LineStore,
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
        store: what it holds is taken as it is; one line for each chunk. It has to be of these arguments alone.
        seed: seeds the draw, which does not depend on where an earlier call was broken off.
        tokens_per_batch: tokens held at once.
        progress: called with ("sampling", prompts done, prompts in all).

    Raises:
        InputError: a prompt cannot be rendered or is too long, or what the store holds is damaged.
    """
    found = _read(store)
    if len(found) > len(prompts):
        raise store.damaged()
    if len(found) < len(prompts):
        # All of them, by their numbers in all: not chunk by chunk, hours apart.
        check_prompts(tokenizer, prompts, options)
    for start in range(len(found), len(prompts), _CHUNK):
        chunk = prompts[start : start + _CHUNK]
        drawn = sample_completions(
            policy, tokenizer, chunk, options, seed=(seed + start) % 2**31, tokens_per_batch=tokens_per_batch
        )
        store.add([[[list(samples.texts), samples.unfinished] for samples in drawn]])
        found += drawn
        progress("sampling", len(found), len(prompts))
    return found


def _read(store: LineStore) -> list[Samples]:
    chunks: list[Any] = store.read()
    try:
        return [Samples(tuple(texts), unfinished) for chunk in chunks for texts, unfinished in chunk]
    except (TypeError, ValueError):
        raise store.damaged() from None
