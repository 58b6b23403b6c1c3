"""Memory of training and scoring, before and after what bounds it.

    python bench/memory.py steps            # resident memory over 500 steps in bf16, caches of products bounded or not
    python bench/memory.py kl               # the divergence of held-out answers, a vocabulary of 151,936 tokens
    python bench/memory.py checkpointing    # what a step keeps, its peak and its time, activations kept or not
    python bench/memory.py decoding         # tokens per second of a bf16 policy, adapters cast once or every token

Each measurement is a process of its own. Rows are random tokens of random lengths; no data is needed. Peaks are the
largest resident size of the whole process, imports and model included.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import everalign
from common import OUT, write_result

CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
POINTS: dict[str, list[dict[str, Any]]] = {
    # Kernels that are kept, and the multiples of tokens that rows are padded to.
    "steps": [{"capacity": capacity, "padding": padding} for padding in (1, 64) for capacity in (1024, 64)],
    "kl": [{"way": "whole", "tokens": 1200}, {"way": "chunked", "tokens": 1200}, {"way": "chunked", "tokens": 3600}],
    "checkpointing": [
        {"precision": precision, "shape": shape, "checkpointing": checkpointing}
        for precision in ("bf16", "fp32")
        for shape in ("4 x (150 + 2 x 100)", "2 x (1024 + 2 x 128)")
        for checkpointing in ("off", "on")
    ],
    "decoding": [{"rows": rows, "casts": casts} for rows in (1, 8) for casts in ("every token", "once")],
}


def main() -> None:
    """Run a point's measurements one after the other, print them and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("point", choices=POINTS)
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, a folder or a GGUF file (not for kl)")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        settings = json.loads(arguments.measure)
        print(json.dumps(MEASURES[arguments.point](settings)))
        return
    results = []
    for settings in POINTS[arguments.point]:
        given = {**settings, "model": arguments.model, "steps": arguments.steps, "threads": arguments.threads}
        found = {**settings, **_in_a_process(arguments.point, given)}
        print("  ".join(f"{name} {value}" for name, value in found.items()), flush=True)
        results.append(found)
    write_result(OUT / f"memory-{arguments.point}.json", {"model": arguments.model, "results": results})


