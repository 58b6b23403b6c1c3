"""Train a reward model on preferences.

    trained = train_reward_model("Qwen/Qwen2.5-0.5B-Instruct", load_preferences("pairs.jsonl"), "runs/reward",
                                 test=load_preferences("pairs.test.jsonl"))
    trained.report.accuracy

The whole model, or an adapter on it, is fine-tuned with the Bradley-Terry loss (see
`everalign.objectives.bradley_terry_loss`), AdamW and a cosine schedule. What is learned is fp32; with `precision` bf16
it is computed in bf16. The same arguments give the same weights on the same machine.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everalign.data.chat_template import keep_template, template_notes
from everalign.data.chat_tokens import template_fingerprint
from everalign.data.collate import Batch
from everalign.data.readers import check_learnable
from everalign.data.records import PreferenceSet
from everalign.data.rows import spread
from everalign.data.tokenization import TokenizedRow, TokenizedRows, check_end, pad_right, tokenize_preferences
from everalign.distributed import on_main, start
from everalign.errors import InputError
from everalign.modeling.base_weights import check_all_weights, check_library
from everalign.modeling.loading import load_tokenizer, resolve_precision, sequence_limit
from everalign.modeling.machine import library_versions, machine_facts
from everalign.modeling.reward_model import (
    RewardFacts,
    RewardNetwork,
    add_adapter,
    backbone_key,
    load_classifier,
    save_reward_model,
    sequence_rewards,
    set_padding,
    with_adapter_merged,
)
from everalign.modeling.runtime import place_name, prepare_process, training_device
from everalign.modeling.trainable import computing_on
from everalign.objectives import bradley_terry_loss, calibrating_temperature, dpo_loss, pair_calibration_error
from everalign.options import Precision
from everalign.storage import check_free, exclusive, lock_of
from everalign.training.base_objective import Metrics, Objective
from everalign.training.options import ObjectiveOptions, RewardOptions, StageOptions
from everalign.training.stage import StageFigures, StageResult, train_stage


@dataclass(frozen=True)
class RewardReport:
    """What a reward model makes of N held-out pairs, every pair counting the same.

    Args:
        pairs: N.
        accuracy: share of pairs whose chosen answer has the higher reward; ties count half.
        log_loss: mean of -log σ(chosen - rejected), in nats; log 2 = 0.693 is a coin's.
        calibration_error: expected calibration error of σ(chosen - rejected), between 0 and 1.
        temperature: what to divide rewards by so that σ gives the right probabilities; fitted on these same pairs.
            None where there is no best one, since every pair (or no more than chance) is ranked as wished.
        calibrated_error: the calibration error at that temperature; on the pairs it was fitted on, so too low.
        length_correlation: Pearson's correlation of an answer's reward with its length in tokens, over all 2N answers;
            None where one of the two is constant. Far from 0, the model may judge by length.
    """

    pairs: int
    accuracy: float
    log_loss: float
    calibration_error: float
    temperature: float | None
    calibrated_error: float | None
    length_correlation: float | None


def reward_report(rewards: Tensor, lengths: Tensor) -> RewardReport:
    """Judge rewards of held-out pairs.

    Args:
        rewards: (N, 2) of chosen and rejected; centred or not.
        lengths: (N, 2) tokens of the answers.
    """
    rewards = rewards.double()
    difference = rewards[:, 0] - rewards[:, 1]
    temperature = calibrating_temperature(difference)
    pair = torch.stack([rewards.flatten(), lengths.double().flatten()])
    constant = bool((pair.amin(dim=1) == pair.amax(dim=1)).any())
    return RewardReport(
        pairs=len(rewards),
        accuracy=((difference.sign() + 1) / 2).mean().item(),
        log_loss=dpo_loss(difference).mean().item(),
        calibration_error=pair_calibration_error(difference),
        temperature=temperature,
        calibrated_error=None if temperature is None else pair_calibration_error(difference / temperature),
        length_correlation=None if constant else torch.corrcoef(pair)[0, 1].item(),
    )


Progress = Callable[[str, int, int], None]

LONGEST_BY_DEFAULT = 1024
CENTRED_BY = 1000
"""At most so many pairs give the mean and the deviation of rewards: enough for a standard error of about 2 % of the
deviation. Scoring all pairs would add about a quarter to the time of one epoch."""


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


class BradleyTerryObjective(Objective):
    """The Bradley-Terry loss with its centring term, averaged over the step's pairs.

    Args:
        padding: the model's padding token.
        centring: strength of the centring term.
    """

    def __init__(self, padding: int, centring: float) -> None:
        super().__init__("reward", ObjectiveOptions())
        self._padding, self._centring = padding, centring

    def collate(self, rows: Sequence[TokenizedRow], shared: bool) -> Batch:
        """Lay out both sequences of every pair, behind one prompt or each its own; `count` is the number of pairs."""
        if shared:
            return super().collate(rows, shared)
        weight = torch.tensor([row.weight for row in rows], dtype=torch.float32)
        sequences = [row.prompt + response for row in rows for response in row.responses]
        return {**pad_right(sequences, self._padding), "weight": weight, "count": torch.tensor(len(rows))}

    def loss(self, model: Callable[[Batch], Tensor], batch: Batch, count: Tensor) -> tuple[Tensor, Metrics]:
        """Return Σ weight·loss(chosen, rejected) / count; metrics `margin` and `accuracy` per pair."""
        chosen, rejected = model(batch).view(-1, 2).unbind(1)
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
    log: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda *_: None,
    figures: StageFigures = lambda *_: None,
) -> TrainedRewardModel:
    """Train a reward model and write its folder, whole or not at all.

    Processes that a launcher has started share the work; all of them call this with the same arguments.
    After a kill, the same call continues from its newest checkpoint. Until it is done, checkpoints are in
    `OUTPUT.training` beside the folder.

    Args:
        model: a folder in Hugging Face format, a Hub name, a GGUF file, `tiny` or `smollm2`. A
            language model gets a fresh score head.
        train: the pairs; their weights count in the loss.
        output: the reward model's folder; must be empty or not exist yet.
        test: held-out pairs, for the report.
        options: how; the defaults when None.
        seed: seeds the head and the order of the pairs.
        allow_overlap: let rows be in `train` and `test`.
        log: called with one line for each thing that happens.
        progress: called with (stage, done, all).
        figures: called with (stage, steps done, figures), see `everalign.training.stage.Figures`.

    Raises:
        InputError: the model, the rows, the options or the output folder cannot be used.
        EveralignError: the loss became NaN or infinite; the message says at which step.
    """
    options, folder = options or RewardOptions(), Path(output)
    start()
    with exclusive(lock_of(folder), "training a reward model there"):
        check_free(folder)
        check_learnable(train, test, allow_overlap)
        check_library(options.quantize)
        prepare_process(options.deterministic)
        device = training_device(log)
        precision = resolve_precision(options.precision, device)
        options = options.replace(precision=precision)
        what = f"an adapter of rank {options.lora_rank}" if options.lora_rank else "all weights, which stay fp32,"
        if options.quantize is not None:
            what += f" on a base model that is quantised to {options.quantize},"
        log(f"  trains {what} in {precision} on {place_name(device)}")
        tokenizer = load_tokenizer(model)
        classifier, base = _load(model, tokenizer, options, precision, device, seed)
        max_length = sequence_limit(options.max_length, LONGEST_BY_DEFAULT, classifier, tokenizer, model)

        pairs = _encode("training", train, tokenizer, max_length, log)
        held_out = _encode("held-out", test, tokenizer, max_length, log) if test else None

        rewards = RewardNetwork(classifier, precision)
        work = folder.with_name(folder.name + ".training")
        template = template_fingerprint(tokenizer)
        training = train_stage(
            rewards,
            BradleyTerryObjective(rewards.padding, options.centring),
            pairs,
            StageOptions(**{**options.shared_with(StageOptions), "learning_rate": options.rate}),
            work / _training_key(base, template, pairs, options, seed),
            seed=seed,
            learns_for=base,
            progress=partial(progress, "reward"),
            figures=partial(figures, "reward"),
            log=log,
        )
        on_device: AbstractContextManager[None] = nullcontext()
        if options.lora_rank:
            # In fp32 it may not fit where a quantised one was trained.
            place = device if options.quantize is None else torch.device("cpu")
            plain = load_classifier(model, fresh_head=True, seed=seed, device=place)
            set_padding(plain, tokenizer)
            classifier = with_adapter_merged(classifier, plain).to(place)
            rewards = RewardNetwork(classifier, precision)
            if options.quantize is not None:
                log("  merged into the plain weights; the merged model scores training and held-out pairs")
                on_device = computing_on(classifier, device, precision)
        rewards.eval()
        report = None
        with on_device:
            raw = _pair_rewards(rewards, spread(pairs, CENTRED_BY), options, "centring", progress)
            if held_out is not None:
                found = _pair_rewards(rewards, held_out, options, "held-out pairs", progress)
                lengths = torch.tensor([[len(tokens) for tokens in row.responses] for row in held_out])
                report = reward_report(found, lengths)
        facts = RewardFacts(
            mean=raw.double().mean().item(),
            scale=raw.double().std(correction=0).item(),
            max_length=max_length,
            template=template,
            base_model=model,
            base_fingerprint=base,
            data=train.fingerprint,
            pairs=len(train),
            accuracy=None if report is None else report.accuracy,
            settings={**options.model_dump(), "learning_rate": options.rate, "max_length": max_length, "seed": seed},
            machine=machine_facts(),
            libraries=library_versions(),
        )
        if any(not isinstance(row.prompt, str) for row in train):
            keep_template(tokenizer)
        on_main(save_reward_model)(folder, rewards, tokenizer, facts, (row.prompt for row in train))
        on_main(shutil.rmtree)(work)
        return TrainedRewardModel(folder, facts, report, training)


def _load(
    model: str, tokenizer: Any, options: RewardOptions, precision: Precision, device: torch.device, seed: int
) -> tuple[Any, str]:
    """Return the classifier with what is trained of it, and what identifies the weights that it starts from."""
    weights: Precision = precision if options.lora_rank else "fp32"
    classifier = load_classifier(
        model, fresh_head=True, seed=seed, precision=weights, device=device, quantize=options.quantize
    )
    base = backbone_key(classifier, model, weights, options.quantize)
    set_padding(classifier, tokenizer)
    if not options.lora_rank:
        check_all_weights(classifier, model)
        return classifier.requires_grad_(True), base
    return add_adapter(classifier, options.lora_rank, options.alpha, seed, model), base


def _training_key(base: str, template: str, pairs: TokenizedRows, options: RewardOptions, seed: int) -> str:
    """Return a digest of everything that a training's result depends on, which names its folder of checkpoints."""
    # Left out is what changes no result; what identifies the base says how it is quantised.
    settings = options.model_dump(exclude={"checkpointing", "checkpoint_steps", "quantize"})
    facts = [base, template, pairs.fingerprint, settings, seed]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _encode(
    name: str, rows: PreferenceSet, tokenizer: Any, max_length: int, log: Callable[[str], None]
) -> TokenizedRows:
    try:
        pairs = tokenize_preferences(rows, tokenizer, max_length)
        for number, pair in enumerate(pairs, start=1):
            for tokens in pair.responses:
                check_end(tokens, tokenizer, f"pair {number} (id {pair.id})")
        notes = template_notes(tokenizer, rows) if name == "training" else ()
        warnings = pairs.warnings()
    except InputError as error:
        raise InputError(f"{rows.source}: {error}") from None
    for line in notes:
        log(f"  {line}")
    log(f"  {name} pairs: {pairs.one_line() if pairs.altered else len(pairs)}")
    for warning in warnings:
        log(f"  warning: {rows.source}: {warning}")
    return pairs


def _pair_rewards(
    model: RewardNetwork, pairs: Sequence[TokenizedRow], options: RewardOptions, stage: str, progress: Progress
) -> Tensor:
    """Return the rewards (N, 2), not centred, of chosen and rejected."""
    found = sequence_rewards(model, pairs, options.tokens_per_batch, lambda done, total: progress(stage, done, total))
    return found.view(-1, 2)
