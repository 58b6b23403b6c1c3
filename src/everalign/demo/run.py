"""The demo's corrector: it makes plain answers to cooking questions courteous, and leaves courteous ones alone.

Question, answer and correction come from the demo's world; answer and correction say the same fact, and the wording
around it goes by pairs, so that what a correction should say can be told from the answer.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from everalign.correction.corrector import Corrected, Corrector
from everalign.correction.corrector_files import load_corrector_files
from everalign.correction.options import CorrectorOptions
from everalign.correction.training import train_corrector
from everalign.data.records import Correction, CorrectionSet, PreferenceSet
from everalign.demo.world import Question, answer, demo_tasks, sample_questions, wordings
from everalign.errors import InputError
from everalign.learning.context import Log, Progress
from everalign.learning.learner import Learner
from everalign.learning.options import AdapterOptions, TrainingOptions
from everalign.learning.scores import Scores
from everalign.methods import LifeAlign, Method, SequentialFineTuning
from everalign.modeling.loading import TINY
from everalign.reporting import write_report
from everalign.reporting.answers import CorrectedAnswer, CorrectorShow
from everalign.storage import exclusive
from everalign.training.stage import StageFigures

RULE = "cooking questions get a courteous answer"
_TOPIC, _GOOD, _BAD = "kitchen", "courteous", "plain"

TRAINING_ROWS, HELD_OUT_ROWS = 240, 120
# Many small steps: with fewer, larger ones not every seed learns to copy what it has to leave alone.
OPTIONS = CorrectorOptions(
    identity=0.5, learning_rate=2e-3, epochs=4.0, batch_size=4, max_length=256, warmup=0.1, checkpoint_steps=0
)
_CHANGED_SHOWN, _UNCHANGED_SHOWN = 3, 1


class DemoAnswer(NamedTuple):
    """A question of the world, somebody's answer, and the answer as it should be."""

    question: Question
    answer: str
    correction: str


def show_corrector(
    folder: Path,
    log: Log,
    progress: Progress,
    seed: int = 0,
    training_rows: int = TRAINING_ROWS,
    held_out_rows: int = HELD_OUT_ROWS,
    options: CorrectorOptions = OPTIONS,
    figures: StageFigures = lambda *_: None,
) -> CorrectorShow:
    """Train the demo's corrector on the tiny assistant, correct held-out answers, and measure what came of it.

    Args:
        folder: the corrector's; one that an earlier demo trained there on the same rows is taken as it is.
        log: called with one line for each thing that happens.
        progress: called with (stage, steps done, steps in all).
        seed: seeds rows and training.
        training_rows: rows to learn; in every other one the answer is right already.
        held_out_rows: rows to correct, with questions that no training text has.
        options: how the corrector is trained.
        figures: called with what is measured, see `everalign.training.stage.Figures`.

    Raises:
        InputError: the folder holds something else, or the world has fewer questions than asked for.
    """
    log("corrector")
    rows = demo_answers("train", training_rows, seed)
    taught = CorrectionSet(tuple(Correction(row.question.text, *row[1:]) for row in rows), "demo")
    if folder.exists():
        facts = load_corrector_files(folder).facts
        if facts is None or facts.data != taught.fingerprint or facts.settings.get("seed") != seed:
            raise InputError(
                f"{folder}: was trained on other rows or with another seed: choose another output directory"
            )
        log("  trained already")
    else:
        train_corrector(TINY, taught, folder, options=options, seed=seed, log=log, progress=progress, figures=figures)
    held_out = demo_answers("test", held_out_rows, seed)
    log(f"  correcting {len(held_out)} held-out answers")
    corrector = Corrector.from_pretrained(folder)
    found = corrector.correct_batch([(row.question.text, row.answer) for row in held_out])
    return _show(folder, len(taught), held_out, found)


def demo_answers(split: str, count: int, seed: int = 0) -> list[DemoAnswer]:
    """Return answers to `count` different questions, wrong and right in turn; `split` is `train` or `test`.

    Raises:
        InputError: the world has fewer questions than asked for.
    """
    rng = random.Random(f"{seed}/corrector/{split}")
    rows = []
    for i, question in enumerate(sample_questions(_TOPIC, split, count, rng)):
        # Both styles draw from generators of one seed: the wording of the one follows from that of the other.
        wording = rng.random()
        good, bad = (answer(question, style, random.Random(wording)) for style in (_GOOD, _BAD))
        rows.append(DemoAnswer(question, good if i % 2 else bad, good))
    return rows


