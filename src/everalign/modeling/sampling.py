"""Completions sampled from a policy, many prompts at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from everalign.data.batches import batches_by_length
from everalign.data.templating import ChatFormat, Prompt
from everalign.errors import InputError
from everalign.modeling.decoding import continue_rows, pick
from everalign.modeling.decoding_cache import pad_left
from everalign.modeling.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int], None]


@dataclass(frozen=True)
class SamplingOptions:
    """How completions are drawn.

    Args:
        completions: K, drawn independently for each prompt.
        temperature: what logits are divided by; 1 draws from the policy itself.
        max_new_tokens: longest completion, its end mark included.
        max_prompt_tokens: longer prompts are an error, since an answer to half a question is no answer.
    """

    completions: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 256
    max_prompt_tokens: int = 1024

    def __post_init__(self) -> None:
        for name in ("completions", "max_new_tokens", "max_prompt_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, found {value!r}")
        value = self.temperature
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise InputError(f"temperature must be a number above 0, found {value!r}")


@dataclass(frozen=True)
class Samples:
    """What a policy answered to one prompt.

    Attributes:
        texts: finished completions, in the order they were drawn, without their end mark.
        unfinished: how many had not ended at the length limit, or had ended at once and say nothing. They are no
            samples of the policy's answers, and are left out.
    """

    texts: tuple[str, ...]
    unfinished: int


def sample_completions(
    policy: Policy,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    *,
    seed: int,
    tokens_per_batch: int = 16384,
    progress: Progress | None = None,
) -> list[Samples]:
    """Draw K completions for every prompt from the policy as it is switched now.

    The draw depends on the seed, the prompts and `tokens_per_batch`, never on the global random state.

    Args:
        policy: in evaluation mode or not; it is put there for the while.
        tokenizer: the model's.
        prompts: text, or chat messages that end before the assistant speaks.
        options: how.
        seed: seeds the draw.
        tokens_per_batch: tokens held at once, padding and what may yet be drawn included.
        progress: called with the number of prompts done after each batch.

    Returns:
        The samples of each prompt, in the prompts' order.

    Raises:
        InputError: a prompt cannot be rendered or is too long; names its number.
    """
    form = ChatFormat(tokenizer)
    texts, tokens = _checked(form, prompts, options)
    ends = [_end_of(form, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    lengths = [options.completions * (len(ids) + options.max_new_tokens) for ids in tokens]
    found: dict[int, Samples] = {}
    was_training = policy.training
    policy.eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for rows in batches_by_length(lengths, tokens_per_batch):
            drawn = _draw(
                policy, [tokens[row] for row in rows], sorted({ends[row] for row in rows} | {form.eos}), options
            )
            for place, row in enumerate(rows):
                answers = drawn[place * options.completions : (place + 1) * options.completions]
                found[row] = _samples(tokenizer, answers, {ends[row], form.eos})
            if progress is not None:
                progress(len(rows))
    policy.train(was_training)
    return [found[row] for row in range(len(prompts))]


def check_prompts(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], options: SamplingOptions) -> None:
    """Refuse prompts that `sample_completions` would refuse, before any are answered."""
    _checked(ChatFormat(tokenizer), prompts, options)


def _checked(
    form: ChatFormat, prompts: Sequence[Prompt], options: SamplingOptions
) -> tuple[list[str], list[list[int]]]:
    """Return the prompts as text and as tokens, none of them too long."""
    texts = [form.prompt_text(prompt) for prompt in prompts]
    tokens = form.prompt_tokens(prompts, texts)
    for number, ids in enumerate(tokens, start=1):
        if len(ids) > options.max_prompt_tokens:
            limit = f"max_prompt_tokens allows {options.max_prompt_tokens}"
            raise InputError(f"prompt {number} has {len(ids)} tokens, and {limit}: raise it or shorten the prompt")
    return texts, tokens


def _end_of(form: ChatFormat, prompt: Prompt, text: str) -> int:
    """Return the token that ends an answer to this prompt: the template's end of turn, or EOS."""
    return form.response_tokens([form.response_text(prompt, text, "x")])[0][-1]


def _draw(policy: Policy, prompts: Sequence[list[int]], ends: list[int], options: SamplingOptions) -> list[list[int]]:
    """Draw K answers to every prompt, prompt by prompt: the new tokens, up to the first end mark or the limit."""
    with policy.decoding(policy.on_device(pad_left(prompts, ends[0]))) as decoder:
        decoder.take(torch.arange(len(prompts)).repeat_interleave(options.completions))
        return continue_rows(decoder, lambda logits: pick(logits / options.temperature), ends, options.max_new_tokens)


def _samples(tokenizer: Any, answers: list[list[int]], ends: set[int]) -> Samples:
    texts = []
    for ids in answers:
        length = next((i for i, token in enumerate(ids) if token in ends), None)
        text = (
            ""
            if length is None
            else tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
        if text.strip():
            texts.append(text)
    return Samples(tuple(texts), len(answers) - len(texts))
