"""Late labels joined to predictions. A label never arrives before its time.

The newest rows wait in a ring of fixed arrays. A label with a time stamp is held until the stream itself has reached
that time, so that a recorded label stream, read ahead of the data, teaches nothing that was not known yet; a label
whose record has not been read yet waits for it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daemon.records import F32, Labels

UNKNOWN = np.float32(np.nan)
FACTS = (
    "served",
    "adapted",
    "version",
    "frozen",
    "weight",
    "epoch",
    "number",
    "by_fast",
    "confidence",
    "place",
    "both",
)
"""What is remembered of a row besides its input, in the order of `Joined`."""
PLACES = 2**24
"""Whole numbers that a float32 holds."""


@dataclass(slots=True)
class Joined:
    """Newly labelled rows, in the order of their labels; every array has n rows."""

    x: F32
    y: np.ndarray
    served: F32
    """Prediction as it was emitted."""
    adapted: F32
    """Prediction of the fast adapter, served or in shadow, NaN where it did not run."""
    version: F32
    """Prediction of the current version without fast adaptation, NaN where it did not run."""
    frozen: F32
    """Prediction of the frozen model, NaN where it did not run."""
    weight: F32
    """One over the chance that the twins ran on the row."""
    epoch: F32
    """Which fast state predicted the row."""
    number: F32
    """Which version predicted the row."""
    by_fast: F32
    """1 where the adapted prediction is the one that was emitted."""
    confidence: F32
    """As it was emitted; 0 for a regression."""
    place: F32
    """Number of the row in the deciding adapter's state that predicted it, modulo `PLACES`; NaN for none."""
    both: F32
    """Prediction of a deciding adapter and the version together, NaN where only one of them ran."""

    def __len__(self) -> int:
        return len(self.y)


def numbers_of(places: F32, same: NDArray[np.bool_], now: int) -> NDArray[np.int64]:
    """Numbers (n,) of rows in a deciding adapter's state of which ``now`` is the next; -1 for none of it.

    Args:
        places: (n,) the numbers modulo `PLACES`, NaN for none.
        same: (n,) whether the row was predicted in the present state.
        now: number of the next row.
    """
    back = (now - np.nan_to_num(places).astype(np.int64)) % PLACES
    return np.where(same & np.isfinite(places), now - back, -1)


