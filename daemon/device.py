"""The device that the model runs on."""

from __future__ import annotations

import resource

import numpy as np
import torch

from daemon.records import F32


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        ValueError: when the named device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"torch sees {torch.cuda.device_count()} CUDA devices, numbered from 0")
    return device


def memory_bytes(device: torch.device) -> int:
    """Memory in use: CUDA's allocator, or the process' resident set on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def upload(x: F32, device: torch.device) -> torch.Tensor:
    """``x`` on the model's device; to a GPU without waiting for the copy."""
    host = torch.from_numpy(np.ascontiguousarray(x))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
