"""Two-sided CUSUM on standardised values."""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np

from detectors.base import F64, Detector, positive
from detectors.registry import register
from detectors.scanning import alarms_in

GRID = float(2**20)
"""Values are rounded to multiples of 1/GRID (1e-6 standard deviations). Sums of such numbers are exact in float64 as
long as they stay under 2**32, so that the running sum over a batch equals the recursion row by row, bit for bit."""
SHORT, LONG = 64, 2048
"""Values scanned at once, just after an alarm and at most: what lies behind an alarm is scanned again."""


@register("cusum")
class CUSUM(Detector):
    """Cumulative sums of what exceeds half the shift looked for, one upwards, one downwards.

        S+ = max(0, S+ + z - shift / 2)        S- = max(0, S- - z - shift / 2)        drift when max(S+, S-) > threshold

    For independent Gaussian values and a known shift no test with the same false-alarm rate has a shorter worst-case
    delay (Moustakides 1986). Needs values with mean 0 and standard deviation 1 in the reference: use ``Calibrated``,
    which also finds the threshold for correlated or heavy-tailed streams. Notices a change of the mean alone.

    E. S. Page, "Continuous inspection schemes", Biometrika 41, 1954.

    ``shift`` is the smallest shift worth noticing, in standard deviations; ``threshold`` is in standard deviations
    too; ``warning`` is raised above ``warn_at`` times the threshold.
    """

    def __init__(self, threshold: float = 5.0, *, shift: float = 1.0, warn_at: float = 0.7) -> None:
        self._shift = positive("shift", shift)
        self._warn_at = positive("warn_at", warn_at)
        self._slack = float(round(0.5 * shift * GRID))
        self._set_threshold(threshold)
        self._up = self._down = 0.0

    def _set_threshold(self, threshold: float) -> None:
        self._threshold = positive("threshold", threshold)
        self._limit = self._threshold * GRID
        self._warn_limit = self._limit * self._warn_at

    @property
    def threshold(self) -> float:
        """The bound h of both sums, in standard deviations."""
        return self._threshold

    @property
    def statistic(self) -> float:
        """The greater of the two sums; 0 after an alarm."""
        return max(self._up, self._down) / GRID

    def options(self) -> dict[str, float]:
        """``shift`` and ``warn_at``."""
        return {"shift": self._shift, "warn_at": self._warn_at}

    def with_threshold(self, threshold: float) -> Self:
        """A new CUSUM at zero with another threshold."""
        return type(self)(threshold, **self.options())

    def update(self, value: float) -> Self:
        """Read one value. Raises ``ValueError`` or ``OverflowError`` if it is not finite."""
        step = round(value * GRID)
        up = self._up + step - self._slack
        down = self._down - step - self._slack
        # Comparisons instead of max(): half the time of the whole update.
        if not up > 0.0:
            up = 0.0
        if not down > 0.0:
            down = 0.0
        top = up if up > down else down
        self.warning = top > self._warn_limit
        self.drift = top > self._limit
        if self.drift:
            up = down = 0.0
        self._up, self._down = up, down
        return self

    def update_many(self, values: F64) -> list[int]:
        """Read ``values`` (B,); indices of the alarms. Raises ``ValueError`` if a value is not finite."""
        step = np.rint(np.asarray(values, dtype=np.float64) * GRID)
        if not step.size:
            return []
        if not math.isfinite(step.sum()):
            raise ValueError("CUSUM needs finite values: drop the others first, as Calibrated does")
        alarms = alarms_in(step, self._scan, SHORT, LONG)
        self.drift = bool(alarms) and alarms[-1] == step.size - 1
        return alarms

    def _scan(self, step: F64) -> int | None:
        """Index of the first alarm in ``step`` (B,), in grid units; the state is then that after it. Else None."""
        up = _reflected(step - self._slack, self._up)
        down = _reflected(-step - self._slack, self._down)
        top = np.maximum(up, down)
        if top.max() > self._limit:
            self._up = self._down = 0.0
            self.warning = True
            return int((top > self._limit).argmax())
        self._up, self._down = float(up[-1]), float(down[-1])
        self.warning = bool(top[-1] > self._warn_limit)
        return None

    def reset(self) -> None:
        """Both sums back to zero."""
        self._up = self._down = 0.0
        self.drift = self.warning = False

    def state_dict(self) -> dict[str, Any]:
        """Both sums in grid units, the flags and the threshold."""
        return {
            "threshold": self._threshold,
            "up": self._up,
            "down": self._down,
            "drift": self.drift,
            "warning": self.warning,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; the options are those of the constructor."""
        self._set_threshold(state["threshold"])
        self._up, self._down = float(state["up"]), float(state["down"])
        self.drift, self.warning = bool(state["drift"]), bool(state["warning"])


def _reflected(steps: F64, start: float) -> F64:
    """``S = max(0, S + step)`` from ``start`` over ``steps`` (B,), which is overwritten; all S (B,).

    Written as a sum minus its running minimum, where only a minimum below zero counts.
    """
    steps[0] += start
    total = np.add.accumulate(steps, out=steps)
    floor = np.minimum.accumulate(total)
    np.minimum(floor, 0.0, out=floor)
    return np.subtract(total, floor, out=total)
