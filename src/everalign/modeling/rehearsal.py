"""All that a model will have to do, done once on a shrunk copy, so that what it cannot do is found before training."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from everalign.data.encoding import EncodedPair
from everalign.data.layout import lay_out_pairs
from everalign.errors import EveralignError, InputError
from everalign.modeling.architecture import configuration_key, study
from everalign.modeling.merging import merged_into, write_checked
from everalign.modeling.policy import Policy
from everalign.modeling.shrinking import FIRST_SPECIAL, MODEL_ERRORS, shrunk_copy
from everalign.modeling.targets import choose_targets, is_linear, kind_of

_TOLERANCE = 1e-4
_LEARNING_RATE = 0.01

_done: set[tuple[Any, ...]] = set()


def rehearse(model: Any, targets: str | Sequence[str]) -> None:
    """Adapt a copy of a model, take a step, consolidate, save, load, merge, write, and compare logits.

    Once for each configuration. A model of which no shrunk copy can be made is not rehearsed.

    Args:
        model: a Hugging Face causal language model without adapters; it is left as it is.
        targets: as in `Policy`.

    Raises:
        InputError: something fails; says what, in which architecture and why.
    """
    key = (*configuration_key(model), targets if isinstance(targets, str) else tuple(targets))
    if key in _done:
        return
    name = f"{type(model).__name__} ({model.config.model_type})"
    try:
        reached = study(model).reached
    except MODEL_ERRORS as error:
        raise InputError(f"{name} cannot be learned with: it fails to read a text ({_said(error)})") from error
    kinds = {kind_of(target) for target in choose_targets(model, targets, reached).names}
    small = shrunk_copy(model)
    if small is None:
        return
    stage = ""
    try:
        with TemporaryDirectory() as folder:
            for doing in _stages(small, kinds, Path(folder)):
                stage = doing
    except (EveralignError, *MODEL_ERRORS) as error:
        raise InputError(f"{name} cannot be learned with: {stage} fails ({_said(error)})") from error
    _done.add(key)


def _said(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return first if isinstance(error, EveralignError) else f"{type(error).__name__}: {first}"


def _stages(small: Any, kinds: set[str], folder: Path) -> Iterator[str]:
    """Yield what is tried next, and try it."""
    plain, served, merging = (copy.deepcopy(small) for _ in range(3))
    tokens = _tokens(small)
    yield "reading a text from left to right"
    _check_causal(small, tokens)
    yield "adapting it"
    names = [name for name, module in small.named_modules() if kind_of(name) in kinds and is_linear(module)]
    policy = Policy(small, 2, 4.0, names)
    yield "a training step"
    learned = _take_a_step(policy, tokens)
    yield "keeping what was learned"
    policy.write_long_term(policy.short_term())
    policy.start_short_term(0)
    _check_same(_logits(policy.peft, tokens), learned, "long-term memory")
    yield "saving and loading the adapter"
    policy.save_adapter(folder / "adapter")
    policy.load_adapter(folder / "adapter", long_term=True, seed=0)
    _check_same(_logits(policy.peft, tokens), learned, "the loaded adapter")
    loaded = PeftModel.from_pretrained(served, str(folder / "adapter")).eval()
    _check_same(_logits(loaded, tokens), learned, "the adapter loaded by peft")
    yield "merging it"
    merged = merged_into(merging, folder / "adapter")
    _check_same(_logits(merged, tokens), learned, "the merged model")
    if _is_of_a_whole_folder(small):
        yield "writing and loading the merged model"
        plain.save_pretrained(folder / "base")
        (folder / "merged").mkdir()
        merged.name_or_path = str(folder / "base")
        write_checked(merged, folder / "merged")


def _is_of_a_whole_folder(small: Any) -> bool:
    """Whether transformers finds the class again by what the class writes.

    Custom code is not written with it, nor the configuration of the larger model that some language models are part of.
    """
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(small.config), None)
    return known is type(small)


def _tokens(small: Any) -> list[int]:
    most = min(small.config.get_text_config().vocab_size, FIRST_SPECIAL)
    return [3 + 5 * i % (most - 3) for i in range(12)]


def _check_causal(small: Any, tokens: list[int]) -> None:
    whole, beginning = _logits(small, tokens)[:, :8], _logits(small, tokens[:8])
    if not _differ(whole, beginning) <= _TOLERANCE:
        raise InputError("what it says of a token depends on later ones: it is no causal language model")


def _take_a_step(policy: Policy, tokens: list[int]) -> Tensor:
    """Learn from one pair; returns the logits after it."""
    before = _logits(policy.peft, tokens)
    pair = EncodedPair("rehearsal", tokens[:4], tokens[4:8], tokens[8:11], 1.0)
    chosen, rejected = policy.train()(lay_out_pairs([pair], policy.head.shared)).unbind()
    (chosen - rejected).backward()
    learning = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in learning:
            if parameter.grad is not None:
                parameter.add_(_LEARNING_RATE * parameter.grad.sign())
    policy.zero_grad()
    policy.eval()
    after = _logits(policy.peft, tokens)
    if not _differ(after, before) > 0:
        raise InputError("it changes nothing of what the model says")
    return after


@torch.no_grad()
def _logits(model: Any, tokens: list[int]) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
    return logits


def _differ(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def _check_same(found: Tensor, expected: Tensor, what: str) -> None:
    error = _differ(found, expected)
    if not error <= _TOLERANCE:
        raise InputError(f"the logits of {what} differ by {error:.1e} of their size from those that were learned")
