"""What the corrector's benches share: real rows to learn from, real answers to correct, and a judge.

The judge is a reward model of pairs that no corrector and no approver has seen.
"""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import torch

from common import OUT, data_folder, preference_rows
from everalign.correction.options import CorrectorOptions
from everalign.correction.training import train_corrector
from everalign.data import Correction, CorrectionSet, PreferenceSet
from everalign.data.records import correction_of
from everalign.evaluation.scorers import RewardModel
from everalign.modeling.loading import load_model, load_tokenizer
from var_real import reward_model

FOLDER = OUT / "correction"
LONGEST = 384
# Longer answers than this are left out, in words: prompt, answer and correction have to fit. Few answers of other
# models are harmful, and those are long.
LONGEST_ANSWER, LONGEST_HARMFUL = 120, 200
# Share of the identity rows: chosen answers that are to be left alone.
GOOD_SHARE = 0.5


def base() -> str:
    """The model that correctors and reward models start from."""
    return str(data_folder() / "base-model")


def pairs(name: str, split: str) -> PreferenceSet:
    """One preference set's rows."""
    return PreferenceSet.of(preference_rows(name, split), f"{name}.{split}")


def training_rows(good_share: float = GOOD_SHARE) -> CorrectionSet:
    """Rejected answers with the chosen ones as corrections, and a share of chosen answers that stay.

    Of safe_rlhf every second pair: the judge learned from the others.
    """
    rows = [*pairs("safe_rlhf", "train")[::2], *pairs("hh_harmless", "train"), *pairs("pku_safe5k", "train")]
    kept = random.Random(0).sample(rows, int(good_share * len(rows)))
    identities = [Correction(row.prompt, row.chosen, row.chosen) for row in kept]
    return CorrectionSet((*(correction_of(row) for row in rows), *identities), "pairs")


def smaller(layers: tuple[int, ...]) -> Path:
    """The base model with some of its layers alone, written once."""
    folder = FOLDER / f"base-{''.join(map(str, layers))}"
    if not folder.exists():
        name = base()
        model = load_model(name)
        model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in layers)
        for place, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = place
        model.config.num_hidden_layers = len(layers)
        model.save_pretrained(folder)
        load_tokenizer(name).save_pretrained(folder)
    return folder


def corrector_folder(name: str, base: str, rows: CorrectionSet, **options: Any) -> Path:
    """A corrector of some rows, trained once and kept; `options` in place of the benches' own."""
    folder = FOLDER / name
    if not folder.exists():
        settings: dict[str, Any] = {
            "identity": 1.0,
            "identity_epochs": 2.0,
            "learning_rate": 5e-4,
            "epochs": 2.0,
            "max_length": LONGEST,
            "precision": "bf16",
        }
        train_corrector(base, rows, folder, options=CorrectorOptions(**(settings | options)), log=print)
    return folder


def judge() -> tuple[RewardModel, float]:
    """Who says which answer is better, and the share of held-out pairs that it orders as people did."""
    return reward_model(FOLDER / "judge", pairs("safe_rlhf", "train")[1::2], pairs("safe_rlhf", "test"), base())


def approving() -> tuple[RewardModel, float]:
    """Who approves of corrections: a reward model of pairs that the corrector learned from."""
    return reward_model(FOLDER / "rewards", pairs("safe_rlhf", "train")[::2], pairs("safe_rlhf", "test"), base())


def is_short(*texts: str, longest: int = LONGEST_ANSWER) -> bool:
    """Whether texts are there, and short enough."""
    return all(text.strip() and len(text.split()) <= longest for text in texts)


def other_models(count: int) -> list[Correction]:
    """Answers of chat models to questions that should not be answered, by whether people found them harmful."""
    with gzip.open(data_folder() / "data" / "outputs" / "do_not_answer.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    harmful = [row for row in rows if row["harmful"] and is_short(row["output"], longest=LONGEST_HARMFUL)]
    rest = [row for row in rows if not row["harmful"] and is_short(row["output"])]
    harmless = random.Random(0).sample(rest, count)
    return [
        *(Correction(row["prompt"], row["output"], kind="others', harmful") for row in harmful),
        *(Correction(row["prompt"], row["output"], good=True, kind="others', harmless") for row in harmless),
    ]


def held_out(count: int) -> CorrectionSet:
    """What is corrected: rejected and chosen held-out answers, and answers of other models."""
    rows = [*pairs("safe_rlhf", "test"), *pairs("hh_harmless", "test")]
    short = [row for row in rows if is_short(row.chosen, row.rejected)][:count]
    return CorrectionSet(
        (
            *(Correction(row.prompt, row.rejected, correction=row.chosen, kind="rejected") for row in short),
            *(Correction(row.prompt, row.chosen, good=True, kind="chosen") for row in short),
            *other_models(count),
        ),
        "held out",
    )
