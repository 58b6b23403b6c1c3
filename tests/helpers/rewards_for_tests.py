"""Pairs that a reward model can tell apart, and one trained on them in about a second."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from everalign.data import PreferenceSet
from everalign.training.options import RewardOptions
from everalign.training.reward_model import TrainedRewardModel, train_reward_model
from models_for_tests import saved_model

FAST = RewardOptions(learning_rate=2e-3, epochs=3, batch_size=8, max_length=64)


def pairs(count: int = 40, start: int = 0, source: str = "pairs") -> PreferenceSet:
    """Kind answers over unkind ones of several lengths, behind chat and text prompts."""
    rows = []
    for i in range(start, start + count):
        prompt = f"q{i}?" if i % 2 else [{"role": "user", "content": f"q{i}?"}]
        rows.append({"prompt": prompt, "chosen": "yes! " * (1 + i % 3) + f"{i}", "rejected": "no. " * (1 + i % 4)})
    return PreferenceSet.of(rows, source)


@functools.cache
def reward_model() -> TrainedRewardModel:
    """A random Llama trained on `pairs()`, made once a session; its folder is never written to."""
    folder = Path(tempfile.mkdtemp(prefix="everalign-reward-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return train_reward_model(str(saved_model()), pairs(), folder / "reward", test=pairs(20, 100), options=FAST)
