"""A stage that was killed goes on from its newest complete checkpoint and ends with the same bits."""

import re
import shutil
import warnings

import pytest

from everalign.training.stage import latest_checkpoint
from models_for_tests import random_pairs, random_policy, random_updates
from stages_for_tests import difference, train, weights
from tiers_for_tests import slow_but


class StopError(Exception):
    """A kill, as far as the policy is concerned."""


def stop_at(step):
    def progress(done, total):
        if done == step:
            raise StopError

    return {"progress": progress}


def policy_at_start():
    """A later task's: a long-term memory below a fresh short-term adapter."""
    policy = random_policy()
    policy.write_long_term(random_updates(policy))
    return policy


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    policy = policy_at_start()
    result = train(policy, "fpo", random_pairs(40), tmp_path_factory.mktemp("whole"), **RESUMED)
    return weights(policy), result


RESUMED = {"checkpoint_steps": 2, "tokens_per_batch": 180, "epochs": 1.5, "warmup": 0.2}


def resume(folder):
    """In a new process the policy starts anew, with the same seed."""
    policy = policy_at_start()
    steps = []
    result = train(
        policy,
        "fpo",
        random_pairs(40),
        folder,
        hooks={"progress": lambda done, total: steps.append(done)},
        **RESUMED,
    )
    return weights(policy), result, steps


def interrupt(folder, step):
    with pytest.raises(StopError):
        train(policy_at_start(), "fpo", random_pairs(40), folder, hooks=stop_at(step), **RESUMED)


def without_time(curve):
    return [{key: value for key, value in entry.items() if "second" not in key} for entry in curve]


def test_a_resumed_stage_ends_with_the_same_bits(tmp_path, uninterrupted):
    interrupt(tmp_path, step=6)
    assert latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-4"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        final, result, steps = resume(tmp_path)
    assert steps == [5, 6, 7, 8]
    assert difference(final, uninterrupted[0]) == 0.0
    assert without_time(result.curve) == without_time(uninterrupted[1].curve)


def test_a_stage_killed_after_its_last_step_is_not_trained_again(tmp_path, uninterrupted):
    train(policy_at_start(), "fpo", random_pairs(40), tmp_path, **RESUMED)
    final, result, steps = resume(tmp_path)
    assert steps == []
    assert difference(final, uninterrupted[0]) == 0.0
    assert without_time(result.curve) == without_time(uninterrupted[1].curve)


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SPOILS = {
    "cut weights": lambda folder: _cut(folder / "model.safetensors"),
    "cut optimiser": lambda folder: _cut(folder / "optimizer.pt"),
    "missing file": lambda folder: (folder / "scheduler.pt").unlink(),
    "no mark": lambda folder: (folder / "complete.json").unlink(),
    "cut mark": lambda folder: _cut(folder / "complete.json"),
}


@pytest.mark.parametrize("kind", slow_but(["cut optimiser", "no mark"], SPOILS))
def test_a_cut_checkpoint_is_passed_over(tmp_path, uninterrupted, kind):
    spoil = SPOILS[kind]
    interrupt(tmp_path, step=6)
    shutil.copytree(tmp_path / "checkpoints" / "checkpoint-4", tmp_path / "checkpoints" / "checkpoint-5")
    shutil.copytree(tmp_path / "checkpoints" / "checkpoint-4", tmp_path / "checkpoints" / "checkpoint-17")
    names = ["checkpoint-17", "checkpoint-5", "checkpoint-4"]
    for name in names:
        spoil(tmp_path / "checkpoints" / name)
    with pytest.warns(UserWarning, match="is not a complete checkpoint") as caught:
        assert latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-2"
    assert [re.search(r"checkpoint-\d+", str(warning.message))[0] for warning in caught] == names
    for name in names[:2]:
        shutil.rmtree(tmp_path / "checkpoints" / name)
    with pytest.warns(UserWarning, match="resuming from before it"):
        final, _, steps = resume(tmp_path)
    assert steps == [3, 4, 5, 6, 7, 8]
    assert difference(final, uninterrupted[0]) == 0.0
    # The broken one was written again on the way, or removed as an old one.
    assert latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-8"


def test_with_no_complete_checkpoint_training_starts_over(tmp_path, uninterrupted):
    interrupt(tmp_path, step=3)
    (tmp_path / "checkpoints" / "checkpoint-2" / "complete.json").unlink()
    (tmp_path / "checkpoints" / "checkpoint-notes").mkdir()
    with pytest.warns(UserWarning, match=r"complete\.json is missing or cut"):
        final, _, steps = resume(tmp_path)
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert difference(final, uninterrupted[0]) == 0.0


def test_a_checkpoint_is_as_small_as_what_is_learned(tmp_path):
    interrupt(tmp_path, step=3)
    learned = sum(4 * value.numel() for value in policy_at_start().state_dict().values())
    assert (tmp_path / "checkpoints" / "checkpoint-2" / "model.safetensors").stat().st_size < learned + 10_000
