"""HDDM with the W-test, from river."""

from __future__ import annotations

import math
from typing import Any

from detectors.base import positive
from detectors.registry import register
from detectors.wrapped import Wrapped, probability

DEFAULT_THRESHOLD = -math.log(0.001)
"""River's default drift confidence, 0.001."""
WARN_AT = math.log(0.005) / math.log(0.001)
"""River's default warning confidence is 0.005: the ratio of the logarithms is kept."""
SAMPLES = ("_total", "_s1_incr", "_s2_incr", "_s1_decr", "_s2_decr")


@register("hddm_w")
class HDDMW(Wrapped):
    """Drift detection by McDiarmid's bound on weighted averages (W-test): the values since a cut exceed those before.

        drift when m_2 - m_1 > sqrt((c_1 + c_2) / 2 * threshold)

    where m_1 is the exponentially weighted mean up to the cut, m_2 that of the values since, and c_1, c_2 the sums of
    their squared weights; the cut is where m + bound was least. With ``two_sided_test`` a fall is noticed as well,
    from a cut of its own.

    I. Frias-Blanco, J. del Campo-Avila, G. Ramos-Jimenez, R. Morales-Bueno, A. Ortiz-Diaz, Y. Caballero-Mota, "Online
    and non-parametric drift detection methods based on Hoeffding's bounds", IEEE TKDE 27, 2015. The alarms are those
    of ``river.drift.binary.HDDMW``.

    Reads numbers from 0 to 1, for which the bound holds. ``threshold`` is -ln of river's ``drift_confidence``;
    ``warning`` is raised at 77% of it (river's 0.005 and 0.001). ``lambda_val`` is the weight of the newest value: a
    small one looks for small changes. Recent values weigh most, so that unlike ``hddm_a`` it does not slow down.
    """

    domain = "unit"
    calibration_rows = 100_000
    kept = (
        "_incr_cutpoint",
        "_decr_cutpoint",
        *(f"{sample}.{attribute}" for sample in SAMPLES for attribute in ("_is_init", "_ibc")),
    )

    def __init__(
        self, threshold: float = DEFAULT_THRESHOLD, *, lambda_val: float = 0.05, two_sided_test: bool = False
    ) -> None:
        if not positive("lambda_val", lambda_val) <= 1.0:
            raise ValueError(f"lambda_val must be at most 1, got {lambda_val!r}")
        super().__init__(threshold, lambda_val=float(lambda_val), two_sided_test=bool(two_sided_test))

    def _new(self) -> Any:
        from river.drift.binary import HDDMW as River  # imports scipy: only for who builds one

        return River(
            drift_confidence=probability(self._threshold),
            warning_confidence=probability(self._threshold * WARN_AT),
            **self._options,
        )

    @property
    def statistic(self) -> float:
        """The threshold that the difference of means would just reach; 0 where it is below all."""
        river = self._river
        rise = _reached(river._s1_incr, river._s2_incr)
        return max(rise, _reached(river._s2_decr, river._s1_decr)) if self._options["two_sided_test"] else rise

    def _dump(self) -> dict[str, Any]:
        """With the weighted means, which river keeps in compiled objects."""
        return super()._dump() | {f"{name}.mean": getattr(self._river, name).ewma for name in SAMPLES}

    def _fill(self, numbers: dict[str, Any]) -> None:
        super()._fill(numbers)
        for name in SAMPLES:
            if numbers[f"{name}._is_init"]:
                # The first value that a weighted mean reads is its mean: no access to the compiled object is needed.
                getattr(self._river, name)._ewma.update(numbers[f"{name}.mean"])


def _reached(lower: Any, upper: Any) -> float:
    """2 (m_upper - m_lower)**2 / (c_upper + c_lower) of two of river's samples, 0 if the difference is negative."""
    if not (lower.is_init and upper.is_init) or upper.ewma <= lower.ewma:
        return 0.0
    return float(2.0 * (upper.ewma - lower.ewma) ** 2 / (upper.ibc + lower.ibc))
