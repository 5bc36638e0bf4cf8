"""How far features lie from those of their predicted class at the source, and which of two models brings them nearer.

Statistics taken from one class make features look as a whole as the source's do, whatever the class is: only within
the predicted classes it shows that the rows were torn apart. Other shares of the classes leave the distance alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.fast.core.source import SourceOutputs
from adapters.reference import Reference

F64 = NDArray[np.float64]

CLIP = 10.0
"""Most deviations that one feature can count."""
PRIOR_ROWS = 10.0
"""Weight of all rows in the moments of one class, in rows."""
BLOCK_ROWS = 16
MEMORY_BLOCKS = 12
LEAST_BLOCKS = 3
MARGIN = 0.03
"""By how much the mean distance must fall, in deviations of a feature."""
SIGNIFICANT = 2.0
"""And how many standard errors that must be."""
HYSTERESIS = 0.5
"""Share of the margin below which a model that serves stops doing so."""


class ClassDistance:
    """Mean absolute z-score of a row's features, clipped, against the reference's rows of the same predicted class."""

    def __init__(self, reference: Reference, source: SourceOutputs) -> None:
        """Take the moments of the reference, or else of its exemplars as the frozen model answers them."""
        assert source.features is not None
        predicted, features = source.logits.argmax(1), source.features.float()
        mean, var = reference.class_feature_mean, reference.class_feature_var
        if mean is None or var is None:
            mean, var = _by_class(predicted, features, source.logits.shape[1])
        self._mean_KD = mean.to(features)
        scale_KD = var.to(features).clamp_min(0.0).sqrt()
        floor = torch.maximum(scale_KD.mean() * 1e-3, self._mean_KD.abs() * 1e-6).clamp_min(1e-6)
        self._inverse_KD = torch.maximum(scale_KD, floor).reciprocal()
        rows = self(features, predicted).double()
        known = reference.class_distance
        level, spread = (rows.mean(), rows.std()) if known is None else known.unbind()
        self.level = float(level)
        """Mean at the source: of held-out rows where the reference knows it, else of the exemplars."""
        self.spread = float(spread)
        """Standard deviation of the same."""

    def __call__(self, features_BD: Tensor, predicted_B: Tensor) -> Tensor:
        """(B,) distances."""
        z_BD = (features_BD.float() - self._mean_KD[predicted_B]) * self._inverse_KD[predicted_B]
        return z_BD.abs_().clamp_(max=CLIP).mean(1)


def _by_class(predicted_N: Tensor, features_ND: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    rows = torch.bincount(predicted_N, minlength=classes).float()[:, None]
    zeros = features_ND.new_zeros(classes, features_ND.shape[1])
    mean, var = features_ND.mean(0), features_ND.var(0, correction=0)
    mean_KD = (zeros.index_add(0, predicted_N, features_ND) + PRIOR_ROWS * mean) / (rows + PRIOR_ROWS)
    squares = zeros.index_add(0, predicted_N, (features_ND - mean_KD[predicted_N]).square())
    return mean_KD, (squares + PRIOR_ROWS * var) / (rows + PRIOR_ROWS)


class NearerToSource:
    """Whether another model's features lie nearer to their classes than the present one's, row by row on the same rows.

    A t-test on means of blocks of rows, over the latest of them: features of the rows of one run are alike.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self.verdict = False
        """Whether they are nearer by the margin, and surely so."""
        self._held = np.zeros(0)
        self._mean = self._var = 0.0
        self._blocks = 0

    def update(self, nearer_n: F64) -> None:
        """Take in (n,) by how much nearer they lie, in the order of the rows; values that are not finite count as 0."""
        held = np.concatenate([self._held, np.nan_to_num(nearer_n, nan=0.0, posinf=0.0, neginf=0.0)])
        whole = len(held) // BLOCK_ROWS * BLOCK_ROWS
        for value in held[:whole].reshape(-1, BLOCK_ROWS).mean(1):
            self._block(float(value))
        self._held = held[whole:].copy()

    def _block(self, value: float) -> None:
        self._blocks += 1
        share, step = max(1.0 / self._blocks, 1.0 / MEMORY_BLOCKS), value - self._mean
        self._mean += share * step
        self._var = (1.0 - share) * (self._var + share * step * step)
        if self._blocks < LEAST_BLOCKS:
            return
        free = min(self._blocks, 2 * MEMORY_BLOCKS - 1) - 1
        sure = self._mean > SIGNIFICANT * math.sqrt(self._var / free)
        self.verdict = self._mean >= HYSTERESIS * MARGIN if self.verdict else self._mean > MARGIN and sure

    def state(self) -> dict[str, Any]:
        """Return a copy of all that `update` changes."""
        return {
            "verdict": self.verdict,
            "held": self._held.copy(),
            "mean": self._mean,
            "var": self._var,
            "blocks": self._blocks,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self.verdict, self._held = bool(state["verdict"]), np.array(state["held"], np.float64)
        self._mean, self._var, self._blocks = float(state["mean"]), float(state["var"]), int(state["blocks"])
