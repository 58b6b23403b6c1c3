"""Verbs in processes of their own, that stop in the middle of their work until a test lets them go on.

    verb = Verb(["reward", "score", ...], tmp_path / "first", gated=True)
    verb.wait_until_inside()
    verb.kill()

Forked: everything that a verb imports is there already.
"""

import os
import signal
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from everalign.cli import main
from everalign.correction.corrector import Corrector
from everalign.evaluation.scorers import CallableScorer
from everalign.modeling import sampling as kept_samples
from everalign.training.trainer import Trainer

_PATIENCE = 60.0
_started = []


class Verb:
    """A command in a process of its own.

    Args:
        arguments: of `everalign`.
        place: files whose names begin so hold what it prints, and how far it is.
        gated: whether it waits at the second batch of its work, for good.
        before: called in the process before the command.
    """

    def __init__(self, arguments, place: Path, gated: bool = False, before=lambda: None) -> None:
        self._inside, self._output = place.with_suffix(".inside"), place.with_suffix(".out")
        self._code = None
        _started.append(self)
        self.pid = os.fork()
        if not self.pid:
            self._run(list(map(str, arguments)), gated, before)

    def _run(self, arguments, gated, before):
        code = 99
        try:
            with self._output.open("w", buffering=1) as output, redirect_stdout(output), redirect_stderr(output):
                if gated:
                    self._close_gates()
                before()
                code = main(arguments)
        finally:
            os._exit(code)

    def _close_gates(self):
        CallableScorer.score = self._gated(CallableScorer.score, 1)
        Corrector.correct_batch = self._gated(Corrector.correct_batch, 1)
        kept_samples.sample_completions = self._gated(kept_samples.sample_completions, 1)
        Trainer.training_step = self._gated(Trainer.training_step, 3)

    def _gated(self, work, free):
        calls = []

        def waiting(*arguments, **options):
            calls.append(None)
            if len(calls) > free:
                self._inside.touch()
                time.sleep(10 * _PATIENCE)
            return work(*arguments, **options)

        return waiting

    def wait_until_inside(self):
        """Return once it stands in the middle of its work."""
        deadline = time.monotonic() + _PATIENCE
        while not self._inside.exists():
            assert self._code is None, f"ended with {self._code}: {self.output()}"
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self._code = os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.01)

    def wait_until_it_says(self, text):
        """Return once it has printed a text."""
        deadline = time.monotonic() + _PATIENCE
        while text not in self.output():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.01)

    def kill(self, sign=signal.SIGKILL):
        """End it the hard way."""
        os.kill(self.pid, sign)
        return self.wait()

    @classmethod
    def end_all(cls):
        """End those that are still there."""
        for verb in _started:
            if verb._code is None:
                verb.kill()
        _started.clear()

    def wait(self):
        """Return its exit code."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def output(self):
        """What it has printed, on either stream."""
        return self._output.read_text() if self._output.exists() else ""
