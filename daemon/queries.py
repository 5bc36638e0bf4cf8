"""Asks for labels: of each window of unlabelled records, the few whose labels are worth most.

A question is sent with the answers and is durable with them. What is chosen hangs on the records, the answers and the
labels that were due, never on a clock, so that a restart from a checkpoint asks the same again: at least once.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
from prometheus_client import Counter

from adapters.slow.queries import choose, sketch
from daemon.records import F32, Batch, Bools, Positions, RawBatch
from daemon.settings import LabelBudget
from daemon.signals import CLIP, REGRESSION, Rows

Ask = Callable[[list[bytes | None], list[bytes]], None]
"""Takes questions as a sink does: keys and values."""

LONGEST_NAME = 1024
"""Characters of an id, bytes of a key: a record with a longer one is not asked for, so that a window stays small."""
_DIGITS = 4


class _Query(msgspec.Struct, omit_defaults=True):
    id: str
    ts: float
    partition: str
    offset: int
    prediction: int | float
    window: int
    why: str
    probability: float
    confidence: float | None = None
    key: str | None = None
    key_base64: str | None = None


_encode = msgspec.json.Encoder().encode


class Queries:
    """The open window of records without a label, and how much of the budget is left.

    Args:
        ask: takes the questions.
        budget: share of the records, and rows of a window.
        task: classification (doubt is one minus the confidence) or regression (it is the distance of the features from
            those that the model was packed with).
        counters: by why.
    """

    def __init__(self, ask: Ask, budget: LabelBudget, *, task: str, counters: Mapping[str, Counter]) -> None:
        self._ask = ask
        self.share, self._size = budget.share, budget.window_rows
        self._classes = task == "classification"
        self._counters = counters
        self._credit = 0.0
        self._window = 0
        self._points = np.zeros((self._size, 0), np.float32)
        self._facts = np.zeros((self._size, 3), np.float32)
        self._times = np.zeros(self._size)
        self._new = np.zeros(self._size, np.bool_)
        self._origin: list[tuple[str, bytes | None, str, int]] = []
        self.asked = 0
        """Questions so far, since the state's beginning."""

    def __len__(self) -> int:
        """Records in the open window."""
        return len(self._origin)

    def take(
        self,
        raw: RawBatch,
        batch: Batch,
        rows: Rows,
        x: F32,
        *,
        answered: Positions,
        waits: Callable[[str], bool] | None = None,
    ) -> None:
        """Take in an answered batch; each window that it fills is asked about.

        Args:
            raw: where the records come from.
            batch: their ids, times and labels.
            rows: the answers, to the valid rows of ``batch``.
            x: (B, *shape) the valid rows.
            answered: next offset per partition as of the last restart: questions about windows that lie wholly before
                it were asked then.
            waits: whether a record's label may still come; None: it may.
        """
        valid = np.flatnonzero(batch.valid)
        wanted = np.isfinite(rows.prediction) & np.isfinite(rows.confidence)
        origin: list[tuple[str, bytes | None, str, int]] = []
        for at, row in enumerate(valid.tolist()):
            name, place = batch.ids[row], batch.rows[row]
            key = raw.keys[place]
            if batch.y[row] is not None or len(name) > LONGEST_NAME or (key is not None and len(key) > LONGEST_NAME):
                wanted[at] = False
            elif wanted[at]:
                origin.append((name, key, raw.partitions[place], raw.offsets[place]))
        if not origin:
            return
        points = sketch((x if rows.features is None else rows.features)[wanted])
        new = np.array([offset >= answered.get(partition, 0) for _, _, partition, offset in origin])
        times = batch.times_s[valid][wanted]
        self._add(origin, points, self._facts_of(rows)[wanted], times, new, waits)

    def _facts_of(self, rows: Rows) -> F32:
        """(B, 3): prediction, confidence, doubt."""
        column = REGRESSION.index("feature_shift")
        doubt = 1.0 - rows.confidence if self._classes else rows.signals[:, column] / CLIP
        return np.stack((rows.prediction, rows.confidence, doubt), axis=1).astype(np.float32)

    def _add(
        self,
        origin: list[tuple[str, bytes | None, str, int]],
        points: F32,
        facts: F32,
        times: np.ndarray,
        new: Bools,
        waits: Callable[[str], bool] | None,
    ) -> None:
        if points.shape[1] != self._points.shape[1]:
            # Features of another kind, as of a batch that the frozen model answered: the two can't be compared.
            self._origin = []
            self._points = np.zeros((self._size, points.shape[1]), np.float32)
        start = 0
        while start < len(origin):
            filled = len(self._origin)
            stop = min(len(origin), start + self._size - filled)
            part, room = slice(start, stop), slice(filled, filled + stop - start)
            self._points[room], self._facts[room] = points[part], facts[part]
            self._times[room], self._new[room] = times[part], new[part]
            self._origin += origin[part]
            start = stop
            if len(self._origin) == self._size:
                self._close(waits)

    def _close(self, waits: Callable[[str], bool] | None) -> None:
        """Ask about the window and begin the next."""
        self._credit += self.share * self._size
        count = int(self._credit + 1e-9)
        self._credit -= count
        # A repeated id belongs to its newest row, as in the label join.
        newest = {origin[0]: row for row, origin in enumerate(self._origin)}
        open_to = np.array(sorted(row for name, row in newest.items() if waits is None or waits(name)), np.int64)
        if count and len(open_to):
            facts = self._facts[open_to]
            chosen = choose(
                self._points[open_to],
                facts[:, 2],
                count,
                groups=facts[:, 0] if self._classes else None,
                seed=[self._window],
            )
            self.asked += len(chosen.rows)
            if self._new.any():
                self._send(open_to[chosen.rows].tolist(), chosen.why, chosen.probability.tolist())
        self._window += 1
        self._origin = []

    def _send(self, rows: list[int], why: list[Any], probability: list[float]) -> None:
        values = []
        for row, reason, chance in zip(rows, why, probability, strict=True):
            name, key, partition, offset = self._origin[row]
            prediction, confidence = self._facts[row, :2].tolist()
            query = _Query(
                id=name,
                ts=float(self._times[row]),
                partition=partition,
                offset=offset,
                prediction=int(prediction) if self._classes else prediction,
                window=self._window,
                why=reason,
                probability=round(chance, 6),
                confidence=round(confidence, _DIGITS) if self._classes else None,
            )
            if key is not None:
                try:
                    query.key = key.decode()
                except UnicodeDecodeError:
                    query.key_base64 = b64encode(key).decode()
            values.append(_encode(query))
            self._counters[reason].inc()
        self._ask([self._origin[row][1] for row in rows], values)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the open window and what is left of the budget."""
        filled = len(self._origin)
        return {
            "credit": self._credit,
            "window": self._window,
            "asked": self.asked,
            "size": self._size,
            "points": self._points[:filled].copy(),
            "facts": self._facts[:filled].copy(),
            "times": self._times[:filled].copy(),
            "new": self._new[:filled].copy(),
            "origin": [list(origin) for origin in self._origin],
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """From a checkpoint; None, of a worker that asked nobody: begin.

        An open window that was to have another length is given up: its records are not asked for.
        """
        if state is None:
            return
        self._credit, self._window = float(state["credit"]), int(state["window"])
        self.asked = int(state["asked"])
        filled = len(state["origin"]) if int(state["size"]) == self._size else 0
        self._points = np.zeros((self._size, state["points"].shape[1]), np.float32)
        self._points[:filled], self._facts[:filled] = state["points"][:filled], state["facts"][:filled]
        self._times[:filled], self._new[:filled] = state["times"][:filled], state["new"][:filled]
        self._origin = [(name, key, partition, offset) for name, key, partition, offset in state["origin"][:filled]]
