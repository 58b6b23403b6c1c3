"""Child processes that begin with what they need imported: they are forked from a server that did nothing else."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest

# A process has one such server, and the first child that is started decides what it imports: so this is all of it.
# Last comes what freezes all objects there are, so that no child's garbage collection walks them.
IMPORTED = ["everalign.serving.store.database", "psycopg", "stores_for_tests", "two_processes_for_tests", "test_resume"]


@pytest.fixture(scope="session")
def quick_processes():
    """The context whose `Process` is forked from the server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        process = context.Process(target=_nothing)
        process.start()
        process.join()
    assert process.exitcode == 0
    return context


def _nothing() -> None:
    """Start the server, while the environment is the one that it needs."""
