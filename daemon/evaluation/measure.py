"""What a configuration costs: processor time, backward passes, memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Stopwatch:
    """Processor seconds of this process while it runs; what it has to wait for costs nothing."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside."""
        began = time.process_time()
        try:
            yield
        finally:
            self.seconds += time.process_time() - began


class Backwards:
    """Counts backward passes, whoever runs them: what a method says of itself is not looked at."""

    def __init__(self) -> None:
        self.count = 0
        self._paused = False

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count while inside; ``Tensor.backward`` goes through ``torch.autograd.backward``."""
        backward, grad = torch.autograd.backward, torch.autograd.grad
        torch.autograd.backward, torch.autograd.grad = self._counted(backward), self._counted(grad)
        try:
            yield
        finally:
            torch.autograd.backward, torch.autograd.grad = backward, grad

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += not self._paused
            return call(*args, **kwargs)

        return counted


class Memory:
    """Most memory in use since it was made, beyond what was in use then.

    On CUDA that is the allocator's; on the CPU the process' resident set, after the C library has given back what it
    held of freed memory. Where the kernel can't begin a new peak, it is the process' own: 0 if an earlier one was
    higher.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = int(torch.cuda.memory_allocated(device))
            return
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        self._before = _status("VmRSS")
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")

    def peak_bytes(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return max(0, int(torch.cuda.max_memory_allocated(self._device)) - self._before)
        return max(0, _status("VmHWM") - self._before)


def _status(name: str) -> int:
    """Bytes of one line of the process' status, the process' peak where there is none."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
