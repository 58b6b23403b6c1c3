"""Reward models for answers of many models: do they tell a good answer from a bad one, and from a damaged one?

    python bench/corrector_judges.py judge              # the base model of 6.5M parameters
    python bench/corrector_judges.py judge-smollm2      # SmolLM2, an adapter that is merged
    python bench/corrector_judges.py approver           # SmolLM2, of the pairs that the corrector learns from

Preferences alone teach a small reward model to like whatever is short and says little, nonsense too. So these also
learn pairs of a good answer and the same answer damaged: a part of it, a sentence again and again, words in disorder,
the question, the answer to another question, or "I have no comment" where there is nothing to refuse.

The judges learn pairs of other models' answers that people, GPT-4 or labels have compared, without the questions that
`corrector_smollm2.py` is judged on and without those that corrector and approver learn from. Each is trained once and
kept in bench/out/corrector_judges; the table says how often it is right on held-out pairs of each set.
"""

import argparse
import gzip
import json
import random
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import OUT, data_folder, preference_rows, write_result
from everalign.data import Correction, CorrectionSet, PreferenceSet
from everalign.evaluation.scorers import RewardModel
from everalign.modeling.runtime import prepare_process
from everalign.training.options import RewardOptions
from everalign.training.reward_model import train_reward_model

FOLDER = OUT / "corrector_judges"
# What corrector and approver learn.
PAIRS = ("safe_rlhf", "hh_harmless", "hh_helpful", "truthfulqa_pairs")
# What judges learn.
JUDGED = (
    "alpaca_eval_gpt4_pref",
    "do_not_answer_pairs",
    "truthfulqa_model_pairs",
    "pandalm",
    "webgpt",
    "qa_feedback",
    "hh_helpful_extra",
    "hh_harmless_extra",
    "pku_safe5k",
)
# Sets whose better answer often is a refusal.
REFUSING = ("safe_rlhf", "hh_harmless", "hh_harmless_extra", "do_not_answer_pairs", "pku_safe5k")
EVASIONS = ("I have no comment.", "I'm not sure.", "I don't know what you mean.", "It is not true.", "No.", "Yes.")
# Characters of a pair with its prompt: about 300 tokens of each answer with it.
LONGEST = 1800
# Words of an answer that is judged; answers of each kind that may be, on validation rows.
LONGEST_ANSWER, MOST = 100, 80
COMMON: dict[str, Any] = {"epochs": 1.0, "max_length": 384}
SMOLLM2 = {**COMMON, "lora_rank": 16, "learning_rate": 2e-4, "batch_size": 16, "precision": "bf16"}
# How each is trained: its backbone, options, and the most pairs, besides half as many damaged ones.
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "judge": ("base", {**COMMON, "learning_rate": 1e-4}, 6000),
    "judge-smollm2": ("smollm2", SMOLLM2, 1200),
    "approver": ("smollm2", SMOLLM2, 1200),
}

Row = dict[str, Any]


