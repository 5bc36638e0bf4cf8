"""What was measured of one detector on one process, over all draws of the reference."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tests.benchmarks.detect import Outcome

RESAMPLES = 2000


@dataclass(kw_only=True)
class Measured:
    """One subject on one process, over all draws."""

    rows: list[int] = field(default_factory=list)
    alarms: list[int] = field(default_factory=list)
    delays: dict[tuple[str, float], list[float]] = field(default_factory=lambda: defaultdict(list))
    error: str = ""

    def ratio(self, arl0: float) -> float:
        """Reached / asked ARL0 over all draws; half an alarm stands for none."""
        return sum(self.rows) / max(sum(self.alarms), 0.5) / arl0

    def interval(self, arl0: float) -> tuple[float, float]:
        """95% interval of ``ratio``: Poisson or, where wider, bootstrap over the draws."""
        rows, alarms = np.array(self.rows), np.array(self.alarms)
        factor = math.exp(1.96 / math.sqrt(max(alarms.sum(), 0.5)))
        middle = self.ratio(arl0)
        chosen = np.random.default_rng(0).integers(rows.size, size=(RESAMPLES, rows.size))
        drawn = rows[chosen].sum(1) / np.maximum(alarms[chosen].sum(1), 0.5) / arl0
        low, high = np.quantile(drawn, [0.025, 0.975])
        return min(float(low), middle / factor), max(float(high), middle * factor)

    def extremes(self, arl0: float) -> tuple[float, float]:
        """Least and greatest ratio of a single draw."""
        ratios = [rows / max(alarms, 0.5) / arl0 for rows, alarms in zip(self.rows, self.alarms, strict=True)]
        return min(ratios), max(ratios)

    def delay(self, change: tuple[str, float]) -> float | None:
        """Median rows to the alarm; infinite where most runs missed it; None if it was not measured."""
        found = self.delays.get(change)
        return float(np.median(np.nan_to_num(found, posinf=1e9))) if found else None

    def missed(self, change: tuple[str, float]) -> float:
        """Share of the runs without an alarm."""
        return float(np.mean(np.isinf(self.delays[change])))


Results = dict[tuple[str, str], Measured]
"""By subject and setting."""


def gathered(outcomes: Iterable[Outcome]) -> Results:
    """All draws of the same subject and setting together."""
    results: Results = defaultdict(Measured)
    for outcome in sorted(outcomes, key=lambda outcome: outcome.job.draw):
        into = results[outcome.job.subject, outcome.job.setting]
        if outcome.error:
            into.error = outcome.error
            continue
        into.rows.append(outcome.rows)
        into.alarms.append(outcome.alarms)
        for change, found in outcome.delays.items():
            into.delays[change] += found
    return dict(results)
