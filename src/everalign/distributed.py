"""Several processes that share one job: who computes what, who writes, and what happens when one of them fails.

All processes run the same program with the same arguments and keep in step. Each computes its share of the rows
(`share`, `add_up`); what has to happen once, such as writing a file, the main process does (`on_main`). Either way all
of them have the result, so that nothing else needs to know how many there are. Without a launcher there is one process,
and nothing here costs anything.

A launcher is `torchrun`, `accelerate launch` or `everalign ... --processes N`: whatever sets RANK and WORLD_SIZE.
"""

import json
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from everalign.errors import EveralignError, InputError

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")

TIMEOUT = "EVERALIGN_PROCESS_TIMEOUT"
"""Environment variable: seconds after which a process that does not answer is given up."""

_TIMEOUT = 1800.0
# Seconds that a failing process waits for the others' reports of the same failure, and for who prints it.
_REPORTS, _PRINTED = 3.0, 10.0


class LostProcessError(EveralignError):
    """Another process has ended or does not answer."""


@dataclass(frozen=True)
class _Group:
    """The processes.

    Args:
        rank: number of this one, from 0.
        size: how many there are.
        objects: the group over which values on the CPU are exchanged; None for torch's own.
        store: what they tell each other without waiting; None where another program made torch's group.
    """

    rank: int
    size: int
    objects: Any
    store: Any


Follower = Callable[[Exception | None], None]
"""Takes part in what others still compute together, until all are done; given the error that ended its own work."""

_group: _Group | None = None
_alone = 0
_follower: Follower | None = None
_fsdp = False


# ---- who we are ----


def rank() -> int:
    """Returns the number of this process, 0 for the main one."""
    return 0 if _group is None or _alone else _group.rank


def world() -> int:
    """Returns how many processes share the work."""
    return 1 if _group is None or _alone else _group.size


