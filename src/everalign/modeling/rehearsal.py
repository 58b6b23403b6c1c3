"""Rehearse a whole run on a shrunk copy of a model, so that what it cannot do is found before training."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL_LM
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as IMAGE_TEXT_TO_TEXT

from everalign.data.collate import collate
from everalign.data.tokenization import TokenizedRow
from everalign.errors import EveralignError, InputError
from everalign.modeling.architecture import choose_targets, configuration_key, is_linear, kind_of, study
from everalign.modeling.loading import load_model
from everalign.modeling.model_files import largest_difference, logits_of, write_checked
from everalign.modeling.policy import Policy
from everalign.modeling.shrinking import FIRST_SPECIAL, MODEL_ERRORS, quiet, shrunk_copy

_TOLERANCE = 1e-4
# What may get lost of the change that was learned, in models that are as sensitive as their random weights make them.
_LOST = 0.02
_LEARNING_RATE = 0.01

_done: set[tuple[Any, ...]] = set()


def rehearse(model: Any, targets: str | Sequence[str]) -> None:
    """Adapt a copy of a model, take a step, consolidate, save, load, merge, write, and compare logits.

    Once for each configuration. A model that cannot be shrunk is not rehearsed.

    Args:
        model: a Hugging Face causal language model without adapters; it is left as it is.
        targets: as in `Policy`.

    Raises:
        InputError: something fails; says what, in which architecture and why.
    """
    key = (*configuration_key(model), targets if isinstance(targets, str) else tuple(targets))
    if key in _done:
        return
    refused = f"{type(model).__name__} ({model.config.model_type}) cannot be learned with"
    try:
        reached = study(model).reached
    except MODEL_ERRORS as error:
        raise InputError(f"{refused}: it fails to read a text ({_reason(error)})") from error
    kinds = {kind_of(target) for target in choose_targets(model, targets, reached).names}
    small = shrunk_copy(model)
    if small is None:
        return
    stage = ""
    try:
        with TemporaryDirectory() as folder, quiet():
            for started in _stages(small, kinds, Path(folder)):
                stage = started
    except (EveralignError, *MODEL_ERRORS) as error:
        raise InputError(f"{refused}: {stage} fails ({_reason(error)})") from error
    _done.add(key)


def _reason(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return first if isinstance(error, EveralignError) else f"{type(error).__name__}: {first}"


def _stages(small: Any, kinds: set[str], folder: Path) -> Iterator[str]:
    """Yield the name of each stage, then try it."""
    plain, served = (copy.deepcopy(small) for _ in range(2))
    most = min(small.config.get_text_config().vocab_size, FIRST_SPECIAL)
    tokens = [3 + 5 * i % (most - 3) for i in range(12)]

    yield "reading a text from left to right"
    # With as many tokens, since positions may stretch with the length.
    one, other = (logits_of(small, [*tokens[:8], *end])[:, :8] for end in (tokens[8:], tokens[:-8]))
    if not largest_difference(one, other) <= _TOLERANCE:
        raise InputError("its output for a token depends on later tokens: it is not a causal language model")

    yield "adapting it"
    names = [name for name, module in small.named_modules() if kind_of(name) in kinds and is_linear(module)]
    policy = Policy(small, 2, 4.0, names)

    yield "a training step"
    before = logits_of(policy.peft, tokens)
    _take_a_step(policy, tokens)
    learned = logits_of(policy.peft, tokens)
    change = largest_difference(learned, before)
    if not change > 0:
        raise InputError("it does not change the model's output")

    def check(model: Any, what: str) -> None:
        error = largest_difference(logits_of(model, tokens), learned)
        if not error <= max(_TOLERANCE, _LOST * change):
            raise InputError(f"{what} differs from what was learned by {error:.1e} of its size")

    yield "keeping what was learned"
    policy.write_long_term(policy.short_term())
    policy.start_short_term(0)
    check(policy.peft, "long-term memory")

    yield "saving and loading the adapter"
    policy.save_adapter(folder / "adapter")
    policy.load_adapter(folder / "adapter", long_term=True, seed=0)
    check(policy.peft, "the loaded adapter")
    loaded = PeftModel.from_pretrained(served, str(folder / "adapter")).eval()
    check(loaded, "the adapter loaded by peft")

    yield "merging it"
    merged = loaded.merge_and_unload()
    check(merged, "the merged model")
    if _can_be_written(plain, folder / "base"):
        yield "writing and loading the merged model"
        (folder / "merged").mkdir()
        merged.name_or_path = str(folder / "base")
        write_checked(merged, folder / "merged")


def _can_be_written(small: Any, folder: Path) -> bool:
    """Whether the copy itself can be written and is loaded again as what it is.

    Custom code is not written with it, nor the configuration of a larger model that it is the language model of, nor
    that its experts are computed one by one; and some configurations cannot be read again once their layers are fewer.
    """
    kind = type(small.config)
    if type(small) not in (known.get(kind, None) for known in (CAUSAL_LM, IMAGE_TEXT_TO_TEXT)):
        return False
    small.save_pretrained(folder)
    try:
        loaded = load_model(str(folder), "fp32")
    except InputError:
        return False
    ways = [getattr(each.config, "_experts_implementation", None) for each in (small, loaded)]
    return ways[0] == ways[1]


def _take_a_step(policy: Policy, tokens: list[int]) -> None:
    """Learn from one pair."""
    pair = TokenizedRow.pair("rehearsal", tokens[:4], tokens[4:8], tokens[8:11])
    chosen, rejected = policy.train()(collate([pair], policy.head.shared)).unbind()
    (chosen - rejected).backward()
    learning = [parameter for parameter in policy.parameters() if parameter.grad is not None]
    if not all(parameter.grad.isfinite().all() for parameter in learning):  # type: ignore[union-attr]
        raise InputError("its gradients are not finite")
    with torch.no_grad():
        for parameter in learning:
            parameter.add_(_LEARNING_RATE * parameter.grad.sign())  # type: ignore[union-attr]
    policy.zero_grad()
    policy.eval()
