"""Which few rows of a window are worth a label: spread over what was seen, more of them where the model doubts.

Greedy choices (the most uncertain rows, core sets, k-means++ on gradients) know their sample only as the one they took:
an error estimated on it is wrong by an unknown amount, and the far-out rows that they love tell a head of class means
the least. Here every row has a known chance to be chosen, and only *which* rows come together is steered.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Why = Literal["representative", "uncertain"]
REASONS: tuple[Why, ...] = get_args(Why)

POINT_WIDTH = 32
"""Numbers that stand for a row; wider rows are sketched."""
DOUBT_SHARE = 0.5
"""Share of the budget that follows the doubt; the rest falls on all rows alike. On the gas stream, in windows of 200
rows, heads of class means and linear discriminants that learn from 1% or 10% of the labels err less by 1 to 4 points
than with rows drawn blindly; from the most doubtful rows alone the linear one errs more by up to 7."""
_SPREAD = 3.0
"""Robust deviations: where a feature is cut off, and what the window's length and another class count for."""
_GROUPS = 16
_STEPS = 1024
_POWER_STEPS = 4
_CERTAIN = 1 - 1e-9
_ONE_QUESTION = 1.5

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class Chosen(NamedTuple):
    """Rows to ask for, in the order of the window."""

    rows: I64
    """(n,) their indices."""
    probability: F64
    """(n,) the chance that each had to be chosen: one over it is the row's weight in an unbiased estimate."""
    why: list[Why]
    """(n,) what most of that chance comes from: doubt, or standing for its like."""


def sketch(x: ArrayLike, width: int = POINT_WIDTH) -> NDArray[np.float32]:
    """(B, *shape) as points (B, at most ``width``): sums of neighbours under fixed random signs.

    Squared distances are kept in expectation (Weinberger et al., "Feature Hashing for Large Scale Multitask Learning",
    ICML 2009); time and memory grow with the size of a row alone.
    """
    values = np.asarray(x, np.float32)
    values = values.reshape(len(values), -1)
    size = values.shape[1]
    if size <= width:
        return values
    signs = np.random.default_rng(size).choice(np.array([-1, 1], np.float32), size)
    edges = np.linspace(0, size, width, endpoint=False).astype(np.int64)
    # What overflows is not finite, and such a row is never chosen.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.add.reduceat(values * signs, edges, axis=1)


def choose(
    points: ArrayLike,
    doubt: ArrayLike,
    n: int,
    *,
    groups: ArrayLike | None = None,
    seed: int | list[int],
    doubt_share: float = DOUBT_SHARE,
) -> Chosen:
    """Choose ``n`` rows of a window: uncertain, diverse and representative at once.

    Row i is chosen with probability p_i = n ((1 - s) / W + s d_i / sum d), at most 1, s the ``doubt_share``, d the
    doubt. The rows are ordered by a tree that halves the window along its first principal direction until one question
    is left in each cell, and drawn systematically along that order (Madow, "On the theory of systematic sampling",
    1949), so that every cell gets its share and close rows hardly ever come together; the idea of a spatially balanced
    sample is Stevens & Olsen's (JASA 2004). Features, predicted class and place in the window make up the space;
    features count in robust deviations, cut off at 3, so that outliers have no corner of their own.

    O(W (D + log W) log n) for W rows of D numbers. The same arguments give the same rows.

    Args:
        points: (W, D) features, or `sketch` of the inputs, oldest first. Rows that are not finite (as float32) are
            never chosen.
        doubt: (W,) of the model about each row, 0 or more; only ratios count. One that is not finite counts as 0.
        n: rows to choose; at most as many as can be.
        groups: (W,) predicted class; None for a regression.
        seed: of the draw.
        doubt_share: s, in [0, 1].

    Raises:
        ValueError: the shapes do not fit, or a number is out of range.
    """
    points, doubt = np.asarray(points, np.float64), np.asarray(doubt, np.float64)
    if points.ndim != 2 or doubt.shape != points.shape[:1]:
        raise ValueError(f"points has shape {points.shape}, doubt {doubt.shape}; they must be (W, D) and (W,)")
    if groups is not None and np.shape(groups) != doubt.shape:
        raise ValueError(f"groups has shape {np.shape(groups)}; it must be {doubt.shape}, one class per row of points")
    if n < 0 or not 0 <= doubt_share <= 1:
        raise ValueError(f"n is {n}, doubt_share {doubt_share}; n must be 0 or more, doubt_share in [0, 1]")
    usable = np.flatnonzero((np.abs(points) <= np.finfo(np.float32).max).all(1))
    n = min(n, len(usable))
    if not n:
        return Chosen(np.zeros(0, np.int64), np.zeros(0), [])
    found = doubt[usable]
    weight = np.where(np.isfinite(found), found, 0.0).clip(0.0)
    peak = float(weight.max())
    # Divided by the largest first: the sum of huge numbers would be infinite.
    scaled = weight / peak if peak > 0 else weight
    uncertain = doubt_share * scaled / math.fsum(scaled) if peak > 0 else scaled
    alike = (1.0 - doubt_share if peak > 0 else 1.0) / len(usable)
    probability = _inclusion(alike + uncertain, n)
    place = usable / max(1, len(points) - 1)
    space = _space(points[usable], place, None if groups is None else np.asarray(groups)[usable])
    start = float(np.random.default_rng(seed).random())
    drawn = np.sort(_systematic(probability, _order(space, probability), n, start))
    why: list[Why] = [REASONS[int(part > alike)] for part in uncertain[drawn]]
    return Chosen(usable[drawn].astype(np.int64), probability[drawn], why)