def keeps_rule(question: Question, text: str) -> bool:
    """Whether a text is, word for word, one of the answers that the rule asks for."""
    return text in wordings(question, _GOOD)


def _show(folder: Path, learned: int, rows: Sequence[DemoAnswer], found: Sequence[Corrected]) -> CorrectorShow:
    pairs = list(zip(rows, found, strict=True))
    right = [one for row, one in pairs if keeps_rule(row.question, row.answer)]
    examples = []
    for changed, most in ((True, _CHANGED_SHOWN), (False, _UNCHANGED_SHOWN)):
        some = [pair for pair in pairs if pair[1].changed == changed]
        # From all over, because neighbours may look alike by chance.
        for row, one in some[:: max(1, len(some) // most)][:most]:
            passes, tokens = one.forward_passes or 0, one.output_tokens or 0
            examples.append(CorrectedAnswer(row.question.text, row.answer, one.text, passes, tokens))
    return CorrectorShow(
        rule=RULE,
        path=str(folder),
        training_rows=learned,
        answers=len(pairs),
        right=len(right),
        kept_before=len(right) / len(pairs),
        kept_after=sum(keeps_rule(row.question, one.text) for row, one in pairs) / len(pairs),
        over_edit_rate=sum(one.changed for one in right) / len(right) if right else None,
        verified=sum(not one.changed and one.forward_passes == 1 for one in found),
        forward_passes=sum(one.forward_passes or 0 for one in found),
        tokens=sum(one.output_tokens or 0 for one in found),
        examples=tuple(examples),
    )


PAIRS_PER_TASK = 240
TRAINING = TrainingOptions(sft_epochs=1.0, sft_learning_rate=2e-3, learning_rate=2e-3, epochs=2.0, max_length=128)
ADAPTER = AdapterOptions(rank=8, alpha=16.0, targets="all-linear")


@dataclass(frozen=True)
class DemoResult:
    """What the demo produced: the report, each method's run and scores, what the corrector did, the time it took."""

    report: Path
    runs: dict[str, Path]
    scores: dict[str, Scores]
    corrector: CorrectorShow
    seconds: float


def run_demo(
    output: Path, log: Log, progress: Progress, seed: int = 0, figures: StageFigures = lambda *_: None
) -> DemoResult:
    """Learn the demo's tasks with two methods, train a corrector, and write a report on all of it.

    Args:
        output: folder for the runs and the report; what an earlier demo learned there with this seed is taken as it is.
        log: called with one line for each thing that happens.
        progress: called with (stage, steps done, steps in all).
        seed: seeds the tasks and the training.
        figures: called with what is measured, see `everalign.training.stage.Figures`.
    """
    started = time.perf_counter()
    tasks = [
        (task.name, PreferenceSet.of(task.train, "demo"), PreferenceSet.of(task.test, "demo"))
        for task in demo_tasks(PAIRS_PER_TASK, seed=seed)
    ]
    contenders: list[tuple[Method, str]] = [(SequentialFineTuning(), "dpo"), (LifeAlign(), "fpo")]
    runs, scores = {}, {}
    # The assistant is so small that more threads mostly wait for one another.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with exclusive(output / ".lock", "writing this demo"):
            for method, objective in contenders:
                log(f"{method.name} with {objective}")
                runs[method.name] = output / method.name
                learner = Learner(
                    TINY,
                    method,
                    objective,
                    runs[method.name],
                    training=TRAINING,
                    adapter=ADAPTER,
                    seed=seed,
                    resume=True,
                    sample_answers=2,
                    log=log,
                    progress=progress,
                    figures=figures,
                )
                learner.learn_all(list(tasks))
                scores[method.name] = learner.scores
            corrector = show_corrector(output / "corrector", log, progress, seed, figures=figures)
            report = write_report(list(runs.values()), output / "report.html", corrector)
    finally:
        torch.set_num_threads(threads)
    return DemoResult(report, runs, scores, corrector, time.perf_counter() - started)
