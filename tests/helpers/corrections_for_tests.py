"""Answers that a corrector learns to mend, and one trained on them in a few seconds."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from everalign.correction import CorrectorOptions, TrainedCorrector, train_corrector
from everalign.data import CorrectionSet
from models_for_tests import saved_model

FAST = CorrectorOptions(learning_rate=3e-3, epochs=4, batch_size=8, tokens_per_batch=1200)


def corrections(count: int = 40, start: int = 0, source: str = "edits") -> CorrectionSet:
    """Every other answer is wrong and gets its correction, the rest stays; text and chat questions."""
    rows = []
    for i in range(start, start + count):
        question = f"q{i}?" if i % 4 < 2 else [{"role": "user", "content": f"q{i}?"}]
        answer = f"no {i}" if i % 2 else f"yes {i}"
        rows.append({"question": question, "answer": answer, "correction": f"yes {i}"})
    return CorrectionSet.of(rows, source)


@functools.cache
def corrector() -> TrainedCorrector:
    """A random Llama trained on `corrections()`, made once a session; its folder is never written to."""
    folder = Path(tempfile.mkdtemp(prefix="everalign-corrector-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return train_corrector(
        str(saved_model()), corrections(), folder / "corrector", test=corrections(20, 100), options=FAST
    )
