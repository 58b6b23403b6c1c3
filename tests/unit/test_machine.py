"""Facts of the machine, and computing deterministically."""

import json
import os

import pytest
import torch

from cli_for_tests import make_workspace, run, run_forked, settings
from everalign.errors import InputError, NondeterministicError
from everalign.modeling import machine
from everalign.modeling.decoding import draw
from everalign.modeling.machine import compute_deterministically, driver_version, machine_facts
from learner_for_tests import adapter_weights, make_learner, same_weights, tasks


@pytest.fixture
def default(monkeypatch):
    """This process as it is after the test."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def test_the_driver_s_version_is_read_from_its_kernel_module(tmp_path):
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC 13"
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == "580.65.06"
    (tmp_path / "version").write_text("nothing of the kind")
    assert driver_version(tmp_path / "version") is None
    assert driver_version(tmp_path / "none") is None


def test_a_gpu_is_told_with_its_driver_and_cuda(monkeypatch):
    class Properties:
        name, total_memory, major, minor = "NVIDIA H100 80GB HBM3", 85_000_000_000, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(machine, "driver_version", lambda: "580.65.06")
    found = machine_facts()
    assert (found["gpu"], found["gpus"], found["driver"]) == ("NVIDIA H100 80GB HBM3", 2, "580.65.06")
    assert found["compute_capability"] == "9.0"
    assert {"cpu", "cores", "platform", "threads", "processes", "cuda", "cudnn", "gpu_memory"} <= found.keys()


def test_cublas_is_set_up_or_refused(default, monkeypatch):
    compute_deterministically()
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    compute_deterministically()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(InputError, match="needs CUBLAS_WORKSPACE_CONFIG=:4096:8, found :0:0: unset it"):
        compute_deterministically()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(InputError, match="CUDA is in use already: set CUBLAS_WORKSPACE_CONFIG=:4096:8 before"):
        compute_deterministically()


def test_tokens_are_drawn_alike_from_sums_of_whole_numbers(default):
    torch.manual_seed(0)
    logits, chances = 4 * torch.randn(64, 1000), torch.rand(64, dtype=torch.float64)
    chances[:2] = torch.tensor([0.0, 1 - 2**-53])
    logits[2] = torch.tensor([-100.0] * 999 + [100.0])
    expected = draw(logits, chances)
    compute_deterministically()
    assert torch.equal(draw(logits, chances), expected)


def test_it_is_recorded_and_changes_nothing_on_a_cpu(workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(workspace)
    flags = ["learn", "--model", "model", "--task", "warm=warm.jsonl", "--rank", "4", "--no-report"]
    for name, more in (("plain", []), ("same", ["--deterministic"])):
        code, _, err = run_forked(*flags, *more, "--output", str(tmp_path / name))
        assert code == 0, err
    assert [settings(tmp_path / name)["deterministic"] for name in ("plain", "same")] == [False, True]
    assert same_weights(adapter_weights(tmp_path / "plain"), adapter_weights(tmp_path / "same"))
    (manifest,) = (tmp_path / "same" / "versions").rglob("manifest.json")
    found = json.loads(manifest.read_text())
    assert (found["deterministic"], found["precision"]) == (True, "fp32")
    assert {"cpu", "threads"} <= found["machine"].keys()
    assert "torch" in found["libraries"]


def test_an_operation_without_a_deterministic_version_is_named(default, workspace, tmp_path, monkeypatch, capsys):
    """`put_` has none on any device."""
    from everalign.training import objective_classes

    original = objective_classes.DpoObjective.loss

    def loss(*arguments):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        return original(*arguments)

    monkeypatch.setattr(objective_classes.DpoObjective, "loss", loss)
    monkeypatch.chdir(workspace)
    flags = ["learn", "--model", "model", "--task", "warm=warm.jsonl", "--no-report", "--deterministic"]
    code, _, err = run(capsys, *flags, "--output", str(tmp_path / "run"))
    assert code == 1
    assert "error: deterministic: torch has no deterministic version of put_ on this device: leave deterministic" in err
    learner = make_learner(workspace / "model", tmp_path / "other", options={"deterministic": True})
    with pytest.raises(NondeterministicError, match="put_"):
        learner.learn_all(tasks("warm"))
