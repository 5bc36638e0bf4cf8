"""A gate for candidates when no labels come: what can be known without them, held against the candidate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from adapters.fast.core.class_distance import ClassDistance, NearerToSource
from adapters.fast.core.source import SourceOutputs
from adapters.features import FeatureTap, find_head
from adapters.reference import Reference
from adapters.slow.gate.blocks import cut, label_rows
from adapters.slow.gate.intervals import F64, Interval, block_interval
from adapters.slow.gate.judge import look_level
from adapters.slow.gate.scores import still
from adapters.slow.gate.verdict import Reason, Verdict
from adapters.slow.rows import Array

MOST_CHANGED = 0.15
"""Most of the answers that may change: labels would be needed to tell a revolution from a loss."""
SHARES_MARGIN = 0.02
"""By how much the answers' class shares may move away from the prior, in total variation."""


class _Answers(NamedTuple):
    """Of one model."""

    logits: Tensor
    """(n, K) float32 on the host."""
    features: Tensor
    """(n, D) float32 on the host."""

    @property
    def finite(self) -> bool:
        return bool(self.logits.isfinite().all()) and bool(self.features.isfinite().all())

    @property
    def answers(self) -> Tensor:
        """(n,) classes."""
        return self.logits.argmax(1)

    def entropy(self) -> F64:
        """(n,) in units of ln K."""
        log_p = self.logits.double().log_softmax(1)
        values: F64 = (-(log_p.exp() * log_p).sum(1) / math.log(self.logits.shape[1])).numpy()
        return values

    def shares(self) -> Tensor:
        """(K,) share of each class among the answers."""
        return torch.bincount(self.answers, minlength=self.logits.shape[1]).double() / len(self.logits)


def judge_unlabelled(
    served: nn.Module,
    candidate: nn.Module,
    x_new: ArrayLike,
    reference: Reference,
    *,
    alpha: float = 0.05,
    min_rows: int = 128,
    query: int = 1,
    max_queries: int | None = None,
    batch_rows: int = 512,
    least_block_rows: float = 1.0,
) -> Verdict:
    """Promote the candidate only if everything that needs no labels speaks for it. Classification alone.

    All of these, or it is rejected:

    1. it makes no more errors on the reference exemplars than the served model, no margin ("worse on reference");
    2. at most ``MOST_CHANGED`` of the answers change;
    3. the class shares of its answers are not farther from the reference's prior than the served model's, by
       ``SHARES_MARGIN`` in total variation ("answers collapse");
    4. its mean entropy on the new rows is no higher ("less sure");
    5. its features lie nearer to those of the class that it answers, by `NearerToSource` on the newest rows and by the
       test on blocks of the gate with labels over all of them, at the level of `look_level` ("not better"). Each model
       is measured against the reference's exemplars in its own features, in their deviations: scaling gains nothing.

    None of it proves fewer errors. A candidate that draws rows to the wrong classes, few at a time and leaving the
    reference alone, gets through: hence 2, and a frozen twin to compare with after the promotion.

    Args:
        served: what serves now; logits (B, K), with a linear head.
        candidate: what may replace it. Neither is changed.
        x_new: (n, *input_shape) rows that were not trained on, oldest first.
        reference: exemplars and the class prior.
        alpha: level of the test over all looks at the same rows.
        min_rows: fewest new rows to judge on.
        query: which candidate of these rows this is, from 1.
        max_queries: candidates after which the rows are stale; None for no limit.
        batch_rows: rows of one forward pass.
        least_block_rows: fewest rows of a block.

    Raises:
        ValueError: an argument is out of range, the model has no linear head or the reference no exemplars.
    """
    if not 0 < alpha < 1 or query < 1 or min_rows < 2 or not least_block_rows >= 1:
        raise ValueError(
            f"alpha is {alpha}, query {query}, min_rows {min_rows}, least_block_rows {least_block_rows}; they must be "
            "in (0, 1), at least 1, at least 2, at least 1"
        )
    if not len(reference.exemplars_x) or reference.exemplars_y.is_floating_point():
        raise ValueError("the gate without labels needs reference exemplars with classes: pack the bundle with them")
    level = look_level(alpha, query)
    x = np.ascontiguousarray(x_new, dtype=np.float32)

    def rejected(reason: Reason) -> Verdict:
        return Verdict(promote=False, reason=reason, measure="class distance", level=level)

    if max_queries is not None and query > max_queries:
        return rejected("stale")
    if len(x) < min_rows:
        return rejected("too few rows")
    known = np.ascontiguousarray(reference.exemplars_x.cpu().numpy(), dtype=np.float32)
    old, new = (_answer(model, x, batch_rows) for model in (served, candidate))
    old_ref, new_ref = (_answer(model, known, batch_rows) for model in (served, candidate))
    if not all(part.finite for part in (old, new, old_ref, new_ref)):
        return rejected("non-finite")
    nearer = _distances(old, old_ref, reference) - _distances(new, new_ref, reference)
    surer = old.entropy() - new.entropy()
    prior = _prior(reference, old.logits.shape[1])
    blocks = cut([nearer], max(least_block_rows, label_rows(old.answers.numpy(), prior.numpy())))
    interval = Interval(float(nearer.mean()), math.nan, math.nan)
    if blocks.number:
        interval = block_interval(*blocks.sums(nearer), level)
    test = NearerToSource()
    test.update(nearer, surer)
    labels = reference.exemplars_y.cpu()
    lost = float(((new_ref.answers != labels).double() - (old_ref.answers != labels).double()).mean())
    changed = float((old.answers != new.answers).double().mean())
    reason: Reason = "better"
    if math.isnan(interval.low):
        reason = "too few rows"
    elif lost > 0:
        reason = "worse on reference"
    elif changed > MOST_CHANGED:
        reason = "too many answers change"
    elif _apart(new.shares(), prior) > _apart(old.shares(), prior) + SHARES_MARGIN:
        reason = "answers collapse"
    elif surer.mean() < 0:
        reason = "less sure"
    elif not (interval.low > 0 and test.verdict):
        reason = "not better"
    return Verdict(
        promote=reason == "better",
        reason=reason,
        measure="class distance",
        gain=interval.estimate,
        gain_low=interval.low,
        gain_high=interval.high,
        reference_loss=lost,
        level=level,
        blocks=blocks.number,
        changed=changed,
    )


