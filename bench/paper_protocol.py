"""LifeAlign's protocol at small scale: supervised, then preference stages, and generated answers against references.

    python bench/paper_protocol.py

Five of the paper's six task sets, in its order, on SmolLM2-135M-Instruct with its adapter (rank 8, α 16, q_proj and
v_proj), the base model as reference, β 0.1 and cosine schedules. LifeAlign consolidates A and B separately, as the
paper is written. Rows and epochs are few, and rates are multiplied to make up for it: `--rate-factor`. After every task
each policy answers held-out prompts of the tasks so far, greedily; answers are compared with the chosen ones by the
paper's own BLEU-4 and ROUGE-L. Its numbers (Table 1, Qwen2.5-7B, 3,000 rows a task) stand beside ours: a model 50 times
as large on other held-out rows, so that only signs and orders can be compared. Differences of Last are paired by
prompts; their intervals say nothing of other seeds.

Started again it goes on where it was. Everything stands in bench/out/paper_protocol.
"""

import argparse
import json
import random
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from common import OUT, preference_rows, write_result
from everalign import Learner, PreferenceSet, TrainingOptions
from everalign.data.messages import completion_text
from everalign.evaluation.statistics import Interval, bootstrap
from everalign.evaluation.text_metrics import compat_bleu, compat_rouge_l
from everalign.learning.answer_evaluation import AnswerSettings, evaluate_run
from everalign.learning.options import PAPER_ADAPTER
from everalign.learning.run_data import BASE, RESULTS, load_run
from everalign.methods import make_method

TASKS = ("hc3", "hh_harmless", "hh_helpful", "safe_rlhf", "truthfulqa")
# Characters of a prompt with its longer answer: about 200 tokens, so that nothing is cut.
LONGEST = 800
METRICS = {"compat_bleu": "BLEU-4", "compat_rouge_l": "ROUGE-L"}
SCORES = {"compat_bleu": compat_bleu, "compat_rouge_l": compat_rouge_l}
CONTENDERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "SeqFT": ("seqft", "dpo", {}),
    "ER": ("er", "dpo", {}),
    "LifeAlign": ("lifealign", "fpo", {"space": "factors"}),
    "MTL": ("mtl", "dpo", {}),
}
# BWT, Last and AP of the paper's Table 1; of MTL it has Last alone.
PAPER: dict[str, dict[str, tuple[float | None, float, float | None]]] = {
    "SeqFT": {"compat_bleu": (-19.06, 11.53, 18.34), "compat_rouge_l": (-11.82, 15.76, 18.41)},
    "ER": {"compat_bleu": (-6.29, 22.73, 30.39), "compat_rouge_l": (-0.42, 24.81, 24.46)},
    "LifeAlign": {"compat_bleu": (0.02, 29.14, 30.53), "compat_rouge_l": (1.39, 26.43, 24.84)},
    "MTL": {"compat_bleu": (None, 30.64, None), "compat_rouge_l": (None, 26.34, None)},
}


def fitting(name: str, split: str, count: int, seed: int) -> PreferenceSet:
    """Return rows that are short enough, drawn by the seed; no prompt twice."""
    rows = {
        str(row["prompt"]): {key: row[key] for key in ("prompt", "chosen", "rejected")}
        for row in preference_rows(name, split)
        if len(str(row["prompt"])) + max(len(row["chosen"]), len(row["rejected"])) <= LONGEST
    }
    drawn = random.Random(seed).sample(list(rows.values()), min(count, len(rows)))
    return PreferenceSet.of(drawn, f"{name}.{split}")


def learn(name: str, arguments: argparse.Namespace) -> Path:
    """Train a contender's run, or go on with it; return its folder."""
    method, objective, settings = CONTENDERS[name]
    folder: Path = arguments.output / f"{name}-{arguments.seed}"
    rates = {"learning_rate": 5e-6 * arguments.rate_factor, "sft_learning_rate": 1e-4 * arguments.rate_factor}
    epochs = {"epochs": arguments.epochs, "sft_epochs": arguments.sft_epochs}
    learner = Learner(
        arguments.model,
        make_method(method, **settings),
        objective,
        folder,
        training=TrainingOptions.preset("paper", **rates, **epochs, max_length=512, precision="bf16"),
        adapter=PAPER_ADAPTER,
        seed=arguments.seed,
        cache=arguments.output / "cache",
        resume=(folder / "run.json").exists(),
        log=print,
    )
    train, test = ("train", arguments.rows), ("test", arguments.held_out)
    learner.learn_all([(task, fitting(task, *train, arguments.seed), fitting(task, *test, 0)) for task in TASKS])
    return folder


