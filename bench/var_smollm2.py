"""VAR on SmolLM2-135M-Instruct beside what else learns from rewards, TRL's GRPO too: reward against time and tokens.

    python bench/var_smollm2.py                                      # everything, about two hours on two cores
    python bench/var_smollm2.py --contenders VAR grpo --seeds 0      # a part; processes may share a folder
    python bench/var_smollm2.py --tune                               # the learning rates alone

A reward model (SmolLM2, an adapter that is merged) learns one half of the prompts of safe_rlhf and hh and gives the
rewards; a judge (the base model of 6.5M parameters) learns the other half and only measures. All contenders start from
the same fresh adapter, are asked for short answers to the same prompts, which neither of the two has seen, and are
tuned alike: the rates of RATES, once, on half of one seed's prompts, for the highest reward on validation prompts among
those that stay near the start. Answers that do not end are left out of what is learned, by GRPO too, and of the means.
All who learn from samples of the start pay for them.

What is finished stays in bench/out/var_smollm2 (models, samples, `tune/`, a file for each contender and seed) and is
not repeated: once all parts are done, the plain command prints and writes the whole.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import OUT, data_folder, mean_and_deviation, preference_rows, write_result
from corrector_judges import damaged_pairs
from everalign.data import Preference, PreferenceSet, Scored
from everalign.data.chat_tokens import ChatFormat
from everalign.data.messages import Prompt
from everalign.errors import InputError
from everalign.evaluation.scorers import RewardModel
from everalign.modeling.loading import load_model, load_tokenizer
from everalign.modeling.policy import Policy
from everalign.modeling.runtime import prepare_process
from everalign.storage import exclusive, write_json
from everalign.training.options import RewardOptions
from var_contenders import ALPHA, RANK, Clock, Contender, Spent, advantage, best_of, chosen, dpo, learn, var
from var_grpo import learn_grpo
from var_real import LONGEST, judged, reward_model, sampled, usable

SETS = ("safe_rlhf", "hh_harmless", "hh_helpful")
# Stands behind every question, for the policies alone. Without it, two thirds of SmolLM2's answers have not ended after
# 128 tokens: what is learned and judged is then the short third.
REQUEST = "\n\nAnswer in one or two short sentences."
LONGEST_ANSWER = 96
LONGEST_PROMPT = LONGEST - LONGEST_ANSWER
RATES = (2e-4, 6e-4, 2e-3)
# Nats from the start, in the mean over answers: a rate that goes further is not chosen. Without this limit GRPO had the
# one that wrote four words at a KL of 18, which the reward model liked.
MOST_KL = 2.0
TUNING_SEED = 100
# What each learns from; the learning rate is the tuned one.
CONTENDERS: dict[str, tuple[str, Contender]] = {
    "sft on chosen": ("pairs", Contender(chosen, RATES[0], 2.0, 8)),
    "DPO": ("pairs", Contender(dpo(0.1), RATES[0], 2.0, 8)),
    "best of K (RAFT)": ("samples", Contender(best_of, RATES[0], 2.0, 8)),
    "A-LoL": ("samples", Contender(advantage, RATES[0], 2.0, 8)),
    "DPO on samples": ("samples", Contender(dpo(0.1), RATES[0], 2.0, 8)),
    "VAR": ("samples", Contender(var(0.25, floor=0.02), RATES[0], 2.0, 8)),
    "VAR, a third of the prompts": ("a third", Contender(var(0.25, floor=0.02), RATES[0], 2.0, 8)),
    "VAR, 3 rounds": ("samples", Contender(var(0.25, floor=0.02), RATES[0], 3.0, 8, rounds=3)),
}
NAMES = ("start", *CONTENDERS, "grpo")
# Looks at GRPO on its way.
GRPO_LOOKS = 3
SIZES = {
    "reward_pairs": 800,
    "judge_pairs": 3000,
    "prompts": 60,
    "answers": 6,
    "validation": 24,
    "held_out": 48,
    "grpo_steps": 18,
}

Point = dict[str, float]


def pairs_of(split: str, tokenizer: Any) -> list[Preference]:
    """The sets' pairs in turn, without those whose prompts leave an answer too little room."""
    columns = ("prompt", "chosen", "rejected")
    sets = [[Preference(*(row[name] for name in columns)) for row in preference_rows(name, split)] for name in SETS]
    shortest = min(map(len, sets))
    rows = [row for some in zip(*(part[:shortest] for part in sets), strict=True) for row in some]
    encoded = ChatFormat(tokenizer).encode_prompts([row.prompt for row in rows])
    return [row for row, tokens in zip(rows, encoded, strict=True) if len(tokens) <= LONGEST_PROMPT]


