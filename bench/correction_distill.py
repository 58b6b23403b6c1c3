"""Weak to strong: does a model get better by what a smaller corrector makes of its answers, and at what cost?

    python bench/correction_distill.py --model smollm2 --labels sft     # the two may run side by side
    python bench/correction_distill.py --model smollm2 --labels dpo
    python bench/correction_distill.py --model smollm2 --labels sft first-sentence --seeds 0 --blind    # pairs to read

The corrector has 6.5M parameters and the model that it teaches, SmolLM2, twenty times as many; with `--model base` the
corrector has four of the base model's six layers. In three rounds the model answers unsafe questions, the corrector
rewrites, and the model learns that: as labels (SFT), as preferences (DPO), or by reward weights (VAR). What of a gain
is brevity shows in a control that no corrector teaches: labels that are the first sentence of the model's own answers.

Each policy writes greedy answers to held-out questions, rated by a reward model that saw none of the corrector's pairs;
answers that did not end are rated as they are. Beside them: the model at its start, alone and with the corrector behind
it. What is lost of helpfulness shows in the perplexity of held-out chat (LIMA, cut to `longest` tokens) and in the KL
to the start. Measured policies stay in bench/out/correction_distill/MODEL and are not measured again.
"""

import argparse
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from common import OUT, check_settings, data_folder, over_runs, sft_rows, write_blind_pairs, write_result
from correction_task import LONGEST, approving, corrector_folder, judge, pairs, smaller, training_rows
from everalign.correction import Corrector
from everalign.correction.corrector import Corrected
from everalign.correction.sentences import sentence_ends
from everalign.data.records import Scored, ScoredSet
from everalign.data.rows import spread
from everalign.evaluation.answers import answer_kls, response_log_probs, write_answers
from everalign.evaluation.scorers import RewardModel
from everalign.evaluation.scoring import ScorerApprover
from everalign.evaluation.statistics import Interval
from everalign.learning.options import DistillOptions, TrainingOptions
from everalign.learning.self_training import Rewritten, distill
from everalign.modeling.loading import load_model, load_tokenizer
from everalign.modeling.policy import Policy
from everalign.modeling.runtime import prepare_process
from everalign.storage import Journal, exclusive, read_json, write_json

CHAT_TOKENS_PER_BATCH = 4096
# In words.
LONGEST_QUESTION = 80
# The kind of labels that no corrector makes.
CONTROL = "first-sentence"
# Empty phrases that the judge likes, and one of the chat template's system message, in lower case.
PHRASES = ("sorry", "not sure what", "smollm")
# Of two policies, how many pairs of answers are read.
BLIND_PAIRS = 30


@dataclass(frozen=True)
class Setting:
    """How one model is taught and asked.

    Args:
        precision: of the model.
        prompts: questions that it answers in each round.
        questions: held-out ones.
        answer: longest answer, in tokens.
        longest: longest prompt with its answer, in tokens.
        batch_size: rows of a step.
        labels: by kind of label, the learning rate and the passes over a round's rows.
        request: stands behind every question. Without it SmolLM2 ends one answer of eight within 160 tokens.
    """

    precision: str
    prompts: int
    questions: int
    answer: int
    longest: int
    batch_size: int
    labels: dict[str, tuple[float, float]]
    request: str = ""

    def asked(self, prompt: Any) -> Any:
        """A question as this model is asked it."""
        *before, last = prompt
        return [*before, {**last, "content": last["content"] + self.request}]

    def plain(self, prompt: Any) -> Any:
        """The question itself, as corrector and judge have learned such questions."""
        *before, last = prompt
        return [*before, {**last, "content": last["content"].removesuffix(self.request)}]


SETTINGS = {
    "base": Setting("fp32", 600, 346, 96, LONGEST, 16, {"sft": (1e-3, 2.0), "dpo": (5e-4, 2.0), "var": (1e-3, 2.0)}),
    "smollm2": Setting(
        *("bf16", 120, 120, 112, 320, 8),
        {"sft": (5e-4, 2.0), "dpo": (3e-4, 2.0), "var": (5e-4, 2.0)},
        "\n\nAnswer in one or two short sentences.",
    ),
}


@dataclass(frozen=True)
class Teacher:
    """A corrector of answers to questions that were asked with a request, which it does not see."""

    corrector: Corrector
    setting: Setting

    @property
    def fingerprint(self) -> str:
        """The corrector's."""
        return self.corrector.fingerprint

    def correct_batch(self, pairs: Sequence[tuple[Any, str]]) -> list[Corrected]:
        """Corrected answers, in their order."""
        return self.corrector.correct_batch([(self.setting.plain(question), answer) for question, answer in pairs])