def _inclusion(weight: F64, n: int) -> F64:
    """Probabilities (W,) in proportion to ``weight`` that add up to ``n``; who would have more than 1 is certain."""
    probability = np.ones(len(weight))
    open_to = np.ones(len(weight), np.bool_)
    left = n
    # Each round makes at least one more row certain.
    while open_to.any():
        total = math.fsum(weight[open_to])
        given = weight[open_to] * (left / total) if total > 0 else np.full(int(open_to.sum()), left / open_to.sum())
        if (given < _CERTAIN).all():
            probability[open_to] = given
            break
        over = np.flatnonzero(open_to)[given >= _CERTAIN]
        open_to[over] = False
        left -= len(over)
    return probability


def _space(points: F64, place: F64, groups: NDArray[Any] | None) -> I64:
    """The coordinates in which rows are alike, in steps of 1/1024: (W, D + 1), with the predicted class (W, D + 17)."""
    centre = np.median(points, axis=0)
    away = points - centre
    scale = np.quantile(np.abs(away), 0.75, axis=0)
    # A constant channel must not turn float noise into a coordinate.
    floor = np.maximum(np.abs(centre) * 1e-6, np.finfo(np.float32).tiny)
    parts = [np.clip(away / np.maximum(scale, floor), -_SPREAD, _SPREAD), (2 * _SPREAD * (place - 0.5))[:, None]]
    if groups is not None:
        # A class that is not a number is a group of its own kind: such rows are as unlike the others as any.
        known = np.nan_to_num(groups.astype(np.float64), nan=-1.0, posinf=-1.0, neginf=-1.0)
        codes = (np.floor(known) % _GROUPS).astype(np.int64)
        parts.append(_SPREAD * np.eye(_GROUPS)[codes])
    return np.asarray(np.rint(np.concatenate(parts, axis=1) * _STEPS), np.int64)


def _order(space: I64, probability: F64) -> I64:
    """The rows, leaf after leaf of a tree that halves the window until a cell has about one question."""
    leaves: list[I64] = []
    cells = [np.arange(len(space))]
    while cells:
        cell = cells.pop()
        mass = float(probability[cell].cumsum()[-1])
        if len(cell) < 2 or mass < _ONE_QUESTION:
            leaves.append(cell)
            continue
        rows = space[cell]
        cell = cell[_principal(rows).argsort(kind="stable")]
        sums = probability[cell].cumsum()
        # Whole questions on this side, but for half a row: else the steps would drift across the cells. An odd number
        # of them is no matter of rounding: the last bit of a confidence must not decide on which side the cut is.
        half = max(1, int(mass / 2 + 0.25))
        cut = min(int(sums.searchsorted(half - mass / len(cell) / 2)) + 1, len(cell) - 1)
        cells += [cell[cut:], cell[:cut]]
    return np.concatenate(leaves)


def _principal(rows: I64) -> I64:
    """Coordinates (m,) along the direction of most variance, about; zeros for rows that are all the same.

    In whole numbers, of which all are below 2^57: floating sums hang on where in memory the rows lie, and the last bit
    of one would turn the whole tree, so that a restart asked for other rows.
    """
    centred = rows - np.add.reduce(rows) // len(rows)
    direction = centred[np.add.reduce(centred * centred, axis=1).argmax()]
    for step in range(_POWER_STEPS):
        along = (centred @ direction) @ centred if step else direction
        length = math.hypot(*along.tolist())
        if not length > 0:
            return np.zeros(len(rows), np.int64)
        direction = np.asarray(np.rint(along * (_STEPS / length)), np.int64)
    return np.asarray(centred @ direction)


def _systematic(probability: F64, order: I64, n: int, start: float) -> I64:
    """Indices (n,): the certain rows, and one for each whole step along the others' probabilities, in ``order``."""
    certain = order[probability[order] >= _CERTAIN]
    rest = order[probability[order] < _CERTAIN]
    steps = n - len(certain)
    if not steps:
        return certain
    sums = np.cumsum(probability[rest])
    # Rounding must not move the end of the last step behind the last row.
    at = np.searchsorted(sums * (steps / sums[-1]), start + np.arange(steps), side="right")
    return np.concatenate((certain, rest[np.minimum(at, len(rest) - 1)]))
