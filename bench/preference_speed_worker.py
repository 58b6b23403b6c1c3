"""One contender of `preference_speed.py`: NAME SETTINGS; runs an epoch for each line on standard input."""

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402  # after the environment
from transformers import AutoModelForCausalLM, Qwen2Config  # noqa: E402

from common import data_folder, preference_rows  # noqa: E402
from roofline import matrix_rate, needed_flops  # noqa: E402

RANK, ALPHA, BETA, LEARNING_RATE = 8, 16.0, 0.1, 1e-3
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EPOCHS = 1000  # more than anybody asks for

Settings = dict[str, Any]


def memory(key: str) -> int:
    """Resident size of this process (`VmRSS`) or its highest so far (`VmHWM`), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def model_name(settings: Settings) -> str:
    """What `--model` names; the base model of the bench's data where it names none."""
    return settings["model"] or str(data_folder() / "base-model")


def load_model(settings: Settings) -> tuple[Any, int]:
    """The model, or random weights of Qwen2.5-0.5B's shape with two layers; and a process's size with it.

    The size is that before it was loaded and its parameters: what loading leaves behind is nobody's advantage.
    """
    from everalign.modeling.loading import resolve_model

    if not settings["vocabulary"]:
        resolve_model(model_name(settings))  # unpacks what has to be unpacked, which is not loading
    before = memory("VmRSS")
    model = _load(settings)
    return model, before + sum(p.numel() * p.element_size() for p in model.parameters())


