"""A regressor's head as ridge regression on the features: solved, not trained."""

from __future__ import annotations

import numpy as np

from adapters.slow.heads.exact import ExactMethod, Known
from adapters.slow.heads.moments import F64, Moments
from adapters.slow.registry import register


@register("ridge_head")
class RidgeHead(ExactMethod):
    """Minimises sum w (y - W h - b)^2 + r (v |W - W_0|^2 + (b - b_0)^2); W_0, b_0 the head as packed, h the features.

    v is the mean square of a feature about the reference's mean, so r counts in rows that speak for the old head. Each
    label is one update of sums, as in recursive least squares (Haykin, "Adaptive Filter Theory", 2002), and the result
    is that of all rows at once, in whatever order they came. For regression with one output; without rows it is the
    old head.

    Can't repair features, and one target far out pulls as in every least-squares fit: the gate is what guards it.

    Args:
        ridge: r, above 0.
        memory_rows: see `ExactMethod`.
        reference_weight: see `ExactMethod`.
    """

    regression = True
    gram = True
    instead = "'lda_head' or 'prototype_head'"

    def __init__(self, *, ridge: float = 10.0, memory_rows: float | None = None, reference_weight: float = 1.0) -> None:
        super().__init__(memory_rows=memory_rows, reference_weight=reference_weight)
        if not 0 < ridge < float("inf"):
            raise ValueError(f"ridge is {ridge}; it must be above 0")
        self.ridge = ridge

    @property
    def needs_bias(self) -> str | None:
        """The fit has a constant."""
        return "use 'head', or give the layer a bias"

    def solve(self, sums: Moments, known: Known) -> tuple[F64, F64] | None:
        """The normal equations of what the old head leaves over; None without rows."""
        if not sums.weight > 0:
            return None
        width = len(sums.origin)
        square = float(np.trace(sums.gram[:-1, :-1])) / (width * sums.weight) or 1.0
        old = np.concatenate((known.weight, (known.bias + known.weight @ sums.origin)[:, None]), axis=1)
        penalty = self.ridge * np.diag([square] * width + [1.0])
        moved = old + np.linalg.solve(sums.gram + penalty, sums.cross - sums.gram @ old.T).T
        return moved[:, :-1], moved[:, -1] - moved[:, :-1] @ sums.origin
