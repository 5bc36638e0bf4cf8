"""Whether the frozen model's features have moved away from their classes: by its mean class distance."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from adapters.fast.core.class_distance import ClassDistance
from adapters.fast.core.seen import F64, RunningMean

LEVEL_ROWS, SLOW_LEVEL_ROWS = 128, 1024
"""Memory of the mean class distance, in rows, and of that from which a new shift stands out."""
SUSPECT, SUSPECT_ERRORS = 1.04, 4.0
"""A mean is suspicious from so many times the source's on, if that is as many standard errors above it."""


class Suspicion:
    """Compares the mean class distance of the latest rows with the source's, and with that of the rows before them."""

    def __init__(self, distance: ClassDistance) -> None:
        self._distance = distance
        self.level = RunningMean(LEVEL_ROWS)
        self._slow = RunningMean(SLOW_LEVEL_ROWS)

    def update(self, distances: F64) -> None:
        """Take in (n,) class distances; those that are not finite are left out."""
        distances = distances[np.isfinite(distances)]
        if len(distances):
            mean = float(distances.mean())
            self.level.add(mean, len(distances))
            self._slow.add(mean, len(distances))

    def _above(self, before: float, design_effect: float) -> bool:
        error = self._distance.spread * math.sqrt(design_effect / self.level.rows)
        return self.level.value - before > max((SUSPECT - 1.0) * self._distance.level, SUSPECT_ERRORS * error)

    def shifted(self, design_effect: float) -> bool:
        """Whether the rows are farther away than the source's."""
        return self.level.rows >= LEVEL_ROWS / 4 and self._above(self._distance.level, design_effect)

    def shifted_again(self, design_effect: float) -> bool:
        """Whether they are farther away than the rows before them."""
        return self._slow.rows >= SLOW_LEVEL_ROWS / 4 and self._above(self._slow.value, design_effect)

    def state(self) -> dict[str, Any]:
        """Return a copy of all that `update` changes."""
        return {"level": self.level.state(), "slow": self._slow.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self.level.load(state["level"])
        self._slow.load(state["slow"])