def launched() -> int | None:
    """Returns how many processes a launcher has started, as far as this one can see; None outside of a launcher.

    Raises:
        InputError: `accelerate launch` was asked for several processes and has started one.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return None
    # What accelerate sets for several processes, also where it leaves starting them to somebody else.
    if "MASTER_PORT" in os.environ:
        raise InputError(
            "accelerate launch was asked for several processes and has started one, as it does with --cpu: use "
            "--processes N instead, or torchrun --nproc-per-node N -m everalign ..."
        )
    return 1


def check_processes(wanted: int | None) -> bool:
    """Whether a verb has to start this many processes itself; refuses a number that is not the launcher's.

    Args:
        wanted: what the user asked for; None for nothing.
    """
    running = launched()
    if wanted is not None and wanted < 1:
        raise InputError(f"--processes {wanted}: must be at least 1", field="processes")
    if wanted is not None and running is not None and running != wanted:
        raise InputError(
            f"--processes {wanted}: the launcher has started {running} already: leave --processes out, or start "
            "everalign without a launcher",
            field="processes",
        )
    return wanted is not None and wanted > 1 and running is None


def asks_for_fsdp() -> bool:
    """Whether `accelerate launch` was configured for FSDP.

    The first call takes that out of the environment: else transformers and accelerate would shard too, and adapters
    with the base model.

    Raises:
        InputError: the configuration has settings that would be ignored.
    """
    global _fsdp
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("1", "true"):
        return _fsdp
    for name, wanted, advice in _FSDP_SETTINGS:
        if (found := os.environ.get(name, wanted)) != wanted:
            raise InputError(f"accelerate's {name.lower()} is {found}, and only {wanted} is possible: {advice}")
    del os.environ["ACCELERATE_USE_FSDP"]
    _fsdp = True
    return True


# Of `accelerate launch`: variable, the only value that is possible, and what to do.
_FSDP_SETTINGS = (
    ("FSDP_VERSION", "2", "set fsdp_version: 2"),
    ("FSDP_RESHARD_AFTER_FORWARD", "true", "set it, or leave FSDP out where the model fits a GPU"),
    ("FSDP_OFFLOAD_PARAMS", "false", "leave it out"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "false", "use --checkpointing on"),
    ("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP", "each decoder layer is a unit"),
)


def start() -> None:
    """Join the processes that a launcher has started; does nothing without one, or when called again.

    Raises:
        InputError: this machine has fewer GPUs than processes, or a launcher's settings would be ignored.
        LostProcessError: the others do not come.
    """
    global _group
    asks_for_fsdp()
    if _group is not None or (launched() or 1) < 2:
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true")
    if on_gpu and local >= torch.cuda.device_count():
        raise InputError(f"process {local} has no GPU of its own, this machine has {torch.cuda.device_count()}")
    if on_gpu:
        torch.cuda.set_device(local)
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    try:
        wait = timedelta(seconds=float(os.environ.get(TIMEOUT, _TIMEOUT)))
    except ValueError:
        raise InputError(f"{TIMEOUT}: must be seconds, found {os.environ[TIMEOUT]!r}", field=TIMEOUT) from None
    store = None
    with _watched():
        if not dist.is_initialized():
            store, rank, size = next(iter(rendezvous("env://", timeout=wait)))
            backend, own = "nccl" if on_gpu else "gloo", PrefixStore("group", store)
            dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=wait)
        objects = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=wait)
    _group = _Group(dist.get_rank(), dist.get_world_size(), objects, store)


def one_line() -> str:
    """Returns how many processes run, for the log."""
    if world() == 1:
        return "1 process"
    import torch.distributed as dist

    return f"{world()} processes share the work ({dist.get_backend()})"


def stop() -> None:
    """Leave the other processes, at the end of a program that went well."""
    global _group
    if _group is not None:
        import torch.distributed as dist

        with _watched():
            dist.destroy_process_group()
        _group = None


def machine_groups() -> tuple[Any, Any]:
    """Returns torch's groups of the processes on this machine, for tensors on their devices and for those on the CPU.

    They are those of all processes where each machine runs one, or their numbers differ.
    """
    import torch.distributed as dist

    size = int(os.environ.get("LOCAL_WORLD_SIZE", world()))
    regular = int(os.environ.get("LOCAL_RANK", rank() % size)) == rank() % size
    if size == 1 or world() % size or gather((size, regular)) != [(size, True)] * world():
        size = world()
    wait = timedelta(seconds=float(os.environ.get(TIMEOUT, _TIMEOUT)))
    make: Any = dist.new_subgroups  # torch gives it no types
    with _watched():
        on_device, on_cpu = (make(size, timeout=wait, backend=name)[0] for name in (dist.get_backend(), "gloo"))
    return on_device, on_cpu


def follow_with(follower: Follower | None) -> None:
    """Have processes that are done with their share of some work follow the others in this, from now on."""
    global _follower
    _follower = follower


def follows(follower: Follower) -> bool:
    """Whether processes that are done follow the others in this."""
    return _follower == follower  # a method is another object each time


def apart() -> bool:
    """Whether this process does its share of some work, and the others do theirs, or wait."""
    return _alone > 0


@contextmanager
def alone() -> Iterator[None]:
    """Context manager in which this process is the only one: what it calls there exchanges nothing."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


# ---- sharing work ----


def on_main(work: Callable[P, R]) -> Callable[P, R]:
    """Decorator: the main process alone calls the function, once all have come that far; all get its result.

    What it raises all of them raise. Results of the others are copies, made by pickle.
    """

    @wraps(work)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if world() == 1:
            return work(*args, **kwargs)
        import torch.distributed as dist

        assert _group is not None
        with _watched():
            # So that nothing changes on disk that another process is still reading.
            dist.barrier(_group.objects)
        main = rank() == 0
        done = _attempt(lambda: work(*args, **kwargs) if main else None)
        box = [_portable(done) if main else None]
        with _watched():
            dist.broadcast_object_list(box, src=0, group=_group.objects)
        return _unpack(done if main else pickle.loads(box[0]))  # type: ignore[arg-type, no-any-return]

    return run


def share(work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R]:
    """Have every process do a part of the work; returns the results of all, in the order of the items.

    Args:
        work: maps some of the items to their results, without asking the other processes for anything.
        items: the same in all processes.
    """
    if world() == 1:
        return list(work(items))
    own, size = items[rank() :: world()], world()
    parts = [_unpack(part) for part in gather(_attempt(lambda: list(work(own))))]
    results: list[Any] = [None] * len(items)
    for number, part in enumerate(parts):
        results[number::size] = part
    return results


