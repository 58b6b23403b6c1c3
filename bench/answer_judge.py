"""A reward model that judges answers of the five tasks' recipes, trained on pairs with other prompts.

    python bench/answer_judge.py

The base model of 6.5M parameters learns people's and models' judgements: pairs of hh that the tasks leave out, other
prompts of PKU-SafeRLHF, and UltraFeedback. Rows whose prompt is one of a task's are left out, so that `everalign bench`
accepts it. Kept in bench/out/answer_judge, which recipes name as `answers.reward_model`.
"""

import json

from common import OUT, data_folder, preference_rows, write_result
from everalign.data import PreferenceSet
from everalign.training.options import RewardOptions
from everalign.training.reward_model import train_reward_model

TASKS = ("hh_harmless", "hh_helpful", "hc3", "safe_rlhf", "truthfulqa_pairs")
SOURCES = ("hh_harmless_extra", "hh_helpful_extra", "pku_safe5k", "ultrafeedback")
TESTS = ("pku_safe5k", "ultrafeedback")


def main() -> None:
    known = {json.dumps(row["prompt"]) for task in TASKS for split in ("train", "test") for row in rows(task, split)}
    learned = [row for name in SOURCES for row in rows(name, "train") if json.dumps(row["prompt"]) not in known]
    test = [row for name in TESTS for row in rows(name, "test")]
    folder = OUT / "answer_judge"
    trained = train_reward_model(
        str(data_folder() / "base-model"),
        PreferenceSet.of(learned, "judge"),
        folder,
        test=PreferenceSet.of(test, "held out"),
        options=RewardOptions(learning_rate=1e-4, epochs=2.0, max_length=256),
        log=print,
    )
    assert trained.report is not None
    print(f"{len(learned)} pairs learned; {100 * trained.report.accuracy:.1f} % of {len(test)} held-out pairs right")
    write_result(OUT / "answer_judge.json", {"learned": len(learned), "accuracy": trained.report.accuracy})


def rows(name: str, split: str) -> list[dict[str, object]]:
    return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in preference_rows(name, split)]


if __name__ == "__main__":
    main()
