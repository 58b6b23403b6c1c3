"""Rewards of real answers by SmolLM2: answers per processor second, beside plain transformers.

    python bench/reward_speed.py                  # bf16 autocast
    python bench/reward_speed.py --precision fp32

Several answers to each prompt, a pair's and beginnings of them, are scored: ours reads a prompt once, transformers'
classifier each prompt with each answer, in batches of similar length of as many tokens. Then pairs are learned, forward
and backward, with a LoRA adapter: laid out behind one prompt, or each answer with its own, as TRL's RewardTrainer does.
The head's values are random, which changes no time. Contenders take turns, and the largest difference of their rewards
is shown.
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
from everalign.data import PreferenceSet
from everalign.data.collate import batches_by_length
from everalign.data.tokenization import TokenizedRow, pad_right, tokenize_preferences
from everalign.modeling.loading import load_tokenizer
from everalign.modeling.reward_model import (
    RewardNetwork,
    add_adapter,
    load_classifier,
    sequence_rewards,
    set_padding,
)
from everalign.modeling.runtime import prepare_process
from everalign.training.reward_model import BradleyTerryObjective

TOKENS_PER_BATCH = 8192
LONGEST = 384


def pairs_of(name: str, count: int, tokenizer: Any) -> list[TokenizedRow]:
    """The first pairs of a set, in tokens."""
    columns = ("prompt", "chosen", "rejected")
    rows = [{key: row[key] for key in columns} for row in preference_rows(name, "test")[:count]]
    return list(tokenize_preferences(PreferenceSet.of(rows, name), tokenizer, LONGEST))


def with_answers(pairs: list[TokenizedRow], count: int) -> list[TokenizedRow]:
    """Rows of `count` answers each: a pair's, and beginnings of them."""
    rows = []
    for pair in pairs:
        answers = [pair.responses[i % 2][: max(2, len(pair.responses[i % 2]) - i // 2)] for i in range(count)]
        rows.append(TokenizedRow(pair.id, pair.prompt, tuple(answers), (1.0,) * count))
    return rows


def plain_rewards(model: RewardNetwork, rows: list[TokenizedRow]) -> torch.Tensor:
    """What transformers' classifier gives, each prompt with each answer."""
    sequences = [row.prompt + answer for row in rows for answer in row.responses]
    rewards = torch.empty(len(sequences))
    for places in batches_by_length([len(tokens) for tokens in sequences], TOKENS_PER_BATCH):
        with torch.no_grad():
            rewards[places] = model(pad_right([sequences[place] for place in places], model.padding))
    return rewards


def pass_of(model: RewardNetwork, pairs: list[TokenizedRow], shared: bool) -> torch.Tensor:
    """Learn from pairs, eight at a time, but for the optimiser; returns the margins."""
    objective, margins = BradleyTerryObjective(model.padding, 0.01), []
    for start in range(0, len(pairs), 8):
        batch = objective.collate(pairs[start : start + 8], shared)
        loss, metrics = objective.loss(model, batch, batch["count"])
        loss.backward()
        margins.append(metrics["margin"])
        model.zero_grad()
    return torch.cat(margins)


def compare(ways: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, Any]:
    """Processor seconds of two ways by turns, the first one's gain round by round, and how far results differ."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, torch.Tensor] = {}
    for _ in range(rounds):
        for name, run in ways.items():
            began = time.process_time()
            results[name] = run()
            seconds[name].append(time.process_time() - began)
    first, second = seconds.values()
    one, other = results.values()
    return {
        "seconds": seconds,
        "times_as_fast": [theirs / ours for ours, theirs in zip(first, second, strict=True)],
        "difference": (one - other).abs().max().item(),
        "deviation": other.std().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--sets", nargs="+", default=["safe_rlhf", "hh_helpful"])
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--answers", nargs="+", type=int, default=[2, 6])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    tokenizer = load_tokenizer("smollm2")
    models = []
    for weights in ("fp32", arguments.precision):  # rewards are made by fp32 weights, adapters learn on the precision's
        classifier = load_classifier("smollm2", fresh_head=True, precision=weights)
        set_padding(classifier, tokenizer)
        models.append(classifier)
    scorer = RewardNetwork(models[0], arguments.precision).eval()
    learner = RewardNetwork(add_adapter(models[1], 16, 32.0, 0, "smollm2"), arguments.precision)
    table = Table(title=f"SmolLM2 as a reward model, {arguments.precision}")
    for column in ("", "tokens of a prompt", "of an answer", "times as fast, round by round", "largest difference"):
        table.add_column(column, justify="left" if not column else "right")
    found: dict[str, Any] = {}
    for name in arguments.sets:
        pairs = pairs_of(name, arguments.pairs, tokenizer)
        comparisons: dict[str, tuple[list[TokenizedRow], dict[str, Callable[[], torch.Tensor]]]] = {}
        for count in arguments.answers:
            rows = with_answers(pairs, count)
            comparisons[f"{name}, {count} answers scored"] = (
                rows,
                {
                    "everalign": lambda rows=rows: sequence_rewards(scorer, rows, TOKENS_PER_BATCH),
                    "transformers": lambda rows=rows: plain_rewards(scorer, rows),
                },
            )
        comparisons[f"{name}, pairs learned"] = (
            pairs,
            {
                "one prompt": lambda pairs=pairs: pass_of(learner, pairs, True),
                "two prompts": lambda pairs=pairs: pass_of(learner, pairs, False),
            },
        )
        for what, (rows, ways) in comparisons.items():
            result = found[what] = compare(ways, arguments.rounds)
            answers = [len(answer) for row in rows for answer in row.responses]
            table.add_row(
                what,
                f"{statistics.mean(len(row.prompt) for row in rows):.0f}",
                f"{statistics.mean(answers):.0f}",
                ", ".join(f"{gain:.2f}" for gain in result["times_as_fast"]),
                f"{result['difference']:.1e} of {result['deviation']:.1e}",
            )
    Console(width=130).print(table)
    write_result(OUT / f"reward_speed.{arguments.precision}.json", {"settings": vars(arguments), "results": found})


if __name__ == "__main__":
    main()
