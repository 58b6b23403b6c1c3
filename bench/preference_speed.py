"""Preference training side by side with TRL's DPOTrainer: pairs per second and peak memory, as paired ratios.

    python bench/preference_speed.py                            # real hh-rlhf pairs, fp32 and bf16
    python bench/preference_speed.py --model smollm2 --max-length 384 --threads 1       # or a folder, or a GGUF file
    python bench/preference_speed.py --shape 1024x128 --vocabulary 152000 --pairs 4 --batch-size 2
    python bench/preference_speed.py --sweep prompt             # or response, vocabulary, tasks

Every contender is a process of its own that holds model, rows and trainer, and runs one epoch over the same pairs
when it is told to. The contenders take turns, so that a slow minute of the machine hits all of them; what counts is
the median of the ratios of neighbouring epochs. Memory is the highest resident size of a process above its size
with the model loaded. The time in which `trl-precomputed` computes its references is not counted against it.
`everalign-N` is ours with the long-term memory of N tasks. Utilisation is the share of the machine's rate of matrix
products, measured in the same process, that the products which a step cannot do without would take up. On a machine
that others load, `--clock processor` counts the processor time of the contenders.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common import OUT, write_result

WORKER = Path(__file__).with_name("preference_speed_worker.py")
PEERS = ("trl", "trl-precomputed")
SMALL = {"pairs": 8, "batch_size": 4, "vocabulary": 32_000}
# What is varied, everything else being equal; prompts and responses are random tokens.
SWEEPS = {
    "prompt": [{**SMALL, "shape": f"{prompt}x64"} for prompt in (64, 256, 1024)],
    "response": [{**SMALL, "shape": f"256x{response}"} for response in (16, 64, 256)],
    "vocabulary": [{**SMALL, "shape": "256x64", "vocabulary": size} for size in (4_000, 32_000, 152_000)],
    "tasks": [{"contenders": ["everalign-1", "everalign-12"]}],
}


class Contender:
    """A worker process that runs an epoch on request."""

    def __init__(
        self, name: str, settings: dict[str, Any], worker: Path = WORKER, environment: dict[str, str] | None = None
    ) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, str(worker), name, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.ready = self._answer()

    def epoch(self) -> dict[str, float]:
        """Run one epoch and return what the worker measured."""
        assert self._process.stdin is not None
        self._process.stdin.write("epoch\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"'):  # others are the trainers' own lines
                answer: dict[str, Any] = json.loads(line)
                return answer
        sys.exit(f"{self.name}: the worker ended with code {self._process.wait()}")

    def close(self) -> None:
        """End the worker."""
        self._process.kill()
        self._process.wait()


def compare(settings: dict[str, Any], names: list[str], rounds: int) -> dict[str, Any]:
    """Let the contenders take turns; the first round warms up and is thrown away."""
    contenders = [Contender(name, settings) for name in names]
    epochs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    try:
        for turn in range(rounds + 1):
            for contender in contenders:
                result = contender.epoch()
                if turn:
                    epochs[contender.name].append(result)
    finally:
        for contender in contenders:
            contender.close()
    return {"ready": {c.name: c.ready for c in contenders}, "epochs": epochs}


def summary(measured: dict[str, Any], pairs: int, clock: str) -> list[dict[str, Any]]:
    """Return a row for each contender: its own numbers, and those of the first as ratios to it."""
    rows, step, reference = [], f"{clock}_seconds", f"{clock}_reference"
    ours = next(iter(measured["epochs"].values()))
    for name, epochs in measured["epochs"].items():
        ready = measured["ready"][name]
        memory = max(epoch["memory"] for epoch in epochs)
        seconds = statistics.median(epoch[step] for epoch in epochs)
        row = {
            "contender": name,
            "pairs_per_second": pairs / seconds,
            "memory_mib": memory / 2**20,
            "first_step_seconds": ready["seconds"],
        }
        if "flops" in ready:
            row["utilisation"] = ready["flops"] / seconds / ready["flops_per_second"]
        if epochs is not ours:
            # A run of one epoch computes every reference once, whoever does it and when.
            whole = [
                (theirs[step] + theirs[reference]) / (o[step] + o[reference])
                for theirs, o in zip(epochs, ours, strict=True)
            ]
            steps = [theirs[step] / o[step] for theirs, o in zip(epochs, ours, strict=True)]
            row |= {
                "speed_one_epoch": statistics.median(whole),
                "speed_known_reference": statistics.median(steps),
                "memory_share": max(o["memory"] for o in ours) / memory,
            }
        rows.append(row)
    return rows


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print what `summary` returned."""
    table = Table(title=title)
    names = (
        "contender",
        "pairs/s in a step",
        "speed, one epoch with references",
        "speed, references known",
        "memory MiB",
        "our memory",
        "start-up s",
        "utilisation",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "contender" else "right")
    for row in rows:
        ratios = [f"{row[key]:.2f}×" if key in row else "" for key in ("speed_one_epoch", "speed_known_reference")]
        share = f"{row['memory_share']:.0%}" if "memory_share" in row else ""
        numbers = (f"{row['pairs_per_second']:.2f}", *ratios, f"{row['memory_mib']:.0f}", share)
        used = f"{row['utilisation']:.0%}" if "utilisation" in row else ""
        table.add_row(row["contender"], *numbers, f"{row['first_step_seconds']:.1f}", used)
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument(
        "--contenders", nargs="+", default=["everalign", *PEERS], help="everalign, everalign-N, trl, trl-precomputed"
    )
    parser.add_argument("--model", help="smollm2, a folder or a GGUF file, instead of the base model of the data")
    parser.add_argument("--shape", help="PROMPTxRESPONSE tokens of random pairs, instead of real ones")
    parser.add_argument(
        "--vocabulary", type=int, default=0, help="a random model of Qwen2.5-0.5B's shape, cut to 2 layers"
    )
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--tokens-per-batch", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--output", default=str(OUT / "preference_speed.json"))
    parser.add_argument("--sweep", choices=list(SWEEPS), help="several runs, with these things varied")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = SWEEPS.get(arguments.sweep, [{}])
    for point in points:
        for precision in arguments.precisions:
            settings = {**vars(arguments), **point, "precision": precision}
            measured = compare(settings, settings["contenders"], arguments.rounds)
            rows = summary(measured, settings["pairs"], settings["clock"])
            what = next(iter(measured["ready"].values()))["what"]
            print_table(f"{precision}, {point or 'as given'}: {what}", rows)
            results.append({"settings": settings, "rows": rows, "measured": measured})
    write_result(Path(arguments.output), {"results": results})


if __name__ == "__main__":
    main()
