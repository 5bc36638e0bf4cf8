"""EDDM, from river."""

from __future__ import annotations

import math
from typing import Any

from detectors.registry import register
from detectors.wrapped import Wrapped, probability, whole

SCALE = 10.0
DEFAULT_THRESHOLD = -SCALE * math.log(0.9)
"""River's default beta, 0.9."""
WARN_AT = math.log(0.95) / math.log(0.9)
"""River warns below alpha = 0.95 and alarms below beta = 0.9: the ratio of their logarithms is kept."""


@register("eddm")
class EDDM(Wrapped):
    """Early drift detection method: the distance between two ones has become shorter than it was at its longest.

        drift when (m + 2 s) / max(m + 2 s) < beta

    where m and s are the mean and the standard deviation of the distances, in values, since the restart.

    M. Baena-Garcia, J. del Campo-Avila, R. Fidalgo, A. Bifet, R. Gavalda, R. Morales-Bueno, "Early drift detection
    method", 4th International Workshop on Knowledge Discovery from Data Streams, 2006. The alarms are those of
    ``river.drift.binary.EDDM``.

    Reads 0 and 1, where 1 is an error, and notices a rise of their share alone. ``threshold`` is -10 ln(beta), 1.05
    for river's 0.9; ``warning`` is raised below beta**0.487 (river's 0.95) and stays until the next 1, as in river.
    Neither comes before ``warm_start`` values and as many ones. The maximum is taken over estimates that are noisy at
    first, so that false alarms gather soon after a restart, and ARL0 depends on the length of the run: at a threshold
    of 2 on fair coins it was 960 rows in runs of 1,000 and 40,000 in runs of 50,000.
    """

    domain = "binary"
    kept = (
        "_error_distances.mean.n",
        "_error_distances.mean._mean",
        "_error_distances._S",
        "_n",
        "_last_error",
        "_n_errors",
        "_p2s_prime_max",
    )

    def __init__(self, threshold: float = DEFAULT_THRESHOLD, *, warm_start: int = 30) -> None:
        super().__init__(threshold, warm_start=whole("warm_start", warm_start))

    def _new(self) -> Any:
        from river.drift.binary import EDDM as River  # imports scipy: only for who builds one

        level = self._threshold / SCALE
        return River(alpha=probability(WARN_AT * level), beta=probability(level), **self._options)

    @property
    def statistic(self) -> float:
        """-10 ln of the ratio tested, to be compared with the threshold; 0 before it is tested."""
        river = self._river
        if river._n_errors <= self._options["warm_start"] or river._p2s_prime_max <= 0.0:
            return 0.0
        distances = river._error_distances
        level = (distances.mean.get() + 2.0 * math.sqrt(distances.get())) / river._p2s_prime_max
        return max(0.0, -SCALE * math.log(level))