def _answer(model: nn.Module, x: Array, batch_rows: int) -> _Answers:
    twin, device = still(model)
    if find_head(twin) is None:
        raise ValueError("the gate without labels needs features: give the model an nn.Linear head, or give labels")
    logits, features = [], []
    with torch.inference_mode(), FeatureTap(twin) as tap:
        for chunk in torch.from_numpy(x).split(batch_rows):
            output = twin(chunk.to(device))
            if output.ndim != 2 or output.shape[1] < 2:
                raise ValueError(f"the gate without labels needs logits (rows, classes), not {tuple(output.shape)}")
            if tap.features is None or len(tap.features) != len(chunk):
                raise ValueError(f"the head {tap.head!r} is not called once per row: the gate can't read its features")
            logits.append(output.float().cpu())
            features.append(tap.features.float().cpu())
    return _Answers(torch.cat(logits), torch.cat(features))


def _distances(new: _Answers, known: _Answers, reference: Reference) -> F64:
    """(n,) distance of each row from the class it is answered as, by the model's own view of the exemplars."""
    # The stored moments are of the frozen model's features, which another version need not share.
    own = replace(reference, class_feature_mean=None, class_feature_var=None, class_distance=None)
    source = SourceOutputs(logits=known.logits, features=known.features, labels=reference.exemplars_y.cpu())
    values: F64 = ClassDistance(own, source)(new.features, new.answers).double().numpy()
    return values


def _prior(reference: Reference, classes: int) -> Tensor:
    if reference.class_prior is not None and len(reference.class_prior) == classes:
        prior = reference.class_prior.detach().cpu().double()
    else:
        prior = torch.bincount(reference.exemplars_y.cpu(), minlength=classes).double()
    return prior / prior.sum()


def _apart(shares: Tensor, others: Tensor) -> float:
    """Total variation."""
    return float((shares - others).abs().sum()) / 2
