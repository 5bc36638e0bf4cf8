"""The threshold that gives the asked mean time between false alarms, found by running the detector itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from detectors.base import F64
from detectors.fronts import Front

CHAINS = 60
ALARMS = 150
"""False alarms wanted in each simulated stream at the asked ARL0: a Monte Carlo error of 8%."""
FEWEST_ALARMS = 60
"""Below this the threshold is extrapolated from a smaller ARL0."""
MIN_ROWS, MAX_ROWS = 200_000, 1_200_000
DOUBT = 0.1
"""The effect on the threshold of a factor in ARL0 is known to this share."""
BELOW = 0.25
"""Share of the threshold over which its slope is measured."""
TOLERANCE = 0.03
"""Relative error at which the search stops: well under the Monte Carlo error."""
RESOLUTION = 1e-3
STEPS = 24
MAX_NUMBERS = 24_000_000
"""Numbers in one set of simulated rows: 200 MB."""


@dataclass(frozen=True, slots=True)
class Found:
    """A threshold, the ARL0 that it reached on fresh null streams with its 95% interval, and how it was found."""

    threshold: float
    reached: float
    low: float
    high: float
    method: str
    rise: float
    """What the threshold rises by where the ARL0 is e times as long: log ARL0 grows about linearly in it."""


class _Runs:
    """Null streams, and the detector's alarms on them."""

    def __init__(self, front: Front, rows: int, seed: int) -> None:
        self._detector = front.detector
        self._streams = front.streams(CHAINS, rows // CHAINS, seed)
        self.rows = CHAINS * (rows // CHAINS)

    def alarms(self, threshold: float, enough: float = math.inf) -> F64:
        """False alarms in each chain (CHAINS,); stops before the next chain once there are ``enough``."""
        counts: list[int] = []
        for values in self._streams:
            counts.append(len(self._detector.with_threshold(threshold).update_many(values)))
            if sum(counts) > enough:
                break
        return np.array(counts, dtype=np.float64)

    def log_arl(self, threshold: float, target: float) -> float:
        """Logarithm of rows per alarm; half an alarm stands for none. Coarse where it is far under ``target``."""
        counts = self.alarms(threshold, 4.0 * self.rows / target)
        rows = self.rows / CHAINS * counts.size
        return math.log(rows / max(float(counts.sum()), 0.5))


def _solve(runs: _Runs, start: float, arl0: float) -> float:
    """Threshold at which ``runs`` has an ARL of ``arl0``: a bracket around ``start``, then regula falsi in log ARL."""
    target = math.log(arl0)
    low, high = 0.0, start
    at_low, at_high = -target, runs.log_arl(start, arl0) - target
    for _ in range(STEPS):
        if at_high >= 0.0:
            break
        low, at_low = high, at_high
        high *= 1.5
        at_high = runs.log_arl(high, arl0) - target
    else:
        raise ValueError(
            f"no threshold up to {high:.3g} gives one false alarm in {arl0:g} rows: ask for a smaller arl0, or take "
            "another detector"
        )
    for step in range(STEPS):
        # Plain regula falsi can creep from one side: every third step halves the bracket.
        weight = 0.5 if step % 3 == 2 else at_low / (at_low - at_high)
        middle = low + weight * (high - low)
        at = runs.log_arl(middle, arl0) - target
        if abs(at) <= TOLERANCE:
            return middle
        if at < 0.0:
            low, at_low = middle, at
        else:
            high, at_high = middle, at
        if high - low < RESOLUTION * start:
            break
    # A signal with few different values makes the ARL jump: take the side with fewer false alarms.
    return high


def find_threshold(front: Front, arl0: float, seed: int) -> Found:
    """Threshold of the detector of ``front`` for one false alarm in ``arl0`` rows of the null stream.

    The search runs on one set of streams, the reported ARL0 is measured on another. Beyond what ``MAX_ROWS`` can
    show, the threshold is extrapolated: log ARL0 grows about linearly in it. Last, the reference itself is replayed:
    it must not alarm clearly more often than asked, as it could where no bootstrap describes it (a periodic signal
    without noise, a reference with a step in it).
    """
    detector = front.detector
    most = min(MAX_ROWS, detector.calibration_rows, MAX_NUMBERS // (front.width or 1))
    rows = int(min(max(ALARMS * arl0, MIN_ROWS), most))
    shown = min(arl0, rows / FEWEST_ALARMS)
    runs = _Runs(front, rows, seed)
    threshold = _solve(runs, detector.threshold, shown)
    method = front.describe()
    # What is needed is a factor of ``reach`` beyond what is shown; its effect on the threshold is known to a tenth.
    reach, stretch = arl0 / shown, 1.0
    beyond = threshold
    if reach > 1.0:
        rise = max(0.0, threshold - _solve(runs, threshold, shown / 8.0)) / math.log(8.0)
        beyond += rise * math.log(reach)
        stretch = reach**DOUBT
        method += f", extrapolated from an ARL0 of {shown:.0f}"
    else:
        rise = _rise(runs, threshold, shown)
    quiet = _raised(front, beyond, arl0)
    if quiet > beyond:
        threshold = beyond = quiet
        reach = stretch = 1.0
        method += ", raised until the reference itself is quiet"
    elif threshold <= 2.0 * RESOLUTION * detector.threshold:
        method += ", lowest threshold: it can't alarm more often"
    reached, low, high = _interval(_Runs(front, rows, seed + 1).alarms(threshold), runs.rows)
    return Found(beyond, reached * reach, low * reach / stretch, high * reach * stretch, method, rise)


def _rise(runs: _Runs, threshold: float, arl0: float) -> float:
    """Threshold per unit of log ARL0 below ``threshold``, which gives ``arl0``; 0 where the ARL0 does not fall."""
    lower = (1.0 - BELOW) * threshold
    fall = runs.log_arl(threshold, arl0) - runs.log_arl(lower, arl0 / 8.0)
    return (threshold - lower) / fall if fall > 0.0 else 0.0


def _raised(front: Front, threshold: float, arl0: float) -> float:
    """``threshold``, or the first greater one at which the reference has no more alarms than chance would give."""
    detector, values, expected = front.detector, front.seen, len(front.seen) / arl0
    for _ in range(STEPS):
        if len(detector.with_threshold(threshold).update_many(values)) <= 1.0 + expected + 3.0 * math.sqrt(expected):
            break
        threshold = max(1.25 * threshold, 0.1 * detector.threshold)
    return threshold


def _interval(counts: F64, rows: int) -> tuple[float, float, float]:
    """Rows per alarm over chains with ``counts`` alarms (CHAINS,), with a 95% interval from the chains' spread."""
    total = max(float(counts.sum()), 0.5)
    # Chains are independent. Poisson counting error is the floor, and makes the interval finite for no alarm.
    variance = max(float(counts.var(ddof=1)) * counts.size, total)
    factor = math.exp(1.96 * math.sqrt(variance) / total)
    return rows / total, rows / total / factor, rows / total * factor
