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
MEMORY_BLOCKS = 8
LEAST_BLOCKS = 3
SHARPNESS = 2.0
"""What a fall of the entropy, in units of ln K, counts against one of the distance: features can come nearer to the
wrong classes, which shows as doubt between them."""
MARGIN = 0.03
"""By how much both together must fall, in deviations of a feature."""
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
        return self._z(features_BD, predicted_B).abs_().clamp_(max=CLIP).mean(1)

    def residuals(self, features_BD: Tensor, answers_B: NDArray[np.float32]) -> Tensor:
        """(B, D) z-scores of the features against the class (B,) that each row was predicted as."""
        predicted_B = torch.from_numpy(np.nan_to_num(answers_B).astype(np.int64)).to(features_BD.device)
        return self._z(features_BD, predicted_B)

    def _z(self, features_BD: Tensor, predicted_B: Tensor) -> Tensor:
        return (features_BD.float() - self._mean_KD[predicted_B]).mul_(self._inverse_KD[predicted_B])


def _by_class(predicted_N: Tensor, features_ND: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    rows = torch.bincount(predicted_N, minlength=classes).float()[:, None]
    zeros = features_ND.new_zeros(classes, features_ND.shape[1])
    mean, var = features_ND.mean(0), features_ND.var(0, correction=0)
    mean_KD = (zeros.index_add(0, predicted_N, features_ND) + PRIOR_ROWS * mean) / (rows + PRIOR_ROWS)
    squares = zeros.index_add(0, predicted_N, (features_ND - mean_KD[predicted_N]).square())
    return mean_KD, (squares + PRIOR_ROWS * var) / (rows + PRIOR_ROWS)


class NearerToSource:
    """Whether another model brings rows nearer to their classes, and is not less sure of these, than the present one.

    Row by row on the same rows, d is by how much less the class distance is and h by how much less the entropy; shown
    where the mean of d + ``SHARPNESS``·h is above ``MARGIN`` and that of d above 0. A t-test on means of blocks of
    rows, over the latest of them: rows of one run are alike.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self.verdict = False
        """Whether they are nearer by the margin, and surely so."""
        self._held = np.zeros((0, 2))
        self._nearer = self._mean = self._var = 0.0
        self._blocks = 0

    def update(self, nearer_n: F64, surer_n: F64) -> None:
        """Take in (n,) falls of the distance and of the entropy, in the order of the rows.

        Rows of which either is not finite count as 0.
        """
        both = np.stack([nearer_n, surer_n], 1)
        both[~np.isfinite(both).all(1)] = 0.0
        held = np.concatenate([self._held, both])
        whole = len(held) // BLOCK_ROWS * BLOCK_ROWS
        for nearer, surer in held[:whole].reshape(-1, BLOCK_ROWS, 2).mean(1).tolist():
            self._block(nearer, nearer + SHARPNESS * surer)
        self._held = held[whole:].copy()

    def _block(self, nearer: float, value: float) -> None:
        self._blocks += 1
        share, step = max(1.0 / self._blocks, 1.0 / MEMORY_BLOCKS), value - self._mean
        self._mean += share * step
        self._var = (1.0 - share) * (self._var + share * step * step)
        self._nearer += share * (nearer - self._nearer)
        if self._blocks < LEAST_BLOCKS:
            return
        free = min(self._blocks, 2 * MEMORY_BLOCKS - 1) - 1
        sure = self._mean > SIGNIFICANT * math.sqrt(self._var / free)
        enough = self._mean >= HYSTERESIS * MARGIN if self.verdict else self._mean > MARGIN and sure
        self.verdict = enough and self._nearer > 0.0

    def state(self) -> dict[str, Any]:
        """Return a copy of all that `update` changes."""
        return {
            "verdict": self.verdict,
            "held": self._held.copy(),
            "nearer": self._nearer,
            "mean": self._mean,
            "var": self._var,
            "blocks": self._blocks,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self.verdict, self._held = bool(state["verdict"]), np.array(state["held"], np.float64).reshape(-1, 2)
        self._nearer = float(state["nearer"])
        self._mean, self._var, self._blocks = float(state["mean"]), float(state["var"]), int(state["blocks"])
