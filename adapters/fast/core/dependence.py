"""Whether neighbouring rows are alike beyond their class, as in a series measured without a break."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

FAR = 8
"""Rows between two that are compared with neighbours."""
MEMORY_PAIRS = 512.0
LEAST_PAIRS = 64.0
MOST = 5.0
"""Most deviations that one feature counts."""


class RowDependence:
    """Autocorrelation of rows of the same predicted class, above that of rows ``FAR`` apart.

        ρ = (c₁ − c₈) / (c₀ − c₈),    c_l = mean of z_t·z_{t−l} over the features and rows of one predicted class

    with z the distances of the features from the class's source mean, in its deviations. Rows drawn independently
    within their class have ρ near 0, whatever moved the class as a whole; a series of measurements has not, and what
    one row says of its class the next one says again.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self._z: F32 | None = None
        self._classes = np.zeros(0, np.float32)
        self._sums = np.zeros(3)
        self._pairs = np.zeros(3)

    @property
    def value(self) -> float:
        """ρ now; NaN before there are enough pairs."""
        if self._pairs.min() < LEAST_PAIRS:
            return math.nan
        own, near, far = self._sums / self._pairs
        return float((near - far) / max(own - far, 1e-9))

    def update(self, z_BD: F32, classes_B: F32) -> None:
        """Take in the next rows and their predicted classes; each call's pairs count alike, older ones fade."""
        z_BD = np.clip(np.nan_to_num(z_BD), -MOST, MOST)
        held = 0 if self._z is None else len(self._z)
        z = z_BD if self._z is None else np.concatenate([self._z, z_BD])
        classes = np.concatenate([self._classes, classes_B])
        for place, lag in enumerate((0, 1, FAR)):
            first = max(held, lag)
            if first >= len(z):
                continue
            same = classes[first:] == classes[first - lag : len(z) - lag]
            products = np.einsum("nd,nd->n", z[first:], z[first - lag : len(z) - lag]) / z.shape[1]
            count = float(same.sum())
            keep = math.exp(-count / MEMORY_PAIRS)
            self._sums[place] = keep * self._sums[place] + float(products[same].sum())
            self._pairs[place] = keep * self._pairs[place] + count
        self._z, self._classes = z[-FAR:].copy(), classes[-FAR:].copy()

    def state(self) -> dict[str, Any]:
        """Return a copy of all that `update` changes."""
        return {
            "z": None if self._z is None else self._z.copy(),
            "classes": self._classes.copy(),
            "sums": self._sums.copy(),
            "pairs": self._pairs.copy(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self._z = None if state["z"] is None else np.array(state["z"], np.float32)
        self._classes = np.array(state["classes"], np.float32)
        self._sums, self._pairs = np.array(state["sums"], np.float64), np.array(state["pairs"], np.float64)
