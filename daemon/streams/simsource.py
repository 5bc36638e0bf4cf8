"""The simulated array as a source, and its labels as a label stream: ``sim://ageing?rate=1000&seed=7``.

Query: ``rate`` rows per second (0: as fast as they are read), ``seed``, ``label_delay`` rows until a row's label comes,
``label_share`` of the rows that get one. Row n has the time n seconds after 2026-01-01, whatever the rate: the stream
is the same at any speed, and after any restart.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from daemon.errors import StreamError
from daemon.records import Batch, Labels, Positions, RawBatch
from daemon.streams.simulator import AgeingArray

PARTITION = "sim/0"
LABEL_PARTITION = "sim-labels/0"
EPOCH_S = 1_767_225_600.0
_DEFAULTS = {"rate": 1000.0, "seed": 7.0, "label_delay": 200.0, "label_share": 1.0}


@dataclass(frozen=True)
class SimOptions:
    """What the URL says."""

    rate: float
    seed: int
    label_delay: int
    label_share: float

    @classmethod
    def parse(cls, url: str, variable: str = "HOMEOSTAT_SOURCE") -> SimOptions:
        """Raises StreamError for an unknown simulator, parameter or value."""
        parts = urlsplit(url)
        if parts.netloc != "ageing" or parts.path not in ("", "/"):
            raise StreamError(f"{variable}={url}: no such simulator; right would be sim://ageing?rate=1000&seed=7")
        values = dict(_DEFAULTS)
        for name, text in parse_qsl(parts.query, keep_blank_values=True):
            if name not in values:
                raise StreamError(f"{variable}={url}: no parameter {name!r}; there are {', '.join(_DEFAULTS)}")
            try:
                values[name] = float(text)
            except ValueError:
                raise StreamError(f"{variable}={url}: {name}={text} is not a number") from None
        if not all(0 <= value < 2**53 for value in values.values()) or values["label_share"] > 1:
            raise StreamError(f"{variable}={url}: numbers must not be negative, and label_share at most 1")
        return cls(values["rate"], int(values["seed"]), int(values["label_delay"]), values["label_share"])


class SimSource:
    """Rows of the array in order, paced to the asked rate."""

    ended = False

    def __init__(self, url: str, *, variable: str = "HOMEOSTAT_SOURCE") -> None:
        self.options = SimOptions.parse(url, variable)
        self._array = AgeingArray(self.options.seed)
        self._next = 0

    def open(self, positions: Positions | None) -> None:
        """Start at ``positions``, else at the first row; the pace counts from here."""
        self._next = self._first = (positions or {}).get(PARTITION, 0)
        self._opened = time.monotonic()

    def _due(self) -> int | None:
        """Rows that the pace allows by now; None without a pace."""
        if not self.options.rate:
            return None
        return self._first + int((time.monotonic() - self._opened) * self.options.rate) - self._next

    def poll(self, max_rows: int, timeout_s: float) -> RawBatch:
        """The rows that are due, at most ``max_rows``; waits up to ``timeout_s`` for the first."""
        due = self._due()
        if due is not None and due <= 0:
            time.sleep(min(timeout_s, 1 / self.options.rate))
            due = self._due()
        count = max_rows if due is None else max(0, min(max_rows, due))
        raw = RawBatch(arrived=time.monotonic())
        if not count:
            return raw
        start, self._next = self._next, self._next + count
        x, _ = self._array.rows(start, count)
        offsets = range(start, start + count)
        times = EPOCH_S + np.arange(start, start + count, dtype=np.float64)
        raw.offsets = list(offsets)
        raw.partitions = [PARTITION] * count
        raw.keys = [None] * count
        raw.times_s = times.tolist()
        raw.batch = Batch(
            ids=[str(row) for row in offsets],
            x=x,
            y=[None] * count,
            times_s=times,
            valid=np.ones(count, bool),
            rows=list(range(count)),
        )
        return raw

    def can_fill(self, rows: int) -> bool:
        """Whether the pace has so many by now."""
        return (self._due() or 0) >= rows if self.options.rate else True

    def lag(self) -> int | None:
        """Rows that are due and not read."""
        return max(0, self._due() or 0)

    def commit(self, positions: Positions, note: str) -> None:
        """Nobody outside watches a simulator."""

    def ready(self) -> bool:
        """Always."""
        return True

    def close(self) -> None:
        """Nothing is open."""


class SimLabels:
    """The label of row n, at the time of row n + ``label_delay``."""

    CHUNK = 512

    def __init__(self, url: str, *, variable: str = "HOMEOSTAT_SOURCE") -> None:
        self.options = SimOptions.parse(url, variable)
        self._array = AgeingArray(self.options.seed)
        self._next = 0
        self.rejected: dict[str, int] = {}

    def open(self, positions: Positions | None) -> None:
        """Go on at ``positions``, else with the first label."""
        self._next = (positions or {}).get(LABEL_PARTITION, 0)

    def poll(self, timeout_s: float = 0.0) -> Labels:
        """The next chunk; the reader holds each label until its time."""
        start, self._next = self._next, self._next + self.CHUNK
        _, y = self._array.rows(start, self.CHUNK)
        # A multiplicative hash of the row: which rows get a label is the same in every run.
        rows = np.arange(start, start + self.CHUNK, dtype=np.uint64)
        share = ((rows * np.uint64(2654435761)) & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2**32
        chosen = np.flatnonzero(share < self.options.label_share)
        times = EPOCH_S + rows.astype(np.float64) + self.options.label_delay
        return Labels([str(rows[i]) for i in chosen], y[chosen].tolist(), times[chosen].tolist())

    def at_end(self) -> bool:
        """There is always a next label."""
        return False

    def positions(self) -> Positions:
        """Next label."""
        return {LABEL_PARTITION: self._next}

    def close(self) -> None:
        """Nothing is open."""
