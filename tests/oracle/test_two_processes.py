"""Two processes that share the work learn what one does: every objective, every method, whatever the rows' number."""

import json

import pytest
import torch
from safetensors.torch import load_file

from everalign.training.stage import latest_checkpoint
from stages_for_tests import difference
from two_processes_for_tests import RUNS, STAGES, exchange, main, run_all, run_both, run_stages, save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def folder(quick_processes, models, tmp_path_factory):
    """What two processes leave."""
    folder = tmp_path_factory.mktemp("two")
    run_both(quick_processes, main, models, folder)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    return [torch.load(folder / f"result.{rank}") for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_stages(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def alone_folder(models, tmp_path_factory):
    """What one process leaves."""
    folder = tmp_path_factory.mktemp("one")
    run_all(models, folder)
    return folder


# ---- what processes exchange ----


def test_all_processes_have_all_results(both):
    expected = exchange()
    assert both[0]["exchange"] == both[1]["exchange"]
    found = dict(both[0]["exchange"])
    assert found.pop("gathered") == [0, 1]
    assert found.pop("sum") == 6.0
    # The main process is alone in what it alone does.
    assert found.pop("from_main") == (0, 1)
    assert found["shared"] == [[], [0], [0, 2], [0, 2, 4, 6, 8]]
    assert found["error"] == ("InputError", "row 1 is bad")
    assert found["main"] == ("EveralignError", "the disk is full")
    assert found.items() <= expected.items()


# ---- stages ----


@pytest.mark.parametrize("name", STAGES)
def test_both_processes_end_with_the_same_bits(both, name):
    assert difference(both[0]["stages"][name][0], both[1]["stages"][name][0]) == 0.0
    assert both[0]["stages"][name][2] == both[1]["stages"][name][2]


@pytest.mark.parametrize("name", STAGES)
def test_gradients_losses_and_weights_are_those_of_one_process(both, alone, name):
    weights, gradients, curve = both[0]["stages"][name]
    expected_weights, expected_gradients, expected_curve = alone[name]
    assert len(gradients) == len(expected_gradients) == -(-STAGES[name]["rows"] // STAGES[name].get("batch_size", 8))
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(curve, expected_curve, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    # Batches of other shapes are rounded another way, and Adam makes whole steps of the smallest gradients.
    assert difference(weights, expected_weights) < 3e-5


def test_a_checkpoint_of_both_is_complete(folder):
    newest = latest_checkpoint(folder / "checkpoints" / "sft" / "checkpoints")
    assert newest is not None
    assert (newest / "rng_state_1.pth").exists()


# ---- runs ----


def products(folder):
    """What a version has learned: of an adapter each update B·A, whose factors are one way of many to write it."""
    (file,) = (folder / "adapter").glob("*.safetensors")
    found = load_file(file)
    pairs = {name: name.replace("lora_A", "lora_B") for name in found if "lora_A" in name}
    return {name: found[other] @ found[name] for name, other in pairs.items()} or found


def state(folder):
    """A method's state, of a memory bank each update that it remembers."""
    found = load_file(folder / "method.safetensors")
    banks = {name.rpartition("/")[0] for name in found if name.endswith("/cores")}
    for bank in banks:
        left, right, cores = (found.pop(f"{bank}/{part}") for part in ("left", "right", "cores"))
        found[f"{bank}/updates"] = left.double() @ cores.double() @ right.double().T
    return found


def close(found, expected, share=1e-5):
    """Equal up to a share of the largest value."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= share * float(value.abs().max()), name


def same_but_rounding(found, expected, rel=1e-4, least=1e-5):
    """Whether JSON values are the same, numbers up to rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            same_but_rounding(found[key], value, rel, least) for key, value in expected.items()
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(
            same_but_rounding(one, other, rel, least) for one, other in zip(found, expected, strict=True)
        )
    if isinstance(expected, float):
        return found == pytest.approx(expected, rel=rel, abs=least)
    return found == expected


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", [*RUNS, "prompts"])
def test_a_run_is_that_of_one_process(folder, alone_folder, name):
    one, two = alone_folder / name, folder / name
    versions = sorted(path.name for path in (one / "versions").iterdir())
    assert versions == sorted(path.name for path in (two / "versions").iterdir())
    assert (one / "current").read_text() == (two / "current").read_text()
    # Computed in the same batches, whoever computes them.
    assert (one / "zero_shot.json").read_bytes() == (two / "zero_shot.json").read_bytes()
    for version in versions:
        a, b = one / "versions" / version, two / "versions" / version
        close(products(b), products(a))
        close(state(b), state(a))
        if (a / "replay.jsonl").exists():
            assert (a / "replay.jsonl").read_bytes() == (b / "replay.jsonl").read_bytes()
        assert same_but_rounding(read(b / "scores.json"), read(a / "scores.json"))
        curves = ((path / "training.jsonl").read_text().splitlines() for path in (b, a))
        for found, expected in zip(*curves, strict=True):
            step, alone_step = json.loads(found), json.loads(expected)
            if abs(alone_step.get("margin", 1.0)) < 1e-5:  # which of two answers as good is ahead is rounding
                step["accuracy"] = alone_step["accuracy"]
            assert same_but_rounding(step, alone_step)
        found, expected = read(b / "manifest.json"), read(a / "manifest.json")
        for key in ("train", "test", "replay_ids", "rollouts", "weights", "gate", "warnings"):
            assert same_but_rounding(found[key], expected[key]), key
    assert read(two / "run.json")["machine"]["processes"] == 2


def test_a_reward_model_is_that_of_one_process(folder, alone_folder):
    facts = [read(path / "reward" / "everalign_reward.json") for path in (alone_folder, folder)]
    for key in ("mean", "scale", "accuracy"):
        assert facts[1][key] == pytest.approx(facts[0][key], rel=1e-4)
    close(*(load_file(path / "reward" / "model.safetensors") for path in (folder, alone_folder)))


def test_a_corrector_is_that_of_one_process(folder, alone_folder):
    facts = [read(path / "corrector" / "corrector.json") for path in (alone_folder, folder)]
    assert same_but_rounding(facts[1]["held_out"], facts[0]["held_out"])
    close(*(load_file(path / "corrector" / "model.safetensors") for path in (folder, alone_folder)))
    assert not (folder / "corrector.training").exists()
