"""How much faster a corrector's answers come by verifying a draft first, by how much of the draft is kept.

    python bench/correction.py
    python bench/correction.py --corrector FOLDER --precision bf16    # a trained one, such as corrector_smollm2's

The model has learnt real corrections by heart (`correction_rows.py`; minutes, kept for the next time). Drafts are its
corrections as they are or with noise in a tenth of the tokens, the real answers that were corrected, answers to other
questions, and noise alone, which is the worst case. A trained corrector writes what it makes of other models' answers
instead; those that it really was given are the drafts called real. All contenders write the same tokens, which is
checked. They take turns batch by batch; ratios are of their whole processor times.

Measured kinds and batch sizes stay in bench/out/correction_speed/MODEL.PRECISION and are not measured again.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import OUT, check_settings, write_result
from correction_rows import KINDS, CorrectorRows, Rows, Tokens, kept_share
from corrector_judges import answers
from everalign.modeling.decoding import Decoder, RaggedModel, continue_rows, pad_left
from everalign.modeling.runtime import prepare_process
from everalign.modeling.speculative import DraftDecoder
from everalign.storage import read_json, write_json


class Contenders:
    """Ways to the same tokens, of a batch of prompts and drafts.

    Args:
        model: the language model.
        ends: tokens that end an answer.
        limit: most tokens of an answer.

    Attributes:
        passes: forward passes of the last verified batch: of the batch, and of its rows on average.
    """

    def __init__(self, model: Any, ends: list[int], limit: int) -> None:
        self._model, self._ragged, self._ends, self._limit = model, RaggedModel(model), ends, limit
        self.passes = (0, 0.0)

    def plain(self, prompts: Tokens, drafts: Tokens) -> Tokens:
        """Our own greedy decoding, rows that have ended dropped."""
        decoder = Decoder(self._model, pad_left(prompts, 0))
        return continue_rows(decoder, lambda logits: logits.argmax(-1), self._ends, self._limit)

    def verified(self, prompts: Tokens, drafts: Tokens) -> Tokens:
        """Verify, then decode."""
        decoder = DraftDecoder(self._ragged, prompts, drafts, self._ends, [self._limit] * len(prompts))
        rows = decoder.run()
        self.passes = (decoder.passes, statistics.fmean(row.passes for row in rows))
        return [row.tokens for row in rows]

    def generate(self, prompts: Tokens, drafts: Tokens, **options: Any) -> Tokens:
        """transformers' greedy `generate`."""
        batch = pad_left(prompts, 0)
        written = self._model.generate(
            **batch,
            max_new_tokens=self._limit,
            do_sample=False,
            eos_token_id=self._ends,
            pad_token_id=0,
            **options,
        )
        return [self._ended(tokens) for tokens in written[:, batch["input_ids"].shape[1] :].tolist()]

    def lookup(self, prompts: Tokens, drafts: Tokens) -> Tokens:
        """transformers' prompt lookup, of one row: it copies from the prompt, where the draft stands too."""
        return self.generate(prompts, drafts, prompt_lookup_num_tokens=10)

    def _ended(self, tokens: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(tokens, start=1) if token in self._ends), len(tokens))
        return tokens[:end]


def measured(
    contenders: Contenders, prompts: Tokens, drafts: Tokens, size: int, ways: list[str], rounds: int
) -> dict[str, Any]:
    """Let contenders take turns, batch by batch; returns their times and what else is in the table."""
    seconds, passes, differ, outputs = dict.fromkeys(ways, 0.0), [], dict.fromkeys(ways, 0), []
    for number in range(rounds):
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            expected: Tokens = []
            for way in ways:
                run: Callable[[Tokens, Tokens], Tokens] = getattr(contenders, way)
                began = time.process_time()
                found = run(prompts[part], drafts[part])
                seconds[way] += time.process_time() - began
                expected = expected or found
                differ[way] += number == 0 and sum(a != b for a, b in zip(found, expected, strict=True))
            if number == 0:
                passes.append(contenders.passes)
                outputs += expected
    return {
        "seconds": seconds,
        "ratio": {way: seconds["plain"] / taken for way, taken in seconds.items()},
        "kept": statistics.fmean(kept_share(*pair) for pair in zip(drafts, outputs, strict=True)),
        "passes_a_row": statistics.fmean(of_rows for _, of_rows in passes),
        "passes_a_token": sum(of_batch for of_batch, _ in passes) / sum(map(len, outputs)),
        "differ": differ,
    }


def show(results: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="times as fast as plain greedy decoding in the same batches")
    for column in ("draft", "kept", "batch", "verify, then decode", "passes a row", "passes a token"):
        table.add_column(column, justify="left" if column == "draft" else "right")
    for column in ("generate", "prompt lookup", "rows that differ"):
        table.add_column(column, justify="right")
    for found in results:
        ratio = found["ratio"]
        table.add_row(
            found["kind"],
            f"{found['kept']:.2f}",
            str(found["size"]),
            f"{ratio['verified']:.2f}×",
            f"{found['passes_a_row']:.1f}",
            f"{found['passes_a_token']:.3f}",
            *(f"{ratio[way]:.2f}×" if way in ratio else "" for way in ("generate", "lookup")),
            str(found["differ"]["verified"]),
        )
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corrector", type=Path, help="folder of a trained corrector to measure instead")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--limit", type=int, default=220, help="longest answer, in tokens")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="outputs may differ in bf16")
    parser.add_argument("--output", type=Path, default=OUT / "correction_speed")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    settings = {name: vars(arguments)[name] for name in ("rows", "limit", "rounds", "precision", "threads")}
    settings["corrector"] = arguments.corrector and str(arguments.corrector)
    model_name = arguments.corrector.name if arguments.corrector else "by-heart"
    folder = arguments.output / f"{model_name}.{arguments.precision}"
    check_settings(folder / "settings.json", settings)
    if arguments.corrector is None:
        rows: Rows | CorrectorRows = Rows(arguments.rows)
        model = rows.model().bfloat16() if arguments.precision == "bf16" else rows.model()
    else:
        corrected = (arguments.corrector, arguments.precision, answers("train", 40), arguments.rows, arguments.limit)
        rows = CorrectorRows(*corrected)
        model = rows.model()
    contenders = Contenders(model, rows.ends, arguments.limit)
    results = []
    for kind in [kind for kind in arguments.kinds if rows.drafts.get(kind)]:
        for size in arguments.sizes:
            place = folder / f"{kind.replace(' ', '-')}.{size}.json"
            if not place.exists():
                ways = ["plain", "verified", "generate", *(["lookup"] if size == 1 else [])]
                found = measured(contenders, rows.prompts[kind], rows.drafts[kind], size, ways, arguments.rounds)
                write_json(place, {"kind": kind, "size": size, **found})
            results.append(read_json(place))
            print(results[-1], flush=True)
    show(results)
    write_result(OUT / "correction.json", {"settings": settings, "results": results})


if __name__ == "__main__":
    main()
