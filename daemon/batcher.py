"""Cuts a stream into batches: full ones while there is a backlog, partial ones only where the stream has no more.

A batch that can't be filled by what is there waits ``linger`` for more, and no longer. While it can, it is always full,
so that reading a backlog again after a crash cuts the same batches and the state comes out the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from daemon.records import RawBatch
from daemon.streams.base import Source

STALL_S = 5.0
"""A partial batch is cut after this long even though the source says that more is to come: a broker may be away."""


class Batcher:
    """Collects polled rows until a batch is full or nothing more is to be had."""

    def __init__(self, source: Source, rows: int, linger_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self.rows = rows
        """Of a full batch; may change between two calls."""
        self.linger_s = linger_s
        self._clock = clock
        self._held: RawBatch | None = None

    @property
    def held(self) -> int:
        """Rows that wait for their batch."""
        return 0 if self._held is None else len(self._held)

    def next(self, idle_s: float, limit: int | None = None) -> RawBatch | None:
        """The next batch, or None when none is due within about ``idle_s``; at most ``limit`` rows when given."""
        rows = self.rows if limit is None else max(1, min(self.rows, limit))
        if self._held is None:
            polled = self._source.poll(rows, idle_s)
            if not len(polled):
                return None
            self._held = polled
        if len(self._held) < rows and not self._source.ended:
            left_s = self.linger_s - (self._clock() - self._held.arrived)
            more = self._source.poll(rows - len(self._held), min(idle_s, max(left_s, 0.001)))
            if len(more):
                _extend(self._held, more)
        missing = rows - len(self._held)
        if missing <= 0 or self._source.ended:
            return self.flush()
        waited = self._clock() - self._held.arrived
        if waited >= STALL_S or (waited >= self.linger_s and not self._source.can_fill(missing)):
            return self.flush()
        return None

    def flush(self) -> RawBatch | None:
        """What is held, as it is."""
        held, self._held = self._held, None
        return held

    def drop(self, partitions: set[str]) -> int:
        """Forget held rows of partitions that are no longer ours; they were not answered and not committed."""
        if self._held is None or not partitions:
            return 0
        keep = [row for row, name in enumerate(self._held.partitions) if name not in partitions]
        dropped = len(self._held) - len(keep)
        if dropped:
            held = self._held
            held.unpack()
            for name in ("values", "keys", "times_s", "partitions", "offsets"):
                setattr(held, name, [getattr(held, name)[row] for row in keep])
            if not keep:
                self._held = None
        return dropped


def _extend(held: RawBatch, more: RawBatch) -> None:
    if held.batch is not None and more.batch is not None:
        held.batch.extend(more.batch, len(held))
    if more.values:
        held.unpack()
    held.values += more.values
    held.chunks += more.chunks
    held.headers |= more.headers
    held.keys += more.keys
    held.times_s += more.times_s
    held.partitions += more.partitions
    held.offsets += more.offsets
