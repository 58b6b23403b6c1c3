"""What results depend on beside settings: processor, GPU, driver, libraries; and computing the same bits again."""

import os
import platform
import re
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from everalign.distributed import world
from everalign.errors import InputError

# Every run asks, and reading a package's metadata takes milliseconds.
_version = cache(version)
_LIBRARIES = ("everalign", "torch", "transformers", "peft", "accelerate", "safetensors")
_DRIVER = Path("/proc/driver/nvidia/version")
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
# The workspaces with which cuBLAS sums in one order: its documentation, "Results reproducibility".
_CUBLAS_FIXED = (":4096:8", ":16:8")


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that results depend on."""
    return {name: _version(name) for name in _LIBRARIES}


def machine_facts() -> dict[str, Any]:
    """Return processor, core count, platform, threads and processes; of a GPU its model, memory, driver and CUDA."""
    info, cpu = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if info.exists():
        models = [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    facts = {"cpu": cpu, "cores": os.cpu_count() or 1, "platform": platform.platform()}
    facts |= {"threads": torch.get_num_threads(), "processes": world()}
    return facts | (gpu_facts() if torch.cuda.is_available() else {})


def gpu_facts() -> dict[str, Any]:
    """Return what is known of the current GPU and of what computes on it."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": gpu.name,
        "gpus": torch.cuda.device_count(),
        "gpu_memory": gpu.total_memory,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "fp32_products": torch.get_float32_matmul_precision(),
    }


def driver_version(file: Path = _DRIVER) -> str | None:
    """Return the version of NVIDIA's driver, such as 580.65.06; None where its kernel module does not say."""
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", file.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else None


def compute_deterministically() -> None:
    """Make operations of this process give the same bits each time on the same machine, or fail; it stays so.

    On a CPU they do so anyway. On a GPU sums such as those of `index_add` have no fixed order otherwise.

    Raises:
        InputError: cuBLAS is set up otherwise, or was used already.
    """
    given = os.environ.get(_CUBLAS)
    if given is not None and given not in _CUBLAS_FIXED:
        raise InputError(f"deterministic: needs {_CUBLAS}={_CUBLAS_FIXED[0]}, found {given}: unset it", field=_CUBLAS)
    if given is None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise InputError(
            f"deterministic: CUDA is in use already: set {_CUBLAS}={_CUBLAS_FIXED[0]} before this process starts",
            field=_CUBLAS,
        )
    os.environ[_CUBLAS] = given or _CUBLAS_FIXED[0]
    torch.use_deterministic_algorithms(True)
