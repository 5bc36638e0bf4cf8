"""The look of a regime: moments of the penultimate features over a window of rows, and how far apart two are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST_ROWS = 32
BLOCKS = 8
"""Blocks of the window that say how much its moments are worth."""
WANDER = 0.1
"""By how many deviations of a feature one regime's moments move from window to window, beside the sampling error."""
MOST_ROWS = 4096.0
"""Most independent rows that a signature counts for: one that has been joined often still follows."""
LOG_SPREAD = 0.75
"""Variance of the log of a standard deviation, times rows: 0.5 for the normal distribution, more with heavier tails."""


@dataclass(frozen=True, eq=False)
class Signature:
    """Moments of features (n, D) without labels."""

    mean: Tensor
    """(D,) float64 on the host."""
    var: Tensor
    """(D,) float64 on the host."""
    rows: float
    """Independent rows that they are worth."""

    def joined(self, other: Signature) -> Signature:
        """The moments of both windows together."""
        own, new = self.rows, other.rows
        share = new / (own + new)
        mean = torch.lerp(self.mean, other.mean, share)
        second = torch.lerp(self.var + (self.mean - mean).square(), other.var + (other.mean - mean).square(), share)
        return Signature(mean, second, min(own + new, MOST_ROWS))

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"mean": self.mean, "var": self.var, "rows": self.rows}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Signature:
        """From a checkpoint."""
        return cls(torch.as_tensor(state["mean"]).clone(), torch.as_tensor(state["var"]).clone(), float(state["rows"]))


def signature(features: Tensor) -> Signature | None:
    """Signature of a window of features (n, D), oldest first; None with fewer than ``LEAST_ROWS`` finite rows.

    What the rows are worth comes from the variance of block means against that of rows: windows in which one class
    lasts long are compared with more tolerance.

    Raises:
        ValueError: the features are not (n, D).
    """
    if features.ndim != 2:
        raise ValueError(f"features have shape {tuple(features.shape)}; they must be (rows, features)")
    x = features.detach().to("cpu", torch.float64)
    x = x[x.isfinite().all(1)]
    if len(x) < LEAST_ROWS or not x.shape[1]:
        return None
    mean, var = x.mean(0), x.var(0, correction=0)
    if not bool(var.isfinite().all()):
        return None
    block = len(x) // BLOCKS
    means = x[: block * BLOCKS].reshape(BLOCKS, block, -1).mean(1)
    # Features in deviations, so that none outweighs the others; one that never moves says nothing.
    scale = torch.where(var > 0, var, torch.ones_like(var))
    moving = var > 0
    effect = block * float((means.var(0) / scale)[moving].mean()) if bool(moving.any()) else 1.0
    return Signature(mean, var, len(x) / min(max(effect, 1.0), float(block)))


def distance(one: Signature, other: Signature) -> float:
    """How far two regimes are apart, in units of what windows of one regime are.

        max of the roots of  mean_d Δμ_d² / (s_d²·(e + 2w²))  and  mean_d (Δ ln s_d)² / (c·e + 2w²),
        e = 1/n₁ + 1/n₂,    s² the mean of both variances,    w = ``WANDER``,    c = ``LOG_SPREAD``

    Near 1 for two windows of one regime. ValueError when the features differ in number.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(
            f"signatures of {len(one.mean)} and {len(other.mean)} features; they must come from the same model: "
            "start the bank of regimes empty"
        )
    sampling = 1 / one.rows + 1 / other.rows
    spread = (one.var + other.var) / 2
    floor = max(float(spread.mean()) * 1e-6, 1e-24)
    means = (one.mean - other.mean).square() / (spread + floor) / (sampling + 2 * WANDER**2)
    logs = (torch.log(one.var + floor) - torch.log(other.var + floor)) / 2
    deviations = logs.square() / (LOG_SPREAD * sampling + 2 * WANDER**2)
    return math.sqrt(max(float(means.mean()), float(deviations.mean())))
