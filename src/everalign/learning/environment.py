"""Where a result was made: versions of the libraries, and the machine."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

_LIBRARIES = ("everalign", "torch", "transformers", "peft", "accelerate", "safetensors")


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that results depend on."""
    return {name: version(name) for name in _LIBRARIES}


def machine_facts() -> dict[str, Any]:
    """Return processor, core count and platform."""
    return {"cpu": _cpu_name(), "cores": os.cpu_count() or 1, "platform": platform.platform()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
