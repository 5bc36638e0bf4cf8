"""From a signal in its own unit to what a detector reads: mean 0, deviation 1, bounded, white if asked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from detectors.base import F64


class Standardiser:
    """Maps finite values to (value - location) / scale, clipped to +-clip, and optionally prewhitened.

    Clipping bounds what one row can do: a single wild value is no drift. Prewhitening is the AR(1) filter
    (z[t] - phi z[t-1]) / sqrt(1 - phi^2), which has unit variance again; ``phi = 0`` leaves it out. ``one`` and
    ``many`` do the same operations in the same order and agree bit for bit.
    """

    def __init__(self, location: float, scale: float, clip: float, phi: float = 0.0) -> None:
        self.location, self.scale, self.clip, self.phi = location, scale, clip, phi
        self._unit = math.sqrt(1.0 - phi * phi)
        self._previous: float | None = None

    def one(self, value: float) -> float:
        """``many`` for one value."""
        z = (value - self.location) / self.scale
        clip = self.clip
        if z > clip:
            z = clip
        elif z < -clip:
            z = -clip
        if self.phi:
            before, self._previous = self._previous, z
            if before is not None:
                return (z - self.phi * before) / self._unit
        return z

    def many(self, values: F64) -> F64:
        """``values`` (B,), finite, in the signal's unit; returns (B,) standardised."""
        z = (values - self.location) / self.scale
        np.maximum(z, -self.clip, out=z)
        np.minimum(z, self.clip, out=z)
        if not self.phi or not z.size:
            return z
        white = z.copy()
        white[1:] = (z[1:] - self.phi * z[:-1]) / self._unit
        if self._previous is not None:
            white[0] = (float(z[0]) - self.phi * self._previous) / self._unit
        self._previous = float(z[-1])
        return white

    def reset(self) -> None:
        """Forget the previous value."""
        self._previous = None

    def state_dict(self) -> dict[str, Any]:
        """Location and scale (a new baseline may have moved them) and the previous value."""
        return {"location": self.location, "scale": self.scale, "previous": self._previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.location, self.scale = float(state["location"]), float(state["scale"])
        self._previous = None if state["previous"] is None else float(state["previous"])
