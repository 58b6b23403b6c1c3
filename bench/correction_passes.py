"""How many forward passes verified drafts take on real corrections, without a model: its answer is taken as known.

    python bench/correction_passes.py

Real answers are the drafts and their real corrections are what a model would write. Whether a guessed token is right is
then a comparison, so that hundreds of corrections take seconds. Costs are in passes of one token of one row, by the
costs that the decoder itself assumes on a CPU.
"""

import argparse
from types import SimpleNamespace
from typing import Any

import torch

from common import OUT, correction_rows, write_result
from everalign.modeling import speculative
from everalign.modeling.decoding import Predicted
from everalign.modeling.loading import load_tokenizer

SETS = (
    "qa_feedback_correction",
    "selfee_revision",
    "criticeval_correction",
    "shepherd_correction",
    "gsm8k_correction",
)
LONGEST = 400


class KnownRows:
    """Stands in for `RaggedRows`, for a model that writes the outputs of `model.rows`."""

    def __init__(self, model: Any, rows: int) -> None:
        self.rows, self.lengths = list(model.rows), [0] * rows
        self.passes, self.cost = 0, 0.0

    def append(
        self, tokens: list[list[int]], wanted: list[int], targets: Any = None, scored: bool = False
    ) -> tuple[list[Predicted], list[int]]:
        row_cost, token_cost = speculative._COSTS["cpu"]
        if self.passes:  # the first pass reads prompts and drafts, however they are guessed later
            self.cost += 1 + len(tokens) * (row_cost + token_cost * (max(map(len, tokens)) - 1))
        self.passes += 1
        found = []
        for place, (ids, count) in enumerate(zip(tokens, wanted, strict=True)):
            prompt, output = self.rows[place]
            start = self.lengths[place] + len(ids) - count + 1 - prompt
            predicted, known = [], True
            for number in range(count):
                known = known and start + number < len(output)
                predicted.append(output[start + number] if known else -1)
                known = known and (targets is None or targets[place][number] == predicted[-1])
            found.append(Predicted(predicted))
        self.lengths = [length + len(ids) for length, ids in zip(self.lengths, tokens, strict=True)]
        return found, [1] * len(tokens)

    def select(self, rows: list[int]) -> None:
        self.rows, self.lengths = ([values[row] for row in rows] for values in (self.rows, self.lengths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 16])
    arguments = parser.parse_args()
    speculative.RaggedRows = KnownRows
    tokenizer, results = load_tokenizer("smollm2"), []
    end = tokenizer.eos_token_id

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    for name in SETS:
        rows = []
        for row in correction_rows(name, "train"):
            question, answer, correction = (encode(row[key]) for key in ("query", "answer", "correction"))
            if max(len(answer), len(correction)) <= LONGEST and answer != correction:
                prompt = question + encode("\n[[answer]]\n") + answer + encode("\n[[correction]]\n")
                rows.append((prompt, [*answer, end], [*correction, end]))
        rows = rows[: arguments.rows]
        tokens = sum(len(output) for _, _, output in rows)
        for size in arguments.sizes:
            passes, cost = 0, 0.0
            for start in range(0, len(rows), size):
                prompts, drafts, outputs = zip(*rows[start : start + size], strict=True)
                known = list(zip(map(len, prompts), outputs, strict=True))
                model: Any = SimpleNamespace(rows=known, device=torch.device("cpu"))
                decoder = speculative.DraftDecoder(model, prompts, drafts, [end], [2 * LONGEST] * len(prompts))
                found = decoder.run()
                assert [row.tokens for row in found] == list(outputs)
                passes += sum(row.passes for row in found)
                cache: Any = decoder._cache
                cost += cache.cost
            results.append({"set": name, "rows": len(rows), "batch": size, "passes": passes, "cost": cost})
            print(f"{name}: {len(rows)} rows, batches of {size}: {passes / tokens:.3f} passes a token, cost {cost:.0f}")
    write_result(OUT / "correction_passes.json", {"settings": vars(arguments), "results": results})


if __name__ == "__main__":
    main()
