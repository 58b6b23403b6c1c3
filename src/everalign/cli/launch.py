"""`--processes N`: run a verb in several processes of this machine, by torch's own launcher."""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Annotated

import typer

from everalign import distributed
from everalign.cli.console import say
from everalign.cli.options import INTERRUPTED, option
from everalign.errors import EveralignError, InputError

Processes = Annotated[
    int | None,
    option("Processes of this machine that share the work: one for each GPU, or some on CPUs.", "N", default="1"),
]

Fsdp = Annotated[
    bool,
    option("Have each process hold a part of the base model's layers, and gather a layer to compute it.", "", "--fsdp"),
]

LAUNCHER = "EVERALIGN_LAUNCHER"
"""Environment variable: the process that has started this one as one of several."""

# Seconds that processes have to end in when one of them has failed.
_SHUTDOWN = 10
# Verbs that several processes can share.
_SHARED = ("learn", "reward train", "correct train")
_GROUPS = (["reward"], ["correct"], ["feedback"])


def check_verb(arguments: list[str]) -> None:
    """Refuses a verb that every one of several launched processes would do again."""
    verb = " ".join(arguments[: 2 if arguments[:1] in _GROUPS else 1])
    if verb and not verb.startswith("-") and verb not in _SHARED and (count := distributed.launched() or 1) > 1:
        raise InputError(f"{verb} runs in one process, found {count}: start it without a launcher")


def share_work(
    processes: int | None,
    context: typer.Context,
    check: Callable[[], object] = lambda: None,
    fsdp: bool | None = None,
) -> None:
    """Joins the processes of a launcher, or starts as many as were asked for, waits for them, and leaves the verb.

    Says how many processes run, where there is a launcher.

    Args:
        processes: as many as were asked for.
        context: of the verb.
        check: finds mistakes: before processes are started, which takes long, or once they have joined, so that one of
            them reports it.
        fsdp: whether the user wants to shard the base model; None where the verb cannot.
    """
    if fsdp is None and distributed.asks_for_fsdp():
        raise InputError("accelerate is configured for FSDP, which only learn can use: take a configuration for DDP")
    starts = distributed.check_processes(processes)
    if fsdp and not starts and (distributed.launched() or 1) < 2:
        raise InputError("--fsdp shares the base model between processes: give --processes N too", field="fsdp")
    if not starts:
        distributed.start()
    check()
    if starts:
        assert processes is not None
        raise typer.Exit(_launch(processes, context.find_root().obj))
    if distributed.launched() is not None:  # there is a launcher that was meant to start some
        say("processes", distributed.one_line(), "bold")


def _launch(processes: int, arguments: list[str]) -> int:
    """Run the command line in several processes; returns the exit code."""
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise InputError(f"--processes {processes}: this machine has {gpus} GPUs, one for each process")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ[LAUNCHER] = str(os.getpid())
    # What ends the processes is said by them and below, not by the launcher's own log.
    logging.disable(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as logs:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=processes,
                run_id=f"everalign-{os.getpid()}",
                rdzv_backend="c10d",
                rdzv_endpoint="127.0.0.1:0",
                local_addr="127.0.0.1",
                max_restarts=0,
                shutdown_timeout=_SHUTDOWN,
                logs_specs=DefaultLogsSpecs(log_dir=logs),
            )
            elastic_launch(config, sys.executable)("-m", "everalign", *arguments)
    except ChildFailedError as error:
        return _failed({number: failure.exitcode for number, failure in error.failures.items()}, processes)
    except SignalException as stopped:
        return INTERRUPTED if stopped.sigval == signal.SIGINT else EveralignError.exit_code
    finally:
        logging.disable(logging.NOTSET)
        del os.environ[LAUNCHER]
    return 0


def _failed(codes: dict[int, int], processes: int) -> int:
    """Name a process that was killed, which cannot do so itself; returns the exit code of the one that failed first."""
    # The launcher ends the others by SIGTERM.
    killed = [number for number, code in codes.items() if code < 0 and -code != signal.SIGTERM]
    if killed or all(code < 0 for code in codes.values()):
        number = min(killed or codes)
        name = signal.Signals(-codes[number]).name
        say("error", f"rank {number} of {processes} was ended by {name}, and the others with it", "bold red")
        if name == "SIGKILL":
            say("note", "the system kills a process that takes more memory than there is", "cyan")
        return EveralignError.exit_code
    return max(codes.values())


def end_with_launcher() -> None:
    """Lets this process end when the launcher that started it is killed; on Linux."""
    parent = os.environ.get(LAUNCHER)
    if parent is None or not sys.platform.startswith("linux"):
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != int(parent):  # it is gone already
        sys.exit(EveralignError.exit_code)
