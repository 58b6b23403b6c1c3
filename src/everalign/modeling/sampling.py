"""Sample completions from a policy, or its greedy answers, many prompts at a time; finished chunks survive a kill.

An answer ends by one of the model's end tokens, or by the text that its chat template ends a turn with.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from everalign.data.chat_template import Renderer, template_in_use
from everalign.data.chat_tokens import ChatFormat
from everalign.data.collate import batches_by_length
from everalign.data.messages import Prompt
from everalign.distributed import share
from everalign.errors import InputError
from everalign.modeling.decoding import continue_rows, draw, pad_left
from everalign.modeling.policy import Policy
from everalign.options import SamplingOptions
from everalign.storage import Journal, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM = "You are polite."
_QUESTION, _ANSWER, _NEXT = "How are you?", "Very well, thanks.", "Good to hear."


@dataclass(frozen=True)
class TurnEnd:
    r"""How a chat template ends an assistant's turn.

    Args:
        token: the token that ends it; None where ordinary text does, or nothing.
        text: that ordinary text, such as `### End`; the beginning of the user's turn, such as `\\nUser:`, where the
            template puts nothing else behind an answer. Empty where a token ends the turn before any text.
        lead: the white space between an answer and `token`.
        opening: what the template puts between the prompt and an answer, which a model has to write itself.
    """

    token: int | None = None
    text: str = ""
    lead: str = ""
    opening: str = ""


def turn_end(tokenizer: "PreTrainedTokenizerBase") -> TurnEnd:
    """Find out how the tokenizer's chat template ends an assistant's turn; an empty `TurnEnd` where it renders none."""
    renderer = Renderer(tokenizer)
    asked, answered, next_one = (
        {"role": role, "content": text} for role, text in (("user", _QUESTION), ("assistant", _ANSWER), ("user", _NEXT))
    )
    for start in ([asked], [{"role": "system", "content": _SYSTEM}, asked]):  # some want a system message
        try:
            prompt, whole = renderer.prompt(start), renderer.render([*start, answered], opens_answer=False)
            longer = renderer.render([*start, answered, next_one], opens_answer=False)
        except InputError:
            continue
        break
    else:
        return TurnEnd()
    before, answer, tail = whole.rpartition(_ANSWER)
    if not answer:  # rewritten
        return TurnEnd()
    if not tail.strip():
        # What only begins the user's turn ends the assistant's one all the same.
        tail = longer.rpartition(_ANSWER)[2].partition(_NEXT)[0]
    opening = before.removeprefix(prompt) if before.startswith(prompt) else ""
    found = [(tail.find(name), -len(name), name) for name in _marks(tokenizer) if name in tail]
    if not found:
        return TurnEnd(None, tail.rstrip(), "", opening)
    place, _, name = min(found)
    lead, token = tail[:place], tokenizer.convert_tokens_to_ids(name)
    return TurnEnd(token, lead.rstrip(), "" if lead.strip() else lead, opening)


def stop_token_ids(model: Any, tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Return the tokens each of which ends an answer.

    Those of the generation configuration (at which transformers' `generate` stops), the tokenizer's EOS, and the one
    that the chat template ends a turn with. Also those of the model's configuration that are no ordinary text for the
    tokenizer: where it was never set, it holds some family's default, which may be any token of another vocabulary.

    Args:
        model: a Hugging Face language model, with or without adapters.
        tokenizer: its tokenizer.
    """
    marks = {tokenizer.convert_tokens_to_ids(name) for name in _marks(tokenizer)}
    generation, *configs = (
        _ids(getattr(config, "eos_token_id", None))
        for config in (getattr(model, "generation_config", None), model.config, model.config.get_text_config())
    )
    configured = {id for ids in configs for id in ids} & marks
    end = turn_end(tokenizer).token
    own = [] if end is None else [end]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return frozenset({*generation, *configured, *eos, *own})


