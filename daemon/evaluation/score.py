"""What a configuration's answers are worth: errors with intervals, recoveries, worst window, forgetting, cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from daemon.evaluation.answers import Frozen, Replayed
from daemon.evaluation.intervals import Interval, block_length, mean_interval
from daemon.evaluation.near import Near, near_loss
from daemon.evaluation.recording import Recording
from daemon.records import F64, Bools

WINDOW = 500
"""Rows of the worst window."""
RECOVERY_ROWS = 100
"""Rows over which the error has to be back."""
LEVEL_ROWS = 1_000
"""Most rows before a change from which the level to come back to is taken."""
TOLERANCE = 0.02
"""Least error above that level that still counts as back."""


@dataclass(frozen=True, slots=True)
class Worst:
    """The window with the largest mean loss."""

    row: int
    rows: int
    loss: float


@dataclass(frozen=True, slots=True)
class Recovery:
    """What happened after a change."""

    change: int
    level: float
    """Mean loss before it."""
    bound: float
    """Level plus tolerance; NaN where there are too few rows to judge."""
    rows: int | None
    """Rows from the change on until the first of `RECOVERY_ROWS` rows with a mean loss within the bound; None: never
    before the next change."""


@dataclass(frozen=True, slots=True)
class Score:
    """One configuration on one recording, over all seeds."""

    error: Interval
    """Share of wrong answers; squared error over the reference variance."""
    against_frozen: Interval
    """Paired: its loss minus the frozen model's on the same row."""
    block: int
    """Rows of a bootstrap block, the same for both."""
    rmse: float | None
    """Of a regression, in the target's unit."""
    worst: Worst | None
    recoveries: list[Recovery]
    near: float | None
    """See `daemon.evaluation.near`."""
    forgetting: float | None
    """Loss on the bundle's source exemplars afterwards, minus the frozen model's."""
    ms_per_row: float
    slow_ms_per_row: float
    backward_share: float
    same_share: float
    adapted_share: float
    peak_bytes: int
    by_seed: list[float]
    """Error of each seed."""


def scored(recording: Recording) -> Bools:
    """(N,) rows that count: those with a label."""
    return recording.known


def score(
    runs: Sequence[Replayed],
    frozen: Replayed,
    recording: Recording,
    twin: Frozen,
    near: Near,
    *,
    window: int = WINDOW,
    seed: int = 0,
) -> Score:
    """Score the replays of one configuration, one per seed; losses are averaged over seeds row by row.

    A row answered as invalid counts as wrong (regression: as far off as the reference's mean).
    """
    rows = scored(recording)
    losses = np.mean([twin.loss(run.prediction, recording.y) for run in runs], axis=0)
    base = twin.loss(frozen.prediction, recording.y)
    mine, difference = losses[rows], (losses - base)[rows]
    block = max(block_length(mine), block_length(difference))
    asked = [
        near_loss(near, run.asked, {at: twin.loss(run.asked[at], recording.y[near.asks[at]]) for at in run.asked})
        for run in runs
    ]
    forgotten = [
        run.source_error - run.frozen_source_error
        for run in runs
        if run.source_error is not None and run.frozen_source_error is not None
    ]
    return Score(
        error=mean_interval(mine, block=block, seed=seed),
        against_frozen=mean_interval(difference, block=block, seed=seed),
        block=block,
        rmse=_rmse(runs, recording) if twin.task == "regression" else None,
        worst=worst_window(losses, rows, window),
        recoveries=[recovery(losses, rows, recording.changes, index) for index in range(len(recording.changes))],
        near=_mean([value for value in asked if value is not None]),
        forgetting=_mean(forgotten),
        ms_per_row=float(np.mean([1e3 * run.seconds / len(recording) for run in runs])),
        slow_ms_per_row=float(np.mean([1e3 * run.slow_seconds / len(recording) for run in runs])),
        backward_share=float(np.mean([run.backward.mean() for run in runs])),
        same_share=float(np.mean([run.same.mean() for run in runs])),
        adapted_share=float(np.mean([run.adapted.mean() for run in runs])),
        peak_bytes=max(run.peak_bytes for run in runs),
        by_seed=[float(twin.loss(run.prediction, recording.y)[rows].mean()) for run in runs] if rows.any() else [],
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _rmse(runs: Sequence[Replayed], recording: Recording) -> float | None:
    """Root mean squared error of the rows that were answered and have a target."""
    squares = [np.square(run.prediction.astype(np.float64) - recording.y)[scored(recording)] for run in runs]
    values = np.concatenate(squares)
    values = values[np.isfinite(values)]
    return math.sqrt(float(values.mean())) if len(values) else None


def running_mean(losses: F64, rows: Bools, width: int) -> tuple[F64, F64]:
    """Mean loss over each ``width`` scored rows in a row: the last row (P,) of each, and the mean (P,)."""
    places = np.flatnonzero(rows)
    width = min(width, len(places))
    if not width:
        return np.empty(0), np.empty(0)
    total = np.concatenate(([0.0], np.cumsum(losses[places])))
    means: F64 = (total[width:] - total[:-width]) / width
    return places[width - 1 :].astype(np.float64), means


def worst_window(losses: F64, rows: Bools, width: int) -> Worst | None:
    """The largest mean loss over any ``width`` scored rows, or over all where there are fewer."""
    _, means = running_mean(losses, rows, width)
    if not len(means):
        return None
    at, width = int(np.argmax(means)), min(width, int(rows.sum()))
    return Worst(int(np.flatnonzero(rows)[at]), width, float(means[at]))


def recovery(losses: F64, rows: Bools, changes: Sequence[int], index: int) -> Recovery:
    """How long the error stayed up after change ``index``.

    The level is the mean loss over the last `LEVEL_ROWS` scored rows between the change before and this one; the bound
    lies above it by the larger of `TOLERANCE` and two standard errors of a mean over `RECOVERY_ROWS` such rows.
    """
    change = changes[index]
    before = changes[index - 1] if index else 0
    after = changes[index + 1] if index + 1 < len(changes) else len(losses)
    calm = losses[before:change][rows[before:change]][-LEVEL_ROWS:]
    if not len(calm):
        return Recovery(change, math.nan, math.nan, None)
    level = float(calm.mean())
    bound = level + max(TOLERANCE, 2 * float(calm.std()) / math.sqrt(RECOVERY_ROWS))
    here = rows[change:after]
    if here.sum() < RECOVERY_ROWS:
        return Recovery(change, level, math.nan, None)
    _, means = running_mean(losses[change:after], here, RECOVERY_ROWS)
    back = np.flatnonzero(means <= bound)
    return Recovery(change, level, bound, int(np.flatnonzero(here)[back[0]]) if len(back) else None)
