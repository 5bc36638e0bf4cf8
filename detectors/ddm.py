"""DDM, from river."""

from __future__ import annotations

import math
from typing import Any

from detectors.registry import register
from detectors.wrapped import Wrapped, whole


@register("ddm")
class DDM(Wrapped):
    """Drift detection method: the share of ones has risen well above the lowest that it has had since the restart.

        drift when p + s > p_min + threshold * s_min,     s = sqrt(p (1 - p) / n)

    where p is the share of ones among the n values read, and p_min, s_min are p and s where p + s was least.

    J. Gama, P. Medas, G. Castillo, P. Rodrigues, "Learning with drift detection", SBIA 2004. The alarms are those of
    ``river.drift.binary.DDM``.

    Reads 0 and 1, where 1 is an error, and notices a rise alone. ``threshold`` is river's ``drift_threshold``;
    ``warning`` is raised above two thirds of it (river's 2 and 3) and not at an alarm. Neither comes in the first
    ``warm_start`` values. Three properties of the method: the longer it has run without an alarm, the longer a change
    takes to show, since p is a mean over all; for the same reason false alarms gather soon after a restart, and ARL0
    depends on the length of the run (at a threshold of 2 on fair coins, 480 rows in runs of 1,000, 2,000 in runs of
    50,000); and where the first values hold no 1, s_min is 0, so that the first 1 is an alarm whatever the threshold:
    errors rarer than about 1 in ``warm_start`` need a greater ``warm_start``.
    """

    domain = "binary"
    kept = ("_p.n", "_p._mean", "_p_min", "_s_min", "_ps_min")

    def __init__(self, threshold: float = 3.0, *, warm_start: int = 30) -> None:
        super().__init__(threshold, warm_start=whole("warm_start", warm_start))

    def _new(self) -> Any:
        from river.drift.binary import DDM as River  # imports scipy: only for who builds one

        return River(drift_threshold=self._threshold, warning_threshold=self._threshold * 2.0 / 3.0, **self._options)

    @property
    def statistic(self) -> float:
        """(p + s - p_min) / s_min, to be compared with the threshold; 0 during the warm start and where s_min is 0."""
        river = self._river
        if not river._s_min:
            return 0.0
        p, n = river._p.get(), river._p.n
        return float((p + math.sqrt(p * (1.0 - p) / n) - river._p_min) / river._s_min)
