"""VAR on real pairs: rewards from a reward model of half of the training part, judged by another of the other half.

    python bench/var_real.py --seeds 0 1 2

Two reward models see no pair in common: one gives the rewards that are learned from, the other judges what the policies
then write to held-out prompts. Held-out pairs tell how often a policy prefers what people preferred.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import OUT, data_folder, mean_and_deviation, preference_rows, write_result
from everalign.data import PreferenceSet, Scored
from everalign.data.tokenization import drop_overlong, tokenize_preferences
from everalign.evaluation import HeldOut, score_preferences
from everalign.evaluation.scorers import RewardModel
from everalign.modeling.loading import load_model, load_tokenizer
from everalign.modeling.policy import Policy
from everalign.modeling.runtime import prepare_process
from everalign.modeling.sampling import sample_completions
from everalign.options import SamplingOptions
from everalign.storage import exclusive
from everalign.training.options import RewardOptions, StageOptions
from everalign.training.reference import sequence_logprobs
from everalign.training.reward_model import train_reward_model
from var_contenders import advantage, best_of, chosen, dpo, snkl, var
from var_task import divergence, encoded

LONGEST, LONGEST_ANSWER, BATCH_TOKENS = 256, 96, 16384
FOLDER = OUT / "var_real"
# What each learns from: pairs as people judged them, or with the reward model's rewards, or samples with them.
# The last number says in how many rounds: each samples anew, to its share of the prompts.
CONTENDERS: dict[str, tuple[str, Any, float, float, int]] = {
    "sft on chosen": ("pairs", chosen, 1e-3, 2.0, 1),
    "DPO": ("pairs", dpo(0.1), 5e-4, 2.0, 1),
    "snkl": ("pairs", snkl(0.5), 5e-4, 2.0, 1),
    "VAR on pairs": ("scored pairs", var(0.5), 1e-3, 2.0, 1),
    "best of K (RAFT)": ("samples", best_of, 1e-3, 2.0, 1),
    "A-LoL": ("samples", advantage, 1e-3, 2.0, 1),
    "DPO on samples": ("samples", dpo(0.1), 5e-4, 2.0, 1),
    "VAR": ("samples", var(0.25, floor=0.02), 1e-3, 2.0, 1),
    "DPO on samples, 3 rounds": ("samples", dpo(0.1), 5e-4, 2.0, 3),
    "VAR, 3 rounds": ("samples", var(0.25, floor=0.02), 1e-3, 4.0, 3),
}


def start() -> Policy:
    """The base model with a fresh adapter."""
    return Policy(load_model(str(data_folder() / "base-model"), "fp32"), 16, 32.0, seed=0)


SMALL_REWARDS = RewardOptions(learning_rate=1e-4, epochs=2.0, max_length=LONGEST)


def reward_model(
    place: Path, pairs: PreferenceSet, test: PreferenceSet, backbone: str, options: RewardOptions = SMALL_REWARDS
) -> tuple[RewardModel, float]:
    """A reward model of some pairs, trained once and kept, and its accuracy on the held-out ones.

    Processes that ask for it side by side wait for the one that trains it.
    """
    folder = place.with_name(f"{place.name}-{pairs.fingerprint[:12]}")
    accuracy = folder / "held_out_accuracy.txt"
    with exclusive(folder.with_suffix(".lock"), wait=lambda holder: print(f"{holder} trains {folder.name}: waiting")):
        if not accuracy.exists():
            trained = train_reward_model(backbone, pairs, folder, test=test, options=options)
            assert trained.report is not None
            accuracy.write_text(str(trained.report.accuracy))
    return RewardModel.from_folder(folder), float(accuracy.read_text())


def scored(scorer: RewardModel, rows: list[Scored]) -> list[Scored]:
    """Answers with their rewards, in units of the deviation over all of them."""
    prompts = [row.prompt for row in rows for _ in row.completions]
    rewards = scorer.score(prompts, [text for row in rows for text in row.completions])
    scale, found = statistics.pstdev(rewards), iter(rewards)
    return [replace(row, rewards=tuple(next(found) / scale for _ in row.completions)) for row in rows]


def sampled(
    policy: Policy, tokenizer: Any, prompts: list[Any], count: int, seed: int, longest: int = LONGEST_ANSWER
) -> list[Scored]:
    """Finished answers of at most `longest` tokens to each prompt; prompts without any are left out."""
    options = SamplingOptions(completions=count, temperature=1.0, max_new_tokens=longest, max_prompt_tokens=LONGEST)
    drawn = sample_completions(policy, tokenizer, prompts, options, seed=seed, tokens_per_batch=4 * BATCH_TOKENS)
    return [Scored(prompt, s.texts) for prompt, s in zip(prompts, drawn, strict=True) if s.texts]


def judged(
    policy: Policy,
    tokenizer: Any,
    answers: Sequence[Scored],
    scorers: Mapping[str, RewardModel],
    at_once: int = 32,
) -> dict[str, float]:
    """What answers of a policy are like: mean rewards by scorer, KL to the base model in nats an answer, words.

    Args:
        policy: that wrote them.
        tokenizer: the policy's.
        answers: prompts with at least one finished answer each.
        scorers: by the names of their columns.
        at_once: prompts whose divergence is computed in one pass; that of about 100 is.
    """
    prompts = [row.prompt for row in answers for _ in row.completions]
    texts = [text for row in answers for text in row.completions]
    some = answers[:: max(1, len(answers) // 100)]
    groups = [encoded(tokenizer, row.prompt, row.completions) for row in some]
    return {
        **{name: statistics.fmean(scorer.score(prompts, texts)) for name, scorer in scorers.items()},
        "kl": divergence(policy, groups, at_once),
        "words": statistics.fmean(len(text.split()) for text in texts),
    }


class Judge:
    """Measures policies on held-out prompts and pairs."""

    def __init__(self, tokenizer: Any, test: PreferenceSet, rewards: RewardModel, judge: RewardModel) -> None:
        self._tokenizer, self._scorers = tokenizer, {"reward": rewards, "judge": judge}
        self._prompts = [row.prompt for row in test]
        self._pairs = tokenize_preferences(test, tokenizer, LONGEST)
        self._base = torch.stack(sequence_logprobs(start(), self._pairs, BATCH_TOKENS))

    def __call__(self, policy: Policy, seed: int) -> dict[str, float]:
        """Mean reward and judgement of sampled answers, and accuracies on held-out pairs."""
        answers = sampled(policy, self._tokenizer, self._prompts, 2, seed)
        pairs = score_preferences(policy, HeldOut(self._pairs, self._base), tokens_per_batch=BATCH_TOKENS)
        return {
            **judged(policy, self._tokenizer, answers, self._scorers),
            "accuracy": pairs.accuracy,
            "reward_accuracy": pairs.reward_accuracy,
            "finished": sum(len(row.completions) for row in answers) / (2 * len(self._prompts)),
        }


def usable(rows: list[Scored], tokenizer: Any) -> list[Scored]:
    """Rows whose answers fit and differ in their rewards."""
    return [row for row in drop_overlong(rows, tokenizer, LONGEST, 2).rows if len(set(row.rewards)) > 1]


def print_table(results: dict[str, list[dict[str, float]]]) -> None:
    """Mean ± deviation over the seeds."""
    table = Table(title="real pairs")
    columns = ("judge", "reward", "kl", "reward_accuracy", "accuracy", "words", "finished", "seconds")
    for column in ("contender", *columns):
        table.add_column(column.replace("_", " "), justify="left" if column == "contender" else "right")
    for name, runs in results.items():
        table.add_row(name, *[mean_and_deviation([run[column] for run in runs]) for column in columns])
    Console(width=150).print(table)


class Source:
    """What is learned from: pairs and samples of the base model, made once a seed; or samples of a policy.

    Args:
        part: the pairs whose prompts are learned from.
        rewards: gives rewards.
        tokenizer: the base model's.
        count: answers sampled to each prompt.
        seed: seeds the draw.
    """

    def __init__(self, part: PreferenceSet, rewards: RewardModel, tokenizer: Any, count: int, seed: int) -> None:
        self._part, self._rewards, self._tokenizer, self._count, self._seed = part, rewards, tokenizer, count, seed
        judged = [Scored(row.prompt, (row.chosen, row.rejected), (1.0, 0.0)) for row in part]
        unscored = [Scored.from_preference(row, rewards=None) for row in part]
        self._fixed = {
            "pairs": usable(judged, tokenizer),
            "scored pairs": usable(scored(rewards, unscored), tokenizer),
            "samples": self._sampled(start(), part, seed),
        }

    def rows(self, kind: str, policy: Policy, number: int, rounds: int) -> list[Scored]:
        """Rows for one of several rounds; those of a single one are the same for everybody."""
        if rounds == 1:
            return self._fixed[kind]
        share = len(self._part) // rounds
        return self._sampled(policy, self._part[number * share : (number + 1) * share], self._seed + number)

    def _sampled(self, policy: Policy, part: PreferenceSet, seed: int) -> list[Scored]:
        answers = sampled(policy, self._tokenizer, [row.prompt for row in part], self._count, seed)
        return usable(scored(self._rewards, [row for row in answers if len(row.completions) > 1]), self._tokenizer)


def learn(name: str, source: Source, tokenizer: Any, judge: Judge, seed: int) -> dict[str, float]:
    """Train one contender from the base model and measure it; what a single round samples is not in its time."""
    kind, teach, rate, epochs, rounds = CONTENDERS[name]
    policy, began = start(), time.perf_counter()
    for number in range(rounds):
        rows = source.rows(kind, policy, number, rounds)
        options = StageOptions(learning_rate=rate, epochs=epochs, batch_size=16, checkpoint_steps=0, logging_steps=1000)
        with tempfile.TemporaryDirectory() as folder:
            teach(policy, tokenizer, rows, options, Path(folder))
    seconds = time.perf_counter() - began
    return {**judge(policy, 10_000 + seed), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pairs", default="safe_rlhf", help="which preference set")
    parser.add_argument("--prompts", type=int, default=500, help="prompts that are learned from")
    parser.add_argument("--answers", type=int, default=8, help="sampled to each prompt")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    FOLDER.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(str(data_folder() / "base-model"))
    pairs = PreferenceSet.of(preference_rows(arguments.pairs, "train"), f"{arguments.pairs}.train")
    test = PreferenceSet.of(preference_rows(arguments.pairs, "test"), f"{arguments.pairs}.test")
    backbone = str(data_folder() / "base-model")
    rewards, accuracy = reward_model(FOLDER / "rewards", pairs[::2], test, backbone)
    judging, judging_accuracy = reward_model(FOLDER / "judge", pairs[1::2], test, backbone)
    print(f"held-out accuracy: {accuracy:.3f} of the reward model, {judging_accuracy:.3f} of the judge", flush=True)
    judge = Judge(tokenizer, test, rewards, judging)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ("start", *arguments.contenders)}
    for seed in arguments.seeds:
        step = max(1, len(pairs[::2]) // arguments.prompts)
        part = pairs[::2][seed % step :: step][: arguments.prompts]
        source = Source(part, rewards, tokenizer, arguments.answers, seed)
        results["start"].append({**judge(start(), 10_000 + seed), "seconds": 0.0})
        for name in arguments.contenders:
            results[name].append(learn(name, source, tokenizer, judge, seed))
            print(f"seed {seed}, {name}: {results[name][-1]}", flush=True)
    print_table(results)
    facts = {"reward_model_accuracy": accuracy, "judge_accuracy": judging_accuracy}
    write_result(FOLDER.with_suffix(".json"), {"settings": vars(arguments), **facts, "results": results})


if __name__ == "__main__":
    main()
