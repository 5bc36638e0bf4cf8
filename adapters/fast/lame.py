"""lame: corrected outputs from neighbours in the batch; the weights never move."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from adapters.fast.core.base import FastAdapter
from adapters.fast.core.registry import register
from adapters.features import find_head
from adapters.reference import Reference

Affinity = Literal["knn", "rbf", "linear"]


def affinity(features_BD: Tensor, kind: Affinity, k: int) -> Tensor:
    """Return (B, B) affinities W of (B, D) features, compared on the unit sphere.

    ``knn``: 1 for the k nearest other rows of each row, not symmetric. ``rbf``: exp(−d²/2σ²), σ the batch mean of the
    k-th smallest distance in each row, counting the row itself. ``linear``: cosine similarity. Rows of NaN are no
    row's neighbours (sorting puts NaN last); what they get themselves means nothing.
    """
    z = torch.nn.functional.normalize(features_BD, dim=1)
    if kind == "linear":
        return z @ z.T
    distances = torch.cdist(z, z)
    if kind == "rbf":
        sigma = distances.kthvalue(min(k, len(z)), dim=1).values.nanmean()
        return torch.exp(-distances.square() / (2 * sigma.square()).clamp_min(torch.finfo(z.dtype).tiny))
    nearest = distances.topk(min(k + 1, len(z)), dim=1, largest=False).indices[:, 1:]  # the first is the row itself
    return torch.zeros_like(distances).scatter_(1, nearest, 1.0)


def laplacian_optimization(unary_BK: Tensor, kernel_BB: Tensor, bound_lambda: float, max_steps: int) -> Tensor:
    """Iterate y ← softmax(−unary + λ·W·y) from y = softmax(−unary); returns (B, K) probabilities.

    On a CPU it stops when the bound's energy changes by at most 1e-8 of itself, after more than two steps. Elsewhere
    all steps are run: to see the energy would make the host wait for the device at each of them.
    """
    y = (-unary_BK).softmax(1)
    energy = float("inf")
    for step in range(1, max_steps + 1):
        pairwise = bound_lambda * (kernel_BB @ y)
        y = (pairwise - unary_BK).softmax(1)
        if y.device.type == "cpu":
            before = energy
            energy = float((y * (unary_BK - pairwise + torch.log(y + 1e-10))).sum())
            if step > 2 and abs(energy - before) <= 1e-8 * abs(before):
                break
    return y


@register("lame")
class Lame(FastAdapter):
    """Laplacian adjusted maximum-likelihood estimation: rows that are near in feature space should agree.

        y_i ∝ p_i ⊙ exp(λ Σ_j w_ij y_j),    p = softmax(z)

    solved by fixed-point iteration over the batch. No gradient, no state. Returns *probabilities*; at gain g
    (1 − g)·p + g·y. A batch of fewer than two rows is answered with p. A row whose features or logits overflow keeps
    its own p and is nobody's neighbour.

    Shines on correlated rows and harms on iid ones, so it is to be gated. Needs a linear head, for the features, and
    at least two classes; costs O(B²·(D + K)) per batch.

    Boudiaf et al., Parameter-free Online Test-time Adaptation, CVPR 2022.
    """

    outputs = "probs"

    class Options(FastAdapter.Options):
        """Settings of LAME."""

        affinity: Affinity = "knn"
        """How near two rows are: ``knn``, ``rbf`` or ``linear``."""
        k: int = Field(default=5, ge=1)
        """Neighbours per row (knn), rank of the distance that sets the width (rbf)."""
        bound_lambda: float = Field(default=1.0, ge=0.0)
        """Weight λ of the neighbours."""
        max_steps: int = Field(default=100, ge=1)
        """Most fixed-point steps per batch."""
        force_symmetry: bool = False
        """Whether W becomes (W + Wᵀ)/2."""

    options: Options

    @classmethod
    def check(cls, model: nn.Module, reference: Reference | None = None) -> str | None:
        """Need a linear head with at least two outputs."""
        head = find_head(model)
        if head is None:
            return "it has no nn.Linear head to read features from; use 'ema_norm' or 'tent'"
        if model.get_submodule(head).out_features == 1:
            return "it has one output, not classes; use 'ema_norm'"
        return None

    def _setup(self) -> None:
        """Nothing moves."""

    def _predict(self, x: Tensor) -> Tensor:
        logits = super()._predict(x)
        p = logits.softmax(1)
        features = self._tap.features if self._tap else None
        if self.gain == 0.0 or len(x) < 2 or features is None:
            return p
        return torch.lerp(p, self._agree(p, features), self.gain)

    def _agree(self, p: Tensor, features: Tensor) -> Tensor:
        o = self.options
        usable = p.isfinite().all(1) & features.isfinite().all(1)
        kernel = affinity(features.where(usable[:, None], torch.nan), o.affinity, o.k)
        if o.force_symmetry:
            kernel = (kernel + kernel.T) / 2
        kernel = kernel.where(usable[:, None] & usable, 0.0)
        unary = -torch.log(p.where(usable[:, None], 1.0) + 1e-10)
        agreed = laplacian_optimization(unary, kernel, o.bound_lambda, o.max_steps)
        return agreed.where(usable[:, None], p)
