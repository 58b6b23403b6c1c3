"""Does `everalign estimate` predict what a run takes? Five small runs on this machine, one thread each.

    python bench/estimate.py

Each run is estimated first, from its flags alone, and then learned, in processes of their own. Time is processor time,
because a machine may be shared; with one thread it is what an idle machine would need. Memory is the highest resident
size. Both are of the whole command: imports, loading, held-out scores, sample answers and report included. Runs that
are finished are not repeated: remove bench/out/estimate for that.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import OUT, correction_rows, data_folder, preference_rows, write_result
from everalign.demo.world import demo_tasks

HERE = OUT / "estimate"
# Names of correction sets differ in what they call a question.
QUESTION = "query"
# Characters of a correction's row: about 600 tokens, so that few are cut.
LONGEST = 2400


def write_rows(name: str, rows: list[dict[str, Any]]) -> str:
    HERE.mkdir(parents=True, exist_ok=True)
    (HERE / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(HERE / name)


def preferences(name: str, train: int, test: int) -> str:
    """A task of real preferences, as a flag's value."""
    files = []
    for split, count in (("train", train), ("test", test)):
        rows = preference_rows(name, split)[:count]
        short = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
        files.append(write_rows(f"{name}.{train}.{split}.jsonl", short))
    return f"{name}={','.join(files)}"


def corrections(name: str, train: int, test: int) -> str:
    files = []
    for split, count in (("train", train), ("test", test)):
        rows = [
            {"question": row[QUESTION], "answer": row["answer"], "correction": row["correction"]}
            for row in correction_rows(name, split)
        ]
        fit = [row for row in rows if sum(map(len, map(str, row.values()))) < LONGEST]
        files.append(write_rows(f"{name}.{split}.jsonl", fit[:count]))
    return f"{name}={','.join(files)}"


def demo(count: int) -> list[str]:
    found = []
    for one in demo_tasks()[:count]:
        files = [
            write_rows(f"{one.name}.{split}.jsonl", [row.to_json() for row in rows])
            for split, rows in (("train", one.train), ("test", one.test))
        ]
        found.append(f"{one.name}={','.join(files)}")
    return found


def runs() -> dict[str, list[str]]:
    """The flags of each run."""
    base = str(data_folder() / "base-model")
    harmless, helpful = preferences("hh_harmless", 80, 24), preferences("hh_helpful", 80, 24)
    few = preferences("hh_harmless", 16, 8)

    def tasks(*found: str) -> list[str]:
        return [part for task in found for part in ("--task", task)]

    long = ["--max-length", "512", "--learning-rate", "2e-3"]
    return {
        "tiny, lifealign, fpo": ["--model", "tiny", *tasks(*demo(2)), "--max-length", "128", "--learning-rate", "3e-3"],
        "6.5M, er, dpo": ["--model", base, *tasks(harmless, helpful), *long, "--method", "er", "--objective", "dpo"],
        "6.5M, seqft, snkl": ["--model", base, *tasks(harmless), *long, "--method", "seqft", "--objective", "snkl"],
        "6.5M, er, correction": [
            *("--model", base, *tasks(corrections("aligner_alpacaeval", 80, 20)), "--max-length", "1024"),
            *("--learning-rate", "2e-3", "--method", "er", "--objective", "correction"),
        ],
        "SmolLM2-135M, lifealign, fpo": [
            *("--model", "smollm2", *tasks(few), "--max-length", "256", "--batch-size", "4"),
            *("--learning-rate", "1e-3", "--sample-answers", "2"),
        ],
    }


def measured(command: list[str], log: Path) -> dict[str, float]:
    """Processor seconds and the highest resident size of a command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed: see {log}")
    return {"seconds": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss * 1024}


def compare(name: str, flags: list[str]) -> dict[str, Any]:
    """Estimate a run, learn it, and return both."""
    folder = HERE / name.replace(", ", "-")
    done = folder / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    everalign = [sys.executable, "-m", "everalign"]
    estimate = measured(
        [*everalign, "estimate", *flags, "--json", str(folder / "estimate.json")], folder / "estimate.log"
    )
    predicted = json.loads((folder / "estimate.json").read_text())
    actual = measured([*everalign, "learn", *flags, "--output", str(folder / "run")], folder / "learn.log")
    manifests = sorted((folder / "run" / "versions").glob("*/manifest.json"))
    stages = [stage for file in manifests for stage in json.loads(file.read_text())["stages"]]
    written = sum(file.stat().st_size for file in (folder / "run").rglob("*") if file.is_file())
    result = {
        "predicted": {name: predicted[name] for name in ("steps", "seconds", "parts", "memory", "disk")},
        "actual": {
            **actual,
            "steps": sum(stage["steps"] for stage in stages),
            "training": sum(stage["processor_seconds"] for stage in stages),
            "disk": written,
        },
        "estimate": estimate,
    }
    done.write_text(json.dumps(result, indent=2))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names that contain this")
    only = parser.parse_args().only
    found = {}
    print(f"{'run':30} {'steps':>11} {'s predicted':>19} {'took':>7} {'ratio':>6} {'MiB':>6} {'took':>6} {'ratio':>6}")
    for name, flags in runs().items():
        if only and only not in name:
            continue
        found[name] = one = compare(name, flags)
        predicted, actual, mib = one["predicted"], one["actual"], 2**20
        seconds, peak = predicted["seconds"], predicted["memory"]["peak"]
        print(
            f"{name:30} {predicted['steps']:4} and {actual['steps']:<3}"
            f" {seconds['low']:6.1f} to {seconds['high']:<6.1f}   {actual['seconds']:7.1f}"
            f" {seconds['expected'] / actual['seconds']:6.2f} {peak / mib:6.0f} {actual['memory'] / mib:6.0f}"
            f" {peak / actual['memory']:6.2f}"
        )
    write_result(HERE / "result.json", {"runs": found})


if __name__ == "__main__":
    main()
