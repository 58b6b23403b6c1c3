"""What one GPU decides: same results as a CPU, same bits twice, speed and memory of steps, sampling and drafts.

    python bench/gpu.py --model MODEL [--sections facts,equal,deterministic,steps,waits,sampling,passes,masks] [--small]

Prints a line of JSON for each finding; a section that fails says so and does not stop the next. MODEL is a small one
with trained weights; speed is measured on random weights of 0.5 and 7 billion parameters in Qwen2's shape, as no time
depends on their values. Give one process to each section where memory is short. `--small` tries every section on a CPU
in minutes; its figures mean nothing. TRL beside it: bench/preference_speed.py.
"""

import argparse
import json
import os
import random
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from everalign.data.tokenization import TokenizedRow
from everalign.evaluation.preference import mean_kl
from everalign.modeling.attention import flex_block_mask, use_flex_attention
from everalign.modeling.decoding import RaggedModel, RaggedRows, continue_rows, pad_left
from everalign.modeling.machine import compute_deterministically, library_versions, machine_facts
from everalign.modeling.policy import Policy
from everalign.modeling.runtime import prepare_process
from everalign.training.objectives import make_objective
from everalign.training.options import StageOptions
from everalign.training.reference import Reference, sequence_logprobs
from everalign.training.stage import train_stage

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Hidden size, feed-forward size, layers, heads, heads of keys and values, vocabulary.
SHAPES = {
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "7b": (3584, 18944, 28, 28, 4, 152064),
    "small": (128, 256, 2, 4, 2, 2000),
}
LARGEST_TOKEN = 1900
SMALL = False


# ---- what the sections share ----


def tell(**facts: Any) -> None:
    print(json.dumps(facts, default=str), flush=True)


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def forget_peak() -> None:
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if DEVICE == "cuda" else None


def seconds_of(work: Callable[[], Any]) -> float:
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def random_model(name: str, dtype: torch.dtype, flex: bool = False) -> Any:
    """A model of a shape, with random weights, on the GPU."""
    hidden, inner, layers, heads, kv_heads, vocabulary = SHAPES["small" if SMALL else name]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=name == "0.5b",
        max_position_embeddings=65536,
    )
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return prepared(model, flex)


def prepared(model: Any, flex: bool) -> Any:
    model = model.eval().requires_grad_(False).to(DEVICE)
    if flex and DEVICE == "cuda":
        use_flex_attention(model)
    return model


def pairs(count: int, prompt: int, answer: int, vary: bool = True) -> list[TokenizedRow]:
    """Pairs of random tokens; with `vary` from half of these lengths on."""
    rng = random.Random(0)

    def tokens(length: int) -> list[int]:
        size = int(length * rng.uniform(0.5, 1)) if vary else length
        return [rng.randrange(10, LARGEST_TOKEN) for _ in range(size)]

    return [TokenizedRow.pair(str(i), tokens(prompt), tokens(answer), tokens(answer)) for i in range(count)]


def learn(policy: Policy, rows: list[TokenizedRow], tokens: int, batch: int = 16, rate: float = 1e-4) -> float:
    """Train a stage on rows; returns its seconds, without those of the reference."""
    found = sequence_logprobs(policy, rows, tokens)
    options = StageOptions(
        learning_rate=rate, batch_size=batch, tokens_per_batch=tokens, checkpoint_steps=0, logging_steps=1
    )
    with tempfile.TemporaryDirectory() as folder:

        def train() -> None:
            reference = Reference("base", found, (), ())
            train_stage(policy, make_objective("fpo"), rows, options, Path(folder), seed=0, reference=lambda: reference)

        return seconds_of(train)


def backward(policy: Policy, rows: list[TokenizedRow]) -> Callable[[], None]:
    """A forward and backward pass over one batch of pairs."""
    objective = make_objective("fpo")
    batch = {**objective.collate(rows, policy.head.shared), "reference": torch.zeros(2 * len(rows))}
    on_device = policy.on_device(batch)
    return lambda: objective.loss(policy, on_device, on_device["count"])[0].backward()


# ---- sections ----


def facts(_: str) -> None:
    tell(section="facts", machine=machine_facts(), libraries=library_versions())


def equal(name: str) -> None:
    """The GPU against the CPU, flex against sdpa, log-probabilities and gradients."""
    rows = pairs(8 if SMALL else 64, 200, 80)
    expected = torch.stack(sequence_logprobs(Policy(loaded(name, torch.float32), 8, 16.0), rows, 4096))
    gradients: dict[torch.dtype, torch.Tensor] = {}
    for dtype, flex in (
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ):
        policy = Policy(prepared(loaded(name, dtype), flex), 8, 16.0)
        first, second = (torch.stack(sequence_logprobs(policy, rows, 4096)) for _ in range(2))
        backward(policy, rows[:4])()
        found = [part.grad.flatten().float().cpu() for part in policy.parameters() if part.grad is not None]
        gradient = torch.cat(found)
        sdpa = gradients.setdefault(dtype, gradient)
        tell(
            section="equal",
            dtype=dtype,
            flex=flex,
            shared=policy.head.shared,
            why_not=policy.head.why_no_prefix_sharing,
            nats_from_cpu=(first - expected).abs().max().item(),
            second_time=(first - second).abs().max().item(),
            gradient_from_sdpa=((gradient - sdpa).norm() / sdpa.norm()).item(),
        )