def _load(settings: Settings) -> Any:
    from everalign.modeling.loading import load_model as load

    if not settings["vocabulary"]:
        return load(model_name(settings), settings["precision"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["precision"]]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=settings["vocabulary"],
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_sliding_window=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def load_pairs(settings: Settings, tokenizer: Any) -> list[Any]:
    """The same token ids for every contender."""
    from everalign.data import tokenize_preferences
    from everalign.data.records import Preference
    from everalign.data.tokenization import TokenizedRow

    if settings["shape"]:
        prompt, response = map(int, settings["shape"].split("x"))
        rng, top = random.Random(0), min(settings["vocabulary"] or len(tokenizer), 8192)
        sizes = (prompt, response, response)
        return [
            TokenizedRow.pair(str(i), *([rng.randrange(10, top) for _ in range(size)] for size in sizes))
            for i in range(settings["pairs"])
        ]
    rows = [*preference_rows("hh_harmless", "train"), *preference_rows("hh_helpful", "train")]
    random.Random(0).shuffle(rows)
    chosen = [Preference(row["prompt"], row["chosen"], row["rejected"]) for row in rows[: settings["pairs"]]]
    return list(tokenize_preferences(chosen, tokenizer, settings["max_length"]))


def clocks() -> tuple[float, float]:
    """The time now and the processor time of this process so far, in seconds."""
    return time.perf_counter(), time.process_time()


class Turns:
    """Waits for the parent before each epoch and reports after it."""

    def __init__(self, reference: Callable[[], None], base: int) -> None:
        self._reference, self._base, self._began = reference, base, (0.0, 0.0)

    def wait(self) -> None:
        """Block until the parent wants the next epoch."""
        if not sys.stdin.readline():
            os._exit(0)
        self._began = clocks()

    def done(self) -> None:
        """Report the epoch that ended."""
        ended = clocks()
        self._reference()
        last = clocks()
        answer: dict[str, float] = {"memory": memory("VmHWM") - self._base}
        for place, clock in enumerate(("wall", "processor")):
            answer[f"{clock}_seconds"] = ended[place] - self._began[place]
            answer[f"{clock}_reference"] = last[place] - ended[place]
        print(json.dumps(answer), flush=True)


def ready(what: str, **facts: float) -> None:
    """Tell the parent that the next thing is the first step."""
    print(json.dumps({"seconds": time.perf_counter() - STARTED, "what": what, **facts}), flush=True)


def remember_tasks(policy: Any, tasks: int) -> None:
    """Give the policy the long-term memory of this many tasks: rank 8 each, 64 at most."""
    from everalign.memory import LowRankUpdate

    rank = min(64, RANK * tasks)
    updates = {}
    for index, (name, update) in enumerate(policy.short_term().items()):
        (m, n), generator = update.shape, torch.Generator().manual_seed(index)
        left, right = (torch.randn(*size, generator=generator) * 0.01 for size in ((m, rank), (rank, n)))
        updates[name] = LowRankUpdate(left, right)
    policy.write_long_term(updates)


def run_everalign(settings: Settings, model: Any, base: int, pairs: list[Any], tasks: int) -> None:
    """Epochs of our Trainer; the reference is computed once, and again after each epoch only to be timed."""
    from everalign.modeling.policy import Policy
    from everalign.training.objectives import make_objective
    from everalign.training.options import StageOptions
    from everalign.training.reference import Reference, sequence_logprobs
    from everalign.training.stage import train_stage

    tokens = settings["tokens_per_batch"]
    model.requires_grad_(False)
    policy = Policy(model.eval(), RANK, ALPHA, LINEAR)
    if tasks:
        remember_tasks(policy, tasks)

    def reference() -> None:
        with policy.as_base():
            sequence_logprobs(policy, pairs, tokens)

    turns = Turns(reference, base)
    with policy.as_base():
        rows = sequence_logprobs(policy, pairs, tokens)
    options = StageOptions(
        learning_rate=LEARNING_RATE,
        epochs=EPOCHS,
        batch_size=settings["batch_size"],
        tokens_per_batch=tokens,
        scheduler="constant",
        warmup=0.0,
        checkpoint_steps=0,
    )
    steps = -(-len(pairs) // settings["batch_size"])

    def progress(done: int, total: int) -> None:
        if done % steps == 0:
            turns.done()
            turns.wait()

    prompts = "shared" if policy.head.shared else "separate"
    what = f"{len(pairs)} pairs, {prompts} prompts, {torch.get_num_threads()} threads"
    ready(what, flops=needed_flops(policy, pairs, RANK), flops_per_second=matrix_rate(model.dtype))
    turns.wait()
    with tempfile.TemporaryDirectory() as folder:
        objective = make_objective("dpo", BETA)
        train_stage(
            policy,
            objective,
            pairs,
            options,
            Path(folder),
            seed=0,
            reference=lambda: Reference("base", rows),
            progress=progress,
        )


def run_trl(settings: Settings, model: Any, base: int, pairs: list[Any], tokenizer: Any, precomputed: bool) -> None:
    """Epochs of TRL's DPOTrainer without gradient checkpointing, its fastest setting."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    turns = Turns(lambda: None, base)
    steps = -(-len(pairs) // settings["batch_size"])

    class Pause(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % steps == 0:
                turns.done()
                turns.wait()

    class Tokenised(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # token ids already, the same as ours

    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=settings["batch_size"],
            num_train_epochs=EPOCHS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            beta=BETA,
            max_length=None,
            bf16=settings["precision"] == "bf16",
            use_cpu=True,
            gradient_checkpointing=False,
            precompute_ref_log_probs=precomputed,
            precompute_ref_batch_size=settings["batch_size"],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=10,
        )
        columns = {
            "prompt_ids": [pair.prompt for pair in pairs],
            "chosen_ids": [pair.chosen for pair in pairs],
            "rejected_ids": [pair.rejected for pair in pairs],
        }
        trainer = Tokenised(
            model,
            args=arguments,
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEAR, task_type="CAUSAL_LM"),
            callbacks=[Pause()],
        )
        ready(f"{len(pairs)} pairs")
        turns.wait()
        trainer.train()


def main() -> None:
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(settings["threads"])
    ours = name.startswith("everalign")
    if ours:
        from everalign.modeling.runtime import prepare_process

        prepare_process()
    from everalign.modeling.loading import load_tokenizer

    tokenizer = load_tokenizer(model_name(settings))
    pairs = load_pairs(settings, tokenizer)
    model, base = load_model(settings)
    if ours:
        run_everalign(settings, model, base, pairs, tasks=int(name.removeprefix("everalign").lstrip("-") or 0))
    else:
        run_trl(settings, model, base, pairs, tokenizer, precomputed="precomputed" in name)


if __name__ == "__main__":
    main()
