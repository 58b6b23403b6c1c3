"""One verb in a process of its own: `python process_for_tests.py GATE ARGUMENTS...` runs `everalign ARGUMENTS`.

It stops inside the verb's work until the file GATE is there, and says so by writing GATE.waiting: a test then knows
that it is in the middle. Work passes the gate at its second batch, so that something was kept before.
"""

import sys
import time
from pathlib import Path


def gated(work, gate: Path, free: int):
    """Return `work` as a function that waits at the gate once it was called `free` times."""
    calls = []

    def waiting(*arguments, **options):
        calls.append(None)
        if len(calls) == free + 1:
            gate.with_suffix(".waiting").touch()
            while not gate.exists():
                time.sleep(0.01)
        return work(*arguments, **options)

    return waiting


def main(gate: Path, arguments: list[str]) -> int:
    import torch

    from everalign.cli import main
    from everalign.correction.corrector import Corrector
    from everalign.evaluation.scorers import CallableScorer
    from everalign.modeling import kept_samples
    from everalign.training.trainer import Trainer

    torch.set_num_threads(1)
    CallableScorer.score = gated(CallableScorer.score, gate, 1)
    Corrector.correct_batch = gated(Corrector.correct_batch, gate, 1)
    kept_samples._CHUNK = 4
    kept_samples.sample_completions = gated(kept_samples.sample_completions, gate, 1)
    Trainer.training_step = gated(Trainer.training_step, gate, 3)
    return main(arguments)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
