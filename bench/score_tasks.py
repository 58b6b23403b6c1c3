"""A reward model for each of the five tasks, and what it says of answers: scored rows for `everalign bench`.

    python bench/score_tasks.py                        # --tasks shares the work between processes
    everalign bench recipes/rewards_five_tasks.yaml

Of every task some prompts are drawn for the policies, some for validation, and the task's reward model learns pairs of
the others alone: no policy learns a prompt that its rewards come from. Written to bench/out/score_tasks, for each TASK:

    TASK.train.jsonl, TASK.validation.jsonl    pairs as people or models judged them, one a prompt
    TASK.pairs.jsonl                           the training pairs' two answers with their rewards
    TASK.samples.jsonl                         sampled answers of the base model with their rewards
    TASK.json                                  counts, the reward model's held-out accuracy, seconds

Of the samples as many are kept as the pairs have tokens, prompts counted once a row: what is learned from either in an
epoch takes the same time, whatever the number of rows.

What is finished stays and is not repeated; a reward model that was interrupted goes on from its last checkpoint.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from common import OUT, check_settings, data_folder, preference_rows
from everalign.data import Preference, PreferenceSet, Scored
from everalign.data.chat_tokens import ChatFormat
from everalign.data.rows import spread
from everalign.evaluation.scorers import RewardModel
from everalign.modeling.loading import load_model, load_tokenizer
from everalign.modeling.policy import Policy
from everalign.modeling.reward_model import read_reward_facts
from everalign.modeling.runtime import prepare_process
from everalign.modeling.sampling import sample_completions
from everalign.options import SamplingOptions
from everalign.storage import json_line, write_json, write_text
from everalign.training.options import RewardOptions
from everalign.training.reward_model import train_reward_model

TASKS = {
    "harmless": "hh_harmless",
    "helpful": "hh_helpful",
    "hc3": "hc3",
    "safe": "safe_rlhf",
    "truthful": "truthfulqa_pairs",
}
# Tokens of a prompt with an answer, as in the recipe, where pairs are cut to it and scored answers left out. Of hc3,
# whose answers are long, 814 of 1,964 prompts fit, and 155 in 256 tokens. Tokens of a sampled answer.
LONGEST, LONGEST_ANSWER = 384, 96
REWARD = {"learning_rate": 1e-4, "epochs": 2.0, "max_length": LONGEST}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--rows", type=int, default=150, help="prompts of a task that policies learn")
    parser.add_argument("--validation", type=int, default=40, help="prompts of a task for validation")
    parser.add_argument("--reward-pairs", type=int, default=800, help="most pairs that a reward model learns")
    parser.add_argument("--held-out", type=int, default=150, help="most test pairs that a reward model is tried on")
    parser.add_argument("--answers", type=int, default=8, help="sampled to each prompt, of which some are kept")
    parser.add_argument("--output", type=Path, default=OUT / "score_tasks")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    settings = {name: vars(arguments)[name] for name in ("rows", "validation", "reward_pairs", "held_out", "answers")}
    check_settings(arguments.output / "settings.json", settings)
    for task in arguments.tasks:
        facts = arguments.output / f"{task}.json"
        if not facts.exists():
            write_json(facts, score_task(task, arguments))
        print(f"{task}: {facts.read_text(encoding='utf-8')}", flush=True)


def score_task(task: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a task's reward model, write its files, and return what there is to say of them."""
    base, folder, started = str(data_folder() / "base-model"), arguments.output, time.perf_counter()
    tokenizer = load_tokenizer(base)
    learned, validation, rest = split(task, tokenizer, arguments)
    write_rows(folder / f"{task}.train.jsonl", learned)
    write_rows(folder / f"{task}.validation.jsonl", validation)

    model = folder / f"reward-{task}"
    if not model.exists():
        train = PreferenceSet(tuple(rest), "rewards")
        test = PreferenceSet.of(spread(preference_rows(TASKS[task], "test"), arguments.held_out), "test")
        train_reward_model(base, train, model, test=test, options=RewardOptions(**REWARD), log=print)
    rewarded = time.perf_counter()

    scorer = RewardModel.from_folder(model)
    pairs = scored(scorer, [Scored.from_preference(row, rewards=None) for row in learned])
    write_rows(folder / f"{task}.pairs.jsonl", pairs)
    policy = Policy(load_model(base), 1, 1.0, seed=0)
    options = SamplingOptions(
        completions=arguments.answers, temperature=1.0, max_new_tokens=LONGEST_ANSWER, max_prompt_tokens=LONGEST
    )
    drawn = sample_completions(policy, tokenizer, [row.prompt for row in learned], options, seed=0)
    answered = [
        Scored(row.prompt, found.texts) for row, found in zip(learned, drawn, strict=True) if len(found.texts) > 1
    ]
    size = tokens(pairs, tokenizer)
    samples = scored(scorer, within(size, answered, tokenizer))
    write_rows(folder / f"{task}.samples.jsonl", samples)
    return {
        "learned": len(learned),
        "validation": len(validation),
        "reward_pairs": len(rest),
        "reward_accuracy": read_reward_facts(model).accuracy,
        "agreement": statistics.fmean(row.rewards[0] > row.rewards[1] for row in pairs),
        "sampled_prompts": len(samples),
        "sampled_answers": sum(len(row.completions) for row in samples),
        "tokens": {"pairs": size, "samples": tokens(samples, tokenizer)},
        "reward_seconds": round(rewarded - started, 1),
        "other_seconds": round(time.perf_counter() - rewarded, 1),
    }


