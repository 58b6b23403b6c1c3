"""A run's versions as plain values: what each has learned, its score then and now, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everalign.learning.run_data import RunData
from everalign.learning.run_files import Score


def version_rows(run: RunData) -> list[dict[str, Any]]:
    """Return all versions in the order of learning, those beside the run's line too.

    `then` is a version's accuracy on its own task, `now` the promoted version's on that task; null where it was not
    measured, or where versions do not build on each other (STL). `status` is what became of a version, `gate` the
    gate's verdict where there was one.
    """
    promoted = next((version.scores for version in run.versions if version.id == run.current), run.zero_shot)
    return [
        {
            "index": version.manifest.index,
            "version": version.id,
            "task": version.task,
            "created": version.manifest.created,
            "then": _accuracy(version.scores, version.task),
            "now": None if run.regime == "separate" else _accuracy(promoted, version.task),
            "promoted": version.id == run.current,
            "status": run.status(version),
            "warnings": version.manifest.warnings,
            "gate": None if version.manifest.gate is None else version.manifest.gate.model_dump(mode="json"),
        }
        for version in run.everything
    ]


def _accuracy(scores: Mapping[str, Score], task: str) -> float | None:
    return scores[task].accuracy if task in scores else None
