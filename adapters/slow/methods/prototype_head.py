"""The head as the classes' mean features, compared by the cosine: solved, not trained."""

from __future__ import annotations

import numpy as np

from adapters.slow.heads.exact import ExactMethod, Known
from adapters.slow.heads.moments import F64, Moments
from adapters.slow.registry import register


@register("prototype_head")
class PrototypeHead(ExactMethod):
    """Logit k = s (m_k - c)' (h - c) / |m_k - c|; m_k mean feature of class k, c the reference's mean feature.

    |h - c| is common to all classes, so the answer is the class of the nearest mean by cosine. Each label is one update
    of sums; the head does not depend on the order. Zhou et al., "Revisiting Class-Incremental Learning with
    Pre-Trained Models: Generalizability and Adaptivity are All You Need" (SimpleCIL), 2023.

    The scale s is calibrated on the newest rows; without that it is the mean norm of the old head's rows. Needs one row
    of a class to know it, and D numbers for it. Can't use that features are correlated or of different spread:
    ``lda_head`` does.

    Args:
        centre: whether c is taken off; features behind a ReLU all point the same way. False: c = 0, and no bias.
        memory_rows: see `ExactMethod`.
        reference_weight: see `ExactMethod`.
        calibration_rows: see `ExactMethod`.
    """

    instead = "'ridge_head'"

    def __init__(
        self,
        *,
        centre: bool = True,
        memory_rows: float | None = None,
        reference_weight: float = 1.0,
        calibration_rows: int = 256,
    ) -> None:
        super().__init__(memory_rows=memory_rows, reference_weight=reference_weight, calibration_rows=calibration_rows)
        self.centre = centre

    @property
    def needs_bias(self) -> str | None:
        """Centring needs a constant."""
        return "set centre=False" if self.centre else None

    def solve(self, sums: Moments, known: Known) -> tuple[F64, F64] | None:
        """Scaled unit vectors; None with fewer than two classes."""
        present = sums.count > 0
        if present.sum() < 2:
            return None
        # The origin is the reference's mean feature, or 0 without exemplars.
        centre = sums.origin if self.centre else np.zeros_like(sums.origin)
        directions = sums.means() + sums.origin - centre
        norms = np.linalg.norm(directions, axis=1, keepdims=True)
        directions = np.divide(directions, norms, out=np.zeros_like(directions), where=norms > 0)
        scale = float(np.linalg.norm(known.weight, axis=1).mean()) or 1.0
        weight = scale * directions
        return weight, -weight @ centre
