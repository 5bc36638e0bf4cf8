"""What the plots of `homeostat detect` show, whatever draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from daemon.recorded.score import Run, runs
from daemon.recorded.watch import Watched
from daemon.records import F64
from detectors.bootstrap import LARGEST

INCOMPARABLE = frozenset({"adwin"})
"""Detectors whose statistic is not what is compared with the threshold."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One column, or the rows of several, with what each detector found in it."""

    label: str
    values: F64
    """(N,) or (N, D): all rows of the file, those of the reference as well."""
    found: list[Watched]
    changes: Sequence[int]
    arl0: float

    @property
    def rows(self) -> int:
        """Rows of the file."""
        return len(self.values)

    @property
    def start(self) -> int:
        """Rows of the file that are its reference; 0 where that is another file."""
        return self.found[0].start

    def signal(self) -> F64:
        """The line to draw (N,), NaN where a row is not finite.

        Of rows (D,) it is the root mean square of the columns, each standardised as in the reference.
        """
        values = np.where(np.abs(self.values) < LARGEST, self.values, np.nan)
        if values.ndim == 1:
            return values
        made = self.found[0].calibration
        z = (values - np.array(made["location"])) / np.array(made["scale"])
        return np.asarray(np.sqrt(np.square(z).mean(1)), dtype=np.float64)

    def statistic(self, watched: Watched) -> tuple[F64, F64, float | None]:
        """Rows (P,), the statistic (P,) there, and the threshold if it is comparable; empty if nothing was traced."""
        rows, statistics = watched.trace or (np.empty(0), np.empty(0))
        if watched.detector not in INCOMPARABLE:
            return rows, statistics, watched.threshold
        # At an alarm stands the threshold, which means nothing here.
        kept = ~np.isin(rows, [alarm.row for alarm in watched.alarms])
        return rows[kept], statistics[kept], None

    def runs(self, watched: Watched) -> list[Run]:
        """Its alarms, those in close succession together."""
        return runs(watched.alarms, self.arl0, self.changes)


def thinned(places: F64, values: F64, low: float, high: float, width: int) -> tuple[F64, F64]:
    """A line through ``values`` (N,) at ``places`` (N,), sorted, from ``low`` to ``high``, for ``width`` pixels.

    Where more than two points share a pixel its least and greatest value stand for them, so that no peak is lost. NaN
    is left out, unless a pixel has nothing else: there the line breaks.
    """
    if len(values) <= 2 * width:
        return places, values
    pixels = np.minimum(((places - low) / (high - low) * width).astype(np.intp), width - 1)
    begins = np.flatnonzero(np.diff(pixels, prepend=-1))
    extremes = np.column_stack((np.fmin.reduceat(values, begins), np.fmax.reduceat(values, begins)))
    centres = low + (pixels[begins] + 0.5) / width * (high - low)
    return np.repeat(centres, 2), extremes.ravel()


def span(values: F64) -> tuple[float, float]:
    """The range to draw (low < high): that of ``values`` (N,), single wild ones excepted."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low = float(np.quantile(finite, 0.001, method="higher"))
    high = float(np.quantile(finite, 0.999, method="lower"))
    room = 0.25 * (high - low)
    low, high = max(float(finite.min()), low - room), min(float(finite.max()), high + room)
    if high > low:
        return low, high
    return low - (0.5 * abs(low) or 1.0), high + (0.5 * abs(high) or 1.0)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw * 0.999)
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
