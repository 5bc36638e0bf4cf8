"""Near-future loss: does the model know more than the labels of its neighbourhood?

Where labels come in runs, whoever repeats the last label seems to learn. Hammoud et al. ("Rapid Adaptation in Online
Continual Learning: Are We Evaluating It Right?", ICCV 2023) therefore ask the model, as it is at row t, about rows so
far ahead that labels there have nothing to do with those at t. This is done here, with one thing more:

- at `POINTS` rows t, evenly spread, each the last of a batch, the served function is asked and learns nothing;
- asked are rows after t + S. S is the least lag at which labels S rows apart agree no more often than the classes'
  shares alone would have it (of targets: correlate by less than 0.1), at most a quarter of the recording;
- of the next 2 S rows (at least `ROWS`), up to `ROWS` are taken, evenly spread, and shuffled;
- at a point the loss is the mean over the classes in it of the class's mean loss. Of targets the quarters between
  their quartiles are the classes. Points with one class are left out. The result is the mean over points.

An answer that is the same for all asked rows can't be better than ``chance``: one minus one over the number of classes
at a point, or the loss of the best constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from daemon.evaluation.recording import I64, Recording
from daemon.records import F32, F64

POINTS = 16
ROWS = 256
_CORRELATED = 0.1
_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class Near:
    """What is asked when."""

    asks: dict[int, I64]
    """By row t, the rows asked after it, shuffled."""
    skipped: int
    """S, in rows."""
    strata: dict[int, I64]
    """By row t, the class, or quarter, of each row asked."""


def near_future(recording: Recording, batch_rows: int, *, seed: int = 0) -> Near:
    """Choose points and rows; the same for every configuration. No points where the recording is too short."""
    rows = len(recording)
    skipped = label_memory(recording)
    span = min(max(ROWS, 2 * skipped), rows // 4)
    asks: dict[int, I64] = {}
    strata: dict[int, I64] = {}
    usable = recording.known & recording.valid
    last = rows - skipped - span
    for number in range(POINTS):
        at = int((number + 1) * last / (POINTS + 1)) // batch_rows * batch_rows - 1
        if at < 0 or at in asks or span < 2:
            continue
        window = np.flatnonzero(usable[at + 1 + skipped : at + 1 + skipped + span]) + at + 1 + skipped
        if len(window) > ROWS:
            window = window[np.linspace(0, len(window) - 1, ROWS).astype(np.int64)]
        found = _strata(recording.y[window])
        if len(np.unique(found)) < 2:
            continue
        order = np.random.default_rng((seed, at)).permutation(len(window))
        asks[at], strata[at] = window[order].astype(np.int64), found[order]
    return Near(asks, skipped, strata)


def label_memory(recording: Recording) -> int:
    """S: the least lag, in rows, at which labels say nothing of one another; at most a quarter of the recording."""
    y = recording.y.astype(np.float64)
    y[~recording.known] = np.nan
    most = len(y) // 4
    classes = recording.y.dtype.kind != "f"
    known = y[np.isfinite(y)]
    if not len(known) or not most:
        return 0
    chance = float(np.square(np.unique(known, return_counts=True)[1] / len(known)).sum()) if classes else _CORRELATED
    # From lag to lag by a tenth: exact enough, and quick on long recordings.
    lag = 1
    while lag < most:
        one, other = y[:-lag], y[lag:]
        both = np.isfinite(one) & np.isfinite(other)
        if not both.any():
            return lag
        if classes:
            bound = chance + max(_TOLERANCE, 2 * float(np.sqrt(chance * (1 - chance) / both.sum())))
            alike = float((one[both] == other[both]).mean())
        else:
            bound, alike = chance, _correlation(one[both], other[both])
        if alike <= bound:
            return lag
        lag = max(lag + 1, int(lag * 1.1))
    return most


def near_loss(near: Near, asked: Mapping[int, F32], losses: Mapping[int, F64]) -> float | None:
    """The balanced loss, mean over points; ``losses`` (n,) by point. None where there is no point."""
    points = [_balanced(losses[at], near.strata[at]) for at in near.asks if at in asked]
    return float(np.mean(points)) if points else None


def chance(near: Near, recording: Recording, scale: float) -> float | None:
    """The balanced loss below which no constant answer comes; ``scale`` divides the squared error of targets."""
    points = []
    for at, rows in near.asks.items():
        strata = near.strata[at]
        if recording.y.dtype.kind != "f":
            points.append(1.0 - 1.0 / len(np.unique(strata)))
            continue
        y = recording.y[rows].astype(np.float64)
        centre = np.mean([y[strata == stratum].mean() for stratum in np.unique(strata)])
        points.append(_balanced(np.square(y - centre) / scale, strata))
    return float(np.mean(points)) if points else None


def _balanced(losses: F64, strata: I64) -> float:
    return float(np.mean([losses[strata == stratum].mean() for stratum in np.unique(strata)]))


def _strata(y: NDArray[np.int64] | F64 | F32) -> I64:
    if y.dtype.kind != "f":
        return y.astype(np.int64)
    if not len(y):
        return np.empty(0, np.int64)
    return np.searchsorted(np.quantile(y, [0.25, 0.5, 0.75]), y).astype(np.int64)


def _correlation(one: F64, other: F64) -> float:
    one, other = one - one.mean(), other - other.mean()
    scale = float(np.sqrt(np.square(one).sum() * np.square(other).sum()))
    return float((one * other).sum()) / scale if scale else 0.0
