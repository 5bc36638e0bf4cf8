"""The proof of progress behind liveness: that the process exists proves nothing."""

from __future__ import annotations

import time

import structlog
from prometheus_client import Gauge

log = structlog.get_logger("homeostat.service")


class Progress:
    """When the loop last got on: an offset moved, there was nothing to read, or something outside is waited for."""

    def __init__(self, timeout_s: float, gauge: Gauge) -> None:
        self.timeout_s = timeout_s
        self._gauge = gauge
        self._at = time.monotonic()
        self.waiting: str | None = None
        """What is waited for; None while everything takes and gives."""

    def moved(self) -> None:
        """An offset moved, or there was nothing to do."""
        self._at = time.monotonic()
        self.waiting = None
        self._gauge.set(time.time())

    def wait(self, reason: str) -> None:
        """Nothing moves, and that is not this process's fault."""
        if self.waiting is None:
            log.warning("waiting", reason=reason)
        self.waiting = reason
        self._at = time.monotonic()

    def alive(self) -> tuple[bool, str]:
        """For /healthz: (whether there was progress in time, why)."""
        age = time.monotonic() - self._at
        if age > self.timeout_s:
            return False, f"no progress for {age:.0f} s"
        return True, f"progress {age:.1f} s ago"
