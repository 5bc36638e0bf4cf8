"""The device that the model runs on."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import torch

from daemon.records import F32

_STATM = Path("/proc/self/statm")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Of the process's own control group (version 2), as a container sees it."""


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        ValueError: when the named device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError("no such device; right would be auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"torch sees {torch.cuda.device_count()} CUDA devices, numbered from 0")
    return device


def memory_bytes(device: torch.device) -> int:
    """Memory in use: CUDA's allocator, or the process' resident set on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    try:
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):  # not Linux: the most that it ever was
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_limit_bytes(device: torch.device) -> int:
    """What there is: the GPU's memory; on the CPU that of the container, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    machine = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    try:
        return min(machine, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no control group, or "max"
        return machine


def upload(x: F32, device: torch.device) -> torch.Tensor:
    """``x`` on the model's device; to a GPU without waiting for the copy."""
    host = torch.from_numpy(np.ascontiguousarray(x))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
