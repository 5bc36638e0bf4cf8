"""What alarms are worth where it is known at which rows a stream changed: delays, misses, false alarms."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from daemon.recorded.watch import Alarm

RUN_SHARE = 0.1
"""Alarms closer than this share of the ARL0 asked for belong to one run: chance puts one in ten that close."""


@dataclass(frozen=True, slots=True)
class Score:
    """How soon the changes were found, and how often there was none to find."""

    delays: list[int | None]
    """Rows from each change to the first alarm after it; None if the next change or the end came first."""
    false_alarms: int
    """Alarms before the first change."""
    rows: int
    """Rows before the first change that could alarm."""
    arl0: float
    """Rows per false alarm; infinite if there was none, NaN without rows."""
    low: float
    high: float
    """95% interval of ``arl0``, false alarms taken as a Poisson process."""

    @property
    def missed(self) -> int:
        """Changes without an alarm."""
        return self.delays.count(None)


@dataclass(frozen=True, slots=True)
class Run:
    """Alarms in close succession, as they come while a shift lasts."""

    first: int
    last: int
    count: int
    statistic: float
    """On the row before the first alarm."""


def score(rows: Sequence[int], changes: Sequence[int], start: int, live: NDArray[np.bool_]) -> Score:
    """Judge alarms at ``rows``, sorted, by the sorted rows ``changes``; both count from the file's begin.

    ``live`` (N,) says for each row from ``start`` on whether it could alarm. An alarm counts for the last change
    before it: that of a shift which lasts beyond the next change makes that one's delay look short.
    """
    end = start + len(live)
    first = changes[0] if changes else end
    false_alarms = bisect_left(rows, first)
    quiet = int(live[: first - start].sum())
    low, high = poisson_interval(false_alarms)
    delays: list[int | None] = []
    for change, following in pairwise([*changes, end]):
        at = bisect_left(rows, change)
        delays.append(rows[at] - change if at < len(rows) and rows[at] < following else None)
    if not quiet:
        return Score(delays, false_alarms, 0, math.nan, math.nan, math.nan)
    return Score(
        delays,
        false_alarms,
        quiet,
        quiet / false_alarms if false_alarms else math.inf,
        quiet / high,
        quiet / low if low else math.inf,
    )


def runs(alarms: Sequence[Alarm], arl0: float, changes: Sequence[int] = ()) -> list[Run]:
    """Group ``alarms``, sorted by row. A known change ends a run."""
    found: list[Run] = []
    for alarm in alarms:
        run = found[-1] if found else None
        joined = run is not None and alarm.row - run.last <= RUN_SHARE * arl0
        if run is not None and joined and bisect_left(changes, run.last + 1) == bisect_left(changes, alarm.row + 1):
            found[-1] = Run(run.first, alarm.row, run.count + 1, run.statistic)
        else:
            found.append(Run(alarm.row, alarm.row, 1, alarm.statistic))
    return found


def poisson_interval(count: int) -> tuple[float, float]:
    """The exact 95% interval of a Poisson mean of which ``count`` events were seen.

    F. Garwood, "Fiducial limits for the Poisson distribution", Biometrika 28, 1936.
    """
    events = np.arange(count + 1)
    log_factorials = np.concatenate(([0.0], np.cumsum(np.log(events[1:]))))

    def at_most(mean: float, limit: int) -> float:
        terms = events[: limit + 1] * math.log(mean) - mean - log_factorials[: limit + 1]
        return float(np.exp(terms).sum())

    reach = count + 10.0 * math.sqrt(count) + 10.0
    low = _root(lambda mean: at_most(mean, count - 1) - 0.975, reach) if count else 0.0
    return low, _root(lambda mean: at_most(mean, count) - 0.025, reach)


def _root(falling: Callable[[float], float], high: float) -> float:
    """Where ``falling`` crosses 0, between 0 and ``high``."""
    low = 0.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if falling(middle) > 0.0:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)
