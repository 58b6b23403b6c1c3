"""Write a run directory, and restore a learner from it. See `run_data` for reading.

    run.json  zero_shot.json  current  versions/001-NAME/{manifest, scores, training, consolidation, adapter, ...}
    current   names the version that learning continues from; versions off its lineage were refused or rolled back
    work/     checkpoints of the task being learned; empty between tasks
    base_model/    the base model, if it was given as an object
    base_adapter/  the adapter that was merged into the base model, if there was one
    cache/    encoded rows and reference log-probabilities
    tests/    the held-out rows that every version is scored on

A version is written to a temporary folder, synced, and renamed: it is there whole or not at all.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from everalign.data.replay import ReplayBuffer
from everalign.data.rows import RowSet
from everalign.distributed import on_main
from everalign.errors import InputError
from everalign.evaluation import PreferenceScore
from everalign.learning import run_files
from everalign.learning.options import TrainingOptions
from everalign.learning.promotion import check_version, exclusive_run, promote
from everalign.learning.run_data import BASE, BASE_ADAPTER, BASE_MODEL, ZERO_SHOT, RunData, RunReader, work_folder
from everalign.learning.run_files import Answers
from everalign.methods import Method
from everalign.methods.base import ModuleRecord
from everalign.modeling.base_adapter import adapter_files
from everalign.modeling.loading import DTYPES, load_tokenizer, model_fingerprint
from everalign.modeling.policy import Policy
from everalign.storage import checksums, new_folder, read_json, write_json, write_text
from everalign.training.objectives import reads
from everalign.training.options import WeightOptions
from everalign.training.stage import StageResult

FORMAT = 1
# In the order in which differences are named: a model in another precision has another fingerprint too.
_SAME = ("format", "objective", "method", "settings", "seed", "model_fingerprint", "template")
# Settings that early runs do not record, with the value that they had.
_SETTINGS_SINCE = {"attention": "sdpa", "quantize": None, "deterministic": False}
# Settings that change no result, so that a run may continue with other ones.
_FREE_SETTINGS = ("checkpointing", "device_map")


def now() -> str:
    """Returns the time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def version_name(index: int, task: str) -> str:
    """Returns the folder name of a version: its number, and the task's name as far as file systems allow."""
    return f"{index:03d}-{re.sub('[^A-Za-z0-9_-]+', '-', task).strip('-')[:60] or 'task'}"


def data_facts(rows: RowSet[Any]) -> dict[str, Any]:
    """Returns what identifies a set of rows: its source, their number, and a hash of their ids."""
    columns = {"columns": dict(rows.columns)} if rows.columns else {}
    return {"source": rows.source, "rows": len(rows), "fingerprint": rows.fingerprint, **columns}


