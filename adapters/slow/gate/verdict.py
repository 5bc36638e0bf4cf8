"""What a gate says, in plain values: the logs and the record of a version keep it as it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Reason = Literal[
    "better",
    "not better",
    "worse on a slice",
    "worse on reference",
    "too few rows",
    "stale",
    "non-finite",
    "less sure",
    "too many answers change",
    "answers collapse",
]
Measure = Literal["error", "log loss", "squared error", "class distance"]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One class or segment of the new rows."""

    kind: Literal["class", "segment"]
    value: int
    rows: int
    """New rows in it."""
    gain: float
    """Drop of the error rate (regression: of the squared error) on them; NaN without rows."""
    gain_high: float = math.nan
    """One-sided upper bound at the slice's share of ``slice_level``; NaN where its blocks are too few to know."""
    shrunken_loss: float = math.nan
    """What the candidate loses on the slice's new and reference rows, shrunken towards none."""
    worse: bool = False
    """Whether the candidate is rejected for it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate decided, and on what evidence. NaN stands for what was not measured."""

    promote: bool
    reason: Reason
    """Why, from a fixed list."""
    measure: Measure
    """What ``gain`` is a drop of: error rate, log loss in nats, squared error in squared units of the target, or
    distance of the features from their predicted class in deviations."""
    gain: float = math.nan
    """Drop from the served model to the candidate on the new rows; above 0 is better."""
    gain_low: float = math.nan
    """One-sided lower bound of the gain at this query's level; promotion needs it above 0."""
    gain_high: float = math.nan
    """One-sided upper bound of the gain at this query's level."""
    reference_loss: float = math.nan
    """What the candidate loses on the reference exemplars: error rate, or share of the target's variance."""
    worst_class: int | None = None
    """Class with the smallest ``worst_class_gain`` among the new rows; None for regression."""
    worst_class_gain: float = math.nan
    """Drop of the error rate within that class."""
    level: float = math.nan
    """Chance that this look promotes a candidate that is no better."""
    blocks: int = 0
    """Blocks of rows that the test counts as independent; 0 where rows are too alike for a proof."""
    slices: list[Slice] = field(default_factory=list)
    """The slices that did worst, the worst first; not all where there are many."""
    contradicted: list[int] = field(default_factory=list)
    """Classes whose reference exemplars the new labels contradict, so that they are no condition."""
    changed: float = math.nan
    """Share of the new rows whose answer changes; the gate without labels alone measures it."""
