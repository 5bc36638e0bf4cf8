"""The gate: whether a candidate is proven better than the served model on rows that neither was trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from torch import nn

from adapters.slow.gate.blocks import cut, label_rows
from adapters.slow.gate.contradiction import contradicted
from adapters.slow.gate.intervals import F64
from adapters.slow.gate.scores import columns, score
from adapters.slow.gate.slices import groups
from adapters.slow.gate.verdict import Measure, Reason, Slice, Verdict
from adapters.slow.gate.weigh import Held, Terms, weigh
from adapters.slow.losses import Task, check_task
from adapters.slow.rows import Array

__all__ = ["Measure", "Reason", "Slice", "Verdict", "judge", "judge_many", "look_level"]


def look_level(alpha: float, query: int, candidates: int = 1) -> float:
    """Level for each of ``candidates`` that are judged in one look, which is the ``query``-th of its rows.

    The k-th candidate that the same rows judge has ``alpha * 6 / (pi k)**2``, which sums to ``alpha`` over all k. Those
    of one look share what is theirs equally: nothing sets the first apart from the last.
    """
    return math.fsum(alpha * 6 / (math.pi * k) ** 2 for k in range(query, query + candidates)) / candidates


def judge(
    served: nn.Module,
    candidate: nn.Module,
    x_new: ArrayLike,
    y_new: ArrayLike,
    x_ref: ArrayLike | None,
    y_ref: ArrayLike | None,
    *,
    task: Task,
    alpha: float = 0.05,
    reference_margin: float | Literal["auto"] | None = 0.02,
    min_rows: int = 32,
    query: int = 1,
    max_queries: int | None = None,
    batch_rows: int = 512,
    segment: ArrayLike | None = None,
    slice_level: float = 0.05,
    slice_margin: float | None = 0.1,
    class_shares: ArrayLike | None = None,
    least_block_rows: float = 1.0,
    run_rows: int | None = None,
) -> Verdict:
    """Promote the candidate only if it is proven better on the new rows and gives up neither a slice nor the reference.

    The rows are cut into blocks that are longer than the paired differences are correlated (`gate.blocks.cut`) and
    than one class lasts (`gate.blocks.label_rows`), and the test flips the signs of whole blocks
    (`intervals.block_interval`): exact for few of them. Classification: of the drop of the error; when both models err
    equally often, of the drop of the log loss, winsorised against the candidate. Each runs at half the level.
    Regression: of the drop of the squared error, winsorised. The level is that of `look_level`, so the chance that any
    candidate no better than the served model is promoted on one set of rows is at most ``alpha``.

    What is not covered: dependence that is weak between neighbours and lasts about as long as the rows do (an error
    rate that wanders over 200 rows unseen: 0.16 reached for 0.05 asked with 96 rows, 0.08 with 256), and a stream that
    changes after them. ``least_block_rows`` tells what a longer memory of the stream knows.

    Slices are the classes and segments: see `gate.slices.judge_slices`.

    The reference exemplars are a fixed suite, not a sample: the loss on them is compared as it is, without an
    interval. ``reference_margin`` is the error rate (regression: the share of the targets' variance) that the
    candidate may lose there. It protects what the model knew. After a concept change the reference labels contradict
    the new ones and no good candidate can pass. With None the loss is measured but is no condition, also not for
    slices; "auto" leaves out the classes only that the new labels are shown to contradict
    (`gate.contradiction.contradicted`), with a margin of 0.02 for the others.

    Args:
        served: what serves now; logits (B, K), or predictions (B,) or (B, 1).
        candidate: what may replace it. Neither is changed, whatever mode it is in.
        x_new: (n, *input_shape) held-back rows, oldest first.
        y_new: (n,) their labels.
        x_ref: (r, *input_shape) reference exemplars; None or empty for none.
        y_ref: (r,) their labels.
        task: classification or regression.
        alpha: chance to promote a candidate that is no better, over all looks at the same rows.
        reference_margin: see above.
        min_rows: fewest new rows to judge on.
        query: which candidate of these rows this is, from 1: ``Holdout.look()``.
        max_queries: candidates after which the rows are stale; None for no limit.
        batch_rows: rows of one forward pass.
        segment: (n,) stratum of each new row; None for one.
        slice_level: chance to reject a candidate for a slice when it is worse on none.
        slice_margin: error rate (regression: share of the targets' variance) that the shrunken estimate of a slice may
            lose; None for no such condition.
        class_shares: (K,) share of each class in the stream over a time longer than the new rows'; by default the more
            even ones of the reference's (all classes alike without one) and the new rows' own.
        least_block_rows: fewest rows of a block.
        run_rows: where classes last so long that the blocks are too few to prove anything: count so many rows of one
            class as one block instead. The level then holds for candidates that differ by chance within a class, not
            for those that are better at the classes of the day alone; None: nothing is proven there.

    Returns:
        Verdict: never promoted without a reason ``better``.

    Raises:
        ValueError: an argument is out of range, or the models' outputs or the labels do not fit the task.
    """
    return judge_many(
        served,
        [candidate],
        x_new,
        y_new,
        x_ref,
        y_ref,
        task=task,
        alpha=alpha,
        reference_margin=reference_margin,
        min_rows=min_rows,
        query=query,
        max_queries=max_queries,
        batch_rows=batch_rows,
        segment=segment,
        slice_level=slice_level,
        slice_margin=slice_margin,
        class_shares=class_shares,
        least_block_rows=least_block_rows,
        run_rows=run_rows,
    )[0]


def judge_many(
    served: nn.Module,
    candidates: Sequence[nn.Module],
    x_new: ArrayLike,
    y_new: ArrayLike,
    x_ref: ArrayLike | None,
    y_ref: ArrayLike | None,
    *,
    task: Task,
    alpha: float = 0.05,
    reference_margin: float | Literal["auto"] | None = 0.02,
    min_rows: int = 32,
    query: int = 1,
    max_queries: int | None = None,
    batch_rows: int = 512,
    segment: ArrayLike | None = None,
    slice_level: float = 0.05,
    slice_margin: float | None = 0.1,
    class_shares: ArrayLike | None = None,
    least_block_rows: float = 1.0,
    run_rows: int | None = None,
) -> list[Verdict]:
    """`judge` several candidates on the same rows at a joint level, in their order; the served model is scored once.

    They count as as many queries, ``query`` to ``query + len(candidates) - 1``: the caller must count them so. The
    chance that any of those that are no better is promoted is at most what these queries have together. All are stale
    when the last of them would be.
    """
    check_task(task)
    if not 0 < alpha < 1 or query < 1 or min_rows < 2:
        raise ValueError(
            f"alpha is {alpha}, query {query}, min_rows {min_rows}; they must be in (0, 1), at least 1, at least 2"
        )
    if not 0 < slice_level < 1 or not least_block_rows >= 1:
        raise ValueError(
            f"slice_level is {slice_level}, least_block_rows {least_block_rows}; they must be in (0, 1), at least 1"
        )
    if run_rows is not None and run_rows < 1:
        raise ValueError(f"run_rows is {run_rows}; it must be at least 1, or None")
    if reference_margin == "auto" and task == "regression":
        raise ValueError("reference_margin 'auto' compares classes; give a number or None for regression")
    if not candidates:
        return []
    measure: Measure = "error" if task == "classification" else "squared error"
    x, y = columns(x_new, y_new, task)
    parts = np.zeros(len(y), np.int64) if segment is None else np.asarray(segment, np.int64)
    if parts.shape != y.shape:
        raise ValueError(f"segment has shape {parts.shape}; it must be ({len(y)},), one per new row")
    level = look_level(alpha, query, len(candidates))

    def all_of(reason: Reason) -> list[Verdict]:
        return [Verdict(promote=False, reason=reason, measure=measure, level=level) for _ in candidates]

    if max_queries is not None and query + len(candidates) - 1 > max_queries:
        return all_of("stale")
    if len(y) < min_rows:
        return all_of("too few rows")
    x_known, y_known = columns(x_ref, y_ref, task)
    old, old_ref = score(served, x, y, task, batch_rows), score(served, x_known, y_known, task, batch_rows)
    if not (old.finite and old_ref.finite):
        return all_of("non-finite")
    least = least_block_rows
    if task == "classification":
        least = max(least, label_rows(y, _shares(class_shares, y, y_known, old.classes)))
    opposed: tuple[int, ...] = ()
    if reference_margin == "auto":
        reference_margin = 0.02
        rough = cut([old.wrong, old.loss], least)
        opposed = contradicted(served, x, y, x_known, y_known, rough, batch_rows)
    counts = np.zeros(len(y_known), bool) if reference_margin is None else ~np.isin(y_known, opposed)
    terms = Terms(
        task=task,
        level=level,
        reference_margin=reference_margin,
        slice_level=slice_level,
        slice_margin=slice_margin,
        least_rows=least,
        run_rows=run_rows,
    )
    held = Held(
        y=y,
        served=old,
        segments=groups(parts),
        y_ref=y_known,
        served_ref=old_ref,
        counts=counts,
        contradicted=opposed,
    )
    verdicts = []
    for candidate in candidates:
        new, new_ref = (score(candidate, *rows, task, batch_rows) for rows in ((x, y), (x_known, y_known)))
        verdicts.append(weigh(new, new_ref, held, terms))
    return verdicts


def _shares(given: ArrayLike | None, y: Array, y_ref: Array, classes: int) -> F64:
    """Class shares (K,) that say how often independent labels would change."""
    if given is not None:
        shares = np.asarray(given, np.float64)
        if shares.shape != (classes,) or not np.isfinite(shares).all() or (shares < 0).any() or shares.sum() <= 0:
            raise ValueError(f"class_shares must be ({classes},) shares of the model's classes, 0 or more; got {given}")
        normed: F64 = shares / shares.sum()
        return normed
    known = np.bincount(y_ref, minlength=classes) if len(y_ref) else np.ones(classes)
    both: list[F64] = [counts / counts.sum() for counts in (known, np.bincount(y, minlength=classes))]
    squares = [float(np.square(shares).sum()) for shares in both]
    return both[0] if squares[0] <= squares[1] else both[1]