def add_up(work: Callable[[Sequence[T]], list["Tensor"]], items: Sequence[T]) -> list["Tensor"]:
    """Have every process do a part of the work; returns the sums of the tensors that it gave.

    Args:
        work: returns sums over some of the items, zeros of the same shapes where there are none.
        items: the same in all processes.
    """
    if world() == 1:
        return work(items)
    import torch
    import torch.distributed as dist

    own = items[rank() :: world()]
    done = _attempt(lambda: work(own))
    for error in gather(done[1]):
        _unpack((None, error))
    flat = torch.cat([part.flatten() for part in done[0]])
    with _watched():
        dist.all_reduce(flat)
    sums = torch.split(flat, [part.numel() for part in done[0]])
    return [total.view_as(part) for total, part in zip(sums, done[0], strict=True)]


def gather(value: T) -> list[T]:
    """Returns the values of all processes, the main one's first; all of them have to call this."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    assert _group is not None
    found: list[Any] = [None] * world()
    with _watched():
        dist.all_gather_object(found, _portable(value), group=_group.objects)
    # Its own as it is: the others' have lost, with an error, what caused it.
    return [value if number == _group.rank else pickle.loads(part) for number, part in enumerate(found)]


def _attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Do this process's share, then follow the others until theirs is done; returns its result, or its error."""
    done: tuple[Any, Exception | None]
    with alone():
        try:
            done = work(), None
        except Exception as error:  # noqa: BLE001  # raised again, by all processes
            done = None, error
    if _follower is not None:
        _follower(done[1])
    return done


def _unpack(done: tuple[Any, Exception | None]) -> Any:
    value, error = done
    if error is not None:
        raise error
    return value


def _portable(value: Any) -> bytes:
    """Return a value as bytes; an error that cannot be read from them becomes a plain one."""
    error = value[1] if isinstance(value, tuple) and len(value) == 2 else value
    if isinstance(error, Exception):
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # noqa: BLE001  # whatever pickle makes of a user's own class
            plain = EveralignError(f"{type(error).__name__}: {error}")
            value = (None, plain) if isinstance(value, tuple) else plain
    return pickle.dumps(value)


# ---- failing ----


@contextmanager
def _watched() -> Iterator[None]:
    """Context manager that turns what torch says of a lost process into a `LostProcessError`."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(_LOST) from error


_LOST = "another process has ended or does not answer"


def lost_contact(error: BaseException) -> bool:
    """Whether an error says that another process is gone; inside a training step torch raises it as it likes."""
    import torch.distributed as dist

    if isinstance(error, LostProcessError | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection"))


def report_failure(message: str, code: int, show: Callable[[str], None], lost: bool = False) -> int:
    """Report why this process ends, once for all processes, before it ends; returns its exit code.

    Of processes that fail in the same way one prints the message. One that failed because another did leaves it to that
    one.

    Args:
        message: what happened.
        code: exit code.
        show: prints a message.
        lost: whether it is nothing but the loss of another process.
    """
    group = _group
    if group is None or group.store is None:
        show(message)
        return code
    try:
        return _agree(group, message, code, show, lost)
    except (RuntimeError, OSError):  # the store was another process's, which is gone
        show(f"{_name(group.rank, group.size)}: {_LOST if lost else message}")
        return code


def _agree(group: _Group, message: str, code: int, show: Callable[[str], None], lost: bool) -> int:
    own = json.dumps({"message": message, "code": code, "lost": lost})
    group.store.set(f"failed/{group.rank}", own)
    others = [number for number in range(group.size) if number != group.rank]
    end, told = time.monotonic() + _REPORTS, dict[int, Any]()
    while time.monotonic() < end and len(told) < len(others):
        told |= {
            number: json.loads(group.store.get(f"failed/{number}"))
            for number in others
            if group.store.check([f"failed/{number}"])
        }
        causes = [number for number in sorted(told) if not told[number]["lost"]]
        if causes and (lost or causes[0] < group.rank):
            # The first of them prints it, and must not be ended while it does.
            end = time.monotonic() + _PRINTED
            while time.monotonic() < end and not group.store.check(["printed"]):
                time.sleep(0.02)
            return int(told[causes[0]]["code"])
        time.sleep(0.02)
    if lost:
        # Whoever is left says the same; the first of them says it.
        if not told or min(told) > group.rank:
            silent = [number for number in others if number not in told]
            names = ", ".join(_name(number, group.size) for number in silent) or "another process"
            show(f"{names} has ended or does not answer; its own message, if it left one, says why")
    else:
        same = len(told) == len(others) and all(one["message"] == message for one in told.values())
        show(message if same and group.rank == 0 else f"{_name(group.rank, group.size)}: {message}")
    group.store.set("printed", "1")
    return code


def _name(number: int, size: int) -> str:
    return f"rank {number} of {size}"
