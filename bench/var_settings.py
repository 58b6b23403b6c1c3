"""Which temperature and which floor of weights VAR should have by default: validation prompts of three real tasks.

    python bench/score_tasks.py --tasks harmless helpful safe    # the tasks' reward models and prompts
    python bench/answer_judge.py                                 # the judge
    python bench/var_settings.py                                 # --tasks shares the work between processes

The base model answers each task's training prompts eight times, as `everalign learn --objective var --samples 8` lets
it; the task's reward model scores the answers, and one epoch with each setting and rate learns them. What is learned is
measured on prompts that neither policies nor reward models have learned: by the reward that was followed, which is what
is chosen by, and by a judge of other rows. Temperatures are in deviations of the answers' rewards.

Runs stay in bench/out/var_settings and are not repeated.
"""

import argparse
import statistics
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import OUT, check_settings, data_folder, write_result
from everalign.data import Scored, encode_prompt, load_preferences
from everalign.data.messages import Prompt
from everalign.evaluation.scorers import RewardModel
from everalign.modeling.loading import load_tokenizer
from everalign.modeling.runtime import prepare_process
from everalign.storage import read_json, write_json
from everalign.training.options import VAR_TEMPERATURE, StageOptions
from var_contenders import var
from var_real import LONGEST, LONGEST_ANSWER, judged, sampled, scored, start, usable

TASKS = ("harmless", "helpful", "safe")
TEMPERATURES, FLOORS, RATES = (1.0, 0.5, 0.25, 0.1), (0.0, 0.02), (5e-4, 1e-3, 2e-3)
# Samples to a prompt: learned and measured. Nats that a setting may move the model by, as in var_smollm2.py.
ANSWERS, MEASURED, MOST_KL = 8, 8, 2.0


class Task:
    """One task's scored answers, and how its policies are measured.

    Args:
        name: of the task.
        inputs: what score_tasks.py has written.
        judge: a reward model of other rows.
        folder: keeps what is made.
    """

    def __init__(self, name: str, inputs: Path, judge: RewardModel, folder: Path) -> None:
        self.name, self._tokenizer = name, load_tokenizer(str(data_folder() / "base-model"))
        self._scorers = {"reward": RewardModel.from_folder(inputs / f"reward-{name}"), "judge": judge}
        self._asked = self._short(inputs / f"{name}.validation.jsonl")
        path = folder / f"{name}.samples.json"
        if not path.exists():
            answers = sampled(start(), self._tokenizer, self._short(inputs / f"{name}.train.jsonl"), ANSWERS, 0)
            rows = scored(self._scorers["reward"], [row for row in answers if len(row.completions) > 1])
            write_json(path, [row.to_json() for row in rows])
        self._rows = usable([Scored.from_json(row, str(path)) for row in read_json(path)], self._tokenizer)

    def _short(self, path: Path) -> list[Prompt]:
        """Prompts that leave room for a whole answer."""
        prompts = [row.prompt for row in load_preferences(path)]
        return [prompt for prompt in prompts if len(encode_prompt(self._tokenizer, prompt)) <= LONGEST - LONGEST_ANSWER]

    def run(self, setting: tuple[float, float, float] | None) -> dict[str, float]:
        """Learn with a temperature, floor and rate, or nothing, and measure the policy."""
        policy = start()
        if setting is not None:
            temperature, floor, rate = setting
            options = StageOptions(learning_rate=rate, epochs=1, batch_size=16, checkpoint_steps=0, logging_steps=1000)
            with tempfile.TemporaryDirectory() as folder:
                var(temperature, floor=floor)(policy, self._tokenizer, self._rows, options, Path(folder))
        answers = sampled(policy, self._tokenizer, self._asked, MEASURED, 1)
        finished = sum(len(row.completions) for row in answers)
        found = judged(policy, self._tokenizer, answers, self._scorers)
        return {**found, "unfinished": 1 - finished / (MEASURED * len(self._asked))}


