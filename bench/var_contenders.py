"""The contenders of the VAR bench that learn from samples: one stage of training each, from the same start.

Every one of them is given the same answers of the reference with their rewards, and pays for sampling them. Those with
several rounds sample anew from what they have become.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everalign.data import Preference, Scored
from everalign.data.collate import Batch
from everalign.data.tokenization import tokenize_preferences, tokenize_scored
from everalign.demo.world import Question
from everalign.learning.rollouts import disagreeing
from everalign.modeling.loading import load_model
from everalign.modeling.policy import Policy
from everalign.training.base_objective import LikelihoodObjective
from everalign.training.objectives import make_objective
from everalign.training.options import StageOptions, WeightOptions
from everalign.training.reference import Reference, sequence_logprobs
from everalign.training.reward_weights import compute_weights
from everalign.training.stage import train_stage
from var_task import LONGEST, encoded, prompt, reward, sample

RANK, ALPHA = 16, 32.0


def start(precision: str = "fp32") -> Policy:
    """The policy that every contender starts from: the embedded assistant with a fresh adapter."""
    return Policy(load_model("tiny", precision), RANK, ALPHA, seed=0)


@dataclass(frozen=True)
class Contender:
    """How one contender learns from scored answers.

    Args:
        teach: makes a stage's rows of scored ones and trains the policy on them.
        learning_rate: peak.
        epochs: passes over the rows.
        batch_size: rows of a step.
        rounds: how often answers are sampled.
        first: answers to each question before it is decided whether it gets the others: only if their rewards differ.
    """

    teach: Callable[[Policy, Any, list[Scored], StageOptions, Path], None]
    learning_rate: float
    epochs: float
    batch_size: int = 16
    rounds: int = 1
    first: int | None = None

    def stage(self) -> StageOptions:
        """How one round is trained."""
        return StageOptions(
            learning_rate=self.learning_rate,
            epochs=self.epochs,
            batch_size=self.batch_size,
            checkpoint_steps=0,
            logging_steps=1000,
        )


@dataclass
class Spent:
    """What learning has cost so far."""

    seconds: float = 0.0
    processor_seconds: float = 0.0
    tokens: int = 0


class Clock:
    """Adds the time inside a `with` block to what was spent."""

    def __init__(self, spent: Spent) -> None:
        self._spent = spent

    def __enter__(self) -> None:
        self._began = (time.perf_counter(), time.process_time())

    def __exit__(self, *_: object) -> None:
        self._spent.seconds += time.perf_counter() - self._began[0]
        self._spent.processor_seconds += time.process_time() - self._began[1]


Draw = Callable[[Policy, int, Spent], list[Scored]]
"""Gives the rows of a round by its number from 0 on; what they have cost is added, but for time, which is measured."""


def learn(
    contender: Contender, policy: Policy, tokenizer: Any, draw: Draw, look: Callable[[Policy, Spent], None]
) -> Policy:
    """Let a contender learn; `look` is called after each round, outside the time that counts.

    Args:
        contender: who.
        policy: what learns, in place.
        tokenizer: the policy's.
        draw: gives each round's rows.
        look: measures the policy.
    """
    spent = Spent()
    for number in range(contender.rounds):
        with Clock(spent), tempfile.TemporaryDirectory() as folder:
            rows = draw(policy, number, spent)
            contender.teach(policy, tokenizer, rows, contender.stage(), Path(folder))
        look(policy, spent)
    return policy


def scored_answers(
    policy: Policy, tokenizer: Any, asked: Sequence[Question], count: int, seed: int, first: int | None = None
) -> tuple[list[Scored], int]:
    """Answers sampled from the policy with their rewards, and how many tokens were generated.

    With `first`, each question gets so many, and the rest of `count` only if their rewards differ.
    """
    texts = [found.texts for found in sample(policy, tokenizer, asked, first or count, seed)]

    def worth(at: int) -> tuple[float, ...]:
        return tuple(reward(asked[at], text) for text in texts[at])

    if first is not None:
        more = disagreeing([worth(at) for at in range(len(asked))], 0.0)
        rest = sample(policy, tokenizer, [asked[at] for at in more], count - first, seed + 500_000)
        for at, found in zip(more, rest, strict=True):
            texts[at] += found.texts
    rows, tokens = [], 0
    for at, question in enumerate(asked):
        if texts[at]:
            tokens += sum(len(response) for response in encoded(tokenizer, prompt(question), texts[at]).responses)
        if len(texts[at]) > 1:
            rows.append(Scored(prompt(question), texts[at], worth(at)))
    return rows, tokens


# ---- what each teaches ----


def var(temperature: float, estimator: str = "group", floor: float = 0.0, varied: bool = False) -> Any:
    """Reward-weighted likelihood; see `everalign.training.reward_weights.WeightOptions`."""
    options = WeightOptions(
        estimator=estimator,  # type: ignore[arg-type]  # one of them
        temperature=temperature,
        scale_rewards=False,
        weight_floor=floor,
        drop_constant=varied,
    )

    def teach(policy: Policy, tokenizer: Any, rows: list[Scored], stage: StageOptions, folder: Path) -> None:
        lengths = [tuple(len(text) for text in row.completions) for row in rows]
        weighed = compute_weights(rows, lengths, options)
        _weighted(policy, tokenizer, list(weighed.rows), stage, folder)

    return teach


def best_of(policy: Policy, tokenizer: Any, rows: list[Scored], stage: StageOptions, folder: Path) -> None:
    """RAFT (Dong et al. 2023, arXiv 2304.06767): fine-tune on the best answer to each question."""
    _weighted(policy, tokenizer, [_with_weights(row, _only(row, _best(row))) for row in rows], stage, folder)


def chosen(policy: Policy, tokenizer: Any, rows: list[Scored], stage: StageOptions, folder: Path) -> None:
    """Fine-tune on the better one of the first two answers that differ, as preference data has it."""
    picked = []
    for row in rows:
        other = next((i for i, worth in enumerate(row.rewards) if worth != row.rewards[0]), None)
        if other is not None:
            picked.append(_with_weights(row, _only(row, max((0, other), key=lambda i: row.rewards[i]))))
    _weighted(policy, tokenizer, picked, stage, folder)


def dpo(beta: float) -> Any:
    """DPO on the best answer to each question over the worst one."""

    def teach(policy: Policy, tokenizer: Any, rows: list[Scored], stage: StageOptions, folder: Path) -> None:
        pairs: list[Preference] = [pair for row in rows if (pair := row.preference()) is not None]
        found = tokenize_preferences(pairs, tokenizer, LONGEST)
        reference = sequence_logprobs(policy, found, stage.tokens_per_batch)
        train_stage(
            policy,
            make_objective("dpo", beta),
            found,
            stage,
            folder,
            seed=0,
            reference=lambda: Reference("stage_start", reference),
        )

    return teach


def snkl(temperature: float) -> Any:
    """The self-normalised KL of each question's answers."""

    def teach(policy: Policy, tokenizer: Any, rows: list[Scored], stage: StageOptions, folder: Path) -> None:
        lengths = [tuple(len(text) for text in row.completions) for row in rows]
        weighed = compute_weights(
            rows, lengths, WeightOptions(estimator="group", temperature=temperature, scale_rewards=False)
        )
        found = tokenize_scored(weighed.rows, tokenizer, LONGEST)
        reference = sequence_logprobs(policy, found, stage.tokens_per_batch)
        train_stage(
            policy,
            make_objective("snkl"),
            found,
            stage,
            folder,
            seed=0,
            reference=lambda: Reference("stage_start", reference),
        )

    return teach


