"""A run that is killed, wherever and how often, ends with the same weights and scores as one that is not."""

import os
import random
import signal
import time
from contextlib import suppress

import pytest
from safetensors.torch import load_file

from everalign.errors import GateRefusedError
from everalign.learning.run_data import load_run
from everalign.learning.run_files import LoggedStep, read_json_lines
from everalign.methods import LifeAlign
from learner_for_tests import adapter_weights, held_out, make_learner, same_weights, save_model, swapped, tasks
from tiers_for_tests import slow_but

OPTIONS = {"sft_epochs": 1.0, "epochs": 1.5, "checkpoint_steps": 1, "reference": "base"}
LIMIT = 120.0
"""Seconds after which a child is taken for hung."""


# ---- the child: one process that learns two tasks ----


def learn(model, output, started, crash=None):
    """Run in a process of its own: learn two tasks with two stages each, from wherever the run stands."""
    if crash is not None:
        crash_at(*crash)
    learner = make_learner(model, output, LifeAlign(space="product"), "fpo", resume=True, options=OPTIONS)
    started.set()
    learner.learn_all(tasks("warm", "brief"))


def learn_past_a_refusal(model, output, started, crash=None):
    """As `learn`, of two tasks with one in between that the gate refuses."""
    if crash is not None:
        crash_at(*crash)
    options = {"checkpoint_steps": 1}
    learner = make_learner(model, output, LifeAlign(space="product"), resume=True, options=options, gate=0.25)
    started.set()
    warm, calm = ((name, rows, held_out(name, 12)) for name, rows, _ in tasks("warm", "calm"))
    for name, rows, test in (warm, ("poison", swapped("warm"), None), calm):
        with suppress(GateRefusedError):
            learner.learn(rows, name, test)


def crash_at(call, target, moment, count=1):
    """Leave the process without a word before or after the count-th `os.CALL` on a path that ends in `target`."""
    original, seen = getattr(os, call), []

    def crashing(*paths, **arguments):
        hit = str(paths[-1]).endswith(target)
        seen.extend([target] if hit else [])
        if hit and len(seen) == count and moment == "before":
            os._exit(9)
        result = original(*paths, **arguments)
        if hit and len(seen) == count:
            os._exit(9)
        return result

    setattr(os, call, crashing)


# ---- the parent ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), layers=2)


class Child:
    """A learning process that may be killed, or left to end."""

    def __init__(self, quick_processes, *arguments, crash=None, teach=learn):
        self.started = quick_processes.Event()
        self.process = quick_processes.Process(target=teach, args=(*arguments, self.started, crash), daemon=True)
        self.process.start()

    def ended(self):
        """Wait for the end; returns the exit code."""
        self.process.join(LIMIT)
        assert self.process.exitcode is not None, "the child hangs"
        return self.process.exitcode

    def kill_after(self, seconds):
        """SIGKILL that many seconds after it began to learn; returns whether it was still alive."""
        assert self.started.wait(LIMIT)
        time.sleep(seconds)
        self.process.kill()
        return self.ended() == -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(quick_processes, model, tmp_path_factory):
    """An uninterrupted run: its folder, and the seconds it took."""
    output = tmp_path_factory.mktemp("whole") / "run"
    child = Child(quick_processes, model, output)
    assert child.started.wait(LIMIT)
    began = time.perf_counter()
    assert child.ended() == 0
    return output, time.perf_counter() - began


def check_same_run(whole, run):
    expected, found = load_run(whole), load_run(run)
    assert [version.id for version in found.versions] == ["001-warm", "002-brief"]
    assert found.current == "002-brief"
    for index in (0, 1):
        assert same_weights(adapter_weights(whole, index), adapter_weights(run, index))
        for name in ("scores.json", "method.safetensors", "replay.jsonl", "consolidation.json"):
            paths = [folder / "versions" / found.versions[index].id / name for folder in (whole, run)]
            assert [path.exists() for path in paths] in ([True, True], [False, False])
            assert not paths[0].exists() or paths[0].read_bytes() == paths[1].read_bytes()
    assert (whole / "zero_shot.json").read_bytes() == (run / "zero_shot.json").read_bytes()
    assert found.scores() == expected.scores()
    for ours, theirs in zip(found.versions, expected.versions, strict=True):
        unlike = {"created", "setup", "seconds", "processor_seconds", "method_seconds", "actual", "files"}
        assert ours.manifest.model_dump(exclude=unlike | {"stages"}) == theirs.manifest.model_dump(
            exclude=unlike | {"stages"}
        )
        assert [stage.model_dump(exclude=unlike) for stage in ours.manifest.stages] == [
            stage.model_dump(exclude=unlike) for stage in theirs.manifest.stages
        ]
    leftovers = {path.name for path in run.iterdir()}
    assert leftovers == {"cache", "current", "run.json", "tests", "training.jsonl", "versions", "zero_shot.json"}
    # Every logged step once, and in order. Its loss is a mean since the step before, or since the kill.
    steps, again = (
        [(one.version, one.stage, one.step) for one in read_json_lines(path / "training.jsonl", LoggedStep)]
        for path in (whole, run)
    )
    assert again == steps


def test_an_uninterrupted_run_in_another_process_is_the_same(quick_processes, whole, model, tmp_path):
    """What the others rest on: a second process gives the same bits."""
    expected, _ = whole
    assert Child(quick_processes, model, tmp_path / "run").ended() == 0
    check_same_run(expected, tmp_path / "run")


