"""Risk monitor: has the served model's risk risen above that of the reference?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from detectors.betting_bank import DEFAULT_THRESHOLD, LEVELS, ODDS, BettingBank, inside
from detectors.registry import register

CONFIDENCE = 0.95
BISECTIONS = 40


@register("risk_monitor")
class RiskMonitor(BettingBank):
    """Bets that the expected loss has risen above the reference's; see ``BettingBank`` for the e-detector.

    Values are losses in [0, 1] in the order of the stream, such as 0/1 errors; without labels, a proxy of the loss
    that was checked against labels on the reference. Only a rise is harm: falling losses are no drift. The mean time
    to a false alarm is at least exp(threshold) values as long as the expected loss, given the past, stays at or under
    the bound. Losses that come in bursts break that condition even where their mean is right: ``Calibrated`` then
    finds the threshold.

    The bound is ``risk + tolerance``. ``fit`` puts the reference's mean loss plus one standard error of it in the
    place of ``risk``; without ``fit``, ``risk`` must be given for the alarms to mean anything. ``tolerance`` is the
    harm that one is ready to bear, in the values' unit. ``odds`` are the sizes of the rise looked for, as odds ratios.
    ``warning`` is raised above ``warn_at`` times the threshold.

    A. Podkopaev, A. Ramdas, "Tracking the risk of a deployed model and detecting harmful distribution shifts", ICLR
    2022; label-free proxies: M. Schirmer et al., "Monitoring risks in test-time adaptation", NeurIPS 2025.
    """

    def __init__(
        self,
        threshold: float = DEFAULT_THRESHOLD,
        *,
        risk: float = 0.5,
        tolerance: float = 0.0,
        odds: Sequence[float] = ODDS,
        warn_at: float = 0.7,
    ) -> None:
        if not 0.0 <= tolerance < 1.0:
            raise ValueError(f"tolerance must be a number from 0 to under 1, got {tolerance!r}")
        self._risk, self._tolerance = inside("risk", risk), float(tolerance)
        super().__init__(threshold, *self._bounds(self._risk, 0.0), odds=odds, warn_at=warn_at)

    def _bounds(self, mean: float, error: float) -> tuple[float | None, float]:
        return None, inside("risk", min(mean + error + self._tolerance, 1.0))

    def options(self) -> dict[str, Any]:
        """``risk``, ``tolerance``, ``odds`` and ``warn_at``."""
        return {"risk": self._risk, "tolerance": self._tolerance, "odds": list(self._odds), "warn_at": self._warn_at}

    @property
    def bound(self) -> float:
        """The expected loss above which there is harm."""
        return self._high

    @property
    def lower(self) -> float:
        """A number that the mean risk since the start or the last alarm is above, with 95% confidence; 0 at first.

        Holds at all times at once, however often it is read, for losses in [0, 1] of any distribution whose
        expectation may move: a confidence sequence from the beta-binomial mixture. Costs tens of microseconds.

        H. Robbins, "Statistical methods related to the law of the iterated logarithm", Annals of Mathematical
        Statistics 41, 1970; S. Howard et al., "Time-uniform, nonparametric, nonasymptotic confidence sequences", Annals
        of Statistics 49, 2021.
        """
        ones = self._total / LEVELS
        if not ones:
            return 0.0
        zeros = self._rows - ones
        # Log of what a bettor with Jeffreys' prior, Beta(1/2, 1/2), would have of 1 if x were a coin with two sides.
        won = math.lgamma(ones + 0.5) + math.lgamma(zeros + 0.5) - math.lgamma(self._rows + 1.0) - math.log(math.pi)
        low, high = 0.0, ones / self._rows
        for _ in range(BISECTIONS):
            middle = 0.5 * (low + high)
            evidence = won - ones * math.log(middle) - zeros * math.log1p(-middle)
            low, high = (middle, high) if evidence > -math.log(1.0 - CONFIDENCE) else (low, middle)
        return low
