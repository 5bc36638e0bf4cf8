"""What is replayed: a recorded stream, how it is cut into batches, and when its labels become known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from daemon.records import F32, F64, Bools, Labels, Positions, RawBatch
from daemon.streams.codec_base import assemble

PARTITION = "recording/0"
I64 = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """A stream with the truth beside it, in the order in which it came."""

    x: F32
    """(N, *input_shape); rows with a value that is not finite are answered as invalid."""
    y: NDArray[np.int64] | F64 | F32
    """(N,) classes or targets, all of them, for the scores; -1 or NaN where unknown: that row is not scored."""
    times_s: F64
    """(N,) seconds; the row's number where the recording has none."""
    keys: list[bytes | None] | None = None
    """Record keys: with HOMEOSTAT_SLOTS=key each has a fast state of its own."""
    changes: tuple[int, ...] = ()
    """Rows at which the world is known to have changed."""
    name: str = "recording"
    """What it is called in the report."""

    def __post_init__(self) -> None:
        """Refuse columns that do not belong together."""
        rows = len(self.x)
        for name, column in (("y", self.y), ("times_s", self.times_s), ("keys", self.keys)):
            if column is not None and len(column) != rows:
                raise ValueError(f"{self.name}: {rows} rows of x with {len(column)} of {name}")

    def __len__(self) -> int:
        return len(self.x)

    @cached_property
    def valid(self) -> Bools:
        """(N,) which rows have finite numbers only."""
        return np.asarray(np.isfinite(self.x.reshape(len(self.x), -1)).all(axis=1), np.bool_)

    @cached_property
    def known(self) -> Bools:
        """(N,) which rows have a label to be scored against."""
        if self.y.dtype.kind == "f":
            return np.asarray(np.isfinite(self.y), np.bool_)
        return np.asarray(self.y >= 0, np.bool_)

    def digest(self) -> str:
        """16 hex digits of everything in it."""
        found = hashlib.sha256(repr((self.x.shape, self.y.dtype.kind, self.changes)).encode())
        for column in (self.x, self.y, self.times_s):
            found.update(np.ascontiguousarray(column).tobytes())
        if self.keys is not None:
            found.update(repr(self.keys).encode())
        return found.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a recording is replayed."""

    batch_rows: int = 64
    """Rows of a batch."""
    delay: int = 200
    """Rows after which a label is known: that of row n once row n + delay is answered."""
    label_share: float = 1.0
    """Share of the rows whose label ever comes; 0: there is no label stream at all."""
    seed: int = 0
    """Chooses those rows (the fewer are among the more), and seeds torch."""

    def __post_init__(self) -> None:
        """Refuse what can't be replayed."""
        if self.batch_rows < 1 or self.delay < 0 or not 0.0 <= self.label_share <= 1.0:
            raise ValueError(
                f"batch_rows={self.batch_rows}, delay={self.delay}, label_share={self.label_share}: batches need a "
                "row, delays must not be negative, and a share is between 0 and 1"
            )


def batches(rows: int, size: int) -> Iterator[slice]:
    """The rows of each batch, in order."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def revealed(recording: Recording, plan: Plan) -> Bools:
    """(N,) the rows whose label comes some day: a seeded hash of the row, so that a smaller share is part of a larger.

    The hash is splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014).
    """
    word = np.arange(len(recording), dtype=np.uint64) + np.uint64((plan.seed * 0x9E3779B97F4A7C15) & (2**64 - 1))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
    share = ((word ^ (word >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53
    return recording.known & (share < plan.label_share)


class Clock:
    """Which labels are known: those of rows ``delay`` rows behind what was answered."""

    def __init__(self, recording: Recording, plan: Plan) -> None:
        self._rows: I64 = np.flatnonzero(revealed(recording, plan))
        self._delay = plan.delay
        self._next = 0

    def due(self, answered: int) -> I64:
        """Rows whose labels became known since the last call, now that rows up to ``answered`` have their answers."""
        stop = int(np.searchsorted(self._rows, answered - self._delay))
        rows = self._rows[self._next : stop]
        self._next = max(self._next, stop)
        return rows


class ReplaySource:
    """The recording as raw batches, decoded already; the driver asks for each by its rows."""

    ended = True

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def batch(self, part: slice) -> RawBatch:
        """Rows ``part`` of the recording; none carries its label."""
        recording, rows = self._recording, range(part.start, part.stop)
        times = recording.times_s[part]
        keys = [None] * len(rows) if recording.keys is None else recording.keys[part]
        raw = RawBatch(keys=list(keys), times_s=times.tolist(), partitions=[PARTITION] * len(rows), offsets=list(rows))
        # A copy: rows that are not finite are zeroed in place.
        raw.batch = assemble(recording.x[part].copy(), [str(row) for row in rows], [None] * len(rows), times.tolist())
        return raw

    def open(self, positions: Positions | None) -> None:
        """Nothing to open."""

    def poll(self, max_rows: int, timeout_s: float) -> RawBatch:
        """Nothing: the driver asks by rows."""
        return RawBatch()

    def can_fill(self, rows: int) -> bool:
        """Never: nothing is polled."""
        return False

    def lag(self) -> int | None:
        """Unknown."""
        return None

    def commit(self, positions: Positions, note: str) -> None:
        """Nobody watches."""

    def ready(self) -> bool:
        """Always."""
        return True

    def close(self) -> None:
        """Nothing is open."""


class ReplayLabels:
    """Labels that come by rows, not by the recording's times: what is polled is due at once."""

    def __init__(self, recording: Recording, plan: Plan) -> None:
        self._y = recording.y
        self._clock = Clock(recording, plan)
        self._waiting: I64 = np.empty(0, np.int64)
        self.rejected: dict[str, int] = {}

    def answered(self, rows: int) -> None:
        """Rows up to ``rows`` have their answers."""
        self._waiting = np.concatenate((self._waiting, self._clock.due(rows)))

    def open(self, positions: Positions | None) -> None:
        """Nothing to open."""

    def poll(self, timeout_s: float = 0.0) -> Labels:
        """All labels that became known; never waits."""
        rows, self._waiting = self._waiting, self._waiting[:0]
        return Labels([str(row) for row in rows.tolist()], self._y[rows].tolist(), [float("-inf")] * len(rows))

    def at_end(self) -> bool:
        """Whether nothing more is known now."""
        return not len(self._waiting)

    def positions(self) -> Positions:
        """Nowhere to go on from."""
        return {}

    def close(self) -> None:
        """Nothing is open."""