def killed_and_resumed(quick_processes, model, run, whole, rng):
    """Kill at random moments, one to three times, then let it end; returns how many kills met a living child."""
    expected, seconds = whole
    kills = 0
    for _ in range(rng.randint(1, 3)):
        kills += Child(quick_processes, model, run).kill_after(rng.uniform(0.0, seconds))
    assert Child(quick_processes, model, run).ended() == 0
    check_same_run(expected, run)
    return kills


def test_killed_at_random_moments(quick_processes, whole, model, tmp_path):
    rng = random.Random(1)
    assert sum(killed_and_resumed(quick_processes, model, tmp_path / str(i), whole, rng) for i in range(2)) >= 1


@pytest.mark.slow
def test_killed_at_many_random_moments(quick_processes, whole, model, tmp_path):
    rng = random.Random(2)
    assert sum(killed_and_resumed(quick_processes, model, tmp_path / str(i), whole, rng) for i in range(10)) >= 8


@pytest.mark.parametrize(("stop", "steps"), [(("fpo", 3), [("fpo", 3), ("fpo", 4)]), (("fpo", 1), None)])
def test_a_resume_trains_no_step_twice(model, tmp_path, stop, steps):
    """It goes on behind the newest checkpoint, and leaves a finished stage alone."""

    def interrupt(stage, done, total):
        if (stage, done) == stop:
            raise KeyboardInterrupt

    seen = []
    arguments = {"objective": "fpo", "options": OPTIONS}
    interrupted = make_learner(model, tmp_path / "run", **arguments, progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        interrupted.learn_all(tasks("warm"))
    note = {"progress": lambda stage, done, _: None if "evaluating" in stage else seen.append((stage, done))}
    make_learner(model, tmp_path / "run", **arguments, **note, resume=True).learn_all(tasks("warm"))
    assert seen == (steps or [("fpo", step) for step in (1, 2, 3, 4)])
    make_learner(model, tmp_path / "whole", **arguments).learn_all(tasks("warm"))
    assert same_weights(adapter_weights(tmp_path / "run"), adapter_weights(tmp_path / "whole"))


WORST = [
    ("replace", "zero_shot.json", 1),
    ("replace", "run.json", 1),
    ("replace", "zero_shot.json", 2),
    ("replace", "checkpoint-2/complete.json", 1),
    ("replace", "done", 1),
    ("replace", "done", 2),
    ("replace", "scores.json", 1),
    ("replace", "versions/001-warm", 1),
    ("replace", "current", 1),
    ("unlink", "report.json", 1),  # while the promoted version's checkpoints are removed
    ("replace", "done", 4),
    ("replace", "versions/002-brief", 1),
    ("replace", "current", 2),
]


# Of each kind of place: a file of the run, a checkpoint, a stage's end, a version's promotion, the clearing up.
QUICK = [WORST[i] for i in (0, 3, 5, 7, 9, 12)]


@pytest.mark.parametrize(
    ("call", "target", "count"), slow_but(QUICK, WORST), ids=[f"{target}-{count}" for _, target, count in WORST]
)
@pytest.mark.parametrize("moment", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_killed_at_the_worst_places(quick_processes, whole, model, tmp_path, call, target, count, moment):
    expected, _ = whole
    crashed = Child(quick_processes, model, tmp_path / "run", crash=(call, target, moment, count))
    assert crashed.ended() == 9
    assert Child(quick_processes, model, tmp_path / "run").ended() == 0
    check_same_run(expected, tmp_path / "run")


# ---- past a refusal ----


@pytest.fixture(scope="module")
def gated(quick_processes, model, tmp_path_factory):
    """An uninterrupted run in which the gate has refused a task."""
    output = tmp_path_factory.mktemp("gated") / "run"
    assert Child(quick_processes, model, output, teach=learn_past_a_refusal).ended() == 0
    assert [one.id for one in load_run(output).off_lineage] == ["002-poison"]
    return output


AROUND_A_REFUSAL = [
    ("replace", "versions/002-poison", 1, "before"),
    ("replace", "versions/002-poison", 1, "after"),
    ("replace", "current", 2, "before"),
    ("replace", "current", 2, "after"),
    ("replace", "versions/003-calm", 1, "after"),
]


@pytest.mark.parametrize(
    ("call", "target", "count", "moment"), slow_but([AROUND_A_REFUSAL[1], AROUND_A_REFUSAL[4]], AROUND_A_REFUSAL)
)
def test_killed_around_a_refusal(quick_processes, gated, model, tmp_path, call, target, count, moment):
    """The refused task may be learned, and refused, once more; what is learned after it is the same."""
    run = tmp_path / "run"
    crashed = Child(quick_processes, model, run, crash=(call, target, moment, count), teach=learn_past_a_refusal)
    assert crashed.ended() == 9
    assert load_run(run).current == ("003-calm" if "calm" in target else "001-warm")
    assert Child(quick_processes, model, run, teach=learn_past_a_refusal).ended() == 0
    expected, found = load_run(gated), load_run(run)
    assert [version.task for version in found.versions] == ["warm", "calm"]
    assert {version.task for version in found.off_lineage} == {"poison"}
    assert found.scores() == expected.scores()
    for ours, theirs in zip(found.versions, expected.versions, strict=True):
        folders = [folder / "versions" / version.id for folder, version in ((run, ours), (gated, theirs))]
        assert same_weights(*(load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders))
        for name in ("method.safetensors", "replay.jsonl"):
            first, second = ((folder / name).read_bytes() for folder in folders)
            assert first == second
    assert not (run / "work").exists()
