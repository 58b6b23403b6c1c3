"""Settings of the process that training profits from."""

import ctypes
import sys
import warnings

import torch
from transformers.utils import logging as transformers_logging

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_REUSED_BLOCK_BYTES = 1 << 28
_KEPT_FREE_BYTES = 1 << 30


def prepare_process() -> None:
    """Set the process up for training; safe to call more than once.

    Subnormal numbers are flushed to zero: the gradient of a softmax over a vocabulary is full of them, and a processor
    takes them a hundred times slower (measured: the fp32 backward pass of a small model, four times as long). Worker
    threads inherit this from the thread that starts them: call it before torch computes anything.
    """
    torch.set_flush_denormal(True)
    keep_freed_memory()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # peft asks transformers for an attribute under its former name.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory instead of returning it to the system after every step.

    A training step frees and takes the same large blocks again and again; given back each time, they cost over a
    million page faults a run (10 to 30 % of a small model's step on a CPU). Returns whether the allocator took it:
    False where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _REUSED_BLOCK_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE_BYTES))