def _in_a_process(point: str, settings: dict[str, Any]) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"])}
    environment |= {name: str(settings.get("capacity", 64)) for name in CAPACITIES}
    environment["PYTHONPATH"] = str(Path(everalign.__file__).parents[1])
    command = [sys.executable, "-W", "ignore", __file__, point, "--measure", json.dumps(settings)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(field: str) -> int:
    """Resident memory of this process in MiB: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) // 1024


def _policy(settings: dict[str, Any], precision: str) -> Any:
    import torch

    from everalign.modeling.loading import load_model
    from everalign.modeling.policy import Policy
    from everalign.modeling.runtime import prepare_process

    prepare_process()
    torch.set_num_threads(settings["threads"])
    return Policy(load_model(settings["model"], precision), 8, 16.0)


def _pair(rng: random.Random, prompt: int, answers: tuple[int, int], vocabulary: int = 1000) -> Any:
    from everalign.data.tokenization import TokenizedRow

    def tokens(count: int) -> list[int]:
        return [rng.randrange(10, vocabulary) for _ in range(count)]

    return TokenizedRow.pair("x", tokens(prompt), tokens(answers[0]), tokens(answers[1]), 1.0)


def steps(settings: dict[str, Any]) -> dict[str, Any]:
    """Train on one pair a step, of up to 256 tokens; tell the resident memory at ten places."""
    import torch

    from everalign.modeling import logprobs as likelihood
    from everalign.training.objectives import make_objective

    likelihood._ROW_STEP = settings["padding"]
    policy, rng = _policy(settings, "bf16"), random.Random(0)
    policy.train()
    objective, resident, started = make_objective("dpo"), {}, time.process_time()
    optimiser = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-4)
    every = max(1, settings["steps"] // 10)
    for step in range(1, settings["steps"] + 1):
        pair = _pair(rng, rng.randint(8, 128), (rng.randint(4, 64), rng.randint(4, 64)))
        batch = {**objective.collate([pair], policy.head.shared), "reference": torch.zeros(1, 2)}
        loss, _ = objective.loss(policy, batch, batch["count"])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % every == 0:
            resident[step] = memory("VmRSS")
    return {"resident MiB": resident, "peak MiB": memory("VmHWM"), "seconds": round(time.process_time() - started, 1)}


def kl(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure the divergence of one answer of so many tokens, with the logits of all of them at once or of some."""
    import torch
    import torch.nn.functional as F
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from everalign.data.collate import collate
    from everalign.evaluation.preference import mean_kl
    from everalign.modeling.policy import Policy

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    policy = Policy(Qwen2ForCausalLM(config).eval().requires_grad_(False), 8, 16.0)
    policy.write_factors({name: (left + 0.1, right) for name, (left, right) in policy.factors().items()})
    pairs = [_pair(random.Random(0), 50, (settings["tokens"], 1), config.vocab_size)]
    before, started = memory("VmHWM"), time.process_time()
    if settings["way"] == "chunked":
        found = mean_kl(policy, {}, pairs)
    else:
        batch = collate([pair.only([0]) for pair in pairs], policy.head.shared)
        with torch.no_grad():
            now = F.log_softmax(policy.response_logits(batch), dim=-1)
            with policy.as_base():
                reference = F.log_softmax(policy.response_logits(batch), dim=-1)
            found = F.kl_div(reference, now, log_target=True, reduction="none").sum(-1).double().mean().item()
    spent = time.process_time() - started
    return {"KL": found, "peak MiB": memory("VmHWM"), "MiB before": before, "seconds": round(spent, 1)}


def checkpointing(settings: dict[str, Any]) -> dict[str, Any]:
    """Compute two steps' gradients; tell what is kept for them, the peak, and the time of the second."""
    import torch

    from everalign.modeling.runtime import SavedBytes, recomputable_layers, recomputing

    policy, rng = _policy(settings, settings["precision"]), random.Random(0)
    policy.train()
    from everalign.data.collate import collate

    count, prompt, answer = {"4": (4, 150, 100), "2": (2, 1024, 128)}[settings["shape"][0]]
    batch = collate([_pair(rng, prompt, (answer, answer)) for _ in range(count)], policy.head.shared)
    with recomputing(recomputable_layers(policy) if settings["checkpointing"] == "on" else []):
        with SavedBytes(policy) as saved:
            policy(batch)
        for _ in range(2):
            started = time.process_time()
            policy.zero_grad()
            loss = policy(batch).sum()
            loss.backward()
            spent = time.process_time() - started
    norm = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm().item()
    kept = {"kept MiB": round(saved.total / 2**20), "peak MiB": memory("VmHWM"), "seconds": round(spent, 1)}
    return {**kept, "loss": loss.item(), "gradient norm": norm}


def decoding(settings: dict[str, Any]) -> dict[str, Any]:
    """Write 40 tokens behind rows of a prompt, with a short-term and a long-term adapter."""
    import zlib

    import torch

    from everalign.memory import LowRankUpdate
    from everalign.modeling import lora as adapters
    from everalign.modeling.decoding import continue_rows, pad_left

    policy, generator = _policy(settings, "bf16"), torch.Generator().manual_seed(0)

    def small(*shape: int) -> torch.Tensor:
        return 0.02 * torch.randn(*shape, generator=generator)

    shapes = {name: update.shape for name, update in policy.short_term().items()}
    policy.write_long_term({name: LowRankUpdate(small(m, 16), small(16, n)) for name, (m, n) in shapes.items()})
    policy.write_factors({name: (small(*left.shape), right) for name, (left, right) in policy.factors().items()})
    policy.eval()
    best, found = 0.0, []
    for _ in range(3):
        with torch.no_grad(), policy.decoding(pad_left([[5, 60, 700, 30]] * settings["rows"], 0)) as decoder:
            if settings["casts"] == "every token":
                for layer in adapters.layers(policy.peft).values():
                    layer.cast_factors = None
            started = time.process_time()
            found = continue_rows(decoder, lambda logits: logits.argmax(-1), [], 40)
            best = max(best, 40 * settings["rows"] / (time.process_time() - started))
    return {"tokens/s": round(best, 1), "tokens' checksum": zlib.crc32(str(found).encode())}


MEASURES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "steps": steps,
    "kl": kl,
    "checkpointing": checkpointing,
    "decoding": decoding,
}

if __name__ == "__main__":
    main()