class AdvantageLeftover(LikelihoodObjective):
    """A-LoL (Baheti et al. 2024, arXiv 2305.14718), sequence variant: positive advantages times a clipped ratio."""

    clip = 0.9

    def loss(self, model: nn.Module, batch: Batch, count: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return Σ A · clip(π/π_ref) · NLL / count."""
        sums = model(batch)
        with torch.no_grad(), model.as_base():  # type: ignore[operator]  # a policy
            reference = model(batch)
        ratio = (sums.detach() - reference).exp().clamp(1 - self.clip, 1 + self.clip)
        losses = -batch["weights"] * ratio * sums / count
        return losses.sum(), {"nll": (-sums / batch["lengths"]).detach()}


def advantage(policy: Policy, tokenizer: Any, rows: list[Scored], stage: StageOptions, folder: Path) -> None:
    """A-LoL with the mean reward of the question's answers as the reference's value."""
    weighed = []
    for row in rows:
        mean = sum(row.rewards) / len(row.rewards)
        if max(row.rewards) > mean:
            weighed.append(_with_weights(row, tuple(max(0.0, worth - mean) for worth in row.rewards)))
    found = tokenize_scored(weighed, tokenizer, LONGEST)
    train_stage(policy, AdvantageLeftover("a-lol"), found, stage, folder, seed=0)


def _weighted(policy: Policy, tokenizer: Any, rows: list[Scored], stage: StageOptions, folder: Path) -> None:
    train_stage(policy, make_objective("var"), tokenize_scored(rows, tokenizer, LONGEST), stage, folder, seed=0)


def _best(row: Scored) -> int:
    return row.rewards.index(max(row.rewards))


def _only(row: Scored, index: int) -> tuple[float, ...]:
    return tuple(float(i == index) for i in range(len(row.completions)))


def _with_weights(row: Scored, weights: tuple[float, ...]) -> Scored:
    return replace(row, weights=weights)
