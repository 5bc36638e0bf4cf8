"""Observations of a label-correlated stream: a run of equal labels counts once."""

from __future__ import annotations

from typing import Any

import numpy as np

from daemon.records import F64

LONGEST = 16
"""Rows after which a run counts, and another begins: a stream of one class is not one observation for ever."""


class Runs:
    """Means of values over runs of equal labels, in the order of the stream.

    Sensors see one thing for a while: twenty rows of one class are hardly more evidence about a model than one. Where
    labels change from row to row, nearly every row is its own run.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the run under way."""
        self._label = float("nan")
        self._total = 0.0
        self._count = 0

    def means(self, labels: np.ndarray, values: F64) -> F64:
        """The means of the runs that ended; labels and values are (n,)."""
        done = []
        for label, value in zip(labels.tolist(), values.tolist(), strict=True):
            if self._count and (label != self._label or self._count >= LONGEST):
                done.append(self._total / self._count)
                self._total, self._count = 0.0, 0
            self._label = float(label)
            self._total += value
            self._count += 1
        return np.asarray(done, dtype=np.float64)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"label": self._label, "total": self._total, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self._label, self._total, self._count = float(state["label"]), float(state["total"]), int(state["count"])