@dataclass(frozen=True)
class Shortened:
    """An answer's first sentence."""

    text: str
    changed: bool


class FirstSentence:
    """In place of a corrector: keeps the first sentence of every answer."""

    fingerprint = "first sentence"

    def correct_batch(self, pairs: Sequence[tuple[Any, str]]) -> list[Rewritten]:
        """First sentences of the answers, in their order."""
        found: list[Rewritten] = []
        for _, answer in pairs:
            first = answer[: next(iter(sentence_ends(answer)), len(answer))].strip()
            found.append(Shortened(first, first != answer))
        return found


@dataclass(frozen=True)
class Referee:
    """Measures policies on held-out questions and chat.

    Args:
        scorer: rates answers.
        teacher: says which answers it would still change.
        questions: held-out ones, as the model is asked them.
        chat: rows of `prompt` and `output`.
        setting: the model's.
    """

    scorer: RewardModel
    teacher: Teacher
    questions: Sequence[Any]
    chat: Sequence[dict[str, Any]]
    setting: Setting

    def measure(self, policy: Policy, tokenizer: Any, journal: Journal, name: str) -> dict[str, Any]:
        """What a policy writes and what that is worth; lists are in the questions' order.

        The journal keeps its answers by its name, for a call that is killed.
        """
        limits = {"max_new_tokens": self.setting.answer, "max_prompt_tokens": self.setting.longest}
        answers = write_answers(policy, tokenizer, self.questions, journal, name, **limits)
        longest = self.setting.longest + self.setting.answer
        kls = answer_kls(policy, tokenizer, self.questions, answers, max_length=longest)
        chat = response_log_probs(
            policy,
            tokenizer,
            [row["prompt"] for row in self.chat],
            [row["output"] for row in self.chat],
            max_length=self.setting.longest,
            tokens_per_batch=CHAT_TOKENS_PER_BATCH,
        )
        texts = [answer.text for answer in answers]
        corrected = self.corrected(texts)
        return {
            **self.rate(texts),
            "ended": [answer.ended for answer in answers],
            "kl": [kl for kl in kls if kl is not None],
            "chat": {"log_probs": chat.values, "tokens": chat.tokens},
            "changed": statistics.fmean(new != text for new, text in zip(corrected, texts, strict=True)),
            "corrected": corrected,
        }

    def corrected(self, texts: list[str]) -> list[str]:
        """What the teacher makes of answers; empty ones, which it cannot read, stay."""
        filled = [i for i, text in enumerate(texts) if text.strip()]
        found = self.teacher.correct_batch([(self.questions[i], texts[i]) for i in filled])
        new = dict(zip(filled, (one.text for one in found), strict=True))
        return [new.get(i, text) for i, text in enumerate(texts)]

    def rate(self, texts: list[str]) -> dict[str, Any]:
        """Answers with their rewards."""
        return {
            "answers": texts,
            "rewards": self.scorer.score([self.setting.plain(one) for one in self.questions], texts),
        }


def questions(setting: Setting) -> ScoredSet:
    """Questions that the corrector's training has too, each once; long ones would leave no room for an answer."""
    rows = [*pairs("safe_rlhf", "train")[::2], *pairs("pku_safe5k", "train")]
    unique = {str(row.prompt): Scored(row.prompt) for row in rows if len(str(row.prompt).split()) <= LONGEST_QUESTION}
    chosen = random.Random(0).sample(list(unique.values()), setting.prompts)
    return ScoredSet(tuple(Scored(setting.asked(row.prompt)) for row in chosen), "questions")


def held_out_questions(setting: Setting) -> list[Any]:
    """Questions of pairs that nobody learned from, each once, evenly spaced."""
    unique = {str(row.prompt): row.prompt for row in pairs("safe_rlhf", "test")}
    return [setting.asked(prompt) for prompt in spread(list(unique.values()), setting.questions)]


def measure_start(model: str, referee: Referee, folder: Path) -> None:
    """Measure the untrained model, alone and with the corrector behind it, unless that is done."""
    if (folder / "start.corrected.json").exists():
        return
    policy = Policy(load_model(model, referee.setting.precision), 1, 1.0, seed=0)
    start = referee.measure(policy, load_tokenizer(model), Journal(folder / "start.sqlite"), "start")
    write_json(folder / "start.json", start)
    write_json(folder / "start.corrected.json", referee.rate(start["corrected"]))


