"""Answers that SmolLM2 samples to real questions: tokens per processor second, beside transformers' `generate`.

    python bench/sampling.py                      # bf16
    python bench/sampling.py --precision fp32

Both sample from the same distribution, but other answers, so that tokens are what is compared, also those of answers
that did not end. The two take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import OUT, preference_rows, write_result
from everalign.data.chat_tokens import ChatFormat
from everalign.modeling.decoding import pad_left
from everalign.modeling.loading import load_model, load_tokenizer
from everalign.modeling.policy import Policy
from everalign.modeling.runtime import prepare_process
from everalign.modeling.sampling import sample_completions, stop_token_ids
from everalign.options import SamplingOptions

LONGEST_PROMPT = 160


class Contenders:
    """Ways to sample some answers to every prompt; each returns how many tokens it generated."""

    def __init__(self, precision: str, prompts: int, answers: int, longest: int) -> None:
        self._tokenizer = load_tokenizer("smollm2")
        form = ChatFormat(self._tokenizer)
        asked = [row["prompt"] for row in preference_rows("safe_rlhf", "test")]
        known = {repr(prompt): prompt for prompt in asked}.values()
        encoded = zip(known, form.encode_prompts(list(known)), strict=True)
        fitting = [(prompt, ids) for prompt, ids in encoded if len(ids) <= LONGEST_PROMPT][:prompts]
        self._prompts, self._ids = [prompt for prompt, _ in fitting], [ids for _, ids in fitting]
        self._options = SamplingOptions(
            completions=answers, temperature=1.0, max_new_tokens=longest, max_prompt_tokens=LONGEST_PROMPT
        )
        self._model = load_model("smollm2", precision)
        self._policy = Policy(load_model("smollm2", precision), 16, 32.0, seed=0)
        self._ends = sorted(stop_token_ids(self._model, self._tokenizer))

    def everalign(self, seed: int) -> int:
        """Our sampling, by a policy with a fresh adapter."""
        count, longest = self._options.completions, self._options.max_new_tokens
        found = sample_completions(
            self._policy, self._tokenizer, self._prompts, self._options, seed=seed, tokens_per_batch=1 << 16
        )
        texts = [text for samples in found for text in samples.texts]
        ended = sum(len(self._tokenizer(text)["input_ids"]) + 1 for text in texts)
        return ended + longest * (count * len(found) - len(texts))

    def generate(self, seed: int) -> int:
        """transformers' `generate`, by the model itself."""
        torch.manual_seed(seed)
        batch = pad_left(self._ids, self._ends[0])
        written = self._model.generate(
            **batch,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=self._options.completions,
            max_new_tokens=self._options.max_new_tokens,
            eos_token_id=self._ends,
            pad_token_id=self._ends[0],
        )
        answers = written[:, batch["input_ids"].shape[1] :].tolist()
        return sum(next((i for i, token in enumerate(ids, 1) if token in self._ends), len(ids)) for ids in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--answers", type=int, default=6)
    parser.add_argument("--longest", type=int, default=96, help="longest answer, in tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    contenders = Contenders(arguments.precision, arguments.prompts, arguments.answers, arguments.longest)
    ways: dict[str, Callable[[int], int]] = {
        "everalign": contenders.everalign,
        "generate": contenders.generate,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(arguments.rounds):
        for name, run in ways.items():
            began = time.process_time()
            tokens = run(number)
            rates[name].append(tokens / (time.process_time() - began))
    table = Table(title=f"SmolLM2 in {arguments.precision}, {arguments.prompts} x {arguments.answers} answers")
    for column in ("", "tokens per processor second", "times generate, round by round"):
        table.add_column(column, justify="left" if not column else "right")
    found: dict[str, Any] = {}
    for name, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(values, rates["generate"], strict=True)]
        found[name] = {"tokens_per_second": values, "over_generate": ratios}
        table.add_row(name, f"{statistics.median(values):.0f}", ", ".join(f"{ratio:.2f}" for ratio in ratios))
    Console(width=110).print(table)
    write_result(OUT / f"sampling.{arguments.precision}.json", {"settings": vars(arguments), "results": found})


if __name__ == "__main__":
    main()
