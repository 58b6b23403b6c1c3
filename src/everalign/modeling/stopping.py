"""Stop tokens: where an answer ends, by a model's end tokens or by the text that its chat template ends a turn with."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everalign.data.chat_template import Renderer, template_in_use
from everalign.errors import InputError
from everalign.storage import read_json, write_json

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
    config = model.config
    configured = {id for part in (config, config.get_text_config()) for id in _ids(_eos(part))} & marks
    end = turn_end(tokenizer).token
    own = [] if end is None else [end]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return frozenset({*_ids(_eos(getattr(model, "generation_config", None))), *configured, *eos, *own})


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


def _eos(config: Any) -> int | list[int] | None:
    named: int | list[int] | None = getattr(config, "eos_token_id", None)
    return named


def _ids(named: int | list[int] | None) -> list[int]:
    """Return the end tokens that a configuration names: none, one of them, or a list."""
    return [] if named is None else [named] if isinstance(named, int) else list(named)
