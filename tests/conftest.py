"""What every test can rely on."""

import os
import sys
from collections.abc import Iterator

import pytest

# Nothing that a test does may need the network.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _subnormal_numbers() -> Iterator[None]:
    """Undo what a learner sets for its process, so that no test depends on which ran before it."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