def asked_shortly(prompt: Prompt) -> Prompt:
    """A prompt as policies are asked it."""
    *before, last = prompt
    return [*before, {**last, "content": last["content"] + REQUEST}]


def with_damaged(rows: Sequence[Preference], name: str) -> PreferenceSet:
    """Pairs, and for every second one its better answer beside the same one damaged: nonsense has to be worth less."""
    pairs = [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected, "set": SETS[0]} for row in rows]
    found = damaged_pairs(pairs, len(pairs) // 2, seed=0)
    return PreferenceSet.of(
        [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs + found], name
    )


class PlainPrompts:
    """A reward model that reads prompts without the request for a short answer, as it has learned them."""

    def __init__(self, scorer: RewardModel) -> None:
        self._scorer = scorer

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """Rewards of N answers."""
        plain = [
            [*before, {**last, "content": last["content"].removesuffix(REQUEST)}]
            for *before, last in map(list, prompts)
        ]
        return list(self._scorer.score(plain, answers))


class World:
    """Models and prompts that all contenders share, made once in a folder.

    Args:
        folder: keeps what is made.
        sizes: as in SIZES.
    """

    def __init__(self, folder: Path, sizes: dict[str, int]) -> None:
        self.folder, self.sizes = folder, sizes
        self.tokenizer = load_tokenizer("smollm2")
        fitting = pairs_of("train", self.tokenizer)
        # A prompt with all its pairs belongs to one half, and within it to one use.
        numbers: dict[str, int] = {}
        for row in fitting:
            numbers.setdefault(repr(row.prompt), len(numbers))
        halves: tuple[list[Preference], list[Preference]] = ([], [])
        for row in fitting:
            halves[numbers[repr(row.prompt)] % 2].append(row)
        self._judged = halves[1][: sizes["judge_pairs"]]
        self._rewarded, left = halves[0][: sizes["reward_pairs"]], halves[0][sizes["reward_pairs"] :]
        known = {repr(row.prompt) for row in self._rewarded}
        unique = {repr(row.prompt): row for row in left if repr(row.prompt) not in known}.values()
        self._left = [replace(row, prompt=asked_shortly(row.prompt)) for row in unique]
        self._tested = [row for row in pairs_of("test", self.tokenizer) if repr(row.prompt) not in numbers]
        unique = {repr(row.prompt): row for row in self._tested}.values()
        self._test = [replace(row, prompt=asked_shortly(row.prompt)) for row in unique]
        if len(self._left) < sizes["validation"] + 3 * sizes["prompts"] or len(self._test) < sizes["held_out"]:
            raise SystemExit(
                f"{len(self._left)} prompts to learn from and {len(self._test)} to judge on: ask for fewer"
            )

    def start(self) -> Policy:
        """The policy that every contender starts from."""
        return Policy(load_model("smollm2", "bf16"), RANK, ALPHA, seed=0)

    def prompts(self, seed: int) -> list[Preference]:
        """The pairs whose prompts are learned from: others with each seed, as far as there are; half when tuning."""
        count = self.sizes["prompts"] // 2 if seed == TUNING_SEED else self.sizes["prompts"]
        rest = self._left[self.sizes["validation"] :]
        first = (seed % 3) * self.sizes["prompts"]
        return rest[first : first + count]

    def asked(self, seed: int) -> list[Prompt]:
        """The prompts that judge: validation prompts when tuning, else held-out ones."""
        rows = self._left[: self.sizes["validation"]] if seed == TUNING_SEED else self._test[: self.sizes["held_out"]]
        return [row.prompt for row in rows]

    @cached_property
    def scorers(self) -> dict[str, PlainPrompts]:
        """The reward model and the judge, by their columns; their held-out accuracies are written beside them."""
        test = PreferenceSet.of(self._tested[: 3 * self.sizes["held_out"]], "held out")
        options = RewardOptions(lora_rank=16, batch_size=16, max_length=LONGEST, precision="bf16", checkpoint_steps=10)
        rewarded, judging = (with_damaged(rows, "half") for rows in (self._rewarded, self._judged))
        judge, judge_accuracy = reward_model(self.folder / "judge", judging, test, str(data_folder() / "base-model"))
        rewards, accuracy = reward_model(self.folder / "rewards", rewarded, test, "smollm2", options)
        write_json(self.folder / "accuracies.json", {"reward": accuracy, "judge": judge_accuracy})
        return {"reward": PlainPrompts(rewards), "judge": PlainPrompts(judge)}

    def draw(
        self, policy: Policy, scorer: PlainPrompts, prompts: Sequence[Prompt], seed: int, spent: Spent
    ) -> list[Scored]:
        """Sample answers and score them; what was generated is added to `spent`, unfinished answers too."""
        count = self.sizes["answers"]
        rows = sampled(policy, self.tokenizer, list(prompts), count, seed, LONGEST_ANSWER)
        finished = [text for row in rows for text in row.completions]
        spent.tokens += sum(len(self.tokenizer(text)["input_ids"]) + 1 for text in finished)
        spent.tokens += LONGEST_ANSWER * (count * len(prompts) - len(finished))
        rewards = iter(scorer.score([row.prompt for row in rows for _ in row.completions], finished))
        return [replace(row, rewards=tuple(next(rewards) for _ in row.completions)) for row in rows]

    def samples(self, seed: int) -> tuple[list[Scored], Spent]:
        """Answers of the start, drawn once a seed, and what they cost."""
        path, scorer = self.folder / f"samples-{seed}.json", self.scorers["reward"]  # there before the clock starts
        with exclusive(path.with_suffix(".lock"), wait=lambda holder: print(f"{holder} samples: waiting")):
            if not path.exists():
                policy, spent = self.start(), Spent()
                with Clock(spent):
                    rows = self.draw(policy, scorer, [row.prompt for row in self.prompts(seed)], seed, spent)
                write_json(path, {"rows": [row.to_json() for row in rows], "spent": asdict(spent)})
                print(f"samples of seed {seed}: {asdict(spent)}", flush=True)
        kept = json.loads(path.read_text(encoding="utf-8"))
        return [Scored.from_json(row, str(path)) for row in kept["rows"]], Spent(**kept["spent"])

    def look(self, policy: Policy, seed: int) -> Point:
        """Measure a policy on two answers to each prompt that judges."""
        asked = self.asked(seed)
        answers = sampled(policy, self.tokenizer, asked, 2, 10_000 + seed, LONGEST_ANSWER)
        if not answers:
            raise InputError("no answer to a held-out prompt ended: the policy is broken, or there are too few prompts")
        finished = sum(len(row.completions) for row in answers) / (2 * len(asked))
        return {**judged(policy, self.tokenizer, answers, self.scorers, at_once=4), "unfinished": 1 - finished}


# ---- one contender with one seed ----


def points_of(world: World, name: str, rate: float, seed: int) -> list[Point]:
    """What a contender was like on its way, and what it had cost by then."""
    points: list[Point] = []

    def look(policy: Policy, spent: Spent) -> None:
        points.append({**world.look(policy, seed), **asdict(spent)})

    if name == "start":
        look(world.start(), Spent())
    elif name == "grpo":
        _grpo(world, rate, seed, look)
    else:
        kind, contender = CONTENDERS[name]
        contender = replace(contender, learning_rate=rate)
        learn(contender, world.start(), world.tokenizer, Rows(world, kind, contender.rounds, seed), look)
    return points


class Rows:
    """What a contender learns from, round by round.

    Args:
        world: models and prompts.
        kind: `pairs` as people judged them, `samples` with the reward model's rewards, or `a third` of the prompts with
            samples of their own.
        rounds: in all; a single one learns from the samples that all share, several sample anew, each to its share of
            the prompts.
        seed: of the prompts and of what is sampled.
    """

    def __init__(self, world: World, kind: str, rounds: int, seed: int) -> None:
        self._world, self._kind, self._seed = world, kind, seed
        self._parts = 3 if kind == "a third" else rounds
        self._shared = world.samples(seed) if kind == "samples" and rounds == 1 else None
        self._scorer, self._scale = world.scorers["reward"], 0.0

    def __call__(self, policy: Policy, number: int, spent: Spent) -> list[Scored]:
        """Return a round's rows; their rewards are in deviations of the first round's."""
        tokenizer, pairs = self._world.tokenizer, self._world.prompts(self._seed)
        if self._kind == "pairs":
            return usable([Scored(row.prompt, (row.chosen, row.rejected), (1.0, 0.0)) for row in pairs], tokenizer)
        if self._shared is None:
            share = len(pairs) // self._parts
            asked = [row.prompt for row in pairs[number * share : (number + 1) * share]]
            rows = self._world.draw(policy, self._scorer, asked, 1000 * (self._seed + 1) + number, spent)
        else:
            rows, cost = self._shared
            spent.seconds += cost.seconds
            spent.processor_seconds += cost.processor_seconds
            spent.tokens += cost.tokens
        self._scale = self._scale or statistics.pstdev(reward for row in rows for reward in row.rewards)
        scaled = [replace(row, rewards=tuple(reward / self._scale for reward in row.rewards)) for row in rows]
        return usable([row for row in scaled if len(row.completions) > 1], tokenizer)


def _grpo(world: World, rate: float, seed: int, look: Callable[[Policy, Spent], None]) -> None:
    steps = max(1, world.sizes["grpo_steps"] // 2 if seed == TUNING_SEED else world.sizes["grpo_steps"])
    asked = [row.prompt for row in world.prompts(seed)]
    learn_grpo(
        load_model("smollm2", "bf16"),
        world.start(),
        world.tokenizer,
        asked,
        world.scorers["reward"].score,
        seed,
        look,
        learning_rate=rate,
        steps=steps,
        every=steps if seed == TUNING_SEED else max(1, steps // GRPO_LOOKS),
        batch=min(4, len(asked)) * world.sizes["answers"],
        count=world.sizes["answers"],
        longest=LONGEST_ANSWER,
        leave_out_unfinished=True,
    )


def kept(world: World, path: Path, name: str, rate: float, seed: int) -> list[Point]:
    """The points of a contender's way, made once; a process that comes second waits for the first."""
    with exclusive(path.with_suffix(".lock"), wait=lambda holder: print(f"{holder} is at {path.name}: waiting")):
        if not path.exists():
            found = points_of(world, name, rate, seed)
            write_json(path, {"contender": name, "learning_rate": rate, "seed": seed, "points": found})
            told = ", ".join(f"{key} {value:.3f}" for key, value in found[-1].items())
            print(f"{path.stem}, rate {rate:g}: {told}", flush=True)
    points: list[Point] = json.loads(path.read_text(encoding="utf-8"))["points"]
    return points


def tuned_rate(world: World, name: str) -> float:
    """The learning rate whose policy has the highest reward on validation prompts; each is tried once and kept.

    Of those within MOST_KL, that is; if there is none, the one with the lowest KL.
    """
    if name == "start":
        return 0.0
    folder = world.folder / "tune"
    tried = {rate: kept(world, folder / f"{_file(name)}-{rate:g}.json", name, rate, TUNING_SEED) for rate in RATES}
    near = [rate for rate in RATES if tried[rate][-1]["kl"] <= MOST_KL]
    return (
        max(near, key=lambda rate: tried[rate][-1]["reward"])
        if near
        else min(RATES, key=lambda rate: tried[rate][-1]["kl"])
    )


def _file(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


# ---- results ----


def print_table(results: dict[str, list[list[Point]]]) -> None:
    """One line a contender: mean ± deviation over the seeds at the end of its way, medians of what it cost."""
    table = Table(title="SmolLM2-135M-Instruct, held-out prompts")
    measured, costs = ("reward", "judge", "kl", "words", "unfinished"), ("seconds", "processor_seconds", "tokens")
    for column in ("contender", *measured, *costs):
        table.add_column(column.replace("_", " "), justify="left" if column == "contender" else "right")
    for name, ways in results.items():
        last = [way[-1] for way in ways]
        cells = [mean_and_deviation([point[column] for point in last]) for column in measured]
        table.add_row(name, *cells, *(f"{statistics.median(point[c] for point in last):,.0f}" for c in costs))
    Console(width=150).print(table)


def ratios(results: dict[str, dict[int, list[Point]]]) -> dict[str, list[float | None]]:
    """GRPO's cost to a reward over that of VAR, seed by seed, at the highest reward that both were seen at.

    A reward counts as reached where a round, or a look at GRPO, ended at it. None where one of them never was above the
    start.
    """
    found: dict[str, list[float | None]] = {}
    for name in (name for name in results if name.startswith("VAR") and "grpo" in results):
        for what in ("processor_seconds", "tokens"):
            found[f"GRPO's {what} over those of {name}, to the same reward"] = [
                _ratio(way, results["grpo"][seed], results["start"][seed][-1]["reward"], what)
                for seed, way in results[name].items()
                if seed in results["grpo"] and seed in results.get("start", {})
            ]
    return found


def _ratio(ours: Sequence[Point], theirs: Sequence[Point], start: float, what: str) -> float | None:
    goal = min(max(point["reward"] for point in way) for way in (ours, theirs))
    if goal <= start:
        return None
    cost = [next(point[what] for point in way if point["reward"] >= goal) for way in (ours, theirs)]
    return cost[1] / cost[0]


def settle_sizes(folder: Path, sizes: dict[str, int]) -> None:
    """Write down what a folder's results are made with, or refuse to mix them with others."""
    path, facts = folder / "sizes.json", {**sizes, "rates": list(RATES)}
    with exclusive(path.with_suffix(".lock"), wait=print):
        if not path.exists():
            write_json(path, facts)
    if (then := json.loads(path.read_text(encoding="utf-8"))) != facts:
        raise SystemExit(f"{path} says {then}, and not {facts}: take the same sizes, or another --output")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, choices=range(3), default=[0, 1, 2])
    parser.add_argument("--tune", action="store_true", help="choose the learning rates, and stop")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUT / "var_smollm2")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    sizes = {name: getattr(arguments, name) for name in SIZES}
    arguments.output.mkdir(parents=True, exist_ok=True)
    settle_sizes(arguments.output, sizes)
    world = World(arguments.output, sizes)
    rates = {}
    for name in arguments.contenders:
        rates[name] = tuned_rate(world, name)
        print(f"{name}: rate {rates[name]:g}", flush=True)
    if arguments.tune:
        return
    results: dict[str, dict[int, list[Point]]] = {name: {} for name in arguments.contenders}
    for seed in arguments.seeds:
        for name in arguments.contenders:
            path = arguments.output / f"{_file(name)}-seed{seed}.json"
            results[name][seed] = kept(world, path, name, rates[name], seed)
    print_table({name: list(ways.values()) for name, ways in results.items()})
    found = ratios(results)
    for name, value in found.items():
        print(f"{name}: {value}")
    facts = {
        "sizes": sizes,
        "rates": rates,
        "accuracies": json.loads((arguments.output / "accuracies.json").read_text()),
    }
    write_result(arguments.output / "result.json", {**facts, "results": results, "ratios": found})


if __name__ == "__main__":
    main()