def special_stop_ids(model: Any, tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Return those of `stop_token_ids` that are special: no text has them, so that none is cut at one."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return stop_token_ids(model, tokenizer) & {*special, *tokenizer.all_special_ids}


def write_ends(folder: Path, generation: Any, tokenizer: "PreTrainedTokenizerBase", chats: bool) -> None:
    """Write into a model's folder which tokens end an answer, where it does not name them yet.

    They are added to those that the generation configuration names: transformers and vLLM stop there. Where that did
    not name the token that ends the turns of learned chats, it becomes the tokenizer's EOS as well, which is all that
    converters for llama.cpp look at; unless texts or chats would be tokenized otherwise then.

    Args:
        folder: with the tokenizer's files, and the base model's `generation_config.json` if it had one.
        generation: the base model's generation configuration.
        tokenizer: the one that was learned with.
        chats: whether chats were learned, whose turns the template ends; else texts, which EOS ends.
    """
    end = turn_end(tokenizer).token if chats else None
    ends = {id for id in (tokenizer.eos_token_id, end) if id is not None}
    path = folder / "generation_config.json"
    held = read_json(path) if path.is_file() else json.loads(generation.to_json_string(use_diff=True))
    named = _ids(held.get("eos_token_id"))
    if missing := sorted(ends - set(named)):
        # A model's own configuration is read in place of this file, and of nothing that the file lacks.
        write_json(path, {**held, "eos_token_id": [*named, *missing]})
    # Those who made a model that names the end already had their reasons for another EOS.
    if end is None or end == tokenizer.eos_token_id or end not in missing:
        return
    if "eos_token" in template_in_use(tokenizer) or tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        return
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if path.is_file() and "eos_token" in (content := read_json(path)):
            write_json(path, {**content, "eos_token": tokenizer.convert_ids_to_tokens(end)})


def _marks(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """Return the texts that the tokenizer reads as one token wherever they stand, white space aside."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return {name for name in added | set(tokenizer.all_special_tokens) if name.strip()}


def _ids(named: int | list[int] | None) -> list[int]:
    """Return the end tokens that a configuration names: none, one of them, or a list."""
    return [] if named is None else [named] if isinstance(named, int) else list(named)


Progress = Callable[[int], None]

# Tokens that are read before those of a turn's end.
_BEFORE = 8


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
    """Draw K completions for every prompt from the policy with the adapters that are on now.

    A prompt's draw depends on the seed, on its place among the prompts and, by rounding alone, on those beside it in a
    batch; never on the global random state, nor on how many
    processes share the batches.

    Args:
        policy: in training mode or not; it is in evaluation mode meanwhile.
        tokenizer: the model's.
        prompts: text, or chat messages that end before the assistant speaks.
        options: how.
        seed: seeds the draw.
        tokens_per_batch: most tokens held at once, padding and completions of full length included.
        progress: called with the number of prompts done after each batch.

    Returns:
        The samples of each prompt, in the prompts' order.

    Raises:
        InputError: a prompt cannot be rendered or is too long; names its number. Or prompt and completion together may
            become longer than the model can read or write.
    """
    tokens = check_prompts(tokenizer, prompts, options)
    longest = policy.prefix_length + max((len(ids) for ids in tokens), default=0) + options.max_new_tokens
    policy.head.lengths.check_written(longest, "lower max_new_tokens, or shorten the prompts")
    ends = _Ends(tokenizer, stop_token_ids(policy.peft, tokenizer), turn_end(tokenizer))
    lengths = [options.completions * (policy.prefix_length + len(ids) + options.max_new_tokens) for ids in tokens]

    def answer(batches: Sequence[list[int]]) -> list[list[Samples]]:
        found = []
        for rows in batches:
            asked = [prompts[row] for row in rows]
            seeds = [(seed, row) for row in rows]
            drawn = _draw(policy, [tokens[row] for row in rows], ends, options, asked, seeds)
            own = [drawn[i : i + options.completions] for i in range(0, len(drawn), options.completions)]
            found.append([_samples(ends, prompts[row], tokens[row], some) for row, some in zip(rows, own, strict=True)])
            if progress is not None:
                progress(len(rows))
        return found

    was_training = policy.training
    policy.eval()
    batches = batches_by_length(lengths, tokens_per_batch)
    with torch.no_grad():
        drawn = share(answer, batches)
    policy.train(was_training)
    rows = [row for batch in batches for row in batch]
    found = dict(zip(rows, (samples for some in drawn for samples in some), strict=True))
    return [found[row] for row in range(len(prompts))]


def greedy_answers(
    policy: Policy, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], options: SamplingOptions
) -> list[tuple[str, bool]]:
    """Write the greedy answer to every prompt, with the adapters that are on now.

    Args:
        policy: in training mode or not; it is in evaluation mode meanwhile.
        tokenizer: the model's.
        prompts: as in `sample_completions`.
        options: only their token limits are used.

    Returns:
        For each prompt the answer without its end mark, and whether it has ended.

    Raises:
        InputError: as in `sample_completions`.
    """
    tokens = check_prompts(tokenizer, prompts, options)
    ends = _Ends(tokenizer, stop_token_ids(policy.peft, tokenizer), turn_end(tokenizer))
    written = greedy_continuations(
        policy, tokens, ends.tokens, options.max_new_tokens, lambda number, ids: ends.finished(prompts[number], ids)
    )
    found = []
    for prompt, before, ids in zip(prompts, tokens, written, strict=True):
        text = ends.text(prompt, before, ids)
        found.append((ends.behind(before, ids), False) if text is None else (text, True))
    return found


def greedy_continuations(
    policy: Policy,
    prompts: Sequence[list[int]],
    ends: Collection[int],
    limit: int,
    finished: Callable[[int, list[int]], bool] = lambda number, ids: False,
) -> list[list[int]]:
    """Return the greedy continuation of each prompt's tokens; arguments and result as in `continue_rows`."""
    was_training = policy.training
    policy.eval()
    with torch.no_grad(), policy.decoding(policy.on_device(pad_left(prompts, min(ends)))) as decoder:
        found = continue_rows(decoder, lambda logits: logits.argmax(-1), ends, limit, finished)
    policy.train(was_training)
    return found


def check_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], options: SamplingOptions
) -> list[list[int]]:
    """Return prompts as the tokens that are read before an answer; called before any are answered.

    Raises:
        InputError: a prompt cannot be rendered or is too long; names its number.
    """
    tokens = ChatFormat(tokenizer).encode_prompts(prompts)
    for number, ids in enumerate(tokens, start=1):
        if len(ids) > options.max_prompt_tokens:
            limit = f"max_prompt_tokens allows {options.max_prompt_tokens}"
            raise InputError(f"prompt {number} has {len(ids)} tokens, and {limit}: raise it or shorten the prompt")
    return tokens


