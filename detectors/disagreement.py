"""Disagreement: do two models answer differently more often, or less often, than they did?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectors.betting_bank import DEFAULT_THRESHOLD, ODDS, BettingBank, inside
from detectors.registry import register


@register("disagreement")
class Disagreement(BettingBank):
    """Bets that the rate of disagreement has risen or fallen; see ``BettingBank`` for the e-detector.

    Values say how far two models differ on a row: 1 if the adapted model answers otherwise than the frozen one and 0
    if not, or the total variation distance of both predictive distributions, 0.5 * sum_k |p_k - q_k|, in [0, 1]. It
    needs no labels: two models that agreed on the reference and no longer do can't both be right. It says nothing
    about which one is wrong, and nothing where both go wrong together.

    The mean time to a false alarm is at least exp(threshold) values as long as the expectation of a value, given the
    past, stays within the reference's rate (``fit``, else ``rate``) give or take one standard error and
    ``tolerance``. A rate under ``floor`` is as good as none: a rise counts from ``floor`` on, and a fall is only
    looked for where the reference's rate lies above it. In a reference where nothing adapts the rate is 0. ``odds``
    are the sizes of the change looked for, as odds ratios. ``warning`` is raised above ``warn_at`` times the threshold.

    Disagreement as a sign of error without labels: Y. Jiang et al., "Assessing generalization of SGD via
    disagreement", ICLR 2022; C. Baek et al., "Agreement-on-the-line", NeurIPS 2022.
    """

    def __init__(
        self,
        threshold: float = DEFAULT_THRESHOLD,
        *,
        rate: float = 0.5,
        floor: float = 0.01,
        tolerance: float = 0.0,
        odds: Sequence[float] = ODDS,
        warn_at: float = 0.7,
    ) -> None:
        if not 0.0 <= tolerance < 1.0:
            raise ValueError(f"tolerance must be a number from 0 to under 1, got {tolerance!r}")
        self._rate, self._floor = inside("rate", rate), inside("floor", floor)
        self._tolerance = float(tolerance)
        super().__init__(threshold, *self._bounds(self._rate, 0.0), odds=odds, warn_at=warn_at)

    def _bounds(self, mean: float, error: float) -> tuple[float | None, float]:
        margin = error + self._tolerance
        low, high = mean - margin, max(mean + margin, self._floor)
        return inside("rate", low) if low > self._floor else None, inside("rate", min(high, 1.0))

    def options(self) -> dict[str, Any]:
        """``rate``, ``floor``, ``tolerance``, ``odds`` and ``warn_at``."""
        return {
            "rate": self._rate,
            "floor": self._floor,
            "tolerance": self._tolerance,
            "odds": list(self._odds),
            "warn_at": self._warn_at,
        }
