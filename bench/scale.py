"""What would it take at scale? 1 to 512 GPUs, 7B and 70B, 100 tasks of 10 million rows, and a gateway under load.

    python bench/scale.py

Prints the tables of docs/scale.md. Nothing is measured on a GPU: training is what `everalign estimate` computes from
the sizes of Qwen2.5-7B and Llama-3.1-70B and the makers' figures of an H100; the gateway is the processor time of a
request in bench/results/serving.md, times the rate. Measured, here, are the memory of 5,000 rows and the processor
time of an exchange that is stored.
"""

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from common import OUT, write_result
from everalign import AdapterOptions, TrainingOptions
from everalign.data import Preference, PreferenceSet
from everalign.data.tokenization import tokenize_preferences
from everalign.estimate.estimator import Estimated, estimate_run
from everalign.estimate.machines import MACHINES, Layout
from everalign.estimate.prediction import Clock, Range
from everalign.estimate.work import Work
from everalign.methods import LifeAlign
from everalign.modeling.loading import load_tokenizer, tiny_assistant_path
from everalign.serving.store import Exchange, FeedbackStore

GPU, PRICE = "h100", 2.5
TASKS, ROWS, HELD_OUT = 100, 100_000, 200
# Rows of an optimiser step over all GPUs: one for each of 512.
BATCH = 512
# Sizes of Qwen2.5-7B and Llama-3.1-70B, as their configurations give them.
MODELS = {
    "7B": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
    "70B": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
}  # fmt: skip
# GPUs, and whether the base is shared: a copy of 70B fits no H100.
LAYOUTS = {
    "7B": [(1, False), (8, False), (64, False), (512, False)],
    "70B": [(1, False), (8, True), (64, True), (512, True)],
}
# Milliseconds of a processor for a request (bench/results/serving.md): the best and the worst day, with 100 clients.
GATEWAY = {"whole": (2.0, 4.1), "streamed, 21 events": (6.2, 12.4)}
REQUESTS, SECONDS, BUSY = 10_000, 1.0, 0.6
# The model that corrects; tokens of question and answer, those of the answer, and requests in a batch.
CORRECTOR, CORRECTED = "7B", (400, 150, 16)
# Rows whose memory is measured.
MEASURED = 5_000
# Bytes of an open request: (97 - 46) MiB for 500 of them.
OPEN = (97 - 46) * 2**20 / 500


def model_folder(parent: Path, name: str) -> str:
    """A folder with a model's sizes, no weights, and the tiny assistant's tokenizer."""
    folder = parent / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODELS[name]))
    for file in tiny_assistant_path().glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    for file in tiny_assistant_path().glob("*.jinja"):
        shutil.copyfile(file, folder / file.name)
    return str(folder)


def rows(count: int, seed: int) -> list[Preference]:
    """Pairs of random words: prompts of about 250 tokens, answers of about 120."""
    rng = random.Random(seed)
    words = (
        "the",
        "time",
        "please",
        "answer",
        "kindly",
        "order",
        "about",
        "kitchen",
        "where",
        "could",
        "never",
        "water",
    )

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))

    return [Preference(text(60, 240), text(30, 120), text(30, 120) + f" {n}") for n in range(count)]


