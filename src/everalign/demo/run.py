"""The demo: four conflicting preference tasks learned by two methods, a corrector, and a report on all of it."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from everalign.data.records import PreferenceSet
from everalign.demo.corrector import show_corrector
from everalign.demo.world import demo_tasks
from everalign.learning.context import Log, Progress
from everalign.learning.learner import Learner
from everalign.learning.options import AdapterOptions, TrainingOptions
from everalign.learning.scores import Scores
from everalign.methods import LifeAlign, Method, SequentialFineTuning
from everalign.modeling.loading import TINY
from everalign.reporting import write_report
from everalign.reporting.answers import CorrectorShow
from everalign.storage import exclusive

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


def run_demo(output: Path, log: Log, progress: Progress, seed: int = 0) -> DemoResult:
    """Learn the demo's tasks with two methods, train a corrector, and write a report on all of it.

    Args:
        output: folder for the runs and the report; what an earlier demo learned there with this seed is taken as it is.
        log: called with one line for each thing that happens.
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
                )
                learner.learn_all(list(tasks))
                scores[method.name] = learner.scores
            corrector = show_corrector(output / "corrector", log, progress, seed)
            report = write_report(list(runs.values()), output / "report.html", corrector)
    finally:
        torch.set_num_threads(threads)
    return DemoResult(report, runs, scores, corrector, time.perf_counter() - started)