def answered(folder: Path, arguments: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Return for each metric what every version, the base model first, scores on every task, in percent."""
    measured: dict[str, Any] = {"compat": True, "standard": False, "likelihoods": False}
    settings = AnswerSettings(every=True, max_new_tokens=arguments.longest, **measured)
    found = evaluate_run(load_run(folder), settings=settings, log=print)["results"]
    versions = list(dict.fromkeys(row["version"] for row in found))
    assert versions[0] == BASE
    return {
        metric: [[row["metrics"][metric][0] for row in found if row["version"] == version] for version in versions]
        for metric in METRICS
    }


def summary(matrix: Sequence[Sequence[float]]) -> tuple[float | None, float, float | None]:
    """Return BWT, Last and AP as the paper defines them; of a run of one version Last alone."""
    after = matrix[1:]
    last = sum(after[-1]) / len(TASKS)
    if len(after) == 1:
        return None, last, None
    forgotten = [after[-1][j] - after[j][j] for j in range(len(TASKS) - 1)]
    so_far = [sum(row[: k + 1]) / (k + 1) for k, row in enumerate(after)]
    return sum(forgotten) / len(forgotten), last, sum(so_far) / len(so_far)


def final_scores(name: str, arguments: argparse.Namespace, metric: str) -> list[list[float]]:
    """What each final answer of a contender scores, by task, in percent."""
    folder: Path = arguments.output / f"{name}-{arguments.seed}"
    answers = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["answers"]
    found = []
    for task in TASKS:
        references = {
            json.dumps(row.prompt if isinstance(row.prompt, str) else list(map(dict, row.prompt))): row.chosen
            for row in fitting(task, "test", arguments.held_out, 0)
        }
        last = [(row["prompt"], list(row["answers"].values())[-1]["text"]) for row in answers[task]]
        found.append([SCORES[metric](text, completion_text(references[json.dumps(prompt)])) for prompt, text in last])
    return found


def ahead(name: str, other: str, arguments: argparse.Namespace, metric: str) -> Interval:
    """By how many points of Last a contender is ahead of another, paired by prompts."""
    scores = [final_scores(one, arguments, metric) for one in (name, other)]
    tasks = np.repeat(np.arange(len(TASKS)), [len(task) for task in scores[0]])
    differences = np.concatenate(scores[0]) - np.concatenate(scores[1])

    def last(weights: Any) -> Any:
        means = [(weights[:, tasks == t] @ differences[tasks == t]) / weights[:, tasks == t].sum(1) for t in set(tasks)]
        return np.mean(means, axis=0)

    return bootstrap(len(differences), last)


def show(found: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> None:
    """Print the table."""
    table = Table(title="BWT / Last / AP")
    for column in ("", *METRICS.values(), *(f"{name}, paper" for name in METRICS.values())):
        table.add_column(column, justify="right" if column else "left")

    def cell(values: tuple[float | None, float, float | None]) -> str:
        return " / ".join("–" if value is None else f"{value:.2f}" for value in values)

    first = next(iter(found.values()))
    base = [cell((None, sum(first[metric][0]) / len(TASKS), None)) for metric in METRICS]
    table.add_row("base model", *base, *("" for _ in METRICS))
    for name, matrices in found.items():
        ours = [cell(summary(matrices[metric])) for metric in METRICS]
        table.add_row(name, *ours, *(cell(PAPER[name][metric]) for metric in METRICS))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rows", type=int, default=60, help="training pairs of a task")
    parser.add_argument("--held-out", type=int, default=24, help="held-out prompts of a task")
    parser.add_argument("--sft-epochs", type=float, default=2.0)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--rate-factor", type=float, default=10.0, help="what the paper's learning rates are times")
    parser.add_argument("--longest", type=int, default=96, help="tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUT / "paper_protocol")
    arguments = parser.parse_args()
    found = {name: answered(learn(name, arguments), arguments) for name in arguments.contenders}
    show(found)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    facts = {"settings": settings, "tasks": TASKS, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    pairs = [(name, other) for i, name in enumerate(found) for other in list(found)[:i]]
    differences = {f"{a} over {b}": {metric: ahead(a, b, arguments, metric) for metric in METRICS} for a, b in pairs}
    for pair, values in differences.items():
        print(
            f"{pair}:",
            "; ".join(f"{METRICS[m]} {v.value:+.2f} [{v.low:+.2f}, {v.high:+.2f}]" for m, v in values.items()),
        )
    summaries = {name: {metric: summary(matrices[metric]) for metric in METRICS} for name, matrices in found.items()}
    write_result(
        arguments.output / "result.json",
        {**facts, "matrices": found, "summaries": summaries, "differences": differences},
    )


if __name__ == "__main__":
    main()
