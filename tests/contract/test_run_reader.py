"""A run that is asked for again is not read again, unless somebody has written into it."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from everalign import storage as files
from everalign.errors import InputError
from everalign.learning.promotion import rollback
from everalign.learning.run_data import RunReader, load_run
from learner_for_tests import held_out, make_learner, save_model, task_rows
from runs_for_tests import LIFEALIGN, score, write_run, write_version


@pytest.fixture
def hashed(monkeypatch):
    """How often each file was hashed, by the names of its version and its own."""
    found, sha256_of = Counter(), files.sha256_of

    def counting(path):
        found[f"{path.parent.name}/{path.name}"] += 1
        return sha256_of(path)

    monkeypatch.setattr(files, "sha256_of", counting)
    return found


def test_nothing_is_read_twice_and_of_what_is_new_only_that(tmp_path, hashed, monkeypatch):
    path = write_run(tmp_path / "run")
    reader = RunReader(path)
    first = reader.read()
    assert set(hashed.values()) == {1}
    assert len(hashed) == 3 * 3
    monkeypatch.setattr("everalign.learning.run_data.read_json", None)
    assert reader.read() is first
    monkeypatch.undo()
    before = dict(hashed)
    write_version(path, 4, "004-4", "truthful-2", "003-3", {task: score(0.7) for task in LIFEALIGN})
    (path / "current").write_text("004-4\n")
    assert [version.id for version in reader.read().versions] == ["001-1", "002-2", "003-3", "004-4"]
    assert {name: count for name, count in hashed.items() if name in before} == before
    assert reader.read() == load_run(path)


CHANGES = {
    "current": lambda path: (path / "current").write_text("001-1\n"),
    "zero-shot scores": lambda path: (path / "zero_shot.json").write_text(
        json.dumps({"scores": {"harmless": score(0.1), "helpful": score(0.2), "truthful": score(0.3)}})
    ),
    "a version that is gone": lambda path: (
        shutil.rmtree(path / "versions" / "003-3"),
        (path / "current").write_text("002-2\n"),
    ),
    "settings": lambda path: (path / "run.json").write_text(
        json.dumps({**json.loads((path / "run.json").read_text()), "seed": 1234})
    ),
    "not promoted yet": lambda path: (
        (path / "current").write_text("002-2\n"),
        (path / "work" / "003-3").mkdir(parents=True),
    ),
    "checkpoints": lambda path: (path / "work" / "003-3").mkdir(parents=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_another_process_writes_is_seen(tmp_path, change):
    path = write_run(tmp_path / "run")
    reader = RunReader(path)
    first = reader.read()
    change(path)
    assert reader.read() == load_run(path)
    # A newest version that has its checkpoints still counts as promoted, whatever else is current.
    assert (reader.read() == first) is (change in (CHANGES["checkpoints"], CHANGES["not promoted yet"]))


@pytest.mark.parametrize("name", ["scores.json", "training.jsonl", "consolidation.json"])
def test_damage_is_seen_later_too(tmp_path, name):
    path = write_run(tmp_path / "run")
    reader = RunReader(path)
    reader.read()
    file = path / "versions" / "002-2" / name
    file.write_text(file.read_text().replace("1", "2"))
    for _ in range(2):
        with pytest.raises(InputError, match=f"{name} is missing or has changed"):
            reader.read()
    shutil.rmtree(path)
    with pytest.raises(InputError, match="is not a run directory"):
        reader.read()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def test_a_learner_reads_each_of_its_versions_once(model, tmp_path, hashed):
    learner = make_learner(model, tmp_path / "run", gate=1.0)
    learner.register_test("warm", held_out("warm"))
    learner.learn(task_rows("warm"), "warm")
    learner.learn(task_rows("brief"), "brief", held_out("brief"))
    assert (len(learner.run.versions), len(learner.scores.tasks)) == (2, 2)
    read = {name: count for name, count in hashed.items() if name.endswith("/scores.json")}
    # Once for its manifest, when it was written, and once when it was read.
    written = {"001-warm.partial/scores.json": 1, "002-brief.partial/scores.json": 1}
    assert read == {**written, "001-warm/scores.json": 1, "002-brief/scores.json": 1}


def test_a_learner_sees_what_a_process_beside_it_has_promoted(model, tmp_path):
    learner = make_learner(model, tmp_path / "run")
    learner.learn(task_rows("warm"), "warm")
    learner.learn(task_rows("brief"), "brief")
    assert learner.run.head == "002-brief"
    command = [sys.executable, "-m", "everalign", "rollback", str(tmp_path / "run")]
    subprocess.run(command, check=True, capture_output=True)
    assert learner.run.head == "001-warm"
    with pytest.raises(InputError, match="was continued by another learner"):
        learner.learn(task_rows("calm"), "calm")
    rollback(tmp_path / "run", "002")
    learner.learn(task_rows("calm"), "calm")
    assert [version.task for version in learner.run.versions] == ["warm", "brief", "calm"]


def test_a_run_of_three_tasks_reads_each_file_once(model, tmp_path, monkeypatch):
    """However often the learner's run and scores are asked for, and whatever learning asks for itself."""
    read, read_text = Counter(), Path.read_text

    def counting(path, *args, **kwargs):
        read[path.relative_to(tmp_path).as_posix() if path.is_relative_to(tmp_path) else "outside"] += 1
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", counting)
    learner = make_learner(model, tmp_path / "run")
    for name in ("warm", "brief", "calm"):
        learner.learn(task_rows(name), name, held_out(name))
        assert learner.scores.learned[-1] == learner.run.versions[-1].task == name
    versions = {name: count for name, count in read.items() if name.startswith("run/versions/")}
    assert set(versions.values()) == {1}
    assert {name.split("/")[2] for name in versions} == {"001-warm", "002-brief", "003-calm"}
    # run.json and the like are read again only after a version was written.
    assert all(count <= 8 for name, count in read.items() if name.startswith("run/")), read
