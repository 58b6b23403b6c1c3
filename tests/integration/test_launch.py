"""Starting several processes from the command line: how many run is said, and a number that is not true is refused."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from cli_for_tests import run, write_rows
from everalign import distributed
from everalign.cli.launch import _failed
from everalign.errors import InputError
from everalign.learning.run_data import load_run
from learner_for_tests import adapter_weights, held_out, same_weights, save_model, task_rows

LAUNCHER = {"RANK": "0", "WORLD_SIZE": "1"}
CONFIGS = Path(__file__).parents[2] / "configs"
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}


@pytest.fixture
def launched(monkeypatch):
    """Sets the environment of a launcher."""
    monkeypatch.setattr(distributed, "_fsdp", False)

    def setting(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return setting


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


# ---- how many there are ----


def test_without_a_launcher_as_many_are_started_as_were_asked_for():
    assert distributed.launched() is None
    assert [distributed.check_processes(wanted) for wanted in (None, 1, 2)] == [False, False, True]
    with pytest.raises(InputError, match="must be at least 1"):
        distributed.check_processes(0)


def test_a_launcher_s_number_counts(launched):
    launched(**{**LAUNCHER, "WORLD_SIZE": "2"})
    assert distributed.launched() == 2
    assert not distributed.check_processes(2)
    with pytest.raises(InputError, match="--processes 3: the launcher has started 2 already"):
        distributed.check_processes(3)


def test_accelerate_that_starts_one_of_several_is_refused(launched):
    launched(**ACCELERATE)
    assert distributed.launched() == 1
    launched(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    with pytest.raises(InputError, match="asked for several processes and has started one"):
        distributed.launched()


def test_verbs_say_how_many_run_and_refuse_more_than_they_can_use(launched, model, tmp_path, capsys):
    launched(**LAUNCHER)
    rows = write_rows(tmp_path / "warm.jsonl", [row.to_json() for row in task_rows("warm", 4)])
    learn = [
        "learn",
        "--model",
        f"{model}",
        "--task",
        f"warm={rows}",
        "--output",
        f"{tmp_path}/run",
        "--max-length",
        "64",
    ]
    code, _, err = run(capsys, *learn, "--no-report")
    assert code == 0, err
    assert err.startswith("processes: 1 process\n")
    code, _, err = run(capsys, *learn, "--processes", "2")
    assert (code, "the launcher has started 1 already" in err) == (2, True)
    launched(WORLD_SIZE="2")
    code, _, err = run(capsys, "bench", f"{tmp_path}/recipe.yaml", "--output", f"{tmp_path}/bench")
    assert (code, "bench runs in one process, found 2" in err) == (2, True)
    code, _, err = run(
        capsys, "correct", "run", "--corrector", f"{model}", "--data", f"{rows}", "--output", "out.jsonl"
    )
    assert (code, "correct run runs in one process, found 2" in err) == (2, True)


def test_a_time_that_is_none_is_refused(launched):
    launched(**{**LAUNCHER, "WORLD_SIZE": "2", distributed.TIMEOUT: "soon"})
    with pytest.raises(InputError, match="must be seconds, found 'soon'"):
        distributed.start()


@pytest.mark.parametrize("name", ["ddp", "ddp_machines", "fsdp"])
def test_accelerate_parses_the_configurations(name, launched):
    arguments = ["--config_file", f"{CONFIGS / name}.yaml", "-m", "everalign", "learn"]
    found, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert (found.num_processes, found.num_machines) == {"ddp_machines": (16, 2)}.get(name, (8, 1))
    launched(**{key: value for key, value in prepare_multi_gpu_env(found).items() if key not in os.environ})
    # What accelerate and transformers would shard by is gone, and asked for of us.
    assert distributed.asks_for_fsdp() == (name == "fsdp")
    assert "ACCELERATE_USE_FSDP" not in os.environ


def test_what_would_be_ignored_of_a_configuration_is_refused(launched):
    launched(ACCELERATE_USE_FSDP="true", FSDP_VERSION="1")
    with pytest.raises(InputError, match="fsdp_version is 1, and only 2 is possible"):
        distributed.start()
    launched(FSDP_VERSION="2", FSDP_OFFLOAD_PARAMS="true")
    with pytest.raises(InputError, match="fsdp_offload_params is true, and only false"):
        distributed.start()


def test_sharding_needs_processes_and_a_verb_that_can(launched, model, tmp_path, capsys):
    rows = write_rows(tmp_path / "warm.jsonl", [row.to_json() for row in task_rows("warm", 4)])
    learn = ["learn", "--model", f"{model}", "--task", f"warm={rows}", "--output", f"{tmp_path}/run"]
    code, _, err = run(capsys, *learn, "--fsdp")
    assert (code, "--fsdp shares the base model between processes: give --processes N too" in err) == (2, True)
    launched(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    code, _, err = run(
        capsys, "reward", "train", "--model", f"{model}", "--data", f"{rows}", "--output", f"{tmp_path}/reward"
    )
    assert (code, "configured for FSDP, which only learn can use" in err) == (2, True)
    code, _, err = run(capsys, *learn)
    assert (code, "shares the base model between processes, found one" in err) == (2, True)


def test_a_killed_process_is_named(capsys):
    assert _failed({0: -signal.SIGTERM, 1: -signal.SIGKILL}, 2) == 1
    assert "rank 1 of 2 was ended by SIGKILL" in capsys.readouterr().err
    # Those that ended by themselves have said why.
    assert _failed({0: 3, 1: -signal.SIGTERM}, 2) == 3
    assert capsys.readouterr().err == ""


# ---- from the command line ----


def command(model, folder, output, *more, launcher=("-m", "everalign")):
    parts = [f"{name}={folder / name}.jsonl,{folder / name}.test.jsonl" for name in ("warm", "brief")]
    flags = [
        "--batch-size",
        "4",
        "--max-length",
        "64",
        "--checkpoint-steps",
        "1",
        "--no-report",
        "--learning-rate",
        "1e-3",
        "--sample-answers",
        "1",
    ]
    tasks = ["--task", parts[0], "--task", parts[1]]
    return [sys.executable, *launcher, "learn", "--model", str(model), *tasks, "--output", str(output), *flags, *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name in ("warm", "brief"):
        write_rows(folder / f"{name}.jsonl", [row.to_json() for row in task_rows(name, 9)])
        write_rows(folder / f"{name}.test.jsonl", [row.to_json() for row in held_out(name, 3)])
    return folder


def finished(arguments):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=600, check=False)


def rank_of(pid):
    facts = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return next((line.removeprefix("RANK=") for line in facts if line.startswith("RANK=")), None)


def children(pid):
    return [
        int(child) for child in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    ]


@pytest.mark.slow
def test_two_from_the_command_line_are_killed_and_resumed(model, folder, tmp_path):
    whole = finished(command(model, folder, tmp_path / "whole", "--processes", "2", "--json"))
    assert whole.returncode == 0, whole.stderr
    assert whole.stderr.startswith("processes: 2 processes share the work (gloo)\n")
    assert whole.stderr.count("task 1: warm") == 1
    assert whole.stdout.startswith("{")
    for rank, wait in (("1", "work"), ("0", "versions")):
        process = subprocess.Popen(
            command(model, folder, tmp_path / "run", "--processes", "2", "--resume"), stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None and not list((tmp_path / "run" / wait).glob("*")):
            time.sleep(0.02)
        (victim,) = [child for child in children(process.pid) if rank_of(child) == rank]
        os.kill(victim, signal.SIGKILL)
        _, err = process.communicate(timeout=600)
        assert process.returncode == 1
        assert f"error: rank {rank} of 2 was ended by SIGKILL, and the others with it" in err
        assert err.count("error:") == 1
    resumed = finished(command(model, folder, tmp_path / "run", "--processes", "2", "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert load_run(tmp_path / "run").scores() == load_run(tmp_path / "whole").scores()
    for index in (0, 1):
        assert same_weights(adapter_weights(tmp_path / "run", index), adapter_weights(tmp_path / "whole", index))


@pytest.mark.slow
def test_a_sharded_base_is_killed_and_resumed_in_another_layout(model, folder, tmp_path):
    processes = ("--processes", "2")
    whole = finished(command(model, folder, tmp_path / "whole", *processes, "--fsdp"))
    assert whole.returncode == 0, whole.stderr
    assert "the layers of the base model are shared by 2 processes (FSDP2)" in whole.stderr
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(model, folder, run, *processes, "--fsdp"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list((run / "work").rglob("checkpoint-*")):
        time.sleep(0.02)
    (victim,) = [child for child in children(process.pid) if rank_of(child) == "1"]
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=600)
    assert (process.returncode, "rank 1 of 2 was ended by SIGKILL" in err) == (1, True)
    shutil.copytree(run, tmp_path / "other")
    for output, layout in ((run, (*processes, "--fsdp")), (tmp_path / "other", ())):
        resumed = finished(command(model, folder, output, *layout, "--resume"))
        assert resumed.returncode == 0, resumed.stderr
        for index in (0, 1):
            found, expected = (adapter_weights(path, index) for path in (output, tmp_path / "whole"))
            assert not layout or same_weights(found, expected)
            for name in (name for name in found if "lora_A" in name):
                other = name.replace("lora_A", "lora_B")
                update, wanted = (weights[other] @ weights[name] for weights in (found, expected))
                # Steps of Adam, which may be whole ones for the smallest gradients.
                assert (update - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.slow
def test_torchrun_gives_what_processes_gives_and_a_bad_row_is_named_once(model, folder, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "everalign")
    done = finished(command(model, folder, tmp_path / "run", launcher=torchrun))
    assert done.returncode == 0, done.stderr
    alone = finished(command(model, folder, tmp_path / "alone"))
    assert alone.returncode == 0, alone.stderr
    found, expected = (adapter_weights(tmp_path / name, 0) for name in ("run", "alone"))
    for name in (name for name in found if "lora_A" in name):
        other = name.replace("lora_A", "lora_B")
        torch.testing.assert_close(found[other] @ found[name], expected[other] @ expected[name], rtol=0, atol=1e-6)
    (folder / "bad.jsonl").write_text('{"prompt": "q"}\n')
    bad = finished(
        [*command(model, folder, tmp_path / "bad", "--processes", "2"), "--task", f"bad={folder / 'bad.jsonl'}"]
    )
    assert bad.returncode == 2
    assert bad.stderr.count("error:") == 1
    assert "bad.jsonl:1" in bad.stderr
