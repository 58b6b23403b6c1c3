"""Speed and memory of this tree beside an earlier commit's, in one run, as ratios.

    python bench/before_after.py COMMIT                     # preference training, correction and gateway
    python bench/before_after.py COMMIT --parts preference --model smollm2

The commit is checked out beside the tree for the while. Both sides take turns and are measured in processor time, so
that other work on the machine hits both. A ratio above 1 is slower, or larger, than before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common import OUT, REPOSITORY, data_folder, write_result
from preference_speed import Contender

PARTS = ("preference", "correction", "gateway")
Values = dict[str, list[float]]


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Yields a worktree of the commit, which is removed again."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        git = ("git", "-C", str(REPOSITORY), "worktree")
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def environment(tree: Path) -> dict[str, str]:
    """Variables with which a process imports a tree's package, and finds the data of the benches."""
    return {**os.environ, "PYTHONPATH": str(tree / "src"), "EVERALIGN_BENCH_DATA": str(data_folder())}


def run_bench(tree: Path, name: str, *arguments: str) -> list[dict[str, Any]]:
    """Runs a tree's bench; returns the results that it wrote."""
    command = [sys.executable, str(tree / "bench" / f"{name}.py"), *arguments]
    subprocess.run(command, env=environment(tree), check=True, stdout=subprocess.DEVNULL)
    results: list[dict[str, Any]] = json.loads((tree / "bench" / "out" / f"{name}.json").read_text())["results"]
    return results


def preference(trees: dict[str, Path], arguments: argparse.Namespace) -> dict[str, Values]:
    """Processor time of an epoch and peak memory, by precision."""
    found: dict[str, Values] = {}
    for precision in ("fp32", "bf16"):
        settings = {
            "model": arguments.model,
            "shape": None,
            "vocabulary": 0,
            "pairs": arguments.pairs,
            "batch_size": 8,
            "max_length": 384,
            "tokens_per_batch": 8192,
            "threads": 1,
            "precision": precision,
        }
        workers = {
            side: Contender("everalign", settings, tree / "bench" / "preference_speed_worker.py", environment(tree))
            for side, tree in trees.items()
        }
        try:
            for turn in range(arguments.rounds + 1):
                for side, worker in workers.items():
                    epoch = worker.epoch()
                    if turn:  # the first one warms up
                        found.setdefault(f"{precision} epoch", {}).setdefault(side, []).append(
                            epoch["processor_seconds"] + epoch["processor_reference"]
                        )
                        found.setdefault(f"{precision} memory", {}).setdefault(side, []).append(epoch["memory"])
        finally:
            for worker in workers.values():
                worker.close()
    return found


def correction(trees: dict[str, Path], arguments: argparse.Namespace) -> dict[str, Values]:
    """Processor time of verified drafts as a share of plain decoding's, by kind of draft and size of batch."""
    found: dict[str, Values] = {}
    for _ in range(arguments.rounds):
        for side, tree in trees.items():
            with tempfile.TemporaryDirectory() as folder:  # this tree's bench would take up what it has measured before
                fresh = ("--output", folder) if side == "after" else ()
                rows = run_bench(tree, "correction", "--rows", "4", "--rounds", "1", "--sizes", "1", "4", *fresh)
            for row in rows:
                values = found.setdefault(f"{row['kind']}, batch of {row['size']}", {})
                values.setdefault(side, []).append(row["seconds"]["verified"])
    return found


def gateway(trees: dict[str, Path], arguments: argparse.Namespace) -> dict[str, Values]:
    """Processor time a request and memory after them, whole and streamed."""
    found: dict[str, Values] = {}
    for _ in range(arguments.rounds):
        for side, tree in trees.items():
            load = ("--clients", "20", "--seconds", "8", "--rounds", "1", "--answer-seconds", "0.2")
            for row in run_bench(tree, "gateway", *load):
                if row["through"] == "everalign":
                    for what, key in (("processor time", "processor_ms"), ("memory", "after")):
                        found.setdefault(f"{row['answer']}, {what}", {}).setdefault(side, []).append(row[key])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="what this tree is compared with")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side; what counts is the median ratio")
    parser.add_argument("--model", help="for preference training: smollm2, or a folder; default: the base model")
    parser.add_argument("--pairs", type=int, default=32)
    arguments = parser.parse_args()
    table = Table(title=f"this tree / {arguments.commit}")
    for column in ("part", "what", "ratio", "lowest", "highest"):
        table.add_column(column, justify="left" if column in ("part", "what") else "right")
    results = []
    with checked_out(arguments.commit) as before:
        trees = {"before": before, "after": REPOSITORY}
        for part in arguments.parts:
            for what, values in {"preference": preference, "correction": correction, "gateway": gateway}[part](
                trees, arguments
            ).items():
                ratios = sorted(new / old for old, new in zip(values["before"], values["after"], strict=True))
                row = {"part": part, "what": what, "ratio": statistics.median(ratios), "ratios": ratios, **values}
                results.append(row)
                table.add_row(part, what, *(f"{n:.3f}" for n in (row["ratio"], ratios[0], ratios[-1])))
                print(f"{part}: {what}: {row['ratio']:.3f}", flush=True)
    Console(width=120).print(table)
    write_result(OUT / "before_after.json", {"settings": vars(arguments), "results": results})


if __name__ == "__main__":
    main()
