"""One candidate of a look: the test of its gain, its slices and what it loses on the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapters.slow.gate.blocks import Blocks, cut, runs
from adapters.slow.gate.intervals import F64, Interval, block_interval, winsorised
from adapters.slow.gate.scores import Scores
from adapters.slow.gate.slices import REPORTED, Groups, groups, judge_slices
from adapters.slow.gate.verdict import Measure, Reason, Slice, Verdict
from adapters.slow.losses import Task
from adapters.slow.rows import Array


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What all candidates of one look are held to."""

    task: Task
    level: float
    reference_margin: float | None
    slice_level: float
    slice_margin: float | None
    least_rows: float
    """Fewest rows of a block, by the labels and by what the caller knows."""
    run_rows: int | None
    """See `gate.judge`."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """The rows that all candidates are judged on, with the served model's scores."""

    y: Array
    served: Scores
    segments: Groups
    y_ref: Array
    served_ref: Scores
    counts: NDArray[np.bool_]
    """(r,) exemplars that are a condition."""
    contradicted: tuple[int, ...]


def _drops(new: Scores, held: Held, task: Task) -> tuple[Measure, F64, float]:
    """What is tested, row by row, and the share of the level that it gets."""
    losses = held.served.loss - new.loss
    if task == "regression":
        return "squared error", winsorised(losses), 1.0
    wrong = held.served.wrong - new.wrong
    # Two tests may promote, so each gets half of the level.
    return ("error", wrong, 0.5) if wrong.sum() else ("log loss", winsorised(losses), 0.5)


def weigh(new: Scores, new_ref: Scores, held: Held, terms: Terms) -> Verdict:
    """The verdict on one candidate, from its scores on the new rows and on the exemplars."""
    measure: Measure = "error" if terms.task == "classification" else "squared error"
    if not (new.finite and new_ref.finite):
        return Verdict(promote=False, reason="non-finite", measure=measure, level=terms.level)
    measure, drops, share = _drops(new, held, terms.task)
    losses = held.served.loss - new.loss
    blocks = cut([drops, losses], terms.least_rows)
    if not blocks.number and terms.run_rows is not None and terms.task == "classification":
        blocks = runs(held.y, terms.run_rows)
    interval = Interval(float(drops.mean()), math.nan, math.nan)
    if blocks.number:
        interval = block_interval(*blocks.sums(drops), share * terms.level)
    lost, counted = _reference(new_ref, held, terms.task)
    slices = _slices(new, new_ref, held, terms, blocks)
    reason: Reason = "better"
    if math.isnan(interval.low):
        reason = "too few rows"
    elif not interval.low > 0:
        reason = "not better"
    elif any(part.worse for part in slices):
        reason = "worse on a slice"
    elif terms.reference_margin is not None and counted > terms.reference_margin:
        reason = "worse on reference"
    seen = [part for part in slices if part.kind == "class" and part.rows]
    worst = min(seen, key=lambda part: part.gain, default=None)
    return Verdict(
        promote=reason == "better",
        reason=reason,
        measure=measure,
        gain=interval.estimate,
        gain_low=interval.low,
        gain_high=interval.high,
        reference_loss=lost,
        worst_class=None if worst is None else worst.value,
        worst_class_gain=math.nan if worst is None else worst.gain,
        level=terms.level,
        blocks=blocks.number,
        slices=slices[:REPORTED],
        contradicted=list(held.contradicted),
    )


def _reference(new: Scores, held: Held, task: Task) -> tuple[float, float]:
    """What is lost on all exemplars, and on those that are a condition; NaN without any."""
    if not len(held.y_ref):
        return math.nan, math.nan
    lost = new.wrong - held.served_ref.wrong
    if task == "regression":
        lost = (new.loss - held.served_ref.loss) / (float(held.y_ref.var()) or 1.0)
    return float(lost.mean()), float(lost[held.counts].mean()) if held.counts.any() else math.nan


def _slices(new: Scores, new_ref: Scores, held: Held, terms: Terms, blocks: Blocks) -> list[Slice]:
    if terms.task == "regression":
        drops = held.served.loss - new.loss
        tame = np.clip(drops, *np.quantile(drops, [0.05, 0.95]))
        classes: Groups = {}
        reference: dict[int, F64] = {}
        scale = float(held.y.var()) or 1.0
    else:
        tame = held.served.wrong - new.wrong
        classes, scale = groups(held.y), 1.0
        kept = held.y_ref[held.counts]
        gone = (held.served_ref.wrong - new_ref.wrong)[held.counts]
        reference = {int(label): gone[kept == label] for label in np.unique(kept)}
    if not classes and not reference and len(held.segments) < 2:
        return []
    return judge_slices(
        blocks,
        tame,
        classes,
        held.segments,
        reference,
        level=terms.slice_level,
        margin=terms.slice_margin,
        scale=scale,
    )
