"""Train a reward model on preferences.

    trained = train_reward_model("Qwen/Qwen2.5-0.5B-Instruct", load_preferences("pairs.jsonl"), "runs/reward",
                                 test=load_preferences("pairs.test.jsonl"))
    trained.report.accuracy

The whole model is fine-tuned with the Bradley-Terry loss (see `everalign.objectives.bradley_terry_loss`), AdamW, a
cosine schedule and fp32. The same arguments give the same weights on the same machine.
"""

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everalign.data.comparisons import Comparison, encode_comparisons, pad_right
from everalign.data.encoding import SHORTEST_MAX_LENGTH
from everalign.data.readers import PreferenceSet, check_disjoint
from everalign.data.template_notes import template_notes
from everalign.data.templating import keep_template, template_fingerprint
from everalign.errors import InputError
from everalign.modeling.loading import load_tokenizer, model_fingerprint, sequence_limit
from everalign.modeling.reward_files import RewardFacts, check_free, save_reward_model
from everalign.modeling.reward_model import RewardModel, load_classifier, sequence_rewards, set_padding
from everalign.modeling.runtime import prepare_process
from everalign.objectives import bradley_terry_loss
from everalign.objectives.rewards import DEFAULT_CENTRING
from everalign.storage import alone, lock_of
from everalign.training.reward_report import RewardReport, reward_report
from everalign.training.stage import TOKENS_PER_BATCH, StageOptions, StageResult, train_rows
from everalign.training.teaching import Metrics

Progress = Callable[[str, int, int], None]

LONGEST_BY_DEFAULT = 1024


