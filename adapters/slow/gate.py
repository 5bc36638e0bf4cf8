"""The gate: whether a candidate is proven better than the served model on rows that neither was trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from adapters.slow.fork import fork
from adapters.slow.intervals import Interval, paired_errors, paired_losses
from adapters.slow.losses import Task, check_task, row_losses

Reason = Literal["better", "not better", "worse on reference", "too few rows", "stale", "non-finite"]
Measure = Literal["error", "log loss", "squared error"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate decided, and on what evidence. NaN stands for what was not measured."""

    promote: bool
    reason: Reason
    """Why, from a fixed list."""
    measure: Measure
    """What ``gain`` is a drop of: error rate, log loss in nats, or squared error in squared units of the target."""
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
    """Drop of the error rate within that class. It is reported, not a condition."""


class _Scores(NamedTuple):
    """Of one model on some rows."""

    loss: NDArray[np.float64]
    """(n,) cross-entropy or squared error."""
    wrong: NDArray[np.float64]
    """(n,) 0 or 1; zeros for regression."""

    @property
    def finite(self) -> bool:
        """Whether the model answered every row."""
        return bool(np.isfinite(self.loss).all())


def _score(model: nn.Module, x: NDArray[Any], y: NDArray[Any], task: Task, batch_rows: int) -> _Scores:
    # A twin in eval mode over the same tensors: whatever mode the given module is in stays, and no statistic moves.
    twin = fork(model, {}).eval()
    first = next(twin.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    losses, wrongs = [], []
    with torch.inference_mode():
        for start in range(0, len(y), batch_rows):
            labels = y[start : start + batch_rows]
            output = twin(torch.tensor(x[start : start + batch_rows], device=device))
            losses.append(row_losses(output, labels, task).double().cpu().numpy())
            wrong = output.argmax(dim=1).cpu().numpy() != labels if task == "classification" else np.zeros(len(labels))
            wrongs.append(wrong.astype(np.float64))
    return _Scores(np.concatenate(losses), np.concatenate(wrongs))


def _gain(served: _Scores, candidate: _Scores, task: Task, level: float) -> tuple[Measure, Interval]:
    if task == "regression":
        return "squared error", paired_losses(served.loss - candidate.loss, level)
    better = int(((served.wrong == 1) & (candidate.wrong == 0)).sum())
    worse = int(((served.wrong == 0) & (candidate.wrong == 1)).sum())
    # Two tests may promote, so each gets half of the level.
    if better != worse:
        return "error", paired_errors(better, worse, len(served.wrong), level / 2)
    return "log loss", paired_losses(served.loss - candidate.loss, level / 2)


def _reference_loss(served: _Scores, candidate: _Scores, y: NDArray[Any], task: Task) -> float:
    if task == "classification":
        return float((candidate.wrong - served.wrong).mean())
    return float((candidate.loss - served.loss).mean()) / (float(y.var()) or 1.0)


def _worst_class(served: _Scores, candidate: _Scores, y: NDArray[Any]) -> tuple[int, float]:
    gains = {int(label): float((served.wrong - candidate.wrong)[y == label].mean()) for label in np.unique(y)}
    worst = min(gains, key=lambda label: gains[label])
    return worst, gains[worst]


def _columns(x: ArrayLike | None, y: ArrayLike | None, task: Task) -> tuple[NDArray[Any], NDArray[Any]]:
    x = np.ascontiguousarray([] if x is None else x, dtype=np.float32)
    y = np.ascontiguousarray([] if y is None else y, dtype=np.int64 if task == "classification" else np.float32)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} rows of x have {len(y)} labels; each row needs one")
    return x, y


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
    reference_margin: float | None = 0.02,
    min_rows: int = 32,
    query: int = 1,
    max_queries: int | None = None,
    batch_rows: int = 512,
) -> Verdict:
    """Promote the candidate only if it is proven better on the new rows and does not lose too much on the reference.

    Classification: the one-sided exact McNemar test of the paired errors; when both models err equally often, a t
    interval of the paired log losses (winsorised against the candidate). Each runs at half the level. Regression: the
    t interval of the paired squared errors. The level of the k-th look at the same rows is ``alpha * 6 / (pi k)**2``,
    which sums to ``alpha`` over all k, so the chance that any candidate no better than the served model is promoted
    on one set of rows is at most ``alpha``. That counts rows as exchangeable: where the errors of neighbouring rows go
    together, the true level is higher, and the t interval holds for many rows rather than exactly.

    The reference exemplars are a fixed suite, not a sample: the loss on them is compared as it is, without an
    interval. ``reference_margin`` is the error rate (regression: the share of the targets' variance) that the
    candidate may lose there. It protects what the model knew. After a concept change the reference labels contradict
    the new ones and no good candidate can pass: then it must be None, and the loss is measured but not a condition.

    Args:
        served: what serves now; logits (B, K), or predictions (B,) or (B, 1).
        candidate: what may replace it. Neither is changed, whatever mode it is in.
        x_new: (n, *input_shape) held-back rows.
        y_new: (n,) their labels.
        x_ref: (r, *input_shape) reference exemplars; None or empty for none.
        y_ref: (r,) their labels.
        task: classification or regression.
        alpha: chance to promote a candidate that is no better, over all looks at the same rows.
        reference_margin: see above; None does not make it a condition.
        min_rows: fewest new rows to judge on.
        query: which look at these rows this is, from 1: ``Holdout.look()``.
        max_queries: looks after which the rows are stale; None for no limit.
        batch_rows: rows of one forward pass.

    Returns:
        Verdict: never promoted without a reason ``better``.

    Raises:
        ValueError: an argument is out of range, or the models' outputs or the labels do not fit the task.
    """
    check_task(task)
    if not 0 < alpha < 1 or query < 1 or min_rows < 2:
        raise ValueError(
            f"alpha is {alpha}, query {query}, min_rows {min_rows}; they must be in (0, 1), at least 1, at least 2"
        )
    measure: Measure = "error" if task == "classification" else "squared error"
    x, y = _columns(x_new, y_new, task)
    if max_queries is not None and query > max_queries:
        return Verdict(promote=False, reason="stale", measure=measure)
    if len(y) < min_rows:
        return Verdict(promote=False, reason="too few rows", measure=measure)
    old, new = (_score(model, x, y, task, batch_rows) for model in (served, candidate))
    if not (old.finite and new.finite):
        return Verdict(promote=False, reason="non-finite", measure=measure)
    measure, interval = _gain(old, new, task, alpha * 6 / (math.pi * query) ** 2)
    worst_class, worst_gain = _worst_class(old, new, y) if task == "classification" else (None, math.nan)

    reason: Reason = "better" if interval.low > 0 else "not better"
    lost = math.nan
    x, y = _columns(x_ref, y_ref, task)
    if len(y):
        old, new = (_score(model, x, y, task, batch_rows) for model in (served, candidate))
        lost = _reference_loss(old, new, y, task)
        if not (old.finite and new.finite):
            reason = "non-finite"
        elif reason == "better" and reference_margin is not None and lost > reference_margin:
            reason = "worse on reference"
    return Verdict(
        promote=reason == "better",
        reason=reason,
        measure=measure,
        gain=interval.estimate,
        gain_low=interval.low,
        gain_high=interval.high,
        reference_loss=lost,
        worst_class=worst_class,
        worst_class_gain=worst_gain,
    )
