"""The head as linear discriminant analysis of the features: solved, not trained."""

from __future__ import annotations

from typing import Literal

import numpy as np

from adapters.slow.heads.exact import ExactMethod, Known
from adapters.slow.heads.moments import F64, Moments
from adapters.slow.registry import register

JITTER = 1e-9
"""Share of the mean variance added to every variance: features that never move must not make the solution infinite."""


def oas(covariance: F64, rows: float) -> float:
    """Share of the scaled identity: Chen, Wiesel, Eldar, Hero, IEEE Trans. Signal Processing 2010, eq. 23.

    Args:
        covariance: (D, D) of ``rows`` rows.
        rows: degrees of freedom, above 0.
    """
    width = len(covariance)
    square, trace = float((covariance**2).sum()), float(np.trace(covariance))
    spread = (rows + 1 - 2 / width) * (square - trace**2 / width)
    return 1.0 if spread <= 0 else min(1.0, ((1 - 2 / width) * square + trace**2) / spread)


@register("lda_head")
class LdaHead(ExactMethod):
    """Logit k = (m_k - c)' S^-1 (h - (m_k + c) / 2) + log prior_k; m_k class mean, S shared covariance of features h.

    c is the average of the class means; what is common to all classes drops out of the softmax. Each label is one
    update of sums; the head equals that of all rows at once, in whatever order they came. Hayes & Kanan, "Lifelong
    Machine Learning with Deep Streaming Linear Discriminant Analysis", CVPR Workshops 2020; Panos et al., "First
    Session Adaptation", ICCV 2023.

    The right choice for few, late labels and for concept change: nothing is tuned and nothing is forgotten unless
    ``memory_rows`` says so. Costs D * D per row and D ** 3 when asked. Can't repair features, and one Gaussian per
    class with one shape for all is an assumption: classes of several modes are better served by ``head``.

    Args:
        shrinkage: share of the scaled identity in the covariance, in [0, 1]; "oas": from the rows themselves.
        prior: "uniform", or "counted": the share of each class among the rows, with one row more for each.
        memory_rows: see `ExactMethod`.
        reference_weight: see `ExactMethod`.
        calibration_rows: see `ExactMethod`.
    """

    gram = True
    instead = "'ridge_head'"

    def __init__(
        self,
        *,
        shrinkage: float | Literal["oas"] = "oas",
        prior: Literal["uniform", "counted"] = "uniform",
        memory_rows: float | None = None,
        reference_weight: float = 1.0,
        calibration_rows: int = 256,
    ) -> None:
        super().__init__(memory_rows=memory_rows, reference_weight=reference_weight, calibration_rows=calibration_rows)
        if shrinkage != "oas" and not (isinstance(shrinkage, (int, float)) and 0 <= shrinkage <= 1):
            raise ValueError(f"shrinkage is {shrinkage!r}; it must be in [0, 1], or 'oas'")
        if prior not in ("uniform", "counted"):
            raise ValueError(f"prior is {prior!r}; it must be 'uniform' or 'counted'")
        self.shrinkage = shrinkage
        self.prior = prior

    @property
    def needs_bias(self) -> str | None:
        """The discriminant has a constant."""
        return "use 'prototype_head' with centre=False, or give the layer a bias"

    def solve(self, sums: Moments, known: Known) -> tuple[F64, F64] | None:
        """The closed form; None with fewer than two classes or when no row differs from its class's mean."""
        present = sums.count > 0
        if present.sum() < 2:
            return None
        covariance = sums.within()
        width = len(covariance)
        variance = float(np.trace(covariance)) / width
        if not variance > 0:
            return None
        share = self.shrinkage
        if share == "oas":
            share = oas(covariance, max(1.0, sums.effective_rows - float(present.sum())))
        shaped = (1 - share) * covariance + (share + JITTER) * variance * np.eye(width)
        means = sums.means()
        centre = means[present].mean(0)
        weight = np.linalg.solve(shaped, (means - centre).T).T
        # With h = z + origin the constant takes the origin in.
        bias = -0.5 * (weight * (means - centre)).sum(1) - weight @ (centre + sums.origin)
        if self.prior == "counted":
            bias += np.log((sums.count + 1) / (sums.count.sum() + len(sums.count)))
        return weight, bias
