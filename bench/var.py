"""VAR beside what else learns from rewards, on a task whose reward is known: reward, KL to the reference, time, tokens.

    python bench/var.py --seeds 0 1 2

All start from the embedded assistant with the same fresh adapter and see the same questions; held-out questions judge
them. What is sampled from the reference is paid for by everyone. `grpo` is TRL's.
"""

import argparse
import statistics
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import OUT, mean_and_deviation, write_result
from everalign.data import Scored
from everalign.modeling.loading import load_model, load_tokenizer
from everalign.modeling.policy import Policy
from everalign.modeling.runtime import prepare_process
from var_contenders import (
    Contender,
    Spent,
    advantage,
    best_of,
    chosen,
    dpo,
    learn,
    scored_answers,
    snkl,
    start,
    var,
)
from var_grpo import learn_grpo
from var_task import LONGEST_ANSWER, draw_questions, measure, prompt, reward

# Chosen in trials, for the highest held-out reward; SFT, best-of-K and A-LoL have VAR's settings, snkl has DPO's.
CONTENDERS = {
    "sft on chosen": Contender(chosen, 2e-3, 4.0),
    "best of K (RAFT)": Contender(best_of, 2e-3, 4.0),
    "A-LoL": Contender(advantage, 2e-3, 4.0),
    "DPO": Contender(dpo(0.1), 5e-4, 3.0),
    "DPO, 3 rounds": Contender(dpo(1.0), 1e-3, 2.0, rounds=3),
    "snkl": Contender(snkl(0.1), 5e-4, 3.0),
    "VAR": Contender(var(0.05, floor=0.02), 2e-3, 4.0),
    "VAR, longer": Contender(var(0.05, floor=0.02), 2e-3, 5.0),
    "VAR, 3 rounds": Contender(var(0.05, floor=0.3, varied=True), 2e-3, 3.0, 8, rounds=3),
    "VAR, 4 rounds": Contender(var(0.05, floor=0.3, varied=True), 2e-3, 3.0, 8, rounds=4),
    "VAR, first 3": Contender(var(0.05, floor=0.02), 2e-3, 4.0, first=3),
    "VAR, 3 rounds, first 3": Contender(var(0.05, floor=0.3, varied=True), 2e-3, 3.0, 8, rounds=3, first=3),
}
GRPO: dict[str, Any] = {"learning_rate": 1e-3, "batch": 64, "every": 20}
ROUND_QUESTIONS = 128

Point = dict[str, float]


class Observer:
    """Measures a policy whenever it is asked to, and keeps what it saw."""

    def __init__(self, tokenizer: Any, held_out: int, seed: int) -> None:
        self._tokenizer, self._asked = tokenizer, draw_questions(held_out, True, seed)
        self._seed = seed
        self.points: list[Point] = []

    def __call__(self, policy: Policy, spent: Spent) -> None:
        """Measure now; `spent` is what it has cost so far."""
        standing = measure(policy, self._tokenizer, self._asked, self._seed + 10_000)
        self.points.append({**asdict(standing), **asdict(spent)})


def run(name: str, arguments: argparse.Namespace, tokenizer: Any, seed: int) -> list[Point]:
    """The points of one contender's way, with one seed."""
    observer = Observer(tokenizer, arguments.held_out, seed)
    asked = draw_questions(arguments.questions, False, seed)
    if name == "start":
        observer(start(), Spent())
    elif name == "grpo":
        known = {question.text: question for question in asked}

        def worth(prompts: list[Any], texts: list[str]) -> list[float]:
            return [reward(known[chat[-1]["content"]], text) for chat, text in zip(prompts, texts, strict=True)]

        learn_grpo(
            load_model("tiny", "fp32"),
            start(),
            tokenizer,
            [prompt(question) for question in asked],
            worth,
            seed,
            observer,
            steps=arguments.grpo_steps,
            count=arguments.answers,
            longest=LONGEST_ANSWER,
            **GRPO,
        )
    else:
        contender = CONTENDERS[name]
        if contender.rounds > 1:
            count = contender.rounds * arguments.round_questions
            asked = draw_questions(max(count, arguments.questions), False, seed)[:count]
        share = len(asked) // contender.rounds

        def draw(policy: Policy, number: int, spent: Spent) -> list[Scored]:
            part = asked[number * share : (number + 1) * share]
            rows, tokens = scored_answers(
                policy, tokenizer, part, arguments.answers, 100 * seed + number, contender.first
            )
            spent.tokens += tokens
            return rows

        learn(contender, start(), tokenizer, draw, observer)
    last = observer.points[-1]
    print(f"seed {seed}, {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in last.items()), flush=True)
    return observer.points


def cost_to(points: list[Point], reward: float, what: str) -> float | None:
    """What a way had cost when it was first seen at a reward; None if it never was."""
    return next((point[what] for point in points if point["reward"] >= reward), None)


def print_table(results: dict[str, list[list[Point]]]) -> None:
    """One line a contender, mean ± deviation over the seeds of its last point."""
    table = Table(title="held-out questions, at the end")
    for column in ("contender", "reward", "KL, nats", "right", "seconds", "tokens generated"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, ways in results.items():
        last = [way[-1] for way in ways]
        cells = [mean_and_deviation([point[key] for point in last]) for key in ("reward", "kl", "right")]
        seconds = statistics.median(point["seconds"] for point in last)
        tokens = statistics.median(point["tokens"] for point in last)
        table.add_row(name, *cells, f"{seconds:.1f}", f"{tokens:,.0f}")
    Console(width=120).print(table)


def comparisons(results: dict[str, list[list[Point]]]) -> dict[str, Any]:
    """VAR against DPO in reward, and against GRPO in the time to GRPO's final reward."""
    found: dict[str, Any] = {}
    last = {name: [way[-1] for way in ways] for name, ways in results.items()}
    if {"VAR", "DPO"} <= last.keys():
        pairs = list(zip(last["VAR"], last["DPO"], strict=True))
        found["VAR over DPO, reward"] = statistics.fmean(
            ours["reward"] / theirs["reward"] - 1 for ours, theirs in pairs
        )
        found["VAR less DPO, KL"] = statistics.fmean(ours["kl"] - theirs["kl"] for ours, theirs in pairs)
    for name, ways in results.items():
        if "grpo" in results and name.startswith("VAR"):
            for what in ("seconds", "processor_seconds", "tokens"):
                found[f"GRPO's {what} to its final reward over those of {name}"] = [
                    None if (ours := cost_to(way, other[-1]["reward"], what)) is None else other[-1][what] / ours
                    for way, other in zip(ways, results["grpo"], strict=True)
                ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["start", *CONTENDERS, "grpo"]
    parser.add_argument("--contenders", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=400, help="asked in training")
    parser.add_argument(
        "--round-questions", type=int, default=ROUND_QUESTIONS, help="of a round, where there are several"
    )
    parser.add_argument("--answers", type=int, default=8, help="sampled to each question")
    parser.add_argument("--held-out", type=int, default=400, help="questions that judge")
    parser.add_argument("--grpo-steps", type=int, default=160)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    tokenizer = load_tokenizer("tiny")
    results: dict[str, list[list[Point]]] = {name: [] for name in arguments.contenders}
    for seed in arguments.seeds:
        for name in arguments.contenders:
            results[name].append(run(name, arguments, tokenizer, seed))
    print_table(results)
    found = comparisons(results)
    for name, value in found.items():
        print(f"{name}: {value}")
    write_result(OUT / "var.json", {"settings": vars(arguments), "results": results, "comparisons": found})


if __name__ == "__main__":
    main()
