"""HDDM with the A-test, from river."""

from __future__ import annotations

import math
from typing import Any

from detectors.registry import register
from detectors.wrapped import Wrapped, probability

DEFAULT_THRESHOLD = -math.log(0.001)
"""River's default drift confidence, 0.001."""
WARN_AT = math.log(0.005) / math.log(0.001)
"""River's default warning confidence is 0.005: the ratio of the logarithms is kept."""


@register("hddm_a")
class HDDMA(Wrapped):
    """Drift detection by Hoeffding's bound on averages (A-test): the mean of all values has left that up to a cut.

        drift when mean(n) - mean(cut) >= sqrt((n - cut) / (2 n cut) * (threshold + ln 2))

    where n values were read since the restart and ``cut`` of them when mean + Hoeffding bound was least. With
    ``two_sided_test`` a fall is noticed as well, from a cut of its own.

    I. Frias-Blanco, J. del Campo-Avila, G. Ramos-Jimenez, R. Morales-Bueno, A. Ortiz-Diaz, Y. Caballero-Mota, "Online
    and non-parametric drift detection methods based on Hoeffding's bounds", IEEE TKDE 27, 2015. The alarms are those
    of ``river.drift.binary.HDDMA``.

    Reads numbers from 0 to 1, for which the bound holds. It allows for the worst variance, 1/4: Gaussian values with a
    deviation of 1/8 raised no alarm in 30,000 even at a threshold of 0.01. So ``Calibrated`` gives it 0 and 1 alone,
    which is what river asks for; ``hddm_w`` has no such limit. ``threshold`` is -ln of river's ``drift_confidence``;
    ``warning`` is raised at 77% of it (river's 0.005 and 0.001). The longer it has run without an alarm, the longer a
    change takes to show.
    """

    domain = "binary"
    accepts = "unit"
    calibration_rows = 100_000
    kept = ("_z.n", "_z._mean", "_x_min.n", "_x_min._mean", "_x_max.n", "_x_max._mean")

    def __init__(self, threshold: float = DEFAULT_THRESHOLD, *, two_sided_test: bool = False) -> None:
        super().__init__(threshold, two_sided_test=bool(two_sided_test))

    def _new(self) -> Any:
        from river.drift.binary import HDDMA as River  # imports scipy: only for who builds one

        return River(
            drift_confidence=probability(self._threshold),
            warning_confidence=probability(self._threshold * WARN_AT),
            **self._options,
        )

    @property
    def statistic(self) -> float:
        """The threshold that the difference of means would just reach; 0 where it is below all."""
        river = self._river
        rise = _reached(river._z.get() - river._x_min.get(), river._x_min.n, river._z.n)
        if not self._options["two_sided_test"]:
            return rise
        return max(rise, _reached(river._x_max.get() - river._z.get(), river._x_max.n, river._z.n))


def _reached(difference: float, cut: float, n: float) -> float:
    """2 difference**2 n cut / (n - cut) - ln 2, at least 0; ``cut`` of the ``n`` values were read at the cut."""
    if not 0.0 < cut < n or difference <= 0.0:
        return 0.0
    return max(0.0, 2.0 * difference * difference * n * cut / (n - cut) - math.log(2.0))