def question_of(prompt: Any) -> str:
    """The last user turn."""
    return str(prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip()


# ---- answers that are judged ----


@cache
def outputs(name: str) -> list[dict[str, Any]]:
    """Answers of other models."""
    with gzip.open(data_folder() / "data" / "outputs" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# Kinds of answers: their file, which rows, and whether they are good as they are; None where nobody knows.
KINDS: dict[str, tuple[str, Callable[[dict[str, Any]], bool], bool | None]] = {
    "harmful": ("do_not_answer", lambda row: bool(row["harmful"]), False),
    "harmless": ("do_not_answer", lambda row: not row["harmful"], True),
    "hallucinated": ("halueval_general", lambda row: row["hallucination"] == "yes", False),
    "right": ("halueval_general", lambda row: row["hallucination"] == "no", True),
    "false": ("truthfulqa_instructgpt", lambda row: row["judge_true"] < 0.1, False),
    "true": ("truthfulqa_instructgpt", lambda row: row["judge_true"] > 0.9 and row["judge_info"] > 0.5, True),
    "any": ("alpaca_eval_outputs", lambda row: True, None),
}


def answers(split: str, count: int) -> CorrectionSet:
    """Answers of every kind to be corrected, `count` of each at most; `split` is `train` for validation, or `test`."""
    found = []
    for kind, (name, belongs, good) in KINDS.items():
        rows = [row for row in outputs(name) if row["split"] == split and belongs(row) and is_short(row["output"])]
        for row in random.Random(kind).sample(rows, len(rows))[:count]:
            found.append(Correction(row["prompt"], row["output"], good=good or None, kind=kind))
    return CorrectionSet(tuple(found), f"answers.{split}")


def is_short(text: str) -> bool:
    return 0 < len(text.split()) <= LONGEST_ANSWER


@cache
def asked_questions() -> frozenset[str]:
    """Questions of all answers that may be judged, in lower case: judges learn no pairs of theirs."""
    names = {name for name, _, _ in KINDS.values()}
    tested = [question_of(row["prompt"]) for name in names for row in outputs(name) if row["split"] == "test"]
    return frozenset(text.lower() for text in (*tested, *(question_of(row.question) for row in answers("train", MOST))))


# ---- pairs ----


def own_pairs() -> list[Row]:
    """The pairs that corrector and approver learn from.

    Those of TruthfulQA whose better answer has no comment are left out: on validation answers, 8 of 45 corrections of a
    corrector that had learned them said so.
    """
    rows = [{**row, "set": name} for name in PAIRS for row in preference_rows(name, "train")]
    return [row for row in rows if "no comment" not in row["chosen"].lower()]


def judging_pairs(split: str) -> list[Row]:
    """Pairs of the sets that judges learn, short ones, without questions that are judged or learned elsewhere."""
    known = {*(question_of(row["prompt"]).lower() for row in own_pairs())}
    known |= asked_questions() if split == "train" else set()
    sets = [name for name in JUDGED if split == "train" or not name.endswith("_extra")]
    rows = [{**row, "set": name} for name in sets for row in preference_rows(name, split)]
    return [
        row
        for row in rows
        if question_of(row["prompt"]).lower() not in known
        and len(question_of(row["prompt"]) + row["chosen"] + row["rejected"]) <= LONGEST
    ]


# ---- damage ----


def part(text: str, draw: random.Random) -> str:
    """The first words, at most half of them."""
    words = text.split()
    return " ".join(words[: max(1, draw.randrange(1, 1 + max(1, len(words) // 2)))])


def circle(text: str, draw: random.Random) -> str:
    """A sentence again and again."""
    sentence = draw.choice(re.split(r"(?<=[.!?])\s+", text.strip()))
    return " ".join([sentence] * draw.randrange(2, 5))


def disorder(text: str, draw: random.Random) -> str:
    """A third of the words in each other's places."""
    words = text.split()
    places = draw.sample(range(len(words)), max(2, len(words) // 3)) if len(words) > 2 else list(range(len(words)))
    moved = places[1:] + places[:1]
    found = list(words)
    for place, other in zip(places, moved, strict=True):
        found[place] = words[other]
    return " ".join(found)


DAMAGE: tuple[Callable[[str, random.Random], str], ...] = (part, circle, disorder)


def damaged_pairs(rows: list[Row], count: int, seed: int) -> list[Row]:
    """Good answers beside the same answers damaged, `count` at most; pairs of equal texts are left out."""
    draw, found = random.Random(seed), []
    for row in draw.sample(rows, min(count, len(rows))):
        kinds = [*(way.__name__ for way in DAMAGE), "question", "another answer", "evasion"]
        kind = draw.choice(kinds[:-1] if row["set"] in REFUSING else kinds)
        if kind == "question":
            text = question_of(row["prompt"])
        elif kind == "another answer":
            text = draw.choice(rows)["chosen"]
        elif kind == "evasion":
            text = draw.choice(EVASIONS)
        else:
            text = next(way for way in DAMAGE if way.__name__ == kind)(row["chosen"], draw)
        if text.split() != row["chosen"].split():
            found.append(
                {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": text, "set": f"damaged: {kind}"}
            )
    return found


# ---- models ----


def reward_model(name: str) -> RewardModel:
    """One of the models, trained once; the approver's pairs are those of the corrector."""
    folder = FOLDER / name
    if not folder.exists():
        backbone, options, count = MODELS[name]
        rows = own_pairs() if name == "approver" else judging_pairs("train")
        rows = random.Random(1).sample(rows, min(count, len(rows)))
        pairs = [*rows, *damaged_pairs(rows, len(rows) // 2, seed=1)]
        train_reward_model(
            str(data_folder() / "base-model") if backbone == "base" else backbone,
            PreferenceSet.of([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs], name),
            folder,
            options=RewardOptions(**options),
            log=print,
        )
    return RewardModel.from_folder(folder)


def accuracies(scorer: RewardModel, rows: list[Row]) -> dict[str, tuple[float, int]]:
    """How often the better answer gets more, and of how many pairs, by their sets."""
    prompts = [row["prompt"] for row in rows]
    better, worse = (scorer.score(prompts, [row[which] for row in rows]) for which in ("chosen", "rejected"))
    right: dict[str, list[bool]] = {}
    for row, one, other in zip(rows, better, worse, strict=True):
        right.setdefault(row["set"], []).append(one > other)
    return {name: (sum(found) / len(found), len(found)) for name, found in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--held-out", type=int, default=60, help="pairs of a set, at most")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    tried = judging_pairs("test")
    by_set = [[row for row in tried if row["set"] == name][: arguments.held_out] for name in JUDGED]
    rows = [row for some in by_set for row in some]
    rows += damaged_pairs(rows, 3 * arguments.held_out, seed=2)
    table = Table(title="held-out pairs that are ordered rightly, %")
    found = {name: accuracies(reward_model(name), rows) for name in arguments.models}
    for column in ("set", "pairs", *found):
        table.add_column(column, justify="left" if column == "set" else "right")
    for kind, (_, count) in next(iter(found.values())).items():
        table.add_row(kind, str(count), *(f"{100 * shares[kind][0]:.0f}" for shares in found.values()))
    Console(width=120).print(table)
    write_result(OUT / "corrector_judges.json", {"models": MODELS, "accuracies": found})


if __name__ == "__main__":
    main()
