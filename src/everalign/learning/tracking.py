"""What a run's training looks like while it goes on: `training.jsonl`, and experiment trackers.

training.jsonl has a line for each logged step of every stage: where it was logged (task, version, round, stage, step of
steps), the time, and what was measured (loss, accuracy, margin, learning rate, tokens a second). A stage that resumes
from a checkpoint cuts it back to that checkpoint.
"""

import atexit
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from everalign.distributed import rank
from everalign.errors import InputError
from everalign.learning.options import check_trackers
from everalign.learning.run_data import TRAINING_LOG
from everalign.learning.run_files import LoggedStep, read_json_lines
from everalign.learning.scores import Scores
from everalign.storage import write_text
from everalign.training.stage import StageFigures

_TENSORBOARD = "tensorboard"
_PROJECT = "everalign"


class Attempt(NamedTuple):
    """Which stage is trained.

    Args:
        version: the version that the task becomes.
        task: its name.
        round: of sampled answers; 1 where answers are given.
        number: of the stage in the task, from 0.
        stage: the objective's name.
    """

    version: str
    task: str
    round: int
    number: int
    stage: str


class Tracker:
    """Writes a run's `training.jsonl`, and passes on what it holds; of several processes the main one does.

    Args:
        run: the run directory.
        services: experiment trackers to log to, as `check_trackers` allows; they begin with `connect`.
        shown: called with (stage, steps done, figures), for a progress bar.

    Raises:
        InputError: a tracker cannot be used, or training.jsonl is damaged.
    """

    def __init__(self, run: Path, services: Sequence[str] = (), shown: StageFigures = lambda *_: None) -> None:
        check_trackers(services)
        self._run, self._path, self._names, self._shown = run, run / TRAINING_LOG, services, shown
        self._services: list[_Service] = []
        self._before = self._total = 0  # steps of earlier stages, and of the run
        if rank() == 0 and self._path.exists():
            # A kill may have cut the last line.
            text = self._path.read_bytes()
            if text and not text.endswith(b"\n"):
                write_text(self._path, text[: text.rfind(b"\n") + 1].decode())
            self._total = sum(_stage_steps(_read(self._path)).values())

    def connect(self, arguments: Callable[[], TrainingArguments]) -> None:
        """Begin with the trackers, if there are any; `arguments` makes what they are told of the settings.

        Not while a stage is trained: transformers' arguments begin with new devices.
        """
        if not self._names:
            return
        settings = arguments()
        settings.run_name, settings.project = self._run.resolve().name, _PROJECT
        if rank() == 0:
            self._services = [_Service(name, self._run, settings) for name in self._names]

    def figures(self, attempt: Attempt, step: int, figures: Mapping[str, float]) -> None:
        """Take what was measured at a step; called first without figures, with the step that a stage begins after."""
        if rank() == 0 and not figures:
            self._begin(attempt, step)
        elif rank() == 0:
            measured = {name: value if math.isfinite(value) else None for name, value in figures.items()}
            place = {"task": attempt.task, "version": attempt.version, "round": attempt.round, "stage": attempt.stage}
            line = {**place, "stage_number": attempt.number, "step": step, "time": round(time.time(), 3), **measured}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._total = self._before + step
            known = {name: value for name, value in measured.items() if value is not None and name != "steps"}
            for service in self._services:
                service.log(self._total, known)
        self._shown(attempt.stage, step, figures)

    def task_done(
        self, task: str, matrix: Scores, scores: Mapping[str, Any], answers: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> None:
        """Pass on what a finished task came to: its scores, the score matrix so far, and sample answers."""
        if rank() > 0 or not self._services:
            return
        numbers = {
            f"eval_{name}/{scored}": value
            for scored, score in scores.items()
            for name in ("accuracy", "margin", "reward_accuracy", "kl_previous")
            if (value := getattr(score, name)) is not None
        }
        numbers |= {f"eval_{name}": value for name, value in matrix.summary.items() if value is not None}
        texts = {f"eval_scores after {task}": _matrix_text(matrix)}
        for name, found in answers.items():
            parts = []
            for one in found:
                prompt = one["prompt"] if isinstance(one["prompt"], str) else one["prompt"][-1].get("content")
                parts.append(f"**{prompt}**\n\n{one['answer']}{'' if one['ended'] else ' …'}")
            texts[f"eval_answers after {task}/{name}"] = "\n\n---\n\n".join(parts)
        for service in self._services:
            service.log(self._total, numbers)
            service.write(self._total, texts)

    def _begin(self, attempt: Attempt, step: int) -> None:
        """Cut the file back to where a stage begins: nothing of its version is kept that comes after that step."""
        lines = _read(self._path) if self._path.exists() else []
        now = (attempt.round, attempt.number, step)
        kept = [
            one for one in lines if one.version != attempt.version or (one.round, one.stage_number, one.step) <= now
        ]
        if len(kept) < len(lines):
            write_text(self._path, "".join(one.model_dump_json(exclude_unset=True) + "\n" for one in kept))
        own = (attempt.version, attempt.round, attempt.number)
        self._before = sum(steps for stage, steps in _stage_steps(kept).items() if stage != own)
        self._total = self._before + step


def _read(path: Path) -> list[LoggedStep]:
    try:
        return read_json_lines(path, LoggedStep)
    except InputError as error:
        raise InputError(f"{error}; or delete the file, which holds training curves alone") from error


def _stage_steps(lines: Sequence[LoggedStep]) -> dict[tuple[str, int, int], int]:
    """Return the last step of each stage."""
    return {(one.version, one.round, one.stage_number): one.step for one in lines}


@dataclass(eq=False)
class _Service:
    """One experiment tracker, by transformers' integration of it.

    The integration's callback is driven by hand, because a run has one history over the stages of all its tasks, while
    each stage has a trainer of its own that would begin and end one. It begins with the first figures.
    """

    name: str
    run: Path
    settings: TrainingArguments
    _callback: Any = field(default=None, init=False)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._begun(step).on_log(*self._arguments(step), logs=dict(values), model=None)

    def write(self, step: int, texts: Mapping[str, str]) -> None:
        """Log texts; MLflow's integration takes none, so that they are kept as its artifacts."""
        if self.name != "mlflow":
            self.log(step, texts)
            return
        self._begun(step)
        import mlflow

        for name, text in texts.items():
            mlflow.log_text(text, f"{name.removeprefix('eval_')}.md")

    def _begun(self, step: int) -> Any:
        if self._callback is None:
            [kind] = get_reporting_integration_callbacks([self.name])
            if self.name == "wandb":
                os.environ.setdefault("WANDB_PROJECT", _PROJECT)
            if self.name == _TENSORBOARD:
                from torch.utils.tensorboard import SummaryWriter

                # What an interrupted call logged after this step is hidden: it is trained, and logged, again.
                self._callback = kind(SummaryWriter(str(self.run / _TENSORBOARD), purge_step=step))
            else:
                self._callback = kind()
            self._callback.on_train_begin(*self._arguments(step), model=None)
            atexit.register(self._callback.on_train_end, *self._arguments(0), model=None)
        return self._callback

    def _arguments(self, step: int) -> tuple[Any, Any, Any]:
        return self.settings, TrainerState(global_step=step), TrainerControl()


def _matrix_text(scores: Scores) -> str:
    """Return the score matrix as a Markdown table, in percent."""

    def line(name: str, cells: Sequence[str]) -> str:
        return f"| {' | '.join([name, *cells])} |"

    rows = [("nothing", scores.zero_shot), *zip(scores.learned, scores.matrix, strict=True)]
    shown = [line(name, ["–" if one is None else f"{100 * one:.1f}" for one in row]) for name, row in rows]
    return "\n".join([line("after learning", scores.tasks), line("---", ["---:"] * len(scores.tasks)), *shown])