@dataclass(frozen=True)
class RewardOptions:
    """How a reward model is trained.

    Args:
        learning_rate: peak learning rate.
        epochs: passes over the pairs, fractions allowed.
        batch_size: pairs of an optimiser step.
        max_length: longest prompt plus answer, in tokens; None for 1,024, or for what the model can take if it is less.
        tokens_per_batch: tokens computed at once, padding included; fewer save memory and change no result.
        centring: strength of the term that keeps a pair's rewards around 0.

    Raises:
        InputError: an option is out of its range.
    """

    learning_rate: float = 2e-5
    epochs: float = 1.0
    batch_size: int = 32
    max_length: int | None = None
    tokens_per_batch: int = TOKENS_PER_BATCH
    centring: float = DEFAULT_CENTRING

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("tokens_per_batch", 1), ("max_length", SHORTEST_MAX_LENGTH)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, found {value}")
        for name in ("learning_rate", "epochs"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be a finite number above 0, found {value}")
        if not (math.isfinite(self.centring) and self.centring >= 0):
            raise InputError(f"centring must be a finite number of at least 0, found {self.centring}")


@dataclass(frozen=True)
class TrainedRewardModel:
    """A finished training.

    Args:
        path: the reward model's folder.
        facts: what its `everalign_reward.json` says.
        report: how it judges the held-out pairs; None without any.
        training: steps, seconds and curve.
    """

    path: Path
    facts: RewardFacts
    report: RewardReport | None
    training: StageResult


class BradleyTerryObjective:
    """The Bradley-Terry loss with its centring term, averaged over the step's pairs.

    Args:
        padding: the model's padding token.
        centring: strength of the centring term.
    """

    name = "reward"
    needs_reference = False

    def __init__(self, padding: int, centring: float) -> None:
        self._padding, self._centring = padding, centring

    def collate(self, pairs: Sequence[Comparison], shared: bool) -> dict[str, Tensor]:
        """Lay out both sequences of every pair, each with its prompt; `count` is the number of pairs."""
        sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        weight = torch.tensor([pair.weight for pair in pairs], dtype=torch.float32)
        return {**pad_right(sequences, self._padding), "weight": weight, "count": torch.tensor(len(pairs))}

    def loss(self, model: nn.Module, batch: dict[str, Tensor], count: Tensor) -> tuple[Tensor, Metrics]:
        """Return Σ weight·loss(chosen, rejected) / count; metrics `margin` and `accuracy` per pair."""
        chosen, rejected = model(batch).chunk(2)
        losses = bradley_terry_loss(chosen, rejected, self._centring, check_finite=False) * batch["weight"]
        margin = (chosen - rejected).detach()
        return losses.sum() / count, {"margin": margin, "accuracy": (margin > 0).float()}


def train_reward_model(
    model: str,
    train: PreferenceSet,
    output: str | os.PathLike[str],
    *,
    test: PreferenceSet | None = None,
    options: RewardOptions | None = None,
    seed: int = 0,
    allow_overlap: bool = False,
    announce: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda *_: None,
) -> TrainedRewardModel:
    """Train a reward model and write its folder, whole or not at all.

    Args:
        model: a folder in Hugging Face format, a Hub name, a GGUF file, `tiny` or `smollm2`. A
            language model gets a fresh score head.
        train: the pairs; their weights count in the loss.
        output: the reward model's folder; must be empty or not exist yet.
        test: held-out pairs, for the report.
        options: how; the defaults when None.
        seed: seeds the head and the order of the pairs.
        allow_overlap: let rows be in `train` and `test`.
        announce: called with one line for each thing that happens.
        progress: called with (stage, done, all).

    Raises:
        InputError: the model, the rows, the options or the output folder cannot be used.
        EveralignError: the loss became NaN or infinite; the message says at which step.
    """
    options, folder = options or RewardOptions(), Path(output)
    with alone(lock_of(folder), "training a reward model there"):
        _check_input(train, test, folder, allow_overlap)
        prepare_process()
        tokenizer = load_tokenizer(model)
        classifier = load_classifier(model, fresh_head=True, seed=seed)
        base = model_fingerprint(classifier.base_model)
        set_padding(classifier, tokenizer)
        max_length = sequence_limit(options.max_length, LONGEST_BY_DEFAULT, classifier, tokenizer, model)

        pairs = _encode("training", train, tokenizer, max_length, announce)
        held_out = _encode("held-out", test, tokenizer, max_length, announce) if test else ()

        rewards = RewardModel(classifier)
        training = _train(rewards, pairs, options, seed, progress)
        rewards.eval()
        raw = _pair_rewards(rewards, pairs, options, "centring", progress)
        report = None
        if held_out:
            found = _pair_rewards(rewards, held_out, options, "held-out pairs", progress)
            report = reward_report(found, torch.tensor([pair.answers for pair in held_out]))
        facts = RewardFacts(
            mean=raw.double().mean().item(),
            scale=raw.double().std(correction=0).item(),
            max_length=max_length,
            template=template_fingerprint(tokenizer),
            base_model=model,
            base_fingerprint=base,
            data=train.fingerprint,
            pairs=len(train),
            accuracy=None if report is None else report.accuracy,
            settings={**asdict(options), "max_length": max_length, "seed": seed},
        )
        if any(not isinstance(row.prompt, str) for row in train):
            keep_template(tokenizer)
        save_reward_model(folder, rewards, tokenizer, facts)
        return TrainedRewardModel(folder, facts, report, training)


def _check_input(train: PreferenceSet, test: PreferenceSet | None, folder: Path, allow_overlap: bool) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a reward model is trained in one process, found WORLD_SIZE above 1")
    check_free(folder)
    for rows in (train, *([] if test is None else [test])):
        if not rows:
            raise InputError(f"{rows.source}: no rows in it")
    check_disjoint(train, test or (), allow=allow_overlap)


def _encode(
    name: str, rows: PreferenceSet, tokenizer: Any, max_length: int, announce: Callable[[str], None]
) -> tuple[Comparison, ...]:
    try:
        pairs, cut = encode_comparisons(rows, tokenizer, max_length)
        notes = template_notes(tokenizer, rows) if name == "training" else ()
    except InputError as error:
        raise InputError(f"{rows.source}: {error}") from None
    for line in notes:
        announce(f"  {line}")
    same = sum(pair.chosen == pair.rejected for pair in pairs)
    altered = f"; {cut} answers with their prompts cut to {max_length} tokens, {same} pairs with identical answers"
    announce(f"  {len(pairs)} {name} pairs{altered if cut or same else ''}")
    return pairs


def _train(
    model: RewardModel, pairs: Sequence[Comparison], options: RewardOptions, seed: int, progress: Progress
) -> StageResult:
    # A batch holds both sequences of a pair, padded to the longest.
    lengths = [2 * max(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    stage = StageOptions(
        learning_rate=options.learning_rate,
        epochs=options.epochs,
        batch_size=options.batch_size,
        tokens_per_batch=options.tokens_per_batch,
        checkpoint_steps=0,
    )
    objective = BradleyTerryObjective(model.padding, options.centring)
    with tempfile.TemporaryDirectory() as folder:
        return train_rows(
            model,
            objective,
            pairs,
            lengths,
            stage,
            Path(folder),
            seed=seed,
            progress=lambda done, total: progress("reward", done, total),
        )


def _pair_rewards(
    model: RewardModel, pairs: Sequence[Comparison], options: RewardOptions, stage: str, progress: Progress
) -> Tensor:
    """Return the rewards (N, 2), not centred, of chosen and rejected."""
    sequences = [tokens for pair in pairs for tokens in (pair.chosen, pair.rejected)]
    found = sequence_rewards(
        model, sequences, options.tokens_per_batch, lambda done, total: progress(stage, done, total)
    )
    return found.view(-1, 2)