@dataclass(frozen=True)
class _Ends:
    """Where answers end, and their text up to there.

    Args:
        tokenizer: the model's.
        tokens: any of them ends an answer.
        turn: how the chat template ends a turn; plain text may go on behind that.
    """

    tokenizer: "PreTrainedTokenizerBase"
    tokens: frozenset[int]
    turn: TurnEnd

    def finished(self, prompt: Prompt, ids: list[int]) -> bool:
        """Whether an answer has reached the text that ends its turn."""
        if not self.turn.text or isinstance(prompt, str):
            return False
        # A token is a byte at least; those that the text may have begun in are read with it.
        last = ids[-len(self.turn.text.encode()) - _BEFORE :]
        return self.turn.text in self.read(last)

    def text(self, prompt: Prompt, prompt_ids: list[int], ids: list[int]) -> str | None:
        """Return an answer's text without its end mark; None where it has not ended."""
        length = next((i for i, token in enumerate(ids) if token in self.tokens), None)
        answer = ids if length is None else ids[:length]
        if isinstance(prompt, str):
            return None if length is None else self.behind(prompt_ids, answer)
        text = self._as_learned(prompt, prompt_ids, answer)
        if self.turn.text and self.turn.text in text:
            return text.partition(self.turn.text)[0]
        if length is None:
            return None
        return text.removesuffix(self.turn.lead) if ids[length] == self.turn.token else text

    def read(self, ids: list[int]) -> str:
        """Return the text of tokens, as of the beginning of a text."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def behind(self, prompt_ids: list[int], ids: list[int]) -> str:
        """Return the text of tokens that follow a prompt; some tokenizers drop a text's first space."""
        before, both = self.read(prompt_ids), self.read(prompt_ids + ids)
        return both[len(before) :] if both.startswith(before) else self.read(ids)

    def _as_learned(self, prompt: Prompt, prompt_ids: list[int], ids: list[int]) -> str:
        """Return the text that is learned as these very tokens, where there is one.

        Whether the white space that begins an answer is its own depends on the template and on the tokenizer.
        """
        behind, alone = self.behind(prompt_ids, ids), self.read(ids)
        texts = [behind.removeprefix(self.turn.opening), alone, behind]
        if len(set(texts)) > 1:
            read = [*prompt_ids, *ids]
            for text in texts:
                try:
                    asked, (learned,) = ChatFormat(self.tokenizer).encode([prompt], [(text,)])[0]
                    if (asked + learned)[: len(read)] == read:
                        return text
                except InputError:  # the template does not take it so
                    continue
        return texts[0]