def split(
    task: str, tokenizer: Any, arguments: argparse.Namespace
) -> tuple[list[Preference], list[Preference], list[Preference]]:
    """Pairs for policies and for validation, one a prompt, and pairs of other prompts for the reward model."""
    rows = list(PreferenceSet.of(preference_rows(TASKS[task], "train"), f"{task}.train"))
    draw = random.Random(0)
    draw.shuffle(rows)
    first: dict[str, Preference] = {}
    for row, fits in zip(rows, fitting(rows, tokenizer), strict=True):
        if fits:
            first.setdefault(str(row.prompt), row)
    chosen = list(first.values())[: arguments.rows + arguments.validation]
    if len(chosen) < arguments.rows + arguments.validation:
        sys.exit(f"{task}: {len(first)} prompts fit in {LONGEST} tokens: lower --rows or --validation")
    taken = {str(row.prompt) for row in chosen}
    rest = [row for row in rows if str(row.prompt) not in taken][: arguments.reward_pairs]
    return chosen[: arguments.rows], chosen[arguments.rows :], rest


def fitting(rows: list[Preference], tokenizer: Any) -> list[bool]:
    """Whether a prompt with each of its answers, and with a sampled one, can be learned whole."""
    found = sizes([Scored.from_preference(row) for row in rows], tokenizer)
    return [prompt + max(LONGEST_ANSWER + 1, *answers) <= LONGEST for prompt, *answers in found]


def within(budget: int, rows: list[Scored], tokenizer: Any) -> list[Scored]:
    """Two answers to each prompt, then a third to each, and so on, as long as they have no more tokens in all."""
    costs = sizes(rows, tokenizer)
    kept, spent = [0] * len(rows), 0
    for count in range(2, 1 + max(len(row.completions) for row in rows)):
        for number, (prompt, *answers) in enumerate(costs):
            # One answer teaches nothing: the first comes with the second.
            before = 0 if count == 2 else count - 1
            new = sum(answers[before:count]) + (prompt if count == 2 else 0)
            if kept[number] == before and count <= len(answers) and spent + new <= budget:
                kept[number], spent = count, spent + new
    return [Scored(row.prompt, row.completions[:count]) for row, count in zip(rows, kept, strict=True) if count]


def tokens(rows: list[Scored], tokenizer: Any) -> int:
    """Tokens that one pass over the rows computes."""
    return sum(map(sum, sizes(rows, tokenizer)))


def sizes(rows: list[Scored], tokenizer: Any) -> list[list[int]]:
    """Tokens of each row's prompt, and of each of its answers."""
    encoded = ChatFormat(tokenizer).encode(
        [row.prompt for row in rows], [row.completions for row in rows], lambda i: f"row {i + 1}"
    )
    return [[len(prompt), *map(len, answers)] for prompt, answers in encoded]


def scored(scorer: RewardModel, rows: list[Scored]) -> list[Scored]:
    """Answers with their rewards; rows without any difference teach nothing and are left out."""
    prompts = [row.prompt for row in rows for _ in row.completions]
    found = iter(scorer.score(prompts, [text for row in rows for text in row.completions]))
    given = [Scored(row.prompt, row.completions, tuple(next(found) for _ in row.completions)) for row in rows]
    return [row for row in given if len(set(row.rewards)) > 1]


def write_rows(path: Path, rows: Iterable[Preference | Scored]) -> None:
    write_text(path, "".join(json_line(row.to_json()) for row in rows))


if __name__ == "__main__":
    main()
