"""Whether verify-then-decode writes the tokens of plain greedy decoding, on real questions and answers.

    python bench/correction_exactness.py

A trained corrector verifies the real answers. Models of random weights of every family that the tests know get the same
questions and, in turn, the real answer, what they would write themselves, and that with noise, as a draft. A row that
differs is told with the distance of the two best logits at its first difference: rounding decides between equal ones.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import OUT, REPOSITORY, data_folder, write_result
from correction_task import corrector_folder, pairs, training_rows
from everalign.correction import load_corrector_files
from everalign.data.chat_tokens import ChatFormat
from everalign.data.collate import batches_by_length
from everalign.modeling.decoding import Decoder, RaggedModel, continue_rows, pad_left
from everalign.modeling.loading import load_model, load_tokenizer
from everalign.modeling.runtime import prepare_process
from everalign.modeling.speculative import DraftDecoder

sys.path.append(str(REPOSITORY / "tests" / "helpers"))
from models_for_tests import FAMILIES, SCALED, random_model

Tokens = list[list[int]]
SIZES = (1, 4, 16)
# What a random model reads of a question, and what it writes, in tokens: the tests' models have 256 places.
QUESTION, ANSWER = 128, 32
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Case:
    """A model with what it reads, its plain greedy tokens, and its drafts."""

    name: str
    model: Any
    prompts: Tokens
    outputs: Tokens
    drafts: Tokens
    ends: list[int]
    limit: int


def noisy(tokens: list[int], vocabulary: int, scattered: bool) -> list[int]:
    """Tokens of which a tenth is noise, in one block or one by one."""
    rng = random.Random(len(tokens))
    size = max(1, len(tokens) // 10)
    start = rng.randrange(max(1, len(tokens) - size))
    places = rng.sample(range(len(tokens)), size) if scattered else range(start, start + size)
    return [rng.randrange(3, vocabulary) if i in places else token for i, token in enumerate(tokens)]


def real_rows(count: int) -> list[tuple[Any, str]]:
    """Held-out questions with their rejected and their chosen answers."""
    rows = [*pairs("safe_rlhf", "test"), *pairs("hh_harmless", "test")]
    return [(row.prompt, answer) for row in rows for answer in (row.rejected, row.chosen)][:count]


def plain(model: Any, prompts: Tokens, ends: list[int], limit: int) -> Tokens:
    """Greedy decoding without drafts."""
    found: dict[int, list[int]] = {}
    for batch in batches_by_length([len(prompt) for prompt in prompts], BATCH_TOKENS):
        decoder = Decoder(model, pad_left([prompts[i] for i in batch], 0))
        rows = continue_rows(decoder, lambda logits: logits.argmax(-1), ends, limit)
        found.update(zip(batch, rows, strict=True))
    return [found[i] for i in range(len(prompts))]


def trained_case(rows: list[tuple[Any, str]], limit: int) -> Case:
    """The corrector of real pairs, with the real answers as drafts."""
    folder = corrector_folder("corrector", str(data_folder() / "base-model"), training_rows())
    encoder = load_corrector_files(folder).encoder(load_tokenizer(str(folder)))
    model, ends = load_model(str(folder)), sorted(encoder.ends)
    prompts = [encoder.prompt(*row) for row in rows]
    drafts = [encoder.response(answer) for _, answer in rows]
    return Case("corrector", model, prompts, plain(model, prompts, ends, limit), drafts, ends, limit)


def random_case(family: str, rows: list[tuple[Any, str]]) -> Case:
    """A random model, with drafts of every kind in turn."""
    tokenizer = load_tokenizer(str(data_folder() / "base-model"))
    form = ChatFormat(tokenizer)
    asked = [question for question, _ in rows]
    prompts = [tokens[-QUESTION:] for tokens in form.encode_prompts(asked)]
    answers = [tokenizer(answer, add_special_tokens=False)["input_ids"][:ANSWER] for _, answer in rows]
    model = random_model(family, vocabulary=len(tokenizer))
    outputs = plain(model, prompts, [form.eos], ANSWER)
    columns = [answers, outputs, *([noisy(row, len(tokenizer), kind) for row in outputs] for kind in (False, True))]
    drafts = [columns[i % len(columns)][i] for i in range(len(rows))]
    return Case(family, model, prompts, outputs, drafts, [form.eos], ANSWER)


def differing(case: Case, size: int) -> Iterator[tuple[int, list[int]]]:
    """The rows that come out otherwise than plain greedy decoding, with what came out."""
    ragged = RaggedModel(case.model)
    for start in range(0, len(case.prompts), size):
        part = slice(start, start + size)
        limits = [case.limit] * len(case.prompts[part])
        decoder = DraftDecoder(ragged, case.prompts[part], case.drafts[part], case.ends, limits)
        for place, row in enumerate(decoder.run(), start=start):
            if row.tokens != case.outputs[place]:
                yield place, row.tokens


def gap(case: Case, place: int, tokens: list[int]) -> float:
    """How far apart the two best logits are where a row first differs."""
    expected = case.outputs[place]
    first = next(i for i, (a, b) in enumerate(zip(expected, tokens, strict=False)) if a != b)
    inputs = torch.tensor([case.prompts[place] + expected[:first]])
    with torch.inference_mode():
        best = case.model(input_ids=inputs, use_cache=False).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=128, help="longest correction")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    rows, results = real_rows(arguments.rows), []
    makers = [partial(trained_case, rows, arguments.tokens)]
    makers += [partial(random_case, family, rows) for family in (*FAMILIES, *SCALED)]
    table = Table(title=f"rows of {len(rows)} that differ from plain greedy decoding, fp32")
    for column in ("model", *(f"batch {size}" for size in SIZES), "largest distance of the best logits there"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for make in makers:
        case = make()
        found = {size: [(place, gap(case, place, tokens)) for place, tokens in differing(case, size)] for size in SIZES}
        gaps = [distance for places in found.values() for _, distance in places]
        widest = f"{max(gaps):.1e}" if gaps else ""
        table.add_row(case.name, *(str(len(found[size])) for size in SIZES), widest)
        results.append({"model": case.name, "rows": len(rows), "differing": {str(k): v for k, v in found.items()}})
        print(f"{case.name}: {[len(found[size]) for size in SIZES]}", flush=True)
    Console(width=120).print(table)
    write_result(OUT / "correction_exactness.json", {"settings": vars(arguments), "results": results})


if __name__ == "__main__":
    main()