class RunDirectory:
    """Writes a run and restores its state; of processes that share one job, the main one writes.

    Args:
        path: created when missing; anything else than a run of ours in it is refused.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cache = path / "cache"
        self._reader = RunReader(path)

    def exclusive(self) -> AbstractContextManager[None]:
        """Context manager that keeps other processes from writing into this run; may be nested."""
        return exclusive_run(self.path)

    @property
    def data(self) -> RunData:
        """The run as it is on disk; unchanged files are not read again."""
        return self._reader.read()

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / "run.json").exists()

    @cached_property
    def _setup(self) -> str:
        return run_files.setup_id(run_files.read_json(self.path / "run.json", run_files.RunFile))

    @on_main
    def keep_model(self, model: Any, tokenizer: Any) -> str:
        """Writes a loaded model into the run, and returns its folder; a run that is continued has it already.

        Args:
            model: a causal language model of transformers.
            tokenizer: its tokenizer; loaded from where the model was when None.

        Raises:
            InputError: it is no such model, has no tokenizer, or is not the one that the run was started with.
        """
        folder = (self.path / BASE_MODEL).resolve()
        if not isinstance(model, PreTrainedModel):
            what = f"a folder, a name, or a causal language model of transformers, found {type(model).__name__}"
            raise InputError(f"model: must be {what}", field="model")
        if self.exists:
            facts = run_files.read_json(self.path / "run.json", run_files.RunFile)
            dtype = DTYPES[facts.settings.get("precision", "fp32")]
            if not folder.exists() or model_fingerprint(model, dtype) != facts.model_fingerprint:
                raise InputError(f"{self.path} was started with a different model: use the same, or another output")
            return str(folder)
        tokenizer = load_tokenizer(model.name_or_path) if tokenizer is None else tokenizer
        shutil.rmtree(folder, ignore_errors=True)
        with new_folder(folder) as written:
            model.save_pretrained(written)
            tokenizer.save_pretrained(written)
        return str(folder)

    @on_main
    def begin(self, facts: Mapping[str, Any]) -> None:
        """Begins a run; run.json comes last, because it makes the folder a run."""
        if facts.get("base_adapter") is not None:
            # Versions depend on it, and the user may delete the original.
            shutil.rmtree(self.path / BASE_ADAPTER, ignore_errors=True)
            with new_folder(self.path / BASE_ADAPTER) as folder:
                for file in adapter_files(facts["base_adapter"]):
                    shutil.copyfile(file, folder / file.name)
        self.write_zero_shot({}, {}, {})
        write_json(self.path / "run.json", {"format": FORMAT, **facts, "created": now()})

    @on_main
    def record_prediction(self, tasks: Mapping[str, Any]) -> None:
        """Writes what tasks are predicted to take (see `run_files.Predicted`) into run.json, beside those of others."""
        with self.exclusive():
            facts = read_json(self.path / "run.json")
            predicted = {**facts.get("predicted", {}), **tasks}
            write_json(self.path / "run.json", {**facts, "predicted": predicted})

    def with_its_precision(self, training: TrainingOptions) -> TrainingOptions:
        """Returns the options with `auto` replaced by the precision that the run was started with."""
        if training.precision != "auto" or not self.exists:
            return training
        return training.replace(precision=self._settings().get("precision", "fp32"))

    def with_its_temperature(self, weighting: WeightOptions, objective: str) -> WeightOptions:
        """Returns the options with the temperature of rewards that the run was started with, where none is given."""
        asked = self.exists and reads(objective, "temperature")
        temperature = self._settings().get("temperature") if asked else None
        return weighting if temperature is None else weighting.resolved(temperature)

    def _settings(self) -> dict[str, Any]:
        return run_files.read_json(self.path / "run.json", run_files.RunFile).settings

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Refuses to continue a run with other settings; names the first that differs."""
        written = read_json(self.path / "run.json")
        now_given = json.loads(json.dumps({"format": FORMAT, **facts}))
        for key in _SAME:
            then, given = written.get(key), now_given[key]
            if key == "settings" and isinstance(then, dict):
                free = {name: given.get(name) for name in _FREE_SETTINGS}
                then = {**_SETTINGS_SINCE, **then, **free}
            if then == given:
                continue
            what, names = f"{then!r} then, {given!r} now", list[str]()
            if isinstance(then, dict) and isinstance(given, dict):
                names = [name for name in {**then, **given} if then.get(name) != given.get(name)]
            if names:
                what = f"{names[0]}: {then.get(names[0])!r} then, {given.get(names[0])!r} now"
            raise InputError(
                f"{self.path} was started with {'' if key.endswith('s') else 'a '}different {key} ({what}): "
                "use the same settings, or another output directory"
            )

    @on_main
    def write_zero_shot(
        self, scores: Mapping[str, PreferenceScore], tests: Mapping[str, Any], answers: Answers
    ) -> None:
        """Writes the base model's scores and answers by task, and the facts of the test sets (see `data_facts`)."""
        write_json(self.path / ZERO_SHOT, {"scores": _as_json(scores), "tests": dict(tests), "answers": answers})

    def read_zero_shot(self) -> tuple[dict[str, PreferenceScore], dict[str, Any], Answers]:
        """Reads what `write_zero_shot` wrote."""
        written = run_files.read_json(self.path / ZERO_SHOT, run_files.ZeroShotFile)
        scores = {task: PreferenceScore(**score.model_dump()) for task, score in written.scores.items()}
        answers = {task: [one.model_dump() for one in found] for task, found in written.answers.items()}
        return scores, {task: test.model_dump() for task, test in written.tests.items()}, answers

    @on_main
    def write_test(self, rows: RowSet[Any]) -> None:
        """Writes a test set's rows."""
        lines = [json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows]
        write_text(self._test_path(rows.fingerprint), "".join(lines))

    def read_test(self, facts: Mapping[str, Any], read: Callable[[Path], RowSet[Any]]) -> RowSet[Any]:
        """Reads the test set that `data_facts` identifies.

        Args:
            facts: what identifies it.
            read: reads rows of its kind.

        Raises:
            InputError: its file is missing or was changed.
        """
        path = self._test_path(facts["fingerprint"])
        rows = read(path)
        if rows.fingerprint != facts["fingerprint"]:
            raise InputError(f"{path}: changed since it was written; restore the file")
        return replace(rows, source=facts["source"])

    def _test_path(self, fingerprint: str) -> Path:
        return self.path / "tests" / f"{fingerprint[:16]}.jsonl"

    @on_main
    def write_version(
        self,
        name: str,
        manifest: Mapping[str, Any],
        policy: Policy,
        method: Method,
        reports: Sequence[StageResult],
        consolidation: Sequence[ModuleRecord],
        scores: Mapping[str, PreferenceScore],
        before: Mapping[str, PreferenceScore] | None,
        answers: Answers,
    ) -> None:
        """Writes a finished task as a version, promotes it unless its gate refused it, and deletes its checkpoints."""
        with new_folder(self.path / "versions" / name) as folder:
            policy.save_adapter(folder / "adapter")
            save_file(method.state_dict(), folder / "method.safetensors")
            if method.buffer is not None:
                method.buffer.to_jsonl(folder / "replay.jsonl")
            if consolidation:
                write_json(folder / "consolidation.json", [asdict(record) for record in consolidation])
            write_json(
                folder / "scores.json",
                {
                    "scores": _as_json(scores),
                    "before_consolidation": None if before is None else _as_json(before),
                    "answers": answers,
                },
            )
            points = [{"stage": report.stage, **point} for report in reports for point in report.curve]
            write_text(folder / "training.jsonl", "".join(json.dumps(point) + "\n" for point in points))
            full = {"format": FORMAT, **manifest, "setup": self._setup, "created": now(), "files": checksums(folder)}
            write_json(folder / "manifest.json", full)
        gate = manifest["gate"]
        promote(self.path, name if gate is None or gate["promoted"] else manifest["parent"])

    @on_main
    def finish_promotion(self, run: RunData) -> None:
        """Completes the promotion, or refusal, of a version that a kill interrupted."""
        newest = run.all_versions[-1:]
        if any(work_folder(self.path, version.id).exists() for version in newest):
            with self.exclusive():
                promote(self.path, run.head)

    def restore(self, run: RunData, policy: Policy, method: Method, seed: int, at_first: Mapping[str, Tensor]) -> None:
        """Loads policy and method as the version that learning continues from left them.

        Args:
            run: the run as it is on disk.
            policy: what learns.
            method: what is carried from task to task.
            seed: seeds the policy.
            at_first: the method's state before the first task, for the base model.

        Raises:
            InputError: a file of the version is missing or was changed.
        """
        if run.head == BASE:
            policy.reset(seed)
            method.load_state_dict(at_first)
            if method.buffer is not None:
                method.buffer = ReplayBuffer(method.buffer.capacity)
            return
        folder = self.path / "versions" / run.head
        versions = run.adapters_at(run.versions[-1])
        for version in versions.values():
            check_version(self.path / "versions" / version.id, version.manifest.files)
        method.load_state_dict(load_file(folder / "method.safetensors"))
        for label, version in versions.items():
            policy.load_adapter(self.path / "versions" / version.id / "adapter", method.long_term, seed)
            method.adopt(policy, label)
        if method.buffer is not None:
            method.buffer = ReplayBuffer.from_jsonl(folder / "replay.jsonl", method.buffer.capacity)


def _as_json(scores: Mapping[str, PreferenceScore]) -> dict[str, Any]:
    return {
        task: {name: value for name, value in asdict(score).items() if name != "outcomes"}
        for task, score in scores.items()
    }
