"""The demo over several seeds: does sequential training forget, and does LifeAlign not?

python bench/demo_seeds.py --seeds 0 1 2
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common import OUT, mean_and_deviation, write_result
from everalign.demo.run import run_demo

LARGEST_BWT_OF_SEQFT = -0.05
SMALLEST_GAIN_IN_BWT = 0.05


def run_seed(seed: int, output: Path) -> dict[str, Any]:
    """Run the demo with one seed and return both methods' numbers."""
    result = run_demo(output / f"seed-{seed}", log=print, progress=lambda *_: None, seed=seed)
    return {"seed": seed, "seconds": result.seconds, **{name: s.summary for name, s in result.scores.items()}}


def print_table(results: list[dict[str, Any]]) -> None:
    """Print Last, BWT and AP of both methods for every seed and over all of them."""
    table = Table(title="the demo's four tasks, held-out preference accuracy")
    for column in ("seed", "method", "Last", "BWT", "AP", "seconds for both"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for result in results:
        for name in ("seqft", "lifealign"):
            numbers = [result[name][key] for key in ("last", "backward_transfer", "average_performance")]
            table.add_row(str(result["seed"]), name, *[f"{x:.3f}" for x in numbers], f"{result['seconds']:.0f}")
    for name in ("seqft", "lifealign"):
        keys = ("last", "backward_transfer", "average_performance")
        table.add_row("all", name, *[mean_and_deviation([r[name][key] for r in results]) for key in keys], "")
    Console(width=120).print(table)


def goals(results: list[dict[str, Any]]) -> dict[str, bool]:
    """Return what the demo promises and whether every seed kept it."""
    pairs = [(result["seqft"], result["lifealign"]) for result in results]
    gains = [life["backward_transfer"] - plain["backward_transfer"] for plain, life in pairs]
    return {
        "sequential training forgets (BWT below -0.05)": all(
            plain["backward_transfer"] < LARGEST_BWT_OF_SEQFT for plain, _ in pairs
        ),
        "LifeAlign's BWT is at least 0.05 better": all(gain >= SMALLEST_GAIN_IN_BWT for gain in gains),
        "LifeAlign's Last is equal or better": all(life["last"] >= plain["last"] for plain, life in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", default=str(OUT / "demo"))
    arguments = parser.parse_args()
    results = [run_seed(seed, Path(arguments.output)) for seed in arguments.seeds]
    print_table(results)
    kept = goals(results)
    for goal, holds in kept.items():
        print(f"{'yes' if holds else 'NO '}  {goal}")
    write_result(Path(arguments.output) / "demo_seeds.json", {"results": results, "goals": kept})
    raise SystemExit(0 if all(kept.values()) else 1)


if __name__ == "__main__":
    main()
