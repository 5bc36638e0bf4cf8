"""Whether a candidate gives up a class or a segment for the mean."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from adapters.slow.gate.blocks import Blocks
from adapters.slow.gate.intervals import F64, block_interval, fewest_blocks
from adapters.slow.gate.verdict import Slice

PRIOR_ROWS = 8.0
"""Rows without a loss that every slice is given: three rows that happen to be lost are not yet a lost class."""
REPORTED = 16
"""Slices in a verdict at the most."""

Groups = dict[int, NDArray[np.bool_]]


def groups(values: NDArray[np.int64]) -> Groups:
    """Rows of each value that occurs."""
    return {int(value): values == value for value in np.unique(values)}


def judge_slices(
    blocks: Blocks,
    drops: F64,
    classes: Groups,
    segments: Groups,
    reference: dict[int, F64],
    *,
    level: float,
    margin: float | None,
    scale: float,
) -> list[Slice]:
    """All slices, the worst first; a slice is worse by either of two rules.

    Surely worse: the upper bound of its gain is below 0, at ``level`` over the number of slices with blocks enough to
    know (Bonferroni), so a candidate that is worse nowhere is rejected for it with probability ``level`` at most.
    Slices that are too small for that can't be shown to be unharmed either: there the estimate decides. What is lost
    on the slice's new rows and on its class's reference rows together, with ``PRIOR_ROWS`` rows at no loss, must be
    ``margin`` at most. That is a rule of caution without a level: it errs towards the served model.

    Args:
        blocks: of the new rows.
        drops: (n,) drop of the error or of the loss, row by row.
        classes: new rows by class; empty for regression.
        segments: new rows by segment; one alone is not a slice.
        reference: drops on the reference exemplars by class, those that count.
        level: of all sure slices together.
        margin: of the shrunken loss, in units of ``scale``; None for the sure rule alone.
        scale: variance of the targets; 1 for errors.
    """
    none = np.zeros(len(drops), bool)
    parts = [("class", value, classes.get(value, none)) for value in sorted(classes.keys() | reference.keys())]
    if len(segments) > 1:
        parts += [("segment", value, rows) for value, rows in segments.items()]
    summed = [blocks.sums(drops, rows) for _, _, rows in parts]
    # How many can know depends on the level, which depends on how many can: the strictest is safe.
    known = sum(len(sums) >= fewest_blocks(level / len(parts)) for sums, _ in summed)
    found = []
    for (kind, value, rows), (sums, sizes) in zip(parts, summed, strict=True):
        high = math.nan
        if known and len(sums) >= fewest_blocks(level / len(parts)):
            high = block_interval(sums, sizes, level / known).high
        beside = reference.get(value, np.zeros(0)) if kind == "class" else np.zeros(0)
        own = drops[rows]
        lost = -float(own.sum() + beside.sum()) / (len(own) + len(beside) + PRIOR_ROWS) / scale
        found.append(
            Slice(
                kind="class" if kind == "class" else "segment",
                value=value,
                rows=len(own),
                gain=float(own.mean()) if len(own) else math.nan,
                gain_high=high,
                shrunken_loss=lost,
                worse=high < 0 or (margin is not None and lost > margin),
            )
        )
    return sorted(found, key=lambda part: (not part.worse, -part.shrunken_loss, part.kind, part.value))