def loaded(name: str, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval().requires_grad_(False)


def deterministic(_: str) -> None:
    """The same bits twice, without and then with --deterministic, and what it costs.

    Workspaces of cuBLAS are fixed from its first use on, in the first part too.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for forced in (False, True):
        if forced:
            compute_deterministically()
        learned, spent = [], []
        for _ in range(2):
            torch.manual_seed(0)
            policy = Policy(random_model("0.5b", torch.bfloat16), 8, 16.0)
            spent.append(round(learn(policy, pairs(48, 200, 100), 8192, rate=1e-3), 2))
            learned.append(torch.cat([part.flatten().cpu() for pair in policy.factors().values() for part in pair]))
        off = (learned[0] - learned[1]).abs().max().item()
        tell(section="deterministic", forced=forced, same_bits=torch.equal(*learned), largest=off, seconds=spent)
    torch.use_deterministic_algorithms(False)


def steps(_: str) -> None:
    """Pairs a second and peak memory of training, by model, precision, attention and shape."""
    half, seven = torch.bfloat16, ("7b", torch.bfloat16, False, (256, 256))
    for name, dtype, flex, shape, tokens in (
        ("0.5b", torch.float32, False, (256, 256), 8192),
        ("0.5b", half, False, (256, 256), 8192),
        ("0.5b", half, True, (256, 256), 8192),
        ("0.5b", half, False, (1024, 256), 32768),
        ("0.5b", half, True, (1024, 256), 32768),
        (*seven, 8192),
        (*seven, 4096),
    ):
        rows = pairs(16 if SMALL else 64 if name == "7b" else 256, *shape, vary=False)
        case = {"model": name, "dtype": dtype, "flex": flex, "shape": shape, "tokens": tokens}
        forget_peak()
        try:
            policy = Policy(random_model(name, dtype, flex), 8, 16.0)
            learn(policy, rows[:16], tokens)
            forget_peak()
            rate = len(rows) / learn(policy, rows, tokens)
            tell(section="steps", **case, pairs_a_second=round(rate, 2), peak_gib=peak_gib())
        except torch.OutOfMemoryError as error:
            tell(section="steps", **case, failed=str(error)[:200], peak_gib=peak_gib())
        policy = None


def waits(_: str) -> None:
    """Where a step waits for the GPU without need, whether the CPU is too slow for it, and the memory of a KL."""
    policy = Policy(random_model("0.5b", torch.bfloat16), 8, 16.0)
    step = backward(policy, pairs(16, 256, 256))
    step()
    if DEVICE == "cuda":
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            step()
            torch.cuda.set_sync_debug_mode("default")
        tell(section="waits", at=[f"{one.filename}:{one.lineno}" for one in seen][:8])
    wait()
    began = time.perf_counter()
    step()
    launched = time.perf_counter() - began
    wait()
    tell(section="waits", launched_ms=1e3 * launched, done_ms=1e3 * (time.perf_counter() - began))
    forget_peak()
    mean_kl(policy, policy.total(), pairs(8, 60, 450, vary=False))
    tell(section="waits", kl_peak_gib=peak_gib())


def sampling(_: str) -> None:
    """Tokens a second of sampled answers."""
    policy, length = Policy(random_model("0.5b", torch.bfloat16), 8, 16.0), 16 if SMALL else 128
    for rows in (32, 256):
        forget_peak()
        batch = policy.on_device(pad_left([row.prompt for row in pairs(rows, 200, 2)], 0))
        with torch.no_grad(), policy.decoding(batch) as decoder:
            spent = seconds_of(lambda: continue_rows(decoder, lambda logits: logits.argmax(-1), [10**6], length))
        rate = round(rows * length / spent)
        tell(section="sampling", rows=rows, tokens_a_second=rate, token_ms=1e3 * spent / length, peak_gib=peak_gib())


def passes(_: str) -> None:
    """What a corrector's pass takes by rows and guessed tokens: see the constants of `modeling/speculative.py`."""
    model, times = RaggedModel(random_model("0.5b", torch.bfloat16)), 5
    for rows in (1, 16, 64):
        for width in (1, 8, 32, 128):
            drafts = RaggedRows(model, rows)
            drafts.append([[7] * 300] * rows, [1] * rows)
            spent = []
            for _ in range(times):
                guess = [[9] * width] * rows
                spent.append(seconds_of(lambda: drafts.append(guess, [width] * rows, guess)))  # noqa: B023
                drafts.lengths = [300] * rows
            tell(section="passes", rows=rows, width=width, ms=round(1e3 * sorted(spent)[times // 2], 2))


def masks(_: str) -> None:
    """Time and memory of the masks of long rows."""
    for length in (2048,) if SMALL else (8192, 16384, 32768):
        forget_peak()
        segments = torch.ones(1, length, dtype=torch.long, device=DEVICE)
        spent = seconds_of(lambda: flex_block_mask(segments, segments))  # noqa: B023
        tell(section="masks", tokens=length, seconds=round(spent, 3), peak_gib=peak_gib())


SECTIONS = {one.__name__: one for one in (facts, equal, deterministic, steps, waits, sampling, passes, masks)}


@contextmanager
def reported(name: str) -> Iterator[None]:
    """Tell how long a section took, and what it failed by."""
    began = time.perf_counter()
    try:
        yield
    except Exception as error:  # noqa: BLE001  # a GPU is lent for minutes: what comes after it is tried
        trace = traceback.format_exc()[-600:]
        tell(section=name, failed=f"{type(error).__name__}: {str(error)[:300]}", trace=trace)
    tell(section=name, took=round(time.perf_counter() - began, 1))


def main() -> None:
    """Run the sections that were asked for."""
    global SMALL
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    SMALL = given.small
    prepare_process()
    for name in given.sections.split(","):
        with reported(name):
            SECTIONS[name](given.model)


if __name__ == "__main__":
    main()
