"""The demo: four conflicting preference tasks, plain sequential training beside LifeAlign, and a corrector at work."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from everalign.data.readers import PreferenceSet
from everalign.demo.correcting import show_corrector
from everalign.demo.tasks import demo_tasks
from everalign.learning.learner import Learner
from everalign.learning.options import AdapterOptions, TrainingOptions
from everalign.learning.scores import Scores
from everalign.learning.setup import Announce, Progress
from everalign.methods import LifeAlign, Method, SequentialFineTuning
from everalign.modeling.loading import TINY
from everalign.reporting import write_report
from everalign.reporting.corrections import CorrectorShow
from everalign.storage import alone

PAIRS_PER_TASK = 240
TRAINING = TrainingOptions(
    sft_epochs=1.0,
    sft_learning_rate=2e-3,
    learning_rate=2e-3,
    epochs=2.0,
    max_length=128,
)
ADAPTER = AdapterOptions(rank=8, alpha=16.0, targets="all-linear")


@dataclass(frozen=True)
class DemoResult:
    """What the demo produced: the report, each method's run and scores, what the corrector did, the time it took."""

    report: Path
    runs: dict[str, Path]
    scores: dict[str, Scores]
    corrector: CorrectorShow
    seconds: float


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: the assistant is so small that more of them mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_demo(output: Path, announce: Announce, progress: Progress, seed: int = 0) -> DemoResult:
    """Learn the demo's tasks with two methods, train a corrector, and write a report on all of it.

    Args:
        output: folder for the runs and the report; what an earlier demo learned there with this seed is taken as it is.
        announce: called with one line for each thing that happens.
        progress: called with (stage, steps done, steps in all).
        seed: seeds the tasks and the training.
    """
    started = time.perf_counter()
    tasks = [
        (task.name, PreferenceSet.of(task.train, "demo"), PreferenceSet.of(task.test, "demo"))
        for task in demo_tasks(PAIRS_PER_TASK, seed=seed)
    ]
    contenders: list[tuple[Method, str]] = [(SequentialFineTuning(), "dpo"), (LifeAlign(), "fpo")]
    runs, scores = {}, {}
    with alone(output / ".lock", "writing this demo"):
        for method, objective in contenders:
            announce(f"{method.name} with {objective}")
            runs[method.name] = output / method.name
            with _one_thread():
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
                    announce=announce,
                    progress=progress,
                )
                learner.learn_all(list(tasks))
            scores[method.name] = learner.scores
        with _one_thread():
            corrector = show_corrector(output / "corrector", announce, progress, seed)
        report = write_report(list(runs.values()), output / "report.html", corrector)
    return DemoResult(report, runs, scores, corrector, time.perf_counter() - started)
