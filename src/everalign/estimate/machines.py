"""Accelerators by name, with the makers' figures, and the machine at hand. Importing this loads nothing heavy."""

import difflib
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from everalign.errors import InputError

_GIB = 2**30
_CPU = "cpu"


@dataclass(frozen=True)
class Machine:
    """One accelerator, or the processor at hand.

    Args:
        name: what `--gpu` calls it.
        bf16: peak of dense matrix products in bf16, operations a second.
        fp32: the same in fp32; on GPUs in TF32, which training uses there.
        bandwidth: of its memory, bytes a second.
        memory: bytes.
        share: of the peak that matrix products of training reach, low and high: an assumption.
        traffic: of the bandwidth that element-wise work reaches, low and high: an assumption.
        launch: seconds that a decoder layer costs in a pass over a micro-batch whatever its size: kernels to launch.
        step: seconds of an optimiser step besides: the optimiser itself, and the loop around it.
        reserved: bytes that the libraries take before anything is loaded.
        source: of peak, bandwidth and memory.
        link: bytes a second that one sends to others of its machine, while it receives as many.
        network: the same to other machines; an assumption where the maker's own servers are not usual.
    """

    name: str
    bf16: float
    fp32: float
    bandwidth: float
    memory: float
    source: str
    share: tuple[float, float] = (0.3, 0.55)
    traffic: tuple[float, float] = (0.5, 0.85)
    launch: float = 4e-4
    step: float = 0.02
    reserved: float = 1.0 * _GIB
    link: float = 0.0
    network: float = 0.0

    @property
    def is_cpu(self) -> bool:
        """Whether it is the processor at hand."""
        return self.name == _CPU

    def peak(self, precision: str) -> float:
        """Return the peak of matrix products in `fp32` or `bf16`, operations a second."""
        return self.bf16 if precision == "bf16" else self.fp32


@dataclass(frozen=True)
class Layout:
    """How many accelerators share a run.

    Args:
        processes: one for each.
        fsdp: whether those of a machine hold a part of the base model's layers each.
        per_machine: accelerators of a machine.
    """

    processes: int = 1
    fsdp: bool = False
    per_machine: int = 8

    @property
    def sharing(self) -> int:
        """How many hold the base model's layers together."""
        return min(self.processes, self.per_machine) if self.fsdp else 1

    def rate(self, machine: Machine) -> float:
        """Return the bytes a second of the slowest link between all."""
        return machine.link if self.processes <= self.per_machine else machine.network


ONE = Layout()


def _gpu(
    name: str, bf16: float, fp32: float, bandwidth: float, gigabytes: float, link: float, network: float, source: str
) -> Machine:
    """Units as makers give them: teraflops, gigabytes a second; memory as the driver shows it, in GiB."""
    found = Machine(name, bf16 * 1e12, fp32 * 1e12, bandwidth * 1e9, gigabytes * _GIB, source)
    return replace(found, link=link * 1e9, network=network * 1e9)


_AMPERE = "NVIDIA A100 datasheet, nvidia.com/en-us/data-center/a100"
_H200 = "NVIDIA H200 datasheet, nvidia.com/en-us/data-center/h200, dense"
_ADA = "NVIDIA Ada GPU architecture whitepaper, appendix A, fp32 accumulate"
_HOPPER = "NVIDIA H100 datasheet, nvidia.com/en-us/data-center/h100, dense: half of what it lists with sparsity"

# Peaks without sparsity; links in one direction, half of what makers list; networks of eight adapters a server, or
# assumed. A little of the memory is never free: an H100 of 80 GB shows 79.6 GiB.
MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        _gpu("h100", 989.4, 494.7, 3350, 79.6, 450, 50, _HOPPER),
        _gpu("h100-pcie", 756, 378, 2000, 79.6, 64, 25, _HOPPER),
        _gpu("h200", 989.4, 494.7, 4800, 139.8, 450, 50, _H200),
        _gpu("a100-80", 312, 156, 2039, 79.2, 300, 25, _AMPERE),
        _gpu("a100-40", 312, 156, 1555, 39.4, 300, 25, _AMPERE),
        _gpu("l40s", 362, 183, 864, 44.5, 32, 12.5, "NVIDIA L40S datasheet, nvidia.com/en-us/data-center/l40s, dense"),
        _gpu("l4", 121, 60, 300, 22.0, 32, 12.5, "NVIDIA L4 datasheet, nvidia.com/en-us/data-center/l4, dense"),
        _gpu("rtx4090", 165.2, 82.6, 1008, 23.6, 32, 1.25, _ADA),
        _gpu("mi300x", 1307.4, 653.7, 5300, 191.5, 448, 50, "AMD Instinct MI300X datasheet, amd.com, dense"),
    )
}


def find_machine(name: str) -> Machine | None:
    """Return an accelerator by its name; None for `cpu`, which has to be measured.

    Raises:
        InputError: there is none of that name.
    """
    key = name.strip().lower()
    if key == _CPU:
        return None
    if key in MACHINES:
        return MACHINES[key]
    near = difflib.get_close_matches(key, [*MACHINES, _CPU], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    known = f"{', '.join(MACHINES)}, or {_CPU} for this machine"
    raise InputError(f"--gpu {name}: is not known; {hint}Known are {known}", field="--gpu", hint=hint or known)


def machine_at_hand(device: Any = None) -> Machine:
    """Return the machine that a run on this device would use: a GPU of the table by its name, or the processor.

    Raises:
        InputError: the GPU is in no table.
    """
    import torch

    if device is None or device.type != "cuda":
        return this_processor()
    properties = torch.cuda.get_device_properties(device)
    words = properties.name.lower().replace("-", " ").replace("geforce ", "").split()
    joined = "".join(words)
    fitting = [name for name in MACHINES if all(part in joined for part in name.split("-"))]
    if not fitting:
        raise InputError(f"the GPU {properties.name} is not among those whose peak is known ({', '.join(MACHINES)})")
    return replace(MACHINES[max(fitting, key=len)], memory=float(properties.total_memory))


@cache
def this_processor() -> Machine:
    """Measure this machine's processor: two matrix products and a sum of long vectors, less than half a second.

    By processor time, which other programs on the machine do not lengthen; so what follows from it holds for a machine
    that is otherwise idle.
    """
    import psutil
    import torch

    threads, size = torch.get_num_threads(), 1024

    def fastest(work: Any) -> float:
        best = float("inf")
        for _ in range(4):
            started = time.process_time()
            work()
            best = min(best, time.process_time() - started)
        return max(best, 1e-6)

    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        rates[dtype] = threads * 2 * size**3 / fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
    x, y = torch.ones(8_000_000), torch.ones(8_000_000)
    bandwidth = threads * 3 * x.numel() * x.itemsize / fastest(lambda: torch.add(x, y, out=x))
    return Machine(
        name=_CPU,
        bf16=rates[torch.bfloat16],
        fp32=rates[torch.float32],
        bandwidth=bandwidth,
        memory=float(psutil.virtual_memory().total),
        source=f"measured on this machine, {threads} threads",
        share=(0.6, 0.9),
        # Element-wise work of a processor is bound by its loops, not by its memory.
        traffic=(0.13, 0.27),
        launch=1.5e-3,
        step=0.04,
        reserved=0.67 * _GIB,
    )
