"""Lifelong preference learning on real data: methods and controls, side by side.

    python bench/lifelong.py --sequence five --seeds 0 1
    python bench/lifelong.py --sequence domains --seeds 0 1 2

Every (method, seed) is a run of the learner in bench/out/lifelong; a run that was interrupted is resumed, a finished
one is read, so that a table can be grown run by run. `--part validation` scores rows cut from the training part
instead of the test part: that is where settings are tuned.
"""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import OUT, data_folder, mean_and_deviation, preference_rows, write_result
from controls import NormMatchedShrink
from everalign import AdapterOptions, Learner, PreferenceSet, TrainingOptions
from everalign.methods import (
    ExperienceReplay,
    LifeAlign,
    Method,
    MultiTask,
    SequentialFineTuning,
    SingleTask,
)

FIVE = ("hh_harmless", "hh_helpful", "hc3", "safe_rlhf", "truthfulqa_pairs")
DOMAINS = ("academy", "business", "entertainment", "literature")
VALIDATION_SHARE = 0.1

Tasks = list[tuple[str, PreferenceSet, PreferenceSet]]


@dataclass(frozen=True)
class Contender:
    """A row of the table: a method, an objective, and what differs in training."""

    method: Callable[[], Method]
    objective: str
    learning_rate_factor: float = 1.0


CONTENDERS = {
    "seqft": Contender(SequentialFineTuning, "dpo"),
    "er": Contender(ExperienceReplay, "dpo"),
    "lifealign": Contender(LifeAlign, "fpo"),
    "mtl": Contender(MultiTask, "dpo"),
    "stl": Contender(SingleTask, "dpo"),
    "er+fpo": Contender(ExperienceReplay, "fpo"),
    "lifealign-dpo": Contender(LifeAlign, "dpo"),
    "sft-only": Contender(SequentialFineTuning, "sft"),
    "er+dpo*0.6": Contender(ExperienceReplay, "dpo", 0.6),
    "shrink": Contender(NormMatchedShrink, "fpo"),
}


def load_tasks(sequence: str, part: str) -> Tasks:
    """Return (name, training rows, held-out rows); validation rows are cut from the training part by prompt."""
    if sequence == "five":
        rows = {name: (preference_rows(name, "train"), preference_rows(name, "test")) for name in FIVE}
    else:
        train, test = preference_rows("dsp_domains", "train"), preference_rows("dsp_domains", "test")
        rows = {
            domain: tuple([row for row in part_rows if row["domain"] == domain] for part_rows in (train, test))
            for domain in DOMAINS
        }
    tasks = []
    for name, (train, test) in rows.items():
        kept, cut = cut_validation(train)
        held_out = test if part == "test" else cut
        tasks.append((name, PreferenceSet.of(kept, source=f"{name}.train"), PreferenceSet.of(held_out, source=name)))
    return tasks


def cut_validation(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Cut a tenth of the prompts off; the same prompt never stands on both sides."""
    prompts = sorted({str(row["prompt"]) for row in rows})
    cut = set(random.Random(20261120).sample(prompts, int(VALIDATION_SHARE * len(prompts))))
    return [row for row in rows if str(row["prompt"]) not in cut], [row for row in rows if str(row["prompt"]) in cut]


def run(name: str, contender: Contender, tasks: Tasks, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Learn all tasks with one contender, or read what an earlier call learned."""
    folder = Path(arguments.output) / arguments.sequence / arguments.part / f"{name}-{seed}"
    options = TrainingOptions(
        learning_rate=arguments.learning_rate * contender.learning_rate_factor,
        epochs=arguments.epochs,
        batch_size=16,
        max_length=arguments.max_length,
        precision=arguments.precision,
        beta=arguments.beta,
        test_limit=arguments.test_limit,
    )
    learner = Learner(
        str(data_folder() / "base-model"),
        contender.method(),
        contender.objective,
        folder,
        training=options,
        adapter=AdapterOptions(rank=8, alpha=16.0, targets=arguments.targets),
        seed=seed,
        resume=True,
        cache=Path(arguments.output) / "reference",
        log=lambda line: print(f"{time.strftime('%H:%M:%S')} {name}-{seed} {line}", flush=True),
    )
    learner.learn_all(list(tasks))
    return summary(learner)


def summary(learner: Learner) -> dict[str, Any]:
    """Return every metric's matrix and its four numbers, with the time that training took."""
    data = learner.run
    metrics = {}
    for metric in ("accuracy", "reward_accuracy", "margin"):
        scores = data.scores(metric)
        metrics[metric] = {
            "tasks": list(scores.tasks),
            "zero_shot": list(scores.zero_shot),
            "matrix": [list(row) for row in scores.matrix],
            **scores.summary,
        }
    seconds = sum(stage.seconds for version in data.versions for stage in version.manifest.stages)
    return {"metrics": metrics, "training_seconds": seconds}


def print_table(results: dict[str, list[dict[str, Any]]], metric: str, title: str) -> None:
    """Print one metric's Last, BWT, AP and the final score of every task, mean ± deviation over the seeds."""
    table = Table(title=title)
    first = next(iter(results.values()))[0]["metrics"][metric]
    for column in ("method", "seeds", "Last", "BWT", "AP", "FWT", *first["tasks"]):
        table.add_column(column, justify="left" if column == "method" else "right")
    zero = first["zero_shot"]
    table.add_row("zero-shot", "", f"{sum(zero) / len(zero):.3f}", "", "", "", *[f"{value:.3f}" for value in zero])
    for name, runs in results.items():
        scores = [run["metrics"][metric] for run in runs]
        numbers = [mean_and_deviation([score[key] for score in scores]) for key in NUMBERS]
        tasks = [mean_and_deviation([final_score(score, j) for score in scores]) for j in range(len(zero))]
        table.add_row(name, str(len(runs)), *numbers, *tasks)
    Console(width=170).print(table)


NUMBERS = ("last", "backward_transfer", "average_performance", "forward_transfer")


def final_score(scores: dict[str, Any], task: int) -> float | None:
    """Score on a task at the end; of a separate model for each task, that task's own model's."""
    last = scores["matrix"][-1][task]
    return scores["matrix"][task][task] if last is None else last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequence", choices=("five", "domains"), default="five")
    parser.add_argument("--part", choices=("test", "validation"), default="test")
    parser.add_argument("--methods", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--test-limit", type=int, default=300)
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default=str(OUT / "lifelong"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tasks = load_tasks(arguments.sequence, arguments.part)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.methods}
    for seed in arguments.seeds:
        for name in arguments.methods:
            results[name].append(run(name, CONTENDERS[name], tasks, arguments, seed))
    for metric in ("accuracy", "reward_accuracy"):
        print_table(results, metric, f"{arguments.sequence}, {arguments.part} part: {metric}")
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    target = Path(arguments.output) / f"{arguments.sequence}.{arguments.part}.json"
    write_result(target, {"settings": settings, "results": results})


if __name__ == "__main__":
    main()
