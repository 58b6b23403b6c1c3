"""How much faster a corrector's answers come by verifying a draft first, by how much of the draft is kept.

    python bench/correction.py

The drafts are what the model writes greedily, changed so that a known share of it agrees; every contender writes the
same tokens, which is checked. Contenders take turns; ratios to plain greedy decoding are medians over the rounds.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import OUT, data_folder, preference_rows, write_result
from everalign.data.templating import ChatFormat
from everalign.modeling.decoding import Decoder, continue_rows
from everalign.modeling.decoding_cache import pad_left
from everalign.modeling.draft_decoding import DraftDecoder
from everalign.modeling.loading import load_model, load_tokenizer
from everalign.modeling.ragged_decoding import RaggedModel
from everalign.modeling.runtime import prepare_process

Tokens = list[list[int]]


def drafts_of(outputs: Tokens, kind: str, vocabulary: int) -> Tokens:
    """Drafts of which a known share is what the model writes."""
    rng = random.Random(0)

    def noise(count: int) -> list[int]:
        return [rng.randrange(3, vocabulary) for _ in range(count)]

    def block(tokens: list[int]) -> list[int]:
        size = max(1, len(tokens) // 10)
        start = rng.randrange(1, max(2, len(tokens) - size))
        return tokens[:start] + noise(size) + tokens[start + size :]

    def scattered(tokens: list[int]) -> list[int]:
        return [noise(1)[0] if rng.random() < 0.1 else token for token in tokens]

    makers: dict[str, Callable[[list[int]], list[int]]] = {
        "unchanged": list,
        "0.9 kept, one block": block,
        "0.9 kept, scattered": scattered,
        "nothing kept": lambda tokens: noise(len(tokens)),
    }
    return [makers[kind](tokens) for tokens in outputs]


KINDS = ("unchanged", "0.9 kept, one block", "0.9 kept, scattered", "nothing kept")


class Contenders:
    """Ways to the same tokens.

    Args:
        model: the language model.
        prompts: tokens of the prompts.
        ends: tokens that end an answer.
        limit: most tokens of an answer.
    """

    def __init__(self, model: Any, prompts: Tokens, ends: list[int], limit: int) -> None:
        self._model, self._ragged, self._prompts = model, RaggedModel(model), prompts
        self._ends, self._limit = ends, limit
        self.passes = 0

    def plain(self, drafts: Tokens, size: int) -> Tokens:
        """Our own greedy decoding, rows that have ended dropped."""
        found: Tokens = []
        for start in range(0, len(self._prompts), size):
            decoder = Decoder(self._model, pad_left(self._prompts[start : start + size], 0))
            found += continue_rows(decoder, lambda logits: logits.argmax(-1), self._ends, self._limit)
        return found

    def verified(self, drafts: Tokens, size: int) -> Tokens:
        """Verify, then decode."""
        found: Tokens = []
        self.passes = 0
        for start in range(0, len(self._prompts), size):
            part = slice(start, start + size)
            limits = [self._limit] * len(self._prompts[part])
            decoder = DraftDecoder(self._ragged, self._prompts[part], drafts[part], self._ends, limits)
            found += [row.tokens for row in decoder.run()]
            self.passes += decoder.passes
        return found

    def generate(self, drafts: Tokens, size: int, **options: Any) -> Tokens:
        """transformers' greedy `generate`, one row at a time."""
        found = []
        for prompt in self._prompts:
            written = self._model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=self._limit,
                do_sample=False,
                eos_token_id=self._ends,
                pad_token_id=0,
                **options,
            )
            found.append(written[0, len(prompt) :].tolist())
        return found

    def lookup(self, drafts: Tokens, size: int) -> Tokens:
        """transformers' prompt lookup, which can copy from the prompt only."""
        return self.generate(drafts, size, prompt_lookup_num_tokens=10)


def long_answers(model: Any, prompts: Tokens, ends: list[int], limit: int) -> Tokens:
    """The prompts that the model answers at length: short answers cost little, however they are written."""
    answers = Contenders(model, prompts, ends, limit).plain([], 32)
    return [prompt for prompt, tokens in zip(prompts, answers, strict=True) if len(tokens) == limit]


def seconds(run: Callable[[], Tokens], expected: Tokens) -> tuple[float, int]:
    """How long a way takes, and how many rows come out otherwise than expected."""
    began = time.process_time()
    found = run()
    return time.process_time() - began, sum(a != b for a, b in zip(found, expected, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=160, help="longest answer")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    name = str(data_folder() / "base-model")
    tokenizer, model = load_tokenizer(name), load_model(name)
    form = ChatFormat(tokenizer)
    asked = [row["prompt"] for row in preference_rows("safe_rlhf", "test")]
    ends = [form.eos]
    questions = form.prompt_tokens(asked, [form.prompt_text(prompt) for prompt in asked])
    questions = long_answers(model, questions, ends, arguments.tokens)[: arguments.rows]
    table = Table(title="times as fast as plain greedy decoding in the same batches")
    columns = ("draft", "batch", "verify, then decode", "passes a row", "generate", "prompt lookup", "rows that differ")
    for column in columns:
        table.add_column(column, justify="left" if column == "draft" else "right")
    results = []
    for kind in KINDS:
        # The draft stands in the prompt too, as it does in a corrector's; prompt lookup has nothing else to copy from.
        base = Contenders(model, questions, ends, arguments.tokens).plain([], arguments.rows)
        prompts = [q + d for q, d in zip(questions, drafts_of(base, kind, len(tokenizer)), strict=True)]
        contenders = Contenders(model, prompts, ends, arguments.tokens)
        outputs = contenders.plain([], arguments.rows)
        drafts = drafts_of(outputs, kind, len(tokenizer))
        for size in arguments.sizes:
            ways = {"plain": contenders.plain, "verified": contenders.verified}
            if size == 1:
                ways |= {"generate": contenders.generate, "lookup": contenders.lookup}
            taken: dict[str, list[float]] = {way: [] for way in ways}
            differ = 0
            for _ in range(arguments.rounds):
                for way, run in ways.items():
                    time_taken, wrong = seconds(partial(run, drafts, size), outputs)
                    taken[way].append(time_taken)
                    differ = max(differ, wrong if way == "verified" else 0)
            ratio = {
                way: statistics.median(plain / other for plain, other in zip(taken["plain"], times, strict=True))
                for way, times in taken.items()
            }
            passes = contenders.passes * min(size, arguments.rows) / arguments.rows
            results.append({"kind": kind, "size": size, "ratio": ratio, "passes": passes, "differ": differ})
            cells = [f"{ratio[way]:.2f}×" if way in ratio else "" for way in ("generate", "lookup")]
            table.add_row(kind, str(size), f"{ratio['verified']:.2f}×", f"{passes:.1f}", *cells, str(differ))
            print(results[-1], flush=True)
    Console(width=130).print(table)
    write_result(OUT / "correction.json", {"settings": vars(arguments), "results": results})


if __name__ == "__main__":
    main()
