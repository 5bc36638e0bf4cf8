"""What ``risk_monitor`` and ``disagreement`` share: bets against "the mean of these numbers in [0, 1] is as before"."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from detectors.base import F64, Detector, positive
from detectors.bootstrap import autocorrelation_time
from detectors.scanning import alarms_in

GRID = float(2**20)
"""Log e-values are rounded down to multiples of 1/GRID: sums are exact and do not depend on how a stream was cut."""
LEVELS = 4096
"""Values are rounded to multiples of 1/LEVELS, always against the bet, so that a table replaces the logarithm."""
EDGE = 1e-6
"""Least distance of a mean from 0 and 1. Also how far outside [0, 1] a value may be, by rounding in float32."""
SHORT, LONG = 64, 1024
"""Values scanned at once, just after an alarm and at most: what lies behind an alarm is scanned again."""
ODDS = (1.25, 1.5, 2.0, 4.0, 8.0)
DEFAULT_THRESHOLD = math.log(10_000.0)


class BettingBank(Detector):
    """Bets that the mean has left [low, high]; drift when a bet begun at any row so far has multiplied its capital.

        S_k = max(0, S_k + log e_k(x))        e_k(x) = 1 + b_k (x - m)        statistic = max_k S_k - log K

    With m = ``high`` and b_k > 0 (bets on a rise), or m = ``low`` and b_k < 0 (bets on a fall), e_k(x) has an
    expectation of at most 1 as long as the mean of x, given the values before it, stays in [low, high]: of x nothing
    else is asked, neither independence nor a distribution. Wherever exp(statistic) is above 1 it is at most the average
    of K e-detectors, so that the mean time to a false alarm is at least exp(threshold), not only asymptotically.

    The bets are those that grow fastest for 0/1 values whose odds became ``odds`` times those of m (or 1/odds times):
    b = (m1 - m) / (m (1 - m)), where m1 has these odds.

    References:
        [1] Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86, 2024.
        [2] Shin, Ramdas and Rinaldo, "E-detectors: a nonparametric framework for sequential change detection",
            New England Journal of Statistics in Data Science 2, 2024.
    """

    domain = "unit"

    def __init__(
        self, threshold: float, low: float | None, high: float, *, odds: Sequence[float], warn_at: float
    ) -> None:
        self._odds = [positive("odds", ratio) for ratio in odds]
        if not self._odds or min(self._odds) <= 1.0:
            raise ValueError(f"odds must be ratios above 1, at least one, got {list(odds)}")
        self._warn_at = positive("warn_at", warn_at)
        self._low, self._high = low, high
        self._learnt = False
        self._set_bounds(low, high)
        self._set_threshold(threshold)

    def _set_bounds(self, low: float | None, high: float) -> None:
        self._low, self._high = low, high
        self._rise = _log_e_values(high, self._odds)
        # The mirror image: a fall of x is a rise of 1 - x.
        self._fall = None if low is None else _log_e_values(1.0 - low, self._odds)[:, ::-1].copy()
        self._log_k = math.log(len(self._odds) * (1 if low is None else 2))
        self._start()

    def _start(self) -> None:
        self._sums = [0.0] * (len(self._odds) * (1 if self._fall is None else 2))
        self._rows = self._total = 0

    def _set_threshold(self, threshold: float) -> None:
        self._threshold = positive("threshold", threshold)
        self._limit = (self._threshold + self._log_k) * GRID
        self._warn_limit = (self._warn_at * self._threshold + self._log_k) * GRID

    @property
    def threshold(self) -> float:
        """Log evidence at which drift is raised, in nats: no more than one false alarm in exp(threshold) values."""
        return self._threshold

    @property
    def statistic(self) -> float:
        """Log evidence in nats; -log K where there is none, as at the start and after an alarm."""
        return max(self._sums) / GRID - self._log_k

    @property
    def mean(self) -> float:
        """Mean of the values since the start or the last alarm, each rounded down to 1/4096; NaN before the first."""
        return self._total / LEVELS / self._rows if self._rows else math.nan

    @abstractmethod
    def _bounds(self, mean: float, error: float) -> tuple[float | None, float]:
        """``low`` and ``high`` for a reference with this mean, known up to the standard error ``error``."""

    def fit(self, reference: F64, *, gain: float = 1.0, jump: float = 1.0) -> Self:
        """A new detector that takes the mean of ``reference`` (N,), numbers from 0 to 1, for normal.

        The mean is known up to a standard error only (autocorrelation counts); one standard error either way is
        granted. Computed as if one 0 and one 1 had been seen besides (Laplace's rule of succession): a reference of
        zeros does not make a 1 impossible. Raises ``ValueError`` for an empty reference or values outside [0, 1].
        """
        values = self._checked(reference)
        if not values.size:
            raise ValueError(f"{self.name} needs a reference: it is empty")
        padded = np.concatenate((values, [0.0, 1.0]))
        error = float(padded.std()) * math.sqrt(autocorrelation_time(values) / values.size)
        low, high = self._bounds(float(padded.mean()), error)
        return self.with_fitted({"low": low, "high": high})

    def fitted(self) -> dict[str, Any]:
        """``low`` (None where a fall is not looked for) and ``high``."""
        return {"low": self._low, "high": self._high} if self._learnt else {}

    def with_fitted(self, fitted: dict[str, Any]) -> Self:
        """A new detector with the bounds that ``fitted`` gave. Raises ``ValueError`` if they do not fit."""
        return self._copy(self._threshold, fitted)

    def with_threshold(self, threshold: float) -> Self:
        """A new detector without evidence, with the same bounds and another threshold."""
        return self._copy(threshold, self.fitted())

    def _copy(self, threshold: float, fitted: dict[str, Any]) -> Self:
        new = type(self)(threshold, **self.options())
        if fitted:
            try:
                low, high = fitted["low"], float(fitted["high"])
                low = None if low is None else float(low)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{self.name}: what was learnt is damaged ({error!r}): calibrate anew") from error
            new._set_bounds(None if low is None else inside("low", low), inside("high", high))
            new._set_threshold(threshold)
            new._learnt = True
        return new

    def _checked(self, values: F64) -> F64:
        values = np.asarray(values, dtype=np.float64)
        if values.size and not (values.min() >= -EDGE and values.max() <= 1.0 + EDGE):
            raise ValueError(f"{type(self).__name__} needs finite values from 0 to 1: drop or rescale the others first")
        return values

    def update(self, value: float) -> Self:
        """Read one value. Raises ``ValueError`` if it is not a number from 0 to 1."""
        if not -EDGE <= value <= 1.0 + EDGE:
            raise ValueError(f"{type(self).__name__} needs finite values from 0 to 1, got {value!r}: drop it first")
        level = min(max(value, 0.0), 1.0) * LEVELS
        floor = int(level)
        steps = self._rise[:, floor].tolist()
        if self._fall is not None:
            steps += self._fall[:, math.ceil(level)].tolist()
        sums = [total if total > 0.0 else 0.0 for total in map(float.__add__, self._sums, steps)]
        top = max(sums)
        self.warning, self.drift = top > self._warn_limit, top > self._limit
        if self.drift:
            self._start()
        else:
            self._sums = sums
            self._rows += 1
            self._total += floor
        return self

    def update_many(self, values: F64) -> list[int]:
        """Read ``values`` (B,); indices of the alarms. Raises ``ValueError`` if one is not a number from 0 to 1."""
        values = self._checked(values)
        if not values.size:
            return []
        levels = np.clip(values, 0.0, 1.0) * LEVELS
        alarms = alarms_in(levels, self._scan, SHORT, LONG)
        self.drift = bool(alarms) and alarms[-1] == levels.size - 1
        return alarms

    def _scan(self, levels: F64) -> int | None:
        """Index of the first alarm in ``levels`` (B,), from 0 to LEVELS; the state is then that after it. Else None."""
        floor = levels.astype(np.intp)
        steps = np.empty((len(self._sums), levels.size))
        count = len(self._odds)
        # With mode="raise", the default, numpy would write to a buffer first. All indices are in range.
        self._rise.take(floor, axis=1, out=steps[:count], mode="clip")
        if self._fall is not None:
            self._fall.take(np.ceil(levels).astype(np.intp), axis=1, out=steps[count:], mode="clip")
        steps[:, 0] += self._sums
        # S = max(0, S + step), written as a sum minus its running minimum, where only one below zero counts.
        total = np.add.accumulate(steps, axis=1, out=steps)
        least = np.minimum.accumulate(total, axis=1)
        np.minimum(least, 0.0, out=least)
        total -= least
        top = total.max(0)
        if top.max() > self._limit:
            self._start()
            self.warning = True
            return int((top > self._limit).argmax())
        self._sums = total[:, -1].tolist()
        self._rows += levels.size
        self._total += int(floor.sum())
        self.warning = bool(top[-1] > self._warn_limit)
        return None

    def reset(self) -> None:
        """No evidence, no values; bounds and threshold stay."""
        self._start()
        self.drift = self.warning = False

    def state_dict(self) -> dict[str, Any]:
        """The sums in grid units, the values since the restart, the flags, the threshold and what ``fit`` learnt."""
        return {
            "threshold": self._threshold,
            "sums": list(self._sums),
            "rows": self._rows,
            "total": self._total,
            "drift": self.drift,
            "warning": self.warning,
            "fitted": self.fitted(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; the options are those of the constructor. Raises ``ValueError`` if the state does not fit them."""
        restored = self._copy(float(state["threshold"]), state["fitted"])
        sums = [float(total) for total in state["sums"]]
        if len(sums) != len(restored._sums):
            raise ValueError(f"{self.name}: the state is for other odds or bounds: start it anew")
        self.__dict__.update(restored.__dict__)
        self._sums, self._rows, self._total = sums, int(state["rows"]), int(state["total"])
        self.drift, self.warning = bool(state["drift"]), bool(state["warning"])


def inside(name: str, mean: float) -> float:
    """``mean`` kept ``EDGE`` away from 0 and 1. Raises ``ValueError`` unless it is from 0 to 1."""
    if not 0.0 <= mean <= 1.0:
        raise ValueError(f"{name} must be a number from 0 to 1, got {mean!r}")
    return min(max(float(mean), EDGE), 1.0 - EDGE)


def _log_e_values(mean: float, odds: Sequence[float]) -> F64:
    """The log of e_k at x = 0, 1/LEVELS, ..., 1 in grid units (K, LEVELS + 1), for bets on a rise above ``mean``."""
    ratio = np.array(odds)[:, None]
    after = ratio * mean / (1.0 - mean + ratio * mean)
    x = np.arange(LEVELS + 1) / LEVELS
    return np.floor(GRID * np.log1p((after - mean) / (mean * (1.0 - mean)) * (x - mean)))
