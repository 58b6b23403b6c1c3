"""Faults of disks, folders, files, clocks and locks: nothing finished is lost, and the message says what to do.

Kills of whole processes are in test_killed_and_resumed, test_resume and test_lost_processes; files that were cut or
changed in test_resuming, test_run_directory and test_storage; the feedback store's in test_feedback_store_durability.
"""

import ctypes
import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch
from sqlalchemy import event

from cli_for_tests import FAST, make_workspace, run, write_rows
from corrections_for_tests import corrections
from everalign.correction.corrector import Corrector
from everalign.errors import EveralignError, InputError
from everalign.learning import run_store
from everalign.learning.promotion import rollback
from everalign.learning.run_data import load_run
from everalign.methods import LifeAlign
from everalign.serving.limits import Allowances
from everalign.serving.security import Allowance, Sessions
from everalign.serving.store import FeedbackStore
from everalign.storage import Journal, exclusive, new_folder, write_fault, write_tensors, write_text
from everalign.training.stage import latest_checkpoint
from everalign.training.trainer import Trainer
from learner_for_tests import adapter_weights, make_learner, same_weights, tasks
from models_for_tests import saved_model
from stores_for_tests import exchange, feedback
from tiers_for_tests import slow_but
from upstream_for_tests import HTTP, Script, UpstreamServer, serving
from verbs_for_tests import Verb