def summary(folder: Path, tasks: list[str]) -> list[dict[str, Any]]:
    """Means over the tasks of what every setting gains over the start, for those that all tasks have."""
    found = []
    for temperature, floor, rate in product(TEMPERATURES, FLOORS, RATES):
        paths = [folder / f"{task}.{temperature:g}.{floor:g}.{rate:g}.json" for task in tasks]
        if all(path.exists() for path in paths):
            runs = [read_json(path) for path in paths]
            starts = [read_json(folder / f"{task}.start.json") for task in tasks]
            means = {name: statistics.fmean(run[name] for run in runs) for name in ("kl", "words", "unfinished")}
            gains = {
                name: [run[name] - start[name] for run, start in zip(runs, starts, strict=True)]
                for name in ("reward", "judge")
            }
            found.append({"temperature": temperature, "floor": floor, "rate": rate, **means, **gains})
    return found


def against(rows: list[dict[str, Any]], temperature: float, name: str) -> str:
    """Mean difference to the default temperature over tasks, floors and rates, with its standard error."""
    theirs, ours = (
        [gain for row in rows if row["temperature"] == one for gain in row[name]]
        for one in (temperature, VAR_TEMPERATURE)
    )
    moved = [a - b for a, b in zip(theirs, ours, strict=True)]
    error = statistics.stdev(moved) / len(moved) ** 0.5
    return f"{statistics.fmean(moved):+.3f} ± {error:.3f} (above 0 in {sum(one > 0 for one in moved)} of {len(moved)})"


def show(rows: list[dict[str, Any]], tasks: list[str]) -> None:
    """Print the table, and which setting has the highest reward within the KL."""
    table = Table(title=f"gains of {', '.join(tasks)}, and their mean")
    for column in ("temperature", "floor", "rate", "reward", "judge", "KL", "words", "unfinished"):
        table.add_column(column, justify="right")
    for row in rows:
        gains = [
            f"{' '.join(f'{gain:+.2f}' for gain in row[name])}  {statistics.fmean(row[name]):+.3f}"
            for name in ("reward", "judge")
        ]
        settings = [f"{row[name]:g}" for name in ("temperature", "floor", "rate")]
        table.add_row(*settings, *gains, f"{row['kl']:.2f}", f"{row['words']:.0f}", f"{row['unfinished']:.0%}")
    Console(width=140).print(table)
    for temperature in (one for one in TEMPERATURES if one != VAR_TEMPERATURE):
        differences = [against(rows, temperature, name) for name in ("reward", "judge")]
        print(
            f"temperature {temperature:g} against {VAR_TEMPERATURE:g}: reward {differences[0]}, judge {differences[1]}"
        )
    if within := [row for row in rows if row["kl"] <= MOST_KL]:
        best = max(within, key=lambda row: statistics.fmean(row["reward"]))
        settings = ", ".join(f"{name} {best[name]:g}" for name in ("temperature", "floor", "rate"))
        print(f"highest reward at a KL of at most {MOST_KL:g}: {settings}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--inputs", type=Path, default=OUT / "score_tasks")
    parser.add_argument("--judge", type=Path, default=OUT / "answer_judge")
    parser.add_argument("--output", type=Path, default=OUT / "var_settings")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    judge = RewardModel.from_folder(arguments.judge)
    settings = {"judge": judge.fingerprint, "answers": ANSWERS, "measured": MEASURED}
    check_settings(arguments.output / "settings.json", settings)
    for name in arguments.tasks:
        task = Task(name, arguments.inputs, judge, arguments.output)
        for setting in (None, *product(TEMPERATURES, FLOORS, RATES)):
            stem = "start" if setting is None else ".".join(f"{number:g}" for number in setting)
            path = arguments.output / f"{name}.{stem}.json"
            if not path.exists():
                write_json(path, task.run(setting))
                print(name, stem, read_json(path), flush=True)
    rows = summary(arguments.output, arguments.tasks)
    show(rows, arguments.tasks)
    write_result(arguments.output.with_suffix(".json"), {"settings": settings, "results": rows})


if __name__ == "__main__":
    main()
