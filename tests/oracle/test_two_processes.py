"""Two processes that share the work learn what one does."""

import socket

import pytest
import torch

from everalign.training.stage import latest_checkpoint
from stages_for_tests import difference
from two_processes_for_tests import STAGES, main, run_stages


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def folder(quick_processes, tmp_path_factory):
    """Two processes talk over gloo, with the environment that `accelerate launch --cpu` gives them."""
    folder = tmp_path_factory.mktemp("two")
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "ACCELERATE_USE_CPU": "true",
    }
    workers = []
    for rank in "01":
        environment = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        workers.append(quick_processes.Process(target=main, args=(folder, environment), daemon=True))
        workers[-1].start()
    for worker in workers:
        worker.join(240)
    assert [worker.exitcode for worker in workers] == [0, 0]
    return folder


@pytest.fixture(scope="module")
def both(folder):
    return [torch.load(folder / f"result.{rank}") for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_stages(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("name", STAGES)
def test_both_processes_end_with_the_same_bits(both, name):
    assert difference(both[0][name][0], both[1][name][0]) == 0.0


@pytest.mark.parametrize("name", STAGES)
def test_gradients_losses_and_weights_are_those_of_one_process(both, alone, name):
    weights, gradients, losses = both[0][name]
    expected_weights, expected_gradients, expected_losses = alone[name]
    assert len(gradients) == len(expected_gradients) == -(-STAGES[name]["rows"] // STAGES[name].get("batch_size", 8))
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    # Batches of other shapes are rounded another way, and Adam makes whole steps of the smallest gradients.
    assert difference(weights, expected_weights) < 3e-5


def test_a_checkpoint_of_both_is_complete(folder):
    newest = latest_checkpoint(folder / "checkpoints" / "sft" / "checkpoints")
    assert newest is not None
    assert (newest / "rng_state_1.pth").exists()
