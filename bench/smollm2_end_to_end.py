"""SmolLM2-135M-Instruct learns three real preference tasks on a CPU, and shows what it writes before and after.

    python bench/smollm2_end_to_end.py

Harmless (hh), truthful (TruthfulQA) and helpful (hh) pairs, one after another, in bf16 and steps of 8 pairs, else with
the defaults of `everalign learn` but for the learning rate: it is the one of three whose policy, trained on a mixture
of the tasks, ranks most of the validation pairs rightly; these are cut from the training part. The rest is the one
command that is printed.

Started again it goes on where it was. Everything stands in bench/out/smollm2: data, the tuning runs, the run with its
report.html, and result.json.
"""

import argparse
import json
import random
import shlex
import time
from pathlib import Path
from typing import Any

import torch

from common import OUT, preference_rows, write_result
from everalign import Learner, PreferenceSet, TrainingOptions
from everalign.cli import main as everalign
from everalign.cli.console import run_answers, run_scores
from everalign.learning.run_data import load_run

TASKS = {"harmless": "hh_harmless", "truthful": "truthfulqa", "helpful": "hh_helpful"}
RATES = (1e-4, 3e-4, 1e-3)
VALIDATION = 48
# Of each of the tasks, in the mixture that the rate is chosen on.
MIXED = 40
# Characters of a prompt with its longer answer: about 200 tokens, so that nothing is cut.
LONGEST = 800
SETTINGS = {"max_length": 512, "batch_size": 8, "precision": "bf16"}


def fitting(name: str, split: str, seed: int) -> list[dict[str, Any]]:
    """The rows that are short enough, in an order of the seed's, with the columns that are learned."""
    rows = [
        {key: row[key] for key in ("prompt", "chosen", "rejected")}
        for row in preference_rows(name, split)
        if len(str(row["prompt"])) + max(len(row["chosen"]), len(row["rejected"])) <= LONGEST
    ]
    return random.Random(seed).sample(rows, len(rows))


def write_data(folder: Path, rows: int, held_out: int, seed: int) -> None:
    """Write NAME.jsonl, NAME.validation.jsonl and NAME.test.jsonl of each task; prompts of one are in no other."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in TASKS.items():
        train, test = fitting(source, "train", seed), fitting(source, "test", seed)
        asked = {str(row["prompt"]) for row in train[:rows]}
        validation = [row for row in train[rows:] if str(row["prompt"]) not in asked][:VALIDATION]
        parts = {f"{name}": train[:rows], f"{name}.validation": validation, f"{name}.test": test[:held_out]}
        for part, found in parts.items():
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def read(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()][:most]


def choose_rate(folder: Path, seed: int) -> tuple[float, dict[str, dict[str, float]]]:
    """Return the rate whose policy ranks most validation pairs rightly, and all that was tried."""
    train = [row for name in TASKS for row in read(folder / f"{name}.jsonl", MIXED)]
    test = [row for name in TASKS for row in read(folder / f"{name}.validation.jsonl")]
    found = {}
    for rate in RATES:
        learner = Learner(
            "smollm2",
            output=folder.parent / f"rate-{rate:g}",
            training=TrainingOptions(learning_rate=rate, **SETTINGS),
            seed=seed,
            cache=folder.parent / "cache",
            resume=(folder.parent / f"rate-{rate:g}" / "run.json").exists(),
        )
        learner.learn_all([("mixture", PreferenceSet.of(train, "mixture"), PreferenceSet.of(test, "validation"))])
        score = learner.run.versions[-1].scores["mixture"]
        found[f"{rate:g}"] = {"accuracy": score.accuracy, "margin": score.margin}
    best = max(RATES, key=lambda rate: (found[f"{rate:g}"]["accuracy"], -rate))
    return best, found


def command(folder: Path, rate: float, seed: int) -> list[str]:
    """The arguments of `everalign` that learn everything."""
    tasks = [part for name in TASKS for part in ("--task", f"{name}={folder}/{name}.jsonl,{folder}/{name}.test.jsonl")]
    flags = {"--learning-rate": f"{rate:g}", "--seed": str(seed), "--cache": str(folder.parent / "cache")}
    settings = {f"--{name.replace('_', '-')}": str(value) for name, value in SETTINGS.items()}
    given = [part for pair in {**settings, **flags}.items() for part in pair]
    return ["learn", "--model", "smollm2", *tasks, *given, "--output", str(folder.parent / "run")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200, help="training pairs of a task")
    parser.add_argument("--held-out", type=int, default=100, help="held-out pairs of a task (TruthfulQA has fewer)")
    parser.add_argument("--rate", type=float, help="take this learning rate instead of choosing one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUT / "smollm2")
    arguments = parser.parse_args()
    folder = arguments.output / "data"
    write_data(folder, arguments.rows, arguments.held_out, arguments.seed)
    started, cpu = time.perf_counter(), time.process_time()
    rate, tried = (arguments.rate, {}) if arguments.rate else choose_rate(folder, arguments.seed)
    tuned = time.perf_counter(), time.process_time()
    learn = command(folder, rate, arguments.seed)
    print(f"\neveralign {shlex.join(learn)}\n")
    resume = ["--resume"] if (arguments.output / "run" / "run.json").exists() else []
    if code := everalign([*learn, *resume]):
        raise SystemExit(code)
    run = load_run(arguments.output / "run")
    seconds = {
        "tuning": round(tuned[0] - started, 1),
        "learning": round(time.perf_counter() - tuned[0], 1),
        "tuning_cpu": round(tuned[1] - cpu, 1),
        "learning_cpu": round(time.process_time() - tuned[1], 1),
        "threads": torch.get_num_threads(),
    }
    for task, pairs in run_answers(run).items():
        for pair in pairs[:2]:
            asked = pair["prompt"] if isinstance(pair["prompt"], str) else pair["prompt"][-1]["content"]
            print(f"\n[{task}] {asked}\n  before: {pair['before']}\n  after:  {pair['after']}")
    answers = [pair for pairs in run_answers(run).values() for pair in pairs]
    ended = {when: sum(pair[f"ended_{when}"] for pair in answers) for when in ("before", "after")}
    print(f"\nof {len(answers)} answers, ended: {ended['before']} before, {ended['after']} after; seconds: {seconds}")
    facts = {"learning_rate": rate, "validation": tried, "seed": arguments.seed, "seconds": seconds, "ended": ended}
    write_result(arguments.output / "result.json", {**facts, **run_scores(run), "answers": run_answers(run)})


if __name__ == "__main__":
    main()