class LabelJoin:
    """The newest ``window`` rows and the labels that wait for one another."""

    def __init__(self, input_shape: tuple[int, ...], window: int, max_bytes: int) -> None:
        row_bytes = 4 * int(np.prod(input_shape, dtype=np.int64)) + 64
        self.window = max(1, min(window, max_bytes // row_bytes))
        self._shape = input_shape
        self._x = np.zeros((self.window, *input_shape), np.float32)
        self._facts = np.full((self.window, len(FACTS)), UNKNOWN, np.float32)
        self._ids: list[str] = [""] * self.window
        self._rows: dict[str, int] = {}
        self._next = 0
        self._held: deque[tuple[float, str, float | int]] = deque()
        self._early: OrderedDict[str, float | int] = OrderedDict()
        self._met: list[str] = []
        self.now = float("-inf")
        """Time the stream has reached, in seconds."""
        self.late = 0
        """Labels whose row has left the window, or never came."""

    def predicted(self, ids: list[str], x: F32, facts: F32, now: float) -> None:
        """Remember emitted rows; their labels may come from now on.

        Args:
            ids: (B,) the records' ids.
            x: (B, *input_shape).
            facts: (B, len(FACTS)).
            now: time of the newest row, in seconds.
        """
        self.now = max(self.now, now)
        count = len(ids)
        if count > self.window:
            cut = count - self.window
            ids, x, facts = ids[cut:], x[cut:], facts[cut:]
            self._next += cut
            count = self.window
        first = self._next
        slots = np.arange(first, first + count) % self.window
        rows = self._rows
        if first + count > self.window:
            for slot, row in zip(slots.tolist(), range(first - self.window, first + count - self.window), strict=True):
                # A repeated id belongs to its newest row: the older one's eviction must not forget it.
                if rows.get(self._ids[slot]) == row:
                    del rows[self._ids[slot]]
        self._x[slots] = x
        self._facts[slots] = facts
        for slot, name in zip(slots.tolist(), ids, strict=True):
            self._ids[slot] = name
        rows.update(zip(ids, range(first, first + count), strict=True))
        if self._early:
            self._met += [name for name in ids if name in self._early]
        self._next = first + count

    def outdate(self) -> None:
        """Another model answers from now on: what waits is scored as it was emitted, and is no evidence any more."""
        for index, name in enumerate(FACTS):
            if name in ("adapted", "version", "frozen", "place", "both"):
                self._facts[:, index] = UNKNOWN
            elif name in ("epoch", "number"):
                self._facts[:, index] = -1.0

    def waits(self, name: str) -> bool:
        """Whether a row of that id is still without its label, and in the window."""
        return name in self._rows

    def wants_more(self) -> bool:
        """Whether labels that are due may still be unread: nothing is held that lies ahead of the stream."""
        return not self._held or self._held[-1][0] <= self.now

    def has_room(self) -> bool:
        """Whether fewer labels are held for later than rows fit into the window."""
        return len(self._held) < self.window

    def offer(self, labels: Labels) -> None:
        """Take labels as they come; they count from their time on."""
        self._held.extend(zip(labels.times_s, labels.ids, labels.y, strict=True))

    def due(self, by: float | None = None) -> Joined | None:
        """Rows whose labels are due by now (or ``by``, for a stream that stands still), None when there are none."""
        by = self.now if by is None else by
        found: list[int] = []
        values: list[float | int] = []
        rows = self._rows
        for name in self._met:
            if name in self._early and name in rows:
                found.append(rows.pop(name))
                values.append(self._early.pop(name))
        self._met.clear()
        while self._held and self._held[0][0] <= by:
            _, name, value = self._held.popleft()
            row = rows.pop(name, None)
            if row is None:
                self._early[name] = value
                if len(self._early) > self.window:
                    self._early.popitem(last=False)
                    self.late += 1
            else:
                found.append(row)
                values.append(value)
        if not found:
            return None
        slots = np.asarray(found) % self.window
        return Joined(self._x[slots], np.asarray(values), *self._facts[slots].T)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: waiting rows, held labels, the stream's time."""
        filled = min(self._next, self.window)
        order = np.arange(self._next - filled, self._next) % self.window
        rows = range(self._next - filled, self._next)
        waiting = [self._rows.get(self._ids[slot]) == row for slot, row in zip(order.tolist(), rows, strict=True)]
        return {
            "x": self._x[order],
            "facts": self._facts[order],
            "ids": [self._ids[slot] for slot in order.tolist()],
            "waiting": waiting,
            "next": self._next,
            "held": [[time_s, name, value] for time_s, name, value in self._held],
            "early": [[name, value] for name, value in self._early.items()],
            "now": self.now,
            "late": self.late,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint; a smaller window keeps its newest rows."""
        self._next = int(state["next"])
        count = min(len(state["ids"]), self.window)
        self._rows.clear()
        ids, waiting = state["ids"][-count:] if count else [], state["waiting"][-count:] if count else []
        for row, name, waits in zip(range(self._next - count, self._next), ids, waiting, strict=True):
            self._ids[row % self.window] = name
            if waits:
                self._rows[name] = row
        if count:
            slots = np.arange(self._next - count, self._next) % self.window
            self._x[slots] = state["x"][-count:]
            self._facts[slots] = state["facts"][-count:]
        self._held = deque((time_s, name, value) for time_s, name, value in state["held"])
        self._early = OrderedDict((name, value) for name, value in state["early"])
        self.now, self.late = float(state["now"]), int(state["late"])