def _draw(
    policy: Policy,
    prompt_ids: Sequence[list[int]],
    ends: _Ends,
    options: SamplingOptions,
    prompts: Sequence[Prompt],
    seeds: Sequence[tuple[int, int]],
) -> list[list[int]]:
    """Draw K answers to every prompt, prompt by prompt: the new tokens, up to the first end or the limit."""
    # A generator for each prompt, so that its answers are the same beside any others.
    size = (options.completions, options.max_new_tokens)
    chances = torch.from_numpy(np.concatenate([np.random.default_rng(pair).random(size) for pair in seeds]))
    batch = policy.on_device({**pad_left(prompt_ids, min(ends.tokens)), "chances": chances})
    with policy.decoding(batch) as decoder:
        decoder.select(torch.arange(len(prompts)).repeat_interleave(options.completions))
        return continue_rows(
            decoder,
            lambda logits, chances: draw(logits / options.temperature, chances),
            ends.tokens,
            options.max_new_tokens,
            lambda number, ids: ends.finished(prompts[number // options.completions], ids),
            batch["chances"],
        )


def _samples(ends: _Ends, prompt: Prompt, prompt_ids: list[int], answers: list[list[int]]) -> Samples:
    texts = [text for ids in answers if (text := ends.text(prompt, prompt_ids, ids)) is not None and text.strip()]
    return Samples(tuple(texts), len(answers) - len(texts))


# Prompts sampled between two writes.
_CHUNK = 256


def sample_journalled(
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
    """Draw K completions for every prompt, as `sample_completions` does, and keep them in a journal.

    Args:
        policy: as it is switched now.
        tokenizer: the model's.
        prompts: text, or chat messages.
        options: how.
        journal: holds finished chunks by the number of their first prompt; it must belong to these arguments alone.
        seed: seeds the draw, which does not depend on where an earlier call was interrupted.
        tokens_per_batch: tokens held at once.
        progress: called with ("sampling", prompts done, prompts in all).

    Raises:
        InputError: a prompt cannot be rendered or is too long, or what the journal holds is damaged.
    """
    starts = range(0, len(prompts), _CHUNK)
    found = _read(journal, starts, len(prompts))
    if len(found) < len(starts):
        # All of them before any is answered: a bad prompt in the last chunk would be found hours later.
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
    """Return the finished chunks by the number of their first prompt."""
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
