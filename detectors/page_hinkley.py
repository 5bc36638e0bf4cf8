"""Page-Hinkley test, from river."""

from __future__ import annotations

from typing import Any

from detectors.base import positive
from detectors.registry import register
from detectors.wrapped import Wrapped, whole


@register("page_hinkley")
class PageHinkley(Wrapped):
    """Cumulative deviations from the mean so far, compared with the lowest (highest) value that they have had.

        up   = alpha up   + (x - mean) - delta     drift when up - min(up) > threshold         (modes "up", "both")
        down = alpha down + (x - mean) + delta     drift when max(down) - down > threshold     (modes "down", "both")

    E. S. Page, "Continuous inspection schemes", Biometrika 41, 1954; D. V. Hinkley, "Inference about the change-point
    from cumulative sum tests", Biometrika 58, 1971. The alarms are those of ``river.drift.PageHinkley``.

    ``threshold`` is lambda, and ``delta`` the deviation that is let pass, both in the values' unit: standard
    deviations behind ``Calibrated``. ``alpha`` is the fading factor of both sums; no alarm comes in the first
    ``min_instances`` values. It learns the mean since the last alarm itself, so that a reference with a known mean is
    better served by ``cusum``: a change soon after a restart is taken into the mean, and one of under about ``delta``
    is not noticed. The logarithm of ARL0 grows ever more slowly with the threshold, so that an ARL0 beyond what was
    simulated is overstated: Gaussian noise gave 258, 1587 and 6897 rows at thresholds of 20, 50 and 100. It never
    warns.
    """

    kept = ("_x_mean.n", "_x_mean._mean", "_sum_increase", "_sum_decrease", "_min_increase", "_max_decrease")

    def __init__(
        self,
        threshold: float = 50.0,
        *,
        delta: float = 0.005,
        alpha: float = 1.0 - 0.0001,
        min_instances: int = 30,
        mode: str = "both",
    ) -> None:
        if not 0.0 <= delta < float("inf"):
            raise ValueError(f"delta must be a finite number of at least 0, got {delta!r}")
        if not positive("alpha", alpha) <= 1.0:
            raise ValueError(f"alpha must be at most 1, got {alpha!r}")
        if mode not in ("up", "down", "both"):
            raise ValueError(f"mode must be 'up', 'down' or 'both', got {mode!r}")
        super().__init__(
            threshold,
            delta=float(delta),
            alpha=float(alpha),
            min_instances=whole("min_instances", min_instances),
            mode=mode,
        )

    def _new(self) -> Any:
        from river.drift import PageHinkley as River  # imports scipy: only for who builds one

        return River(threshold=self._threshold, **self._options)

    @property
    def statistic(self) -> float:
        """The greater of the differences that are tested, in the values' unit; 0 before the first value."""
        river, mode = self._river, self._options["mode"]
        if not river._x_mean.n:
            return 0.0
        up = river._sum_increase - river._min_increase if mode != "down" else 0.0
        down = river._max_decrease - river._sum_decrease if mode != "up" else 0.0
        return float(max(up, down))
