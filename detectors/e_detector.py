"""E-detector: a bank of CUSUMs on log e-values, for shifts of mean and scale of several sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from detectors.base import F64, Detector, positive
from detectors.registry import register
from detectors.scanning import alarms_in

GRID = float(2**20)
"""Log e-values are rounded to multiples of 1/GRID, so that sums are exact and do not depend on how a stream was cut."""
LOWEST = -50.0
"""Log e-values below this are raised to it: it keeps sums exact and is as good as minus infinity."""
OVERSHOOT = 1.166
"""Siegmund's correction: a sum of steps with deviation s jumps over its limit by about 0.583 s, on either side."""
SHORT, LONG = 64, 512
"""Values scanned at once, just after an alarm and at most: what lies behind an alarm is scanned again."""
BISECTIONS = 50


@register("e_detector")
class EDetector(Detector):
    """Sums of log e-values that start anew whenever they have lost everything; drift when one exceeds ``threshold``.

        S_k = max(S_k, 0) + log e_k(z)        log e_k(z) = min(a_k z + b_k z^2 - c_k, cap)
        statistic = max_k (S_k + log w_k)

    Each of the K components is a likelihood ratio: a mean that moved up or down by one of ``shifts``, or a deviation
    that became one of ``scales``, in standard deviations of the signal. The constants c_k make the expectation of e_k
    at most 1 without drift, so that e_k is an e-value and the sum over all starting points an e-detector: for values
    independent of the past the mean time to a false alarm is at least exp(threshold) / sum_k w_k, whatever the
    horizon. Calibration (``Calibrated``) makes that exact instead of a bound, also for dependent values. The weights
    w_k, the greatest of which is 1, give each component about the same rate of false alarms (D. Siegmund, "Sequential
    Analysis", 1985, formula 10.14): all alike would leave small shifts no chance.

    Before ``fit`` c_k is that of the standard Gaussian: the guarantee then holds for Gaussian (for the mean: for all
    1-sub-Gaussian) values. ``fit`` takes it from the reference, whatever its tails. ``cap``, in nats, bounds what one
    value can say: a single wild value is no drift.

    A level shift in an autocorrelated signal that was prewhitened shows as one large value and small ones ever after:
    ``fit`` is told both (``jump``, ``gain``), and the components look for just that (a factor of 2 of the guarantee).

    J. Shin, A. Ramdas, A. Rinaldo, "E-detectors: a nonparametric framework for sequential change detection", New
    England Journal of Statistics in Data Science 2, 2024 (here with their "CUSUM" form of the e-detector).

    The default threshold is for ARL0 >= 10,000 by the guarantee. ``warning`` is raised above ``warn_at`` times the
    threshold.
    """

    assumes_independence = True

    def __init__(
        self,
        threshold: float | None = None,
        *,
        shifts: Sequence[float] = (0.25, 0.5, 1.0, 2.0),
        scales: Sequence[float] = (0.6, 1.4, 2.2),
        cap: float = 3.0,
        warn_at: float = 0.7,
    ) -> None:
        self._shifts = [positive("shifts", shift) for shift in shifts]
        self._scales = [positive("scales", scale) for scale in scales]
        if not self._shifts and not self._scales:
            raise ValueError("an e-detector needs shifts or scales to look for: give at least one")
        if 1.0 in self._scales:
            raise ValueError("scales: 1 is no change of scale, leave it out")
        self._cap = positive("cap", cap)
        self._warn_at = positive("warn_at", warn_at)
        count = 2 * len(self._shifts) + len(self._scales)
        self._gain, self._jump = 1.0, 1.0
        self._linear, self._square = self._tilts(1.0)
        self._offset = self._gaussian_offsets()
        self._first: tuple[F64, F64] | None = None
        self._weigh(self._linear**2 + 2.0 * self._square**2)
        self._set_threshold(math.log(10_000.0 * self._weights.sum()) if threshold is None else threshold)
        self._sums = np.zeros(count)

    def _tilts(self, gain: float) -> tuple[F64, F64]:
        """a_k and b_k, (K,) each, for shifts that show as ``gain`` times their size."""
        linear = [sign * gain * shift for shift in self._shifts for sign in (1.0, -1.0)] + [0.0] * len(self._scales)
        square = [0.0] * (2 * len(self._shifts)) + [0.5 - 0.5 / scale**2 for scale in self._scales]
        return np.array(linear), np.array(square)

    def _gaussian_offsets(self) -> F64:
        means = [0.5 * shift**2 for shift in self._shifts for _ in range(2)]
        return np.array(means + [math.log(scale) for scale in self._scales])

    def _weigh(self, variance: F64) -> None:
        """Set the weights from the variances (K,) of the log e-values without drift."""
        self._variance = variance
        weights = np.exp(OVERSHOOT * np.sqrt(variance)) / variance
        self._weights: F64 = weights / weights.max()
        self._handicap = np.rint(np.log(self._weights) * GRID)

    def _set_threshold(self, threshold: float) -> None:
        self._threshold = positive("threshold", threshold)
        self._limit = self._threshold * GRID
        self._warn_limit = self._limit * self._warn_at

    @property
    def threshold(self) -> float:
        """Log evidence at which drift is raised, in nats."""
        return self._threshold

    @property
    def statistic(self) -> float:
        """The greatest of the weighted sums, in nats; 0 where none has anything."""
        return max(0.0, float((self._sums + self._handicap).max()) / GRID)

    def options(self) -> dict[str, Any]:
        """``shifts``, ``scales``, ``cap`` and ``warn_at``."""
        return {"shifts": self._shifts, "scales": self._scales, "cap": self._cap, "warn_at": self._warn_at}

    def with_threshold(self, threshold: float) -> Self:
        """A new e-detector at zero with another threshold."""
        return self._copy(threshold, self.fitted())

    def fit(self, reference: F64, *, gain: float = 1.0, jump: float = 1.0) -> Self:
        """A new e-detector whose e-values have expectation 1 over ``reference`` (N,)."""
        fresh = self._copy(self._threshold, {})
        if not np.ptp(reference):
            # Gaussian e-values, except that a signal that stays constant is no loss of variance.
            return fresh._constant()
        linear, square = fresh._tilts(gain)
        first, _ = fresh._tilts(jump)
        means = 2 * len(self._shifts)
        return self._copy(
            self._threshold,
            {
                "gain": float(gain),
                "jump": float(jump),
                "offsets": (offsets := fresh._normalise(linear, square, reference, self._cap)).tolist(),
                "first_offsets": fresh._normalise(first[:means], square[:means], reference, 0.5 * self._cap).tolist(),
                "variances": np.clip(_tilted(linear, square, offsets, reference), LOWEST, self._cap).var(1).tolist(),
            },
        )

    def _constant(self) -> Self:
        offsets = np.maximum(self._offset, 0.0)
        self._first = self._linear[: 2 * len(self._shifts)], offsets[: 2 * len(self._shifts)]
        self._offset = offsets
        return self

    def fitted(self) -> dict[str, Any]:
        """``gain``, ``jump`` and the constants c_k, once more for the first value after a shift."""
        if self._first is None:
            return {}
        return {
            "gain": self._gain,
            "jump": self._jump,
            "offsets": self._offset.tolist(),
            "first_offsets": self._first[1].tolist(),
            "variances": self._variance.tolist(),
        }

    def with_fitted(self, fitted: dict[str, Any]) -> Self:
        """A new e-detector with the constants that ``fitted`` gave. Raises ``ValueError`` if they do not fit."""
        return self._copy(self._threshold, fitted)

    def _copy(self, threshold: float, fitted: dict[str, Any]) -> Self:
        new = type(self)(threshold, **self.options())
        if fitted:
            try:
                new._gain, new._jump = float(fitted["gain"]), float(fitted["jump"])
                offsets, first, variance = (
                    np.array(fitted[key], dtype=np.float64) for key in ("offsets", "first_offsets", "variances")
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"e_detector: what was learnt is damaged ({error}): calibrate anew") from error
            means = 2 * len(self._shifts)
            if offsets.shape != new._offset.shape or first.shape != (means,) or not (variance > 0).all():
                raise ValueError("e_detector: what was learnt is for other shifts or scales: calibrate anew")
            new._linear, new._square = new._tilts(new._gain)
            new._offset = offsets
            new._weigh(variance)
            new._first = new._tilts(new._jump)[0][:means], first
        return new

    @staticmethod
    def _normalise(linear: F64, square: F64, reference: F64, cap: float) -> F64:
        """c_k (K,) at which the mean of e_k over ``reference`` (N,) is 1, by bisection: the mean falls with c_k."""
        tilt = _tilted(linear, square, np.zeros(len(linear)), reference)
        low, high = tilt.min(1) - 1.0, tilt.max(1) + 1.0
        for _ in range(BISECTIONS):
            middle = 0.5 * (low + high)
            above = np.exp(np.clip(tilt - middle[:, None], LOWEST, cap)).mean(1) > 1.0
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        found: F64 = high
        return found

    def _increments(self, values: F64) -> tuple[F64, F64 | None]:
        """Log e-values (K, B) of ``values`` (B,) in grid units; and those of a first value after a shift, if other."""
        steps = self._linear[:, None] * values
        if self._scales:
            # Only the last components look at the square.
            scales = len(self._scales)
            steps[-scales:] = self._square[-scales:, None] * (values * values)
        steps -= self._offset[:, None]
        if self._first is None or self._jump == self._gain:
            return self._rounded(steps, self._cap), None
        linear, offset = self._first
        return self._rounded(steps, self._cap), self._rounded(
            linear[:, None] * values - offset[:, None], 0.5 * self._cap
        )

    @staticmethod
    def _rounded(steps: F64, cap: float) -> F64:
        np.maximum(steps, LOWEST, out=steps)
        np.minimum(steps, cap, out=steps)
        steps *= GRID
        rounded: F64 = np.rint(steps, out=steps)
        return rounded

    def update(self, value: float) -> Self:
        """Read one value. Raises ``ValueError`` if it is not finite."""
        self.update_many(np.array([value], dtype=np.float64))
        return self

    def update_many(self, values: F64) -> list[int]:
        """Read ``values`` (B,); indices of the alarms. Raises ``ValueError`` if a value is not finite."""
        values = np.asarray(values, dtype=np.float64)
        if not values.size:
            return []
        if not math.isfinite(values.sum()):
            raise ValueError("EDetector needs finite values: drop the others first, as Calibrated does")
        alarms = alarms_in(values, self._scan, SHORT, LONG)
        self.drift = bool(alarms) and alarms[-1] == values.size - 1
        return alarms

    def _scan(self, values: F64) -> int | None:
        """Index of the first alarm in ``values`` (B,); the state is then that after it. Else None."""
        steps, first = self._increments(values)
        total = np.add.accumulate(steps, axis=1, out=steps)
        # S[t] = max(S[t-1] + step[t], first[t], 0), written as a sum plus a running maximum.
        floor: F64 = np.negative(total)
        if first is not None:
            np.maximum(first, 0.0, out=first)
            floor[: len(first)] += first
        np.maximum(floor[:, 0], self._sums, out=floor[:, 0])
        np.maximum.accumulate(floor, axis=1, out=floor)
        floor += total
        top = (floor + self._handicap[:, None]).max(0)
        if top.max() > self._limit:
            self._sums = np.zeros(len(self._sums))
            self.warning = True
            return int((top > self._limit).argmax())
        self._sums = np.maximum(floor[:, -1], 0.0)
        self.warning = bool(top[-1] > self._warn_limit)
        return None

    def reset(self) -> None:
        """All sums back to zero."""
        self._sums = np.zeros(len(self._sums))
        self.drift = self.warning = False

    def state_dict(self) -> dict[str, Any]:
        """The sums in grid units, the flags, the threshold and what ``fit`` learnt."""
        return {
            "threshold": self._threshold,
            "sums": self._sums.tolist(),
            "drift": self.drift,
            "warning": self.warning,
            "fitted": self.fitted(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; the options are those of the constructor. Raises ``ValueError`` if the state does not fit them."""
        restored = self._copy(float(state["threshold"]), state["fitted"])
        sums = np.array(state["sums"], dtype=np.float64)
        if sums.shape != restored._sums.shape:
            raise ValueError("e_detector: the state is for other shifts or scales: start it anew")
        self.__dict__.update(restored.__dict__)
        self._sums = sums
        self.drift, self.warning = bool(state["drift"]), bool(state["warning"])


def _tilted(linear: F64, square: F64, offsets: F64, values: F64) -> F64:
    """Log e-values (K, N) before rounding and limits."""
    z = np.asarray(values, dtype=np.float64)
    tilted: F64 = linear[:, None] * z + square[:, None] * z**2 - offsets[:, None]
    return tilted