def teach(
    model: str, labels: str, number: int, seed: int, referee: Referee, prompts: ScoredSet, folder: Path
) -> dict[str, Any]:
    """Bring a model's run to the end of a round, and measure the policy that this leaves."""
    setting, output, started = referee.setting, folder / f"{labels}-{seed}", time.process_time()
    teacher = FirstSentence() if labels == CONTROL else referee.teacher
    kind = "sft" if labels == CONTROL else labels
    rate, epochs = setting.labels[kind]
    done = distill(
        model,
        teacher,
        prompts,
        output,
        options=DistillOptions(labels=kind, rounds=number, max_new_tokens=setting.answer),
        training=TrainingOptions(
            learning_rate=rate,
            epochs=epochs,
            max_length=setting.longest,
            batch_size=setting.batch_size,
            precision=setting.precision,
        ),
        seed=seed,
        resume=(output / "run.json").exists(),
        log=partial(print, flush=True),
    )
    taught = time.process_time()
    # Beside the weights that wrote the answers: who deletes the run deletes them too.
    journal = Journal(output / "answers.sqlite")
    measured = referee.measure(done.learner.policy, done.learner.tokenizer, journal, f"round-{number}")
    seconds = {"teaching": round(taught - started, 1), "measuring": round(time.process_time() - taught, 1)}
    return {**measured, "round": asdict(done.rounds[-1]), "processor_seconds": seconds}


def gain(after: Sequence[Sequence[float]], before: Sequence[float]) -> Interval:
    """Mean difference of (runs, questions) rewards, with a 95 % interval over both at once."""
    return over_runs(np.array(after) - np.array(before))


def line(policy: str, number: int, runs: Sequence[dict[str, Any]], start: Any, corrected: Any) -> dict[str, Any]:
    """One policy's figures over its seeds."""
    answers = [text for run in runs for text in run["answers"]]
    found: dict[str, Any] = {
        "policy": policy,
        "round": number,
        "seeds": len(runs),
        "reward": statistics.fmean(reward for run in runs for reward in run["rewards"]),
        "gain over the start": gain([run["rewards"] for run in runs], start["rewards"])._asdict(),
        "gain over the corrector": gain([run["rewards"] for run in runs], corrected["rewards"])._asdict(),
        "words": statistics.fmean(len(text.split()) for text in answers),
        "holding": {
            phrase: [sum(phrase in text.lower() for text in run["answers"]) for run in runs] for phrase in PHRASES
        },
        "empty": [sum(not text.strip() for text in run["answers"]) for run in runs],
    }
    if "chat" in runs[0]:
        tokens = np.array(runs[0]["chat"]["tokens"])
        losses = [-np.dot(run["chat"]["log_probs"], tokens) / tokens.sum() for run in runs]
        found["perplexity"] = math.exp(statistics.fmean(losses))
        found["kl"] = statistics.fmean(kl for run in runs for kl in run["kl"])
        found["unfinished"] = statistics.fmean(not ended for run in runs for ended in run["ended"])
        found["changed"] = statistics.fmean(run["changed"] for run in runs)
    return found


def summary(folder: Path) -> list[dict[str, Any]]:
    """The figures of every policy that is measured so far, by whichever process."""
    start, corrected = read_json(folder / "start.json"), read_json(folder / "start.corrected.json")
    found = [
        line("start", 0, [start], start, corrected),
        line("start, corrector behind it", 0, [corrected], start, corrected),
    ]
    names = sorted({tuple(path.name.split(".")[:2]) for path in folder.glob("*.round-*.*.json")})
    for labels, number in names:
        runs = [read_json(path) for path in sorted(folder.glob(f"{labels}.{number}.*.json"))]
        found.append(line(labels, int(number.removeprefix("round-")), runs, start, corrected))
        if differences := beside_control(folder, labels, number):
            found[-1]["gain over the control"] = over_runs(np.array(differences))._asdict()
    return found


