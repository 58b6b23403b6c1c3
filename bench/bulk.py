"""Whole datasets with the embedded model: is each row there once and in order after a kill, and does memory stay flat?

    python bench/bulk.py                       # 20,000 and 200,000 rows scored, in one process and by two Ray workers
    python bench/bulk.py --verb correct --rows 2000 --window 128
    python bench/bulk.py --stub --engines local --rows 2000000     # no model: what the machinery itself takes

In one process the command is killed by SIGKILL half-way and started again; of Ray's workers one is killed half-way. The
output is then compared with the input, row by row. Times are of whole commands, with Python's start and Ray's; those of
the killed command and its second start are added.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from common import OUT, write_result

HERE = OUT / "bulk"
OUTPUT = HERE / "output.jsonl"
WORDS = ("yes", "no", "the", "sea", "is", "salty", "sugar", "sweet", "moon", "of", "cheese", "stars", "at", "night")
# Ray lowers its workers' priority by default, and a busy machine then starves them.
ENVIRONMENT = {
    **os.environ,
    "RAY_worker_niceness": "0",
    "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
}
SCORER = "def by_length(prompts, completions):\n    return [float(len(text)) for text in completions]\n"


def row(number: int, verb: str, words: int) -> dict[str, Any]:
    """A row whose question and answer have at most so many words each."""
    draw = random.Random(number)
    question = f"{number}: {' '.join(draw.choices(WORDS, k=draw.randint(2, words)))}?"
    answer = " ".join(draw.choices(WORDS, k=draw.randint(1, words))) + "."
    if verb == "correct":
        return {"question": question, "answer": answer}
    return {"prompt": question, "completions": [answer]}


def prepare(verb: str, stub: bool) -> list[str]:
    """Make the model; returns the verb's flags."""
    HERE.mkdir(parents=True, exist_ok=True)
    if stub:
        (HERE / "bulk_stub.py").write_text(SCORER)
        return ["reward", "score", "--model", "bulk_stub:by_length"]
    name = "reward" if verb == "score" else "corrector"
    rows = [
        {"prompt": f"{i}?", "chosen": "yes", "rejected": "no"}
        if verb == "score"
        else {"question": f"{i}?", "answer": "no", "correction": "yes"}
        for i in range(64)
    ]
    (HERE / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    if not (HERE / name).exists():
        train = ["reward", "train"] if verb == "score" else ["correct", "train"]
        length = ["--max-length", "256", "--epochs", "1", "--learning-rate", "1e-3"]
        everalign([*train, "--model", "tiny", "--data", "train.jsonl", "--output", name, *length]).wait()
    if verb == "score":
        return ["reward", "score", "--model", name]
    return ["correct", "run", "--corrector", name, "--max-new-tokens", "8"]


def everalign(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "everalign", *arguments], cwd=HERE, env=ENVIRONMENT)


def run(engine: str, flags: list[str], data: Path, kill: bool) -> dict[str, Any]:
    """Run the verb, with a kill half-way; returns seconds, peaks and what became of the rows."""
    shutil.rmtree(f"{OUTPUT}.parts", ignore_errors=True)
    for old in HERE.glob("output.jsonl*"):
        old.unlink()
    arguments = [*flags, "--data", data.name, "--output", OUTPUT.name]
    if engine == "ray":
        arguments += ["--engine", "ray", "--workers", "2"]
    seconds, peak, killed = 0.0, 0, False
    while True:
        started, process = time.perf_counter(), everalign(arguments)
        while process.poll() is None:
            peak = max(peak, largest(process.pid))
            if kill and not killed and half_way(engine, data):
                killed = kill_one(engine, process)
            time.sleep(0.2)
        seconds += time.perf_counter() - started
        if process.returncode == 0:
            break
        if process.returncode != -signal.SIGKILL:
            sys.exit(f"{' '.join(arguments)} ended with {process.returncode}")
    if kill and not killed:
        sys.exit("the work was done before half of it was seen: give more --rows")
    return {"engine": engine, "killed": killed, "seconds": round(seconds, 1), "peak_mib": peak >> 20, **compare(data)}


def largest(pid: int) -> int:
    """Resident bytes of the largest process that works on rows: the command's own, or a Ray worker."""
    found = 0
    try:
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            if one.pid == pid or "ray::" in "".join(one.cmdline()[:1]):
                found = max(found, one.memory_info().rss)
    except psutil.Error:  # it has just ended
        pass
    return found


def half_way(engine: str, data: Path) -> bool:
    if engine == "ray":
        parts = list(Path(f"{OUTPUT}.parts").glob("*.jsonl"))
        return bool(parts) and len(parts) >= int(parts[0].name.split("-of-")[1][:5]) // 2
    written = OUTPUT.with_name(f"{OUTPUT.name}.partial")
    return written.exists() and written.stat().st_size > data.stat().st_size // 2


def kill_one(engine: str, process: subprocess.Popen[bytes]) -> bool:
    if engine == "local":
        process.kill()
        return True
    for one in psutil.Process(process.pid).children(recursive=True):
        if "_Worker" in "".join(one.cmdline()[:1]):
            one.kill()
            return True
    return False


def compare(data: Path) -> dict[str, Any]:
    """Whether the output has each row of the input once and in order."""
    rows = right = 0
    with data.open() as wanted, OUTPUT.open() as found:
        for line, other in itertools.zip_longest(wanted, found):
            rows += line is not None
            if line is None or other is None:
                continue
            one, result = json.loads(line), json.loads(other)
            right += all(result[name] == value for name, value in one.items()) and len(result) > len(one)
        extra = sum(1 for _ in found)
    return {"rows": rows, "once_and_in_order": right == rows and not extra}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verb", choices=["score", "correct"], default="score")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--words", type=int, default=20, help="most words of a question, and of an answer")
    parser.add_argument("--window", default="1024", help="less than half of --rows, or no half is seen")
    parser.add_argument("--engines", nargs="+", default=["local", "ray"], choices=["local", "ray"])
    parser.add_argument("--stub", action="store_true", help="score by the answers' length, without a model")
    parser.add_argument("--once", action="store_true", help="leave out the run with a tenth of the rows")
    arguments = parser.parse_args()
    flags = [*prepare(arguments.verb, arguments.stub), "--window", arguments.window]
    results = []
    for count in [arguments.rows] if arguments.once else [arguments.rows // 10, arguments.rows]:
        data = HERE / f"rows.{arguments.verb}.{count}.jsonl"
        with data.open("w") as file:
            file.writelines(json.dumps(row(number, arguments.verb, arguments.words)) + "\n" for number in range(count))
        results += [run(engine, flags, data, kill=count == arguments.rows) for engine in arguments.engines]
    print("\n| engine | rows | killed half-way | seconds | rows/s | peak RSS of a process, MiB | once and in order |")
    print("|---|---:|---|---:|---:|---:|---|")
    for one in results:
        facts = (one["engine"], f"{one['rows']:,}", "yes" if one["killed"] else "no", one["seconds"])
        rate, exact = f"{one['rows'] / one['seconds']:,.0f}", "yes" if one["once_and_in_order"] else "NO"
        print(f"| {' | '.join(map(str, (*facts, rate, one['peak_mib'], exact)))} |")
    kind = "stub" if arguments.stub else arguments.verb
    write_result(OUT / f"bulk.{kind}.json", {"results": results})


if __name__ == "__main__":
    main()
