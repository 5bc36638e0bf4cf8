"""From a signal in its own unit to what a detector reads: mean 0, deviation 1, bounded, and white if asked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from detectors.base import F64


class Standardiser:
    """Maps finite values to z = (value - location) / scale, clipped to +-clip, and what a detector's domain wants of z.

    Clipping bounds what one row can do: a single wild value is no drift. ``weights`` (P,) is a prewhitening filter,
    ``(z[t] - sum_i weights[i] z[t-1-i]) / unit``; its first P values have no past and are not given out. ``unit``
    brings it back to unit variance. ``one`` and ``many`` agree bit for bit.

    For rows (D,) all numbers are (D,), or (P, D) for ``weights``.

    ``domain`` "unit" maps to ``(z - base) / span``, limited to [0, 1]; "binary" to 1.0 where ``z > base``, else 0.0.
    """

    def __init__(
        self,
        location: Any = 0.0,
        scale: Any = 1.0,
        clip: Any = math.inf,
        *,
        weights: F64 | None = None,
        unit: Any = 1.0,
        domain: str = "standard",
        base: float = 0.0,
        span: float = 1.0,
    ) -> None:
        self.location, self.scale, self.clip, self.unit = location, scale, clip, unit
        self.weights = np.empty(0) if weights is None else np.asarray(weights, dtype=np.float64)
        self._reversed = self.weights[::-1].copy()
        self.domain, self.base, self.span = domain, base, span
        self._past: F64 | None = None
        self._plain = not self.weights.size and domain in ("standard", "raw")

    def one(self, value: float) -> float | None:
        """``many`` for one value; None while the filter has no past."""
        if not self._plain:
            made = self.many(np.array([value]))
            return float(made[0]) if made.size else None
        z = (value - self.location) / self.scale
        clip = self.clip
        if z > clip:
            return float(clip)
        if z < -clip:
            return float(-clip)
        return float(z)

    def many(self, values: F64) -> F64:
        """``values`` (B,) or (B, D), finite, in the signal's unit; returns what the detector reads of them."""
        z: F64 = (values - self.location) / self.scale
        np.maximum(z, -self.clip, out=z)
        np.minimum(z, self.clip, out=z)
        if self.weights.size:
            z = self._filtered(z)
        return self.limited(z)

    def limited(self, z: F64) -> F64:
        """What the domain makes of standardised, filtered values."""
        if self.domain == "unit":
            return np.minimum(np.maximum((z - self.base) / self.span, 0.0), 1.0)
        return (z > self.base).astype(np.float64) if self.domain == "binary" else z

    def _filtered(self, z: F64) -> F64:
        order = len(self.weights)
        path = z if self._past is None else np.concatenate((self._past, z))
        self._past = path[-order:].copy()
        if len(path) <= order:
            return path[:0]
        if z.ndim == 1:
            # One dot product a value, in C, and each the same whatever the batch.
            guess = np.correlate(path[:-1], self._reversed, mode="valid")
        else:
            guess = np.zeros((len(path) - order, path.shape[1]))
            for lag, weight in enumerate(self.weights, start=1):
                guess += weight * path[order - lag : len(path) - lag]
        white: F64 = (path[order:] - guess) / self.unit
        return white

    def reset(self) -> None:
        """Forget the past values."""
        self._past = None

    def state_dict(self) -> dict[str, Any]:
        """Location and scale (a new baseline may have moved them) and the past values."""
        return {
            "location": _copied(self.location),
            "scale": _copied(self.scale),
            "past": None if self._past is None else self._past.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.location, self.scale = _copied(state["location"]), _copied(state["scale"])
        past = state["past"]
        self._past = None if past is None else np.array(past, dtype=np.float64)


def _copied(number: Any) -> Any:
    return number.copy() if isinstance(number, np.ndarray) else float(number)
