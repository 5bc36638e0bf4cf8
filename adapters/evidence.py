"""An anytime-valid test of "no harm": look after every batch, as often as you like, for ever."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

BETS = (0.03, 0.06, 0.12, 0.25, 0.5, 0.9)
"""The shares of the capital that are bet, mixed evenly: the best one depends on the unknown size of the harm."""

_LOG_BETS = math.log(len(BETS))


class HarmEvidence:
    """Evidence against H0 "no row's difference d in [-1, 1] is above 0 on average, given the rows before it".

    A bet of share b, begun at row s, has the capital prod_{t >= s} (1 + b d_t); under H0 it can't be expected to
    grow. Mixing bets and beginnings keeps that: with the prior weight w_t = 1 / (t (t + 1)) on a beginning at row t,

        S_t(b) = (S_{t-1}(b) + w_t) (1 + b d_t),        M_t = mean_b S_t(b) + 1 / (t + 1),

    where 1 / (t + 1) is the weight of the beginnings still to come. M starts at 1 and is a nonnegative supermartingale
    under H0, so that by Ville's inequality it ever reaches 1 / delta with a probability of at most delta, at whatever
    times one looks. The mixture over beginnings finds harm that starts late: good rows before it cost only the log of
    their number.

    Rows with d = 0 say nothing and change nothing; skipping them, weights included, is allowed because a beginning
    just before the next informative row is as good as any since the last. Computed in logarithms: no overflow however
    long the stream, and no capital so small that new beginnings would drown in it.

    References:
        [1] Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 2024.
        [2] Shin, Ramdas and Rinaldo, "E-detectors: a nonparametric framework for sequential change detection",
            New England Journal of Statistics in Data Science 2024.
    """

    def __init__(self) -> None:
        self._log_capital_G = np.full(len(BETS), -np.inf)
        self._rows = 0
        self.log_value = 0.0
        """Natural log of M now."""
        self.log_peak = 0.0
        """Natural log of the largest M so far: the test is on this one."""

    def update(self, d: F64) -> None:
        """Take (n,) differences in [-1, 1], in the order of the stream; how they are cut into calls does not matter.

        Raises:
            ValueError: a difference is not finite or outside [-1, 1].
        """
        d_N = np.asarray(d, dtype=np.float64)
        # Differences of float32 losses in [0, 1] can be a rounding too large. NaN fails the comparison too.
        if d_N.ndim != 1 or not (np.abs(d_N) <= 1 + 1e-6).all():
            raise ValueError(f"differences of shape {d_N.shape}: give (n,) finite numbers in [-1, 1]")
        d_N = np.clip(d_N[d_N != 0], -1.0, 1.0)
        if not d_N.size:
            return
        row_N = np.arange(self._rows + 1, self._rows + d_N.size + 1, dtype=np.float64)
        log_later_N = -np.log1p(row_N)
        log_w_N = log_later_N - np.log(row_N)
        # With L the running sum of log(1 + b d):  log S_t = L_t + log(S_0 + sum_{s <= t} w_s exp(-L_{s-1})).
        log_factor_GN = np.log1p(np.multiply.outer(np.asarray(BETS), d_N))
        log_growth_GN = np.cumsum(log_factor_GN, axis=1)
        log_stake_GN = log_w_N - (log_growth_GN - log_factor_GN)
        log_stake_GN[:, 0] = np.logaddexp(log_stake_GN[:, 0], self._log_capital_G)
        log_capital_GN = log_growth_GN + np.logaddexp.accumulate(log_stake_GN, axis=1)
        log_m_N = np.logaddexp(np.logaddexp.reduce(log_capital_GN, axis=0) - _LOG_BETS, log_later_N)
        self._log_capital_G = log_capital_GN[:, -1].copy()
        self._rows += d_N.size
        self.log_value = float(log_m_N[-1])
        self.log_peak = max(self.log_peak, float(log_m_N.max()))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on as if never stopped."""
        return {
            "log_capital": self._log_capital_G.copy(),
            "rows": self._rows,
            "log_value": self.log_value,
            "log_peak": self.log_peak,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``.

        Raises:
            ValueError: keys are missing or unknown, or the capital belongs to other bets.
        """
        differing = state.keys() ^ {"log_capital", "rows", "log_value", "log_peak"}
        if differing or np.shape(state["log_capital"]) != (len(BETS),):
            raise ValueError(f"evidence does not fit (keys that differ: {sorted(differing)}): start without it")
        self._log_capital_G = np.array(state["log_capital"], dtype=np.float64)
        self._rows, self.log_value, self.log_peak = state["rows"], state["log_value"], state["log_peak"]
