"""What every test can rely on."""

import os
import sys
from collections.abc import Iterator

import pytest

from stores_for_tests import address, cluster, quick_processes  # noqa: F401  # fixtures of every test of the store

# Nothing that a test does may need the network.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _subnormal_numbers() -> Iterator[None]:
    """Undo what a learner sets for its process, so that no test depends on which ran before it."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
