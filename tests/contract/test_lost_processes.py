"""One of two processes is killed, stands still or fails: the other ends with a clear word, and a later call goes on."""

import os
import random
import signal
import sys
import time

import pytest
import torch
from test_resume import check_same_run

from everalign import cli, distributed
from everalign.errors import EveralignError
from everalign.learning.run_data import load_run
from everalign.methods import LifeAlign
from everalign.training.trainer import Trainer
from learner_for_tests import adapter_weights, make_learner, same_weights, save_model, tasks
from two_processes_for_tests import environments, join

OPTIONS = {"sft_epochs": 1.0, "epochs": 1.5, "checkpoint_steps": 1, "reference": "base"}
LIMIT = 240.0
"""Seconds after which a process is taken for hung."""


def learn(model, output, log, environment, started=None, fault=None):
    """One of the processes: learns two tasks from wherever the run stands; ends as a command does."""
    sys.stderr = open(f"{log}.{environment['RANK']}", "w", buffering=1)  # noqa: SIM115  # until the process ends
    cli.notes.quiet = environment["RANK"] != "0"
    try:
        join(environment)
        if fault is not None and fault[0] == distributed.rank():
            break_at(*fault[1:])
        learner = make_learner(model, output, LifeAlign(space="product"), "fpo", resume=True, options=OPTIONS)
        if started is not None:
            started.set()
        learner.learn_all(tasks("warm", "brief"))
    except Exception as error:  # noqa: BLE001  # as the command line does
        lost = distributed.lost_contact(error)
        sys.exit(cli._fail(str(error), getattr(error, "exit_code", 1), lost))


def break_at(where, count, how):
    """Be killed, stand still or fail at the count-th exchange with the other process, or the count-th training step."""
    seen = []

    def due():
        seen.append(where)
        if len(seen) == count and how == "fails":
            raise EveralignError("no memory is left")
        if len(seen) == count:
            os.kill(os.getpid(), how)

    holder, name = {"exchange": (distributed, "_watched"), "step": (Trainer, "training_step")}[where]
    original = getattr(holder, name)

    def breaking(*arguments, **others):
        due()
        return original(*arguments, **others)

    setattr(holder, name, breaking)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


class Pair:
    """Two processes that learn into one folder."""

    def __init__(self, quick_processes, model, output, fault=None, timeout=120.0):
        self.log, self.started = output.with_suffix(".log"), quick_processes.Event()
        self.processes = [
            quick_processes.Process(
                target=learn, args=(model, output, self.log, environment, self.started, fault), daemon=True
            )
            for environment in environments(timeout)
        ]
        for process in self.processes:
            process.start()

    def ended(self, *ranks):
        """Wait for the processes of these ranks, or both; returns the exit codes."""
        chosen = [self.processes[rank] for rank in ranks or (0, 1)]
        for process in chosen:
            process.join(LIMIT)
            assert process.exitcode is not None, "a process hangs"
        return [process.exitcode for process in chosen]

    def said(self, rank):
        return self.log.with_suffix(f".log.{rank}").read_text()


@pytest.fixture(scope="module")
def whole(quick_processes, model, tmp_path_factory):
    """An undisturbed run of two processes, and the seconds it took."""
    output = tmp_path_factory.mktemp("whole") / "run"
    pair = Pair(quick_processes, model, output)
    assert pair.started.wait(LIMIT)
    began = time.perf_counter()
    assert pair.ended() == [0, 0]
    return output, time.perf_counter() - began


def test_killed_again_and_again_and_resumed(quick_processes, whole, model, tmp_path):
    run = tmp_path / "run"
    faults = [(1, "exchange", 25), (0, "step", 5), (1, "step", 6), (0, "exchange", 30)]
    for rank, where, count in faults:
        # Each goes on from where the one before was killed.
        pair = Pair(quick_processes, model, run, (rank, where, count, signal.SIGKILL))
        codes = pair.ended()
        assert codes[rank] == -signal.SIGKILL
        assert codes[1 - rank] == 1
        # Rank 0 keeps what the two tell each other, where no launcher does.
        who = "rank 1 of 2 has ended" if rank == 1 else "another process has ended"
        assert f"{who} or does not answer" in pair.said(1 - rank)
    assert Pair(quick_processes, model, run).ended() == [0, 0]
    check_same_run(whole[0], run)


def test_another_number_of_processes_goes_on(quick_processes, whole, model, tmp_path):
    run = tmp_path / "run"
    assert Pair(quick_processes, model, run, (1, "step", 8, signal.SIGKILL)).ended()[1] == -signal.SIGKILL
    make_learner(model, run, LifeAlign(space="product"), "fpo", resume=True, options=OPTIONS).learn_all(
        tasks("warm", "brief")
    )
    assert load_run(run).current == "002-brief"
    for index in (0, 1):
        found, expected = adapter_weights(run, index), adapter_weights(whole[0], index)
        for name in (name for name in found if "lora_A" in name):
            other = name.replace("lora_A", "lora_B")
            torch.testing.assert_close(found[other] @ found[name], expected[other] @ expected[name], rtol=0, atol=1e-4)


def test_a_process_that_stands_still_is_given_up(quick_processes, model, tmp_path):
    pair = Pair(quick_processes, model, tmp_path / "run", (1, "step", 3, signal.SIGSTOP), timeout=8.0)
    try:
        assert pair.ended(0) == [1]
    finally:
        pair.processes[1].kill()
    assert "error: rank 1 of 2 has ended or does not answer" in pair.said(0)


def test_the_process_that_fails_says_so_alone(quick_processes, model, tmp_path):
    pair = Pair(quick_processes, model, tmp_path / "run", (1, "step", 3, "fails"))
    assert pair.ended() == [1, 1]
    assert pair.said(1) == "error: rank 1 of 2: no memory is left\n"
    assert "error" not in pair.said(0)


@pytest.mark.slow
def test_killed_at_many_random_moments(quick_processes, whole, model, tmp_path):
    """20 kills of one of the two processes, in runs that go on from where the last kill left them."""
    rng, kills, run = random.Random(0), 0, tmp_path / "run0"
    while kills < 20:
        pair = Pair(quick_processes, model, run)
        assert pair.started.wait(LIMIT)
        time.sleep(rng.uniform(0.0, whole[1]))
        victim = pair.processes[rng.randrange(2)]
        victim.kill()
        codes = pair.ended()
        kills += -signal.SIGKILL in codes
        if codes == [0, 0]:
            check_same_run(whole[0], run)
            run = tmp_path / f"run{kills}"
    assert Pair(quick_processes, model, run).ended() == [0, 0]
    check_same_run(whole[0], run)
    assert same_weights(adapter_weights(whole[0]), adapter_weights(run))
