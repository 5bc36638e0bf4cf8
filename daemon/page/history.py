"""The run so far in a bounded number of points: when one more does not fit, neighbours become one."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from typing import NamedTuple

POINTS, MARKS = 600, 120
"""Most of each. 600 points are ten minutes at one a second, a day at one in 2.4 minutes."""


class Sample(NamedTuple):
    """What the gauges say at one moment."""

    served: float
    """Recent error of the answers; NaN: unknown."""
    frozen: float
    """That of the frozen model on the same rows; NaN: unknown."""
    rank: int
    """How far from calm the state is; of several the highest is kept, so that a short alarm is not lost."""


@dataclass(slots=True)
class _Mean:
    """A mean of finite numbers."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        if math.isfinite(value):
            self.total, self.count = self.total + value, self.count + 1

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass(slots=True)
class _Bucket:
    """One or more samples that follow each other."""

    first: float
    last: float
    samples: int
    served: _Mean
    frozen: _Mean
    rank: int

    def add(self, at: float, sample: Sample) -> None:
        self.last, self.samples, self.rank = at, self.samples + 1, max(self.rank, sample.rank)
        self.served.add(sample.served)
        self.frozen.add(sample.frozen)

    def join(self, later: _Bucket) -> None:
        self.last, self.samples, self.rank = later.last, self.samples + later.samples, max(self.rank, later.rank)
        for own, other in ((self.served, later.served), (self.frozen, later.frozen)):
            own.total, own.count = own.total + other.total, own.count + other.count


class Point(NamedTuple):
    """A piece of the run."""

    first: float
    """When its first sample was taken, in monotonic seconds."""
    last: float
    """When its last one was."""
    samples: int
    served: float | None
    """Mean of the samples that had one; None: none had."""
    frozen: float | None
    rank: int


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at a moment."""

    at: float
    """Monotonic seconds."""
    kind: str
    version: int | None = None
    count: int = 1
    """How many it stands for, itself included."""


class History:
    """Points and marks from the first moment on; written by one thread, read by any.

    A point stands for ``width`` samples, 1 to begin with. When ``capacity`` points are full, each two neighbours become
    one and the width doubles, so that the whole run is always covered. Of marks, when they are too many, the two of a
    kind that are closest to each other become one.
    """

    def __init__(self, capacity: int = POINTS, marks: int = MARKS) -> None:
        if capacity < 2 or marks < 1:
            raise ValueError(f"room for {capacity} points and {marks} marks: give at least 2 and 1")
        self.capacity, self.most_marks = capacity, marks
        self.width = 1
        self._buckets: list[_Bucket] = []
        self._marks: list[Mark] = []
        self._lock = threading.Lock()

    def add(self, at: float, sample: Sample) -> None:
        """Take in one sample; ``at`` must not be before that of the one before."""
        with self._lock:
            if self._buckets and self._buckets[-1].samples < self.width:
                self._buckets[-1].add(at, sample)
                return
            if len(self._buckets) == self.capacity:
                self._halve()
            if self._buckets and self._buckets[-1].samples < self.width:
                self._buckets[-1].add(at, sample)
                return
            bucket = _Bucket(at, at, 0, _Mean(), _Mean(), sample.rank)
            bucket.add(at, sample)
            self._buckets.append(bucket)

    def _halve(self) -> None:
        for earlier, later in zip(self._buckets[::2], self._buckets[1::2], strict=False):
            earlier.join(later)
        self._buckets = self._buckets[::2]
        self.width *= 2

    def mark(self, at: float, kind: str, version: int | None = None) -> None:
        """Note that something happened; not before the mark before."""
        with self._lock:
            self._marks.append(Mark(at, kind, version))
            if len(self._marks) > self.most_marks:
                self._thin()

    def _thin(self) -> None:
        newest: dict[str, int] = {}
        best: tuple[float, int, int] | None = None
        for index, mark in enumerate(self._marks):
            if (before := newest.get(mark.kind)) is not None:
                found = (mark.at - self._marks[before].at, before, index)
                best = found if best is None else min(best, found)
            newest[mark.kind] = index
        if best is None:  # as many kinds as there is room for marks
            del self._marks[0]
            return
        _, before, index = best
        count = self._marks[before].count + self._marks[index].count
        self._marks[index] = replace(self._marks[index], count=count)
        del self._marks[before]

    def points(self) -> list[Point]:
        """All of them, oldest first; the newest one still grows."""
        with self._lock:
            return [
                Point(one.first, one.last, one.samples, one.served.value, one.frozen.value, one.rank)
                for one in self._buckets
            ]

    def marks(self) -> list[Mark]:
        """All of them, oldest first."""
        with self._lock:
            return list(self._marks)