def tasks() -> list[tuple[str, PreferenceSet, PreferenceSet]]:
    """Two tasks, the first and one that replays, each the same 500 rows over and over.

    Their held-out rows are as many as those of all tasks, which are scored after each.
    """
    some, test = rows(500, 0), rows(500, 1)
    half = TASKS * HELD_OUT // 2
    return [
        (
            name,
            PreferenceSet(tuple(some * (ROWS // len(some))), f"{name}.jsonl"),
            PreferenceSet(tuple(test * (half // len(test))), f"{name}.test.jsonl"),
        )
        for name in ("first", "later")
    ]


def estimated(model: str, gpus: int, fsdp: bool, given: list[Any]) -> Estimated:
    arguments = {
        "model": model,
        "method": LifeAlign(),
        "training": TrainingOptions(batch_size=BATCH, max_length=2048, tokens_per_batch=8192),
        "adapter": AdapterOptions(rank=16, alpha=32.0),
    }
    return estimate_run(arguments, given, MACHINES[GPU], lambda _: None, Layout(gpus, fsdp))


def facts(found: Estimated) -> dict[str, Any]:
    """A line of the table: the first task once, the later one 99 times."""
    prediction, clock, layout = found.prediction, found.clock, found.clock.layout
    first, later = (task.stages for task in found.plan.tasks)
    steps = sum(stage.steps for stage in first) + (TASKS - 1) * sum(stage.steps for stage in later)
    begun = prediction.seconds["start"] + clock.seconds(found.plan.start, "forward")
    whole = begun + prediction.tasks["first"] + prediction.tasks["later"].times(TASKS - 1)
    hours = [part / 3600 for part in (whole.low, whole.high)]
    (stage,) = later
    step = clock.seconds(stage.work, "training", 0, stage.steps, stage.uneven).times(1 / stage.steps)
    reference = clock.seconds(stage.reference, "forward").times(1 / stage.steps)
    # Micro-batches of one process in a step.
    each = stage.work.batches * stage.uneven / stage.steps / layout.processes
    return {
        "gpus": layout.processes,
        "fsdp": layout.fsdp,
        "steps": steps,
        "memory_gib": prediction.memory.peak / 2**30,
        "memory_parts_gib": {name: part / 2**30 for name, part in prediction.memory.parts.items()},
        "fits": prediction.memory.fits,
        "checkpointing": prediction.memory.checkpointing,
        "gathered_bytes_a_step": 2 * each * clock.shape.layer_bytes * (1 - 1 / layout.sharing),
        "reduced_bytes_a_step": clock.reduced,
        "exchange_seconds_a_step": clock.exchanged(each, "training", 1),
        "step_seconds": [step.low, step.high],
        "reference_share": reference.middle / (reference.middle + step.middle),
        "held_out_share": clock.seconds(found.plan.tasks[1].scoring, "forward").middle
        / prediction.tasks["later"].middle,
        "hours": hours,
        "cost": [PRICE * layout.processes * part for part in hours],
        "uneven": stage.uneven,
        "tokens_a_row": stage.work.tokens / stage.rows,
    }


def row_bytes() -> dict[str, float]:
    """Bytes of a row in memory, as text and as tokens, and its length."""
    tokenizer, process = load_tokenizer("tiny"), psutil.Process()
    before = process.memory_info().rss
    some = PreferenceSet(tuple(rows(MEASURED, 2)))
    text = process.memory_info().rss - before
    tokens = list(tokenize_preferences(some, tokenizer, 2048))
    whole = process.memory_info().rss - before
    length = sum(len(row.prompt) + sum(map(len, row.responses)) for row in tokens) / len(tokens)
    return {"text": text / len(some), "tokens": (whole - text) / len(some), "length": length}


def verifying(clock: Clock) -> Range:
    """GPUs that read question and answer of each request once, as verification does where an answer stays as it is."""
    tokens, answer, together = CORRECTED
    pairs = tokens * (tokens + 1) / 2
    return clock.seconds(Work(tokens, answer, pairs, 1 / together).times(REQUESTS), "forward")


def show_corrections(gpus: Range) -> None:
    tokens, answer, together = CORRECTED
    print(
        f"\nCorrecting all of them with {CORRECTOR}, {tokens} tokens read of which {answer} are the answer, {together} "
        f"at once, and none changed: {gpus.low:.0f} to {gpus.high:.0f} {GPU}, ${PRICE * gpus.low:,.0f} to "
        f"${PRICE * gpus.high:,.0f} an hour."
    )


def storing_seconds() -> float:
    """Processor time of an exchange that is written into an SQLite store, eight waiting at a time."""

    def exchange(number: int) -> Exchange:
        messages = ({"role": "user", "content": "Is the sea salty? " * 20},)
        names = {
            "key_id": "local",
            "upstream": "main",
            "model": "small",
            "corrector": "0001",
            "template": "everalign-1",
        }
        what = {"outcome": "applied", "reason": None, "mode": "correct", "usage": {"total_tokens": 12}}
        texts = {"messages": messages, "original": "No. " * 100, "returned": "Yes. " * 100}
        return Exchange(id=f"chatcmpl-{number}", created=datetime.now(timezone.utc), **names, **what, **texts)  # type: ignore[arg-type]

    some = [exchange(number) for number in range(2_000)]
    with (
        tempfile.TemporaryDirectory() as folder,
        FeedbackStore.open(f"sqlite:///{folder}/store.db") as store,
        ThreadPoolExecutor(8) as threads,
    ):
        started = time.process_time()
        list(threads.map(store.add_exchange, some))
        return (time.process_time() - started) / len(some)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    held, given, lines, correcting = row_bytes(), tasks(), {}, Range()
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            model = model_folder(Path(folder), name)
            found = [estimated(model, gpus, fsdp, given) for gpus, fsdp in LAYOUTS[name]]
            lines[name] = [facts(one) for one in found]
            if name == CORRECTOR:
                correcting = verifying(found[0].clock)
    show_training(lines)
    show_rows(held)
    gateway, stored = show_gateway(), storing_seconds()
    print(f"\nAn exchange is stored in {1e3 * stored:.2g} ms of a processor: SQLite takes {1 / stored:,.0f} a second.")
    show_corrections(correcting)
    results = {"training": lines, "rows": held, "gateway": gateway, "storing_seconds": stored}
    results["correcting_gpus"] = [correcting.low, correcting.high]
    write_result(OUT / "scale.json", {"gpu": GPU, "price": PRICE, **results})


def show_training(lines: dict[str, list[dict[str, Any]]]) -> None:
    print(
        "| model, base | H100s | memory of each | exchanged a step | a step | 100 tasks, 10M rows | cost | efficiency |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, found in lines.items():
        base = next(line for line in found if line["fits"])
        for line in found:
            what = "shared" if line["fsdp"] else "whole"
            memory = f"{line['memory_gib']:.0f} GiB" + ("" if line["fits"] else ": does not fit")
            if not line["fits"]:
                print(f"| {name}, {what} | {line['gpus']} | {memory} | | | | | |")
                continue
            sent = f"{line['reduced_bytes_a_step'] / 1e6:.0f} MB"
            if line["fsdp"]:
                sent = f"{line['gathered_bytes_a_step'] / 1e9:.0f} GB gathered, {sent}"
            low, high = line["step_seconds"]
            spent = " to ".join(f"${part:,.0f}" for part in line["cost"])
            efficiency = base["cost"][1] / line["cost"][1]
            sent = f"{sent}, {1e3 * line['exchange_seconds_a_step']:.0f} ms"
            print(
                f"| {name}, {what} | {line['gpus']} | {memory} | {sent} "
                f"| {low:.2g} to {high:.2g} s | {_hours(line['hours'])} | {spent} | {100 * efficiency:.0f} % |"
            )
    for name, found in lines.items():
        for line in (line for line in found if line["fits"]):
            parts = ", ".join(f"{part} {size:.1f}" for part, size in line["memory_parts_gib"].items() if size > 0.05)
            print(
                f"\n{name} on {line['gpus']}: {line['steps']:,} steps; GiB: {parts}"
                f"{', activations computed twice' if line['checkpointing'] else ''}; of a task, references "
                f"{line['reference_share']:.0%} and held-out rows {line['held_out_share']:.0%}; the largest share of a "
                f"step {line['uneven']:.2f} of the mean"
            )


def _hours(ends: list[float]) -> str:
    if ends[1] < 72:
        return " to ".join(f"{end:.3g}" for end in ends) + " h"
    return " to ".join(f"{end / 24:.3g}" for end in ends) + " days"


def show_rows(held: dict[str, float]) -> None:
    text, tokens = held["text"], held["tokens"]
    print(f"\nA row of {held['length']:.0f} tokens takes {text:,.0f} bytes as text and {tokens:,.0f} as tokens.")
    whole, task = ROWS * TASKS * text / 2**30, ROWS * tokens / 2**30
    print(f"All tasks as text: {whole:.0f} GiB in each process, {8 * whole:.0f} on a machine of eight GPUs;")
    print(f"the tokens of one task: {task:.1f} GiB and {8 * task:.0f}; of all rows as one task: {TASKS * task:.0f}.")


def show_gateway() -> list[dict[str, Any]]:
    """What a rate of requests takes, each answered by the upstream in one second."""
    print(f"\n| answers | busy processors | processes, {BUSY:.0%} busy | open at once | their memory |")
    print("|---|---|---|---|---|")
    found = []
    for kind, ends in GATEWAY.items():
        busy = [REQUESTS * each / 1000 for each in ends]
        processes = [math.ceil(one / BUSY) for one in busy]
        waiting = REQUESTS * SECONDS
        found.append({"kind": kind, "busy": busy, "processes": processes, "open": waiting, "bytes": waiting * OPEN})
        print(
            f"| {kind} | {busy[0]:.0f} to {busy[1]:.0f} | {processes[0]} to {processes[1]} | {waiting:,.0f} "
            f"| {waiting * OPEN / 2**30:.1f} GiB |"
        )
    return found


if __name__ == "__main__":
    main()
