"""Weak to strong: a model learns from what a smaller corrector makes of its answers, in three rounds.

    python bench/correction_distill.py

The corrector has four of the base model's six layers. The base model answers unsafe questions, the corrector rewrites,
and the base model learns that: as labels (SFT), as preferences (DPO), or by reward weights (VAR). A reward model that
saw none of these pairs rates answers to held-out questions. Beside them: the untrained model with the corrector behind
it.
"""

import argparse
import random
import shutil
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap

from common import OUT, data_folder, write_result
from correction_task import FOLDER, LONGEST, approving, corrector_folder, judge, pairs, smaller, training_rows
from everalign.correction import Corrector
from everalign.data.records import Scored, ScoredSet
from everalign.evaluation.scorers import RewardModel
from everalign.evaluation.scoring import ScorerApprover
from everalign.learning.options import DistillOptions, TrainingOptions
from everalign.learning.self_training import distill
from everalign.modeling.options import SamplingOptions
from everalign.modeling.runtime import prepare_process
from everalign.modeling.sampling import sample_completions

LONGEST_ANSWER = 96
# The learning rate and the passes of each kind of label.
LABELS: dict[str, tuple[float, float]] = {"sft": (1e-3, 2.0), "dpo": (5e-4, 2.0), "var": (1e-3, 2.0)}
RESAMPLES = 9999


@dataclass(frozen=True)
class Referee:
    """Rates what a policy answers to held-out questions."""

    scorer: RewardModel
    tokenizer: Any
    prompts: list[Any]
    samples: int

    def answers(self, policy: Any, seed: int) -> list[tuple[str, ...]]:
        """Finished answers to each question."""
        options = SamplingOptions(
            completions=self.samples, temperature=1.0, max_new_tokens=LONGEST_ANSWER, max_prompt_tokens=LONGEST
        )
        return [found.texts for found in sample_completions(policy, self.tokenizer, self.prompts, options, seed=seed)]

    def rewards(self, answers: list[tuple[str, ...]]) -> list[float | None]:
        """Mean reward of each question's answers; None where none has ended."""
        prompts = [prompt for prompt, texts in zip(self.prompts, answers, strict=True) for _ in texts]
        found = iter(self.scorer.score(prompts, [text for texts in answers for text in texts]))
        return [statistics.fmean(next(found) for _ in texts) if texts else None for texts in answers]


def gain(before: list[float | None], after: list[float | None]) -> dict[str, float]:
    """Mean difference over the questions that both answer, with its bootstrap 95 % interval."""
    gains = [b - a for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    found = bootstrap((gains,), statistics.fmean, n_resamples=RESAMPLES, method="percentile", vectorized=False, rng=0)
    low, high = found.confidence_interval
    return {"gain": statistics.fmean(gains), "low": float(low), "high": float(high), "questions": len(gains)}


def questions(count: int) -> ScoredSet:
    """Questions that the corrector's training has too, each once."""
    rows = [*pairs("safe_rlhf", "train")[::2], *pairs("pku_safe5k", "train")]
    unique = {str(row.prompt): Scored(row.prompt) for row in rows}
    return ScoredSet(tuple(random.Random(0).sample(list(unique.values()), count)), "questions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4, help="answers to each held-out question")
    parser.add_argument("--labels", nargs="+", default=list(LABELS))
    parser.add_argument("--approved", action="store_true", help="a reward model approves of corrections")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    base = str(data_folder() / "base-model")
    folder = corrector_folder("corrector-small", str(smaller((0, 1, 3, 5))), training_rows())
    approver = ScorerApprover(approving()[0]) if arguments.approved else None
    corrector, (scorer, accuracy) = Corrector.from_pretrained(folder, approver=approver), judge()
    held_out = [row.prompt for row in pairs("safe_rlhf", "test")]
    table = Table(title=f"answers to {len(held_out)} held-out questions; judge of held-out accuracy {accuracy:.3f}")
    for column in ("policy", "round", "mean reward", "gain", "95 %", "changed", "finished", "words"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    results: list[dict[str, Any]] = []
    start: list[float | None] = []

    def tell(name: str, number: int, answers: list[tuple[str, ...]], referee: Referee, changed: float | None) -> None:
        rewards = referee.rewards(answers)
        start[:] = start or rewards
        texts = [text for found in answers for text in found]
        row = {
            "policy": name,
            "round": number,
            "reward": statistics.fmean(reward for reward in rewards if reward is not None),
            **gain(start, rewards),
            "changed": changed,
            "finished": len(texts) / (arguments.samples * len(held_out)),
            "words": statistics.fmean(len(text.split()) for text in texts),
        }
        results.append(row)
        interval = f"{row['low']:+.3f} to {row['high']:+.3f}"
        share = "" if changed is None else f"{changed:.2f}"
        figures = (f"{row['reward']:+.3f}", f"{row['gain']:+.3f}", interval, share, f"{row['finished']:.2f}")
        table.add_row(name, str(number), *figures, f"{row['words']:.0f}")
        Console(width=120).print(table)

    for labels in arguments.labels:
        rate, epochs = LABELS[labels]
        training = TrainingOptions(learning_rate=rate, epochs=epochs, max_length=LONGEST)
        output = FOLDER / f"distilled-{labels}-{arguments.seed}{'-approved' * arguments.approved}"
        shutil.rmtree(output, ignore_errors=True)
        for number in range(1, arguments.rounds + 1):
            options = DistillOptions(labels=labels, rounds=number, max_new_tokens=LONGEST_ANSWER)
            done = distill(
                base,
                corrector,
                questions(arguments.prompts),
                output,
                options=options,
                training=training,
                seed=arguments.seed,
                resume=number > 1,
                log=print,
            )
            referee = Referee(scorer, done.learner.tokenizer, held_out, arguments.samples)
            if not start:
                with done.learner.policy.as_base():
                    answers = referee.answers(done.learner.policy, 1000 + arguments.seed)
                tell("start", 0, answers, referee, None)
                asked = [(prompt, text) for prompt, found in zip(held_out, answers, strict=True) for text in found]
                corrected = iter(corrector.correct_batch(asked))
                tell(
                    "start, corrector behind it",
                    0,
                    [tuple(next(corrected).text for _ in found) for found in answers],
                    referee,
                    None,
                )
            tell(
                labels,
                number,
                referee.answers(done.learner.policy, 1000 + arguments.seed),
                referee,
                done.rounds[-1].changed_share,
            )
    write_result(
        OUT / "correction_distill.json",
        {"settings": vars(arguments), "judge_accuracy": accuracy, "results": results},
    )


if __name__ == "__main__":
    main()