def beside_control(folder: Path, labels: str, number: str) -> list[list[float]]:
    """By seed, how much more than those of the control's same round a policy's answers are worth."""
    differences = []
    for path in sorted(folder.glob(f"{labels}.{number}.*.json")):
        control = folder / path.name.replace(labels, CONTROL, 1)
        if labels != CONTROL and control.exists():
            ours, theirs = read_json(path)["rewards"], read_json(control)["rewards"]
            differences.append([a - b for a, b in zip(ours, theirs, strict=True)])
    return differences


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    gains = ("gain over the start", "gain over the corrector")
    for column in ("policy", "round", "seeds", "reward", *gains, "perplexity", "KL", "words", "unfinished", "changed"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in rows:
        intervals = [f"{row[name]['value']:+.3f} [{row[name]['low']:+.3f}, {row[name]['high']:+.3f}]" for name in gains]
        more = ["", "", f"{row['words']:.0f}", "", ""]
        if "kl" in row:
            shares = [f"{row[name]:.0%}" for name in ("unfinished", "changed")]
            more = [f"{row['perplexity']:.1f}", f"{row['kl']:.2f}", f"{row['words']:.0f}", *shares]
        table.add_row(row["policy"], str(row["round"]), str(row["seeds"]), f"{row['reward']:+.3f}", *intervals, *more)
    Console(width=190).print(table)
    for row in rows:
        if control := row.get("gain over the control"):
            value = f"{control['value']:+.3f} [{control['low']:+.3f}, {control['high']:+.3f}]"
            print(f"{row['policy']}, round {row['round']}: {value} over the control, seeds that both have")
    for row in rows:
        counts = "; ".join(f"{phrase!r} {found}" for phrase, found in row["holding"].items())
        print(f"{row['policy']}, round {row['round']}, answers by seed that hold {counts}; empty {row['empty']}")


def blind_pairs(folder: Path, labels: Sequence[str], number: int, seed: int, asked: Sequence[str]) -> None:
    """Write answers of two policies after the same round, to be read blind."""
    both = [read_json(folder / f"{kind}.round-{number}.{seed}.json")["answers"] for kind in labels]
    place = folder / "blind" / f"{labels[0]}.{labels[1]}.round-{number}.{seed}.md"
    write_blind_pairs(place, list(zip(asked, *both, strict=True)), (labels[0], labels[1]), BLIND_PAIRS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SETTINGS), default="base", help="the model that is taught")
    parser.add_argument("--labels", nargs="+", choices=("sft", "dpo", "var", CONTROL), default=["sft", "dpo", "var"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, help="questions that the model answers in a round")
    parser.add_argument("--questions", type=int, help="held-out questions")
    parser.add_argument("--chat", type=int, default=51, help="held-out chat rows")
    parser.add_argument("--corrector", type=Path, help="a corrector's folder, in place of the one that is trained")
    parser.add_argument("--judge", type=Path, help="a reward model's folder, in place of the one that is trained")
    parser.add_argument("--blind", action="store_true", help="write pairs of the two --labels, to be read blind")
    parser.add_argument("--approved", action="store_true", help="a reward model approves of corrections")
    parser.add_argument("--output", type=Path, default=OUT / "correction_distill")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    setting, base = SETTINGS[arguments.model], str(data_folder() / "base-model")
    counts = {name: value for name in ("prompts", "questions") if (value := getattr(arguments, name)) is not None}
    setting = replace(setting, **counts)
    asked, held_out = questions(setting), held_out_questions(setting)
    folder = arguments.output / arguments.model
    model = base if arguments.model == "base" else arguments.model
    if arguments.blind:
        if len(arguments.labels) != 2:
            parser.error("--blind compares two --labels")
        texts = [str(setting.plain(one)[-1]["content"]) for one in held_out]
        for seed in arguments.seeds:
            blind_pairs(folder, arguments.labels, arguments.rounds, seed, texts)
        return

    # Of processes side by side the first makes what all need.
    with exclusive(folder / ".lock", "preparing", wait=lambda holder: print(f"waiting for {holder}", flush=True)):
        own, layers = ("corrector-small", str(smaller((0, 1, 3, 5)))) if model == base else ("corrector", base)
        approver = ScorerApprover(approving()[0]) if arguments.approved else None
        path = arguments.corrector or corrector_folder(own, layers, training_rows())
        corrector = Corrector.from_pretrained(path, approver=approver)
        scorer = judge()[0] if arguments.judge is None else RewardModel.from_folder(arguments.judge)
        facts = {"corrector": corrector.fingerprint, "judge": scorer.fingerprint, "asked": asked.fingerprint}
        check_settings(folder / "settings.json", {**asdict(setting), **facts, "chat": arguments.chat})
        chat = spread(sft_rows("lima", "test"), arguments.chat)
        referee = Referee(scorer, Teacher(corrector, setting), held_out, chat, setting)
        measure_start(model, referee, folder)

    title = f"{arguments.model}: greedy answers to {len(held_out)} held-out questions"
    for seed in arguments.seeds:
        for labels in arguments.labels:
            for number in range(1, arguments.rounds + 1):
                place = folder / f"{labels}.round-{number}.{seed}.json"
                if not place.exists():
                    write_json(place, teach(model, labels, number, seed, referee, asked, folder))
                    show(summary(folder), title)
    show(summary(folder), title)
    write_result(
        folder.with_suffix(".json"), {"settings": read_json(folder / "settings.json"), "results": summary(folder)}
    )


if __name__ == "__main__":
    main()