ROWS = 12
STEPS = f"{' '.join(FAST)} --no-report --epochs 2 --checkpoint-steps 1 --sample-answers 0"
LEARN = f"learn --model model --task warm=warm.jsonl,warm.test.jsonl {STEPS}"
# What each writes, and how.
VERBS = {
    "learn": ("run", LEARN),
    "reward train": ("folder", "reward train --model model --data warm.jsonl --batch-size 2 --checkpoint-steps 1"),
    "correct train": (
        "folder",
        "correct train --model roomy --data edits.jsonl --batch-size 2 --epochs 1 --checkpoint-steps 1",
    ),
    "reward score": ("out.jsonl", "reward score --model rewards:length --data answers.jsonl --batch-size 2"),
    "correct run": (
        "out.jsonl",
        "correct run --corrector roomy --template aligner-1 --data edits.jsonl --batch-size 2 --max-new-tokens 6 "
        "--no-guards",
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models and rows, made once."""
    folder = make_workspace(tmp_path_factory.mktemp("workspace"))
    answered = [{"prompt": f"q{i}?", "completions": [f"{i}", "x" * (i + 1)]} for i in range(ROWS)]
    write_rows(folder / "answers.jsonl", answered)
    write_rows(folder / "edits.jsonl", corrections(ROWS))
    shutil.copytree(saved_model(), folder / "roomy")
    (folder / "rewards.py").write_text(
        "def length(prompts, completions):\n    return [float(len(text)) for text in completions]\n"
    )
    # In this process, and so in those forked from it, layers are replaced once by ones that round differently.
    make_learner(folder / "model", folder / "first")
    return folder


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    monkeypatch.syspath_prepend(str(made))
    yield made
    Verb.end_all()


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """What each verb writes where nothing fails; made when first asked for."""
    place, found = tmp_path_factory.mktemp("whole"), {}

    def ask(verb):
        if verb not in found:
            kind, arguments = VERBS[verb]
            found[verb] = place / verb.replace(" ", "-") / kind
            done = Verb([*arguments.split(), "--output", found[verb]], place / verb.replace(" ", "-"))
            assert done.wait() == 0, done.output()
        return found[verb]

    return ask


def same(found: Path, whole: Path) -> bool:
    """Whether two verbs have come to the same."""
    if found.is_file():
        return found.read_bytes() == whole.read_bytes()
    if (found / "run.json").exists():
        return same_weights(adapter_weights(found), adapter_weights(whole))
    return (found / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def command(verb, output, again=False):
    kind, arguments = VERBS[verb]
    return [*arguments.split(), *(["--resume"] if again and verb == "learn" else []), "--output", output / kind]


# ---- a full disk ----


@pytest.fixture
def disk(tmp_path):
    """A small disk: its folder, and what gives it another size in KiB."""
    place = tmp_path / "disk"
    place.mkdir()

    def resize(size, option="remount,"):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", f"{option}size={size}k", "tmpfs", str(place)], check=False)

    if os.getuid() or resize(64, "").returncode:
        pytest.skip("a file system can be mounted by root alone")
    yield place, resize
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("verb", slow_but(["learn", "reward score"], VERBS))
def test_a_disk_that_is_full_again_and_again(verb, here, whole, disk, tmp_path):
    """It is full at other moments each time; the same command goes on, and ends as if it never had been."""
    expected, (place, resize), size, failed = whole(verb), disk, 8, 0
    while size < 100_000:
        resize(size)
        done = Verb(command(verb, place, again=True), tmp_path / str(size))
        if done.wait() == 0:
            break
        assert done.wait() in (1, 2), done.output()
        assert "full" in done.output(), done.output()
        assert "Traceback" not in done.output()
        assert "give the same command again" in done.output()
        size, failed = size * 3, failed + 1
    assert failed >= (2 if (place / VERBS[verb][0]).is_dir() else 1), done.output()
    assert same(place / VERBS[verb][0], expected)


def test_a_disk_that_is_going_to_be_full_is_told_before(here, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    code, _, err = run(capsys, *map(str, command("learn", tmp_path)))
    assert code == 0, err
    assert re.search(r"warning: .*run: about 0\.\d MiB are going to be written, and 0\.0 MiB are free: make room", err)
    assert err.index("are going to be written") < err.index("fpo: 1/")


NATIVE = {
    "safetensors": RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "system": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "limit": OSError(errno.EFBIG, "File too large"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
}


@pytest.mark.parametrize("kind", NATIVE)
def test_whoever_says_it_the_message_names_the_file_and_a_way_out(kind):
    found = write_fault(NATIVE[kind], Path("runs/a.partial/weights"))
    assert str(found).startswith("runs/a/weights: cannot be written (")
    assert "then give the same command again; what was finished is kept" in str(found)
    assert found.exit_code == 1


def test_what_is_no_fault_of_the_disk_stays_as_it_is():
    assert write_fault(RuntimeError("CUDA error"), Path("x")) is None
    assert write_fault(FileNotFoundError(errno.ENOENT, "No such file"), Path("x")) is None


def test_what_was_there_stays_when_there_is_no_room_for_more(tmp_path, monkeypatch):
    text, tensors, folder = tmp_path / "text", tmp_path / "tensors", tmp_path / "folder"
    write_text(text, "before")
    write_tensors(tensors, {"a": torch.ones(2)})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(EveralignError, match=r"text: cannot be written \(No space left on device\): the disk is full"):
        write_text(text, "after")
    with pytest.raises(EveralignError, match="tensors: cannot be written"):
        write_tensors(tensors, {"a": torch.zeros(2)})
    with pytest.raises(EveralignError, match="folder: cannot be written"), new_folder(folder) as temporary:
        (temporary / "a").write_text("a")
    assert text.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tensors", "text"]


# ---- a folder that is read-only ----


def without_privilege():
    """Obey the modes of files, also as root: give up the two capabilities that pass over them."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data, libc = (ctypes.c_uint32 * 6)(), ctypes.CDLL(None)
    libc.capget(header, data)
    data[0] &= ~0b110
    if libc.capset(header, data):
        raise OSError("capset")


@pytest.mark.parametrize("verb", VERBS)
def test_a_read_only_folder_is_refused_at_once(verb, here, tmp_path):
    place = tmp_path / "place"
    place.mkdir(mode=0o555)
    done = Verb(command(verb, place), tmp_path / "said", before=without_privilege)
    assert done.wait() == 2, done.output()
    assert f"{place}" in done.output()
    assert "may not be written to: make it writable, or choose" in done.output()
    assert "step" not in done.output()
    assert "Traceback" not in done.output()
    assert not list(place.iterdir())


def test_a_run_that_became_read_only_goes_on_when_it_is_writable_again(here, whole, tmp_path):
    output = tmp_path / "place" / "run"
    shutil.copytree(whole("learn"), output)
    more = ["--task", "brief=brief.jsonl,brief.test.jsonl", "--resume"]
    output.chmod(0o555)
    done = Verb([*command("learn", tmp_path / "place"), *more], tmp_path / "said", before=without_privilege)
    assert done.wait() == 2, done.output()
    assert "run/.lock: cannot be written (Permission denied)" in done.output()
    output.chmod(0o755)
    assert load_run(output).current == "001-warm"
    done = Verb([*command("learn", tmp_path / "place"), *more], tmp_path / "said", before=without_privilege)
    assert done.wait() == 0, done.output()


def test_a_report_and_feedback_go_to_no_read_only_folder(here, whole, tmp_path):
    store = f"sqlite:///{tmp_path / 'x.db'}"
    with FeedbackStore.open(store) as opened:
        opened.add_exchange(exchange("a"))
        opened.add_feedback(feedback("a", edited_text="better"))
    place = tmp_path / "place"
    place.mkdir(mode=0o555)
    for arguments in (
        ["report", whole("learn"), "--output", place / "report.html"],
        ["feedback", "export", "--store", store, "--as", "corrections", "--output", place / "rows.jsonl"],
    ):
        done = Verb(arguments, tmp_path / "said", before=without_privilege)
        assert done.wait() == 2, done.output()
        assert f"{place}/" in done.output()
        assert "may not be written to" in done.output()
    done = Verb(["feedback", "stats", "--store", f"sqlite:///{place}/y.db"], tmp_path / "said")
    assert done.wait() == 2


# ---- a checkpoint that was cut, or is of something else ----


def killed(verb, output, place):
    """Kill a verb at its fourth step; returns the folder of its newest checkpoint."""
    first = Verb(command(verb, output), place, gated=True)
    first.wait_until_inside()
    assert first.kill() < 0
    return max(output.rglob("checkpoint-*"), key=lambda path: path.name)


@pytest.mark.parametrize("verb", slow_but(["learn", "reward train"], ["learn", "reward train", "correct train"]))
def test_another_one_s_checkpoint_is_passed_over(verb, here, whole, tmp_path):
    ours = killed(verb, tmp_path / "ours", tmp_path / "first")
    kind, arguments = VERBS[verb]
    other = {"learn": ["--task", "warm=brief.jsonl"]}.get(verb, ["--seed", "5"])
    kept = arguments.replace("--task warm=warm.jsonl,warm.test.jsonl", "").split()
    theirs = Verb([*kept, *other, "--output", tmp_path / "theirs" / kind], tmp_path / "second", gated=True)
    theirs.wait_until_inside()
    theirs.kill()
    found = max((tmp_path / "theirs").rglob("checkpoint-*"), key=lambda path: path.name)
    assert found.name == ours.name
    shutil.rmtree(ours)
    shutil.copytree(found, ours)
    done = Verb(command(verb, tmp_path / "ours", again=True), tmp_path / "third")
    assert done.wait() == 0, done.output()
    assert f"{ours} is not a complete checkpoint (it is of another stage or run)" in done.output()
    assert same(tmp_path / "ours" / kind, whole(verb))


def test_a_stage_s_result_that_was_cut_is_learned_again(here, whole, tmp_path, monkeypatch):
    def crash(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    run_folder = tmp_path / "run"
    first = Verb(
        command("learn", tmp_path),
        tmp_path / "first",
        before=lambda: setattr(run_store.RunDirectory, "write_version", crash),
    )
    assert first.wait() < 0
    (weights,) = run_folder.rglob("done/policy.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    done = Verb(command("learn", tmp_path, again=True), tmp_path / "second")
    assert done.wait() == 0, done.output()
    assert f"{weights.parent} is not used (policy.safetensors is cut or missing)" in done.output()
    assert same(run_folder, whole("learn"))


@pytest.mark.parametrize("name", ["method.safetensors", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("how", ["half", "one bit"])
def test_a_version_or_a_bank_that_is_not_what_was_written(name, how, here, whole, tmp_path, capsys):
    shutil.copytree(whole("learn"), tmp_path / "run")
    path = tmp_path / "run" / "versions" / "001-warm" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content if how == "one bit" else content[: len(content) // 2])
    more = ["--task", "brief=brief.jsonl", "--resume"]
    code, _, err = run(capsys, *map(str, command("learn", tmp_path)), *more)
    assert code == 2
    assert f"{path}: missing or changed since it was written; restore the file" in err


def test_a_version_of_another_run(here, whole, tmp_path, capsys):
    shutil.copytree(whole("learn"), tmp_path / "run")
    code, _, err = run(capsys, *map(str, command("learn", tmp_path / "other")), "--seed", "7")
    assert code == 0, err
    place = tmp_path / "run" / "versions" / "001-warm"
    shutil.rmtree(place)
    shutil.copytree(tmp_path / "other" / "run" / "versions" / "001-warm", place)
    code, _, err = run(capsys, "versions", str(tmp_path / "run"))
    assert code == 2
    assert f"{place}: is a version of another run" in err


@pytest.mark.parametrize("verb", ["reward score", "correct run"])
def test_a_model_that_was_cut(verb, here, whole, tmp_path, capsys):
    shutil.copytree(whole("reward train" if verb == "reward score" else "correct train"), tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    arguments = {
        "reward score": ["reward", "score", "--model", "cut", "--data", "answers.jsonl"],
        "correct run": ["correct", "run", "--corrector", "cut", "--data", "edits.jsonl"],
    }[verb]
    arguments = [str(tmp_path / "cut") if part == "cut" else part for part in arguments]
    code, _, err = run(capsys, *arguments, "--output", str(tmp_path / "out.jsonl"))
    assert code == 2
    assert str(tmp_path / "cut") in err
    assert "Traceback" not in err
    assert not (tmp_path / "out.jsonl").exists()


def test_the_results_of_other_work_are_no_part_of_this(tmp_path):
    one, other = (Journal.beside(tmp_path / "out.jsonl", fact) for fact in "ab")
    one.put({0: 1.0})
    shutil.copy(one.path, other.path)
    with pytest.raises(InputError, match="holds the results of other work: delete this file"):
        other.read([0])
    assert one.read([0]) == {0: 1.0}


# ---- a clock that goes back ----


def test_the_newest_checkpoint_is_kept_whatever_the_clock_says(here, whole, tmp_path):
    """Each checkpoint looks an hour older than the one before it."""
    seen = []

    def set_back(stage, done, _):
        for path in (tmp_path / "run" / "work").rglob("checkpoint-*"):
            if path not in seen:
                seen.append(path)
                os.utime(path, (10**9 - 3600 * len(seen),) * 2)
        if (stage, done) == ("dpo", 4):
            raise KeyboardInterrupt

    learner = make_learner(here / "model", tmp_path / "run", options={"checkpoint_steps": 1, "epochs": 2.0})
    learner._setup.__dict__["progress"] = set_back
    with pytest.raises(KeyboardInterrupt):
        learner.learn_all(tasks("warm"))
    (place,) = (tmp_path / "run" / "work").rglob("checkpoints")
    assert sorted(path.name for path in place.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    assert latest_checkpoint(place) == place / "checkpoint-3"


def test_versions_are_in_the_order_in_which_they_were_learned(here, tmp_path, monkeypatch, capsys):
    times = iter(f"20{year}-01-01T00:00:00+00:00" for year in range(60, 0, -1))
    monkeypatch.setattr(run_store, "now", lambda: next(times))
    learner = make_learner(here / "model", tmp_path / "run", LifeAlign(), "fpo")
    learner.learn_all(tasks("warm", "brief"))
    found = load_run(tmp_path / "run")
    created = [version.manifest.created for version in found.versions]
    assert created == sorted(created, reverse=True)
    assert [version.id for version in found.versions] == ["001-warm", "002-brief"]
    assert rollback(tmp_path / "run").current == "001-warm"
    assert rollback(tmp_path / "run", "002").current == "002-brief"
    again = make_learner(here / "model", tmp_path / "run", LifeAlign(), "fpo", resume=True)
    again.learn_all(tasks("warm", "brief", "calm"))
    assert load_run(tmp_path / "run").current == "003-calm"


def test_feedback_is_replaced_and_learned_once_whatever_the_clock_says(tmp_path):
    noon = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
    with FeedbackStore.open(f"sqlite:///{tmp_path}/x.db") as store:
        for name in "ab":
            store.add_exchange(exchange(name, created=noon))
        store.add_feedback(feedback("a", rating=-1, created=noon))
        # The same user's later word, by a clock that has gone back meanwhile.
        store.add_feedback(feedback("a", rating=1, created=noon - timedelta(hours=1)))
        ((_, said),) = store.feedback()
        assert said.rating == 1
        store.mark_learned([said.id], "one")
        store.add_feedback(feedback("b", rating=1, created=noon - timedelta(days=1)))
        assert [found.exchange for _, found in store.feedback(unlearned=True)] == ["b"]


def test_allowances_and_sessions_outlive_a_clock_that_is_set(monkeypatch):
    day, now = 24 * 60 * 60.0, [100.5 * 24 * 60 * 60.0]
    allowances = Allowances(lambda _: None, Allowance(tokens_per_day=10), now=lambda: now[0])
    now[0] = 101 * day + 5
    allowances.spend("key", 10)
    for wrong in (101 * day - 5, 101 * day + 10):
        now[0] = wrong
        with pytest.raises(Exception, match="has used its 10 tokens"):
            allowances.enter("key")
    now[0] = 102 * day
    allowances.enter("key")

    monkeypatch.setattr("time.time", lambda: now[0])
    sessions = Sessions(60)
    session = sessions.begin("0123456789ab")
    sessions.end(session)
    now[0] += 10 * day  # wrong, and put right after another session has ended
    sessions.end(sessions.begin("0123456789ab"))
    now[0] -= 10 * day
    assert sessions.read(sessions.cookie(session)) is None


# ---- a lock that is lost, or that cannot be had ----


def test_nothing_more_is_written_once_a_lock_is_gone(tmp_path):
    lock, text = tmp_path / "lock", tmp_path / "text"

    def write_folder():
        with new_folder(tmp_path / "folder"):
            pass

    with exclusive(lock):
        write_text(text, "held")
        lock.unlink()
        # Another process begins, and holds a lock of the same name.
        handle = os.open(lock, os.O_CREAT | os.O_RDWR)
        fcntl.flock(handle, fcntl.LOCK_EX)
        for write in (lambda: write_text(text, "after"), write_folder, lambda: Journal(tmp_path / "j").put({0: 1})):
            with pytest.raises(EveralignError, match="lock: this lock was removed while it was held"):
                write()
    assert lock.exists(), "the other one's lock was removed"
    os.close(handle)
    assert text.read_text() == "held"
    with exclusive(tmp_path / "another"):
        write_text(text, "after")


@pytest.mark.parametrize("verb", ["learn", "correct run"])
def test_a_verb_whose_lock_is_lost_goes_on_when_it_is_given_again(verb, here, whole, tmp_path):
    kind = VERBS[verb][0]
    lock = tmp_path / kind / ".lock" if kind == "run" else tmp_path / f"{kind}.lock"
    place, steps = {"learn": (Trainer, "training_step"), "correct run": (Corrector, "correct_batch")}[verb], []

    def lose():
        original = getattr(*place)

        def losing(*arguments, **options):
            steps.append(None)
            if len(steps) == 4:
                lock.unlink()
            return original(*arguments, **options)

        setattr(*place, losing)

    done = Verb(command(verb, tmp_path), tmp_path / "first", before=lose)
    assert done.wait() == 1, done.output()
    assert f"{lock}: this lock was removed while it was held, so another process may be" in done.output()
    done = Verb(command(verb, tmp_path, again=True), tmp_path / "second")
    assert done.wait() == 0, done.output()
    assert same(tmp_path / kind, whole(verb))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("verb", [*VERBS, "feedback stats"])
def test_a_file_system_without_locks(verb, number, here, tmp_path, capsys, monkeypatch):
    store = tmp_path / "x.db"
    FeedbackStore.open(f"sqlite:///{store}").close()

    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    if verb == "feedback stats":
        monkeypatch.setattr("filelock._unix.lock_fd_nonblocking", none)
        arguments = ["feedback", "stats", "--store", f"sqlite:///{store}"]
    else:
        arguments = list(map(str, command(verb, tmp_path)))
    code, _, err = run(capsys, *arguments)
    assert code in (1, 2)
    assert "lock: cannot be locked (" in err
    assert "Traceback" not in err
    assert ("write to another one" in err) or ("name a file in a folder of this machine" in err)


# ---- two at once, and a consolidation that is interrupted ----


def test_what_appeared_where_a_folder_is_to_be_written_is_left_alone(here, whole, tmp_path):
    """Another program writes into the folder while a model is trained for it."""
    output = tmp_path / "folder"

    def appear():
        original = Trainer.training_step

        def training_step(*arguments, **options):
            output.mkdir(exist_ok=True)
            (output / "theirs").touch()
            return original(*arguments, **options)

        Trainer.training_step = training_step

    done = Verb(command("correct train", tmp_path), tmp_path / "first", before=appear)
    assert done.wait() == 2, done.output()
    assert f"{output}: cannot be written (Directory not empty): another process has written" in done.output()
    assert [path.name for path in output.iterdir()] == ["theirs"]
    shutil.rmtree(output)
    done = Verb(command("correct train", tmp_path), tmp_path / "second")
    assert done.wait() == 0, done.output()
    assert "was finished by an earlier call" in done.output()
    assert same(output, whole("correct train"))


BETWEEN = ["adapter_model.safetensors", "method.safetensors", "consolidation.json", "scores.json", "manifest.json"]


@pytest.fixture(scope="module")
def consolidated(made, tmp_path_factory):
    """A run that has consolidated two tasks."""
    output = tmp_path_factory.mktemp("consolidated") / "run"
    make_learner(made / "model", output, LifeAlign(space="product"), "fpo").learn_all(tasks("warm", "brief"))
    return output


@pytest.mark.parametrize("name", slow_but(BETWEEN[1:3], BETWEEN))
def test_a_consolidation_that_is_killed_between_its_files(name, here, consolidated, tmp_path):
    """The second task's: the bank of the first is still what it was, and the same bank comes out in the end."""
    pid = os.fork()
    if not pid:
        kill_when_written("002-brief.partial", name)
        learner = make_learner(here / "model", tmp_path / "run", LifeAlign(space="product"), "fpo")
        learner.learn_all(tasks("warm", "brief"))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    left = load_run(tmp_path / "run")
    assert [version.id for version in left.versions] == ["001-warm"]
    first = [folder / "versions" / "001-warm" / "method.safetensors" for folder in (tmp_path / "run", consolidated)]
    assert first[0].read_bytes() == first[1].read_bytes()
    learner = make_learner(here / "model", tmp_path / "run", LifeAlign(space="product"), "fpo", resume=True)
    learner.learn_all(tasks("warm", "brief"))
    for file in ("method.safetensors", "adapter/adapter_model.safetensors", "consolidation.json"):
        found, expected = (folder / "versions" / "002-brief" / file for folder in (tmp_path / "run", consolidated))
        assert found.read_bytes() == expected.read_bytes()


def kill_when_written(folder, name):
    """SIGKILL this process as soon as a file of that name has appeared in a folder of that name."""

    def watch(event, arguments):
        # Whatever is opened or renamed next: the file before it is written.
        if event in ("open", "os.rename", "os.mkdir") and folder in str(arguments[0]):
            place = Path(str(arguments[0]).split(folder)[0]) / folder
            if any(path.name == name for path in place.rglob("*")):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


# ---- the gateway's store ----


def test_answers_are_given_while_the_store_is_full(tmp_path, caplog):
    with (
        UpstreamServer(lambda _: Script("four")) as upstream,
        FeedbackStore.open(f"sqlite:///{tmp_path}/x.db") as store,
    ):
        full = [False]

        @event.listens_for(store._engine, "begin")
        def _limit(connection):
            connection.exec_driver_sql(f"PRAGMA max_page_count = {1 if full[0] else 10**6}")

        with serving(upstream, store=store) as gateway:
            body = {"model": "small", "messages": [{"role": "user", "content": "2+2?" * 500}], "store": True}
            first = HTTP.post(f"{gateway.url}/chat/completions", json=body).json()["id"]
            full[0] = True
            answers = [HTTP.post(f"{gateway.url}/chat/completions", json=body) for _ in range(3)]
            assert {reply.json()["choices"][0]["message"]["content"] for reply in answers} == {"four"}
            said = {"id": first, "edited_text": "4" * 20_000}
            refused = HTTP.post(f"{gateway.url}/feedback", json=said)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_failed")
            full[0] = False
            assert HTTP.post(f"{gateway.url}/feedback", json=said).status_code in (200, 201)
        assert [found.edited_text for _, found in store.feedback()] == ["4" * 20_000]
    assert "database or disk is full; check that its folder is writable, has space" in caplog.text
