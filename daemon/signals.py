"""What is measured on each row: one small matrix on the device, one copy to the host a batch.

A row's shift is the mean absolute z-score against the reference, clipped, so that one wild channel can't drown the
others; its class shift is that of its features against the rows that the model put into the same class when it was
packed, which other shares of the classes leave alone; its entropy is normalised by ln K. Detectors get these values row
by row, so that an alarm doesn't depend on how the stream was cut into batches.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapters.reference import Reference
from daemon.records import F32, F64

CLASSIFICATION = ("input_shift", "feature_shift", "class_shift", "entropy")
REGRESSION = ("input_shift", "feature_shift", "output_shift")
CLIP = 10.0
_TINY = 1e-12


def names(task: str) -> tuple[str, ...]:
    """The row signals of a task, in the order of the matrix' columns."""
    return CLASSIFICATION if task == "classification" else REGRESSION


@dataclass(slots=True)
class Rows:
    """One batch on the host; every array has the batch's B rows."""

    prediction: F32
    """Class index, or the predicted value."""
    confidence: F32
    """Probability of the predicted class; zeros for a regression."""
    signals: F32
    """(B, S), columns as `names` says."""
    mean_p: F32 | None
    """(K,) mean prediction of the batch; None for a regression."""
    probabilities: F32 | None = None
    """(B, K), only when asked for."""
    features: F32 | None = None
    """(B, R), only when asked for: features, or their leading parts (see `Reference.feature_axes`)."""

    def finite(self) -> bool:
        """Whether every output is a finite number."""
        return bool(np.isfinite(self.prediction).all() and np.isfinite(self.confidence).all())


class Meter:
    """Computes the signals of one task against one reference, on the model's device."""

    def __init__(
        self, task: str, reference: Reference, *, keep_probabilities: bool = False, keep_features: bool = False
    ) -> None:
        self.task = task
        self.names = names(task)
        self._keep = keep_probabilities
        self._keep_features = keep_features
        self._mean, self._axes = reference.feature_mean, reference.feature_axes
        self._input = _centre_scale(reference.input_mean, reference.input_var)
        self._feature: tuple[Tensor, Tensor] | None = None
        if reference.feature_mean is not None and reference.feature_var is not None:
            self._feature = _centre_scale(reference.feature_mean, reference.feature_var)
        self._classes: tuple[Tensor, Tensor] | None = None
        if reference.class_feature_mean is not None and reference.class_feature_var is not None:
            self._classes = _centre_scale(reference.class_feature_mean, reference.class_feature_var)
        self._output = reference.output_mean, max(reference.output_var, _TINY) ** 0.5

    def measure(self, x: Tensor, outputs: Tensor, features: Tensor | None, *, kind: str) -> Rows:
        """Signals of ``x`` (B, *shape) and the model's ``outputs`` (B, K) on it; copies once from device to host.

        Args:
            x: the inputs as the model got them.
            outputs: logits, probabilities, or (B, 1) values.
            features: (B, D) input of the head, or None when the model has no linear head.
            kind: ``logits``, ``probs`` or ``values``.
        """
        with torch.inference_mode():
            input_shift = _shift(x.flatten(1), *self._input)
            feature_shift = torch.zeros_like(input_shift)
            if features is not None and self._feature is not None:
                feature_shift = _shift(features, *self._feature)
            if kind == "values":
                value = outputs.float().reshape(len(x), -1)[:, 0]
                mean, scale = self._output
                output_shift = ((value - mean) / scale).abs().clamp(max=CLIP)
                columns = torch.stack((value, torch.zeros_like(value), input_shift, feature_shift, output_shift), 1)
                kept = self._watched(features)
                host = (columns if kept is None else torch.cat((columns, kept), 1)).cpu().numpy()
                watched = None if kept is None else host[:, 5:]
                return Rows(host[:, 0], host[:, 1], host[:, 2:5], None, features=watched)
            p_BK = outputs.float() if kind == "probs" else outputs.float().softmax(1)
            confidence, predicted = p_BK.max(1)
            entropy = -(p_BK * p_BK.clamp_min(_TINY).log()).sum(1) / math.log(max(2, p_BK.shape[1]))
            class_shift = feature_shift
            if features is not None and self._classes is not None:
                mean_KD, inverse_KD = self._classes
                class_shift = _shift(features, mean_KD[predicted], inverse_KD[predicted])
            parts = [predicted.float(), confidence, input_shift, feature_shift, class_shift, entropy]
            columns = torch.stack(parts, 1)
            kept = self._watched(features)
            # All of it in one vector, so that one copy brings everything.
            flat = [columns.flatten(), p_BK.flatten() if self._keep else p_BK.mean(0)]
            host = torch.cat(flat if kept is None else [*flat, kept.flatten()]).cpu().numpy()
        rows, classes = p_BK.shape
        head, tail = rows * len(parts), classes * (rows if self._keep else 1)
        table, spread, rest = host[:head].reshape(rows, -1), host[head : head + tail], host[head + tail :]
        probabilities = spread.reshape(rows, classes) if self._keep else None
        mean_p = spread if probabilities is None else probabilities.mean(0)
        watched = None if kept is None else rest.reshape(rows, -1)
        return Rows(table[:, 0], table[:, 1], table[:, 2:], mean_p, probabilities, watched)

    def _watched(self, features: Tensor | None) -> Tensor | None:
        """What a detector of rows gets of ``features`` (B, D): (B, R), or None."""
        return watched_features(features, self._mean, self._axes) if self._keep_features else None


def watched_features(features: Tensor | None, mean: Tensor | None, axes: Tensor | None) -> Tensor | None:
    """``features`` (B, D) themselves, or (B, R + 1): along ``axes`` (R, D), and the length of what these leave out."""
    if features is None or axes is None or mean is None:
        return None if features is None else features.float()
    centred = features.float() - mean
    along = centred @ axes.T
    rest = (centred.square().sum(1) - along.square().sum(1)).clamp_min(0).sqrt()
    return torch.cat((along, rest[:, None]), 1)


def _centre_scale(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    # A channel that is constant in the reference must not turn float noise into a shift.
    scale = var.clamp_min(0).sqrt()
    floor = torch.maximum(scale.mean() * 1e-3, mean.abs() * 1e-6).clamp_min(1e-6)
    return mean, torch.maximum(scale, floor).reciprocal()


def _shift(values: Tensor, mean: Tensor, inverse_scale: Tensor) -> Tensor:
    # One new tensor: of wide rows, most of the time goes into the memory that the steps between would take.
    return (values.float() - mean).mul_(inverse_scale).abs_().clamp_(max=CLIP).mean(1)


def divergence(mean_p: np.ndarray, prior: np.ndarray) -> float:
    """Jensen-Shannon divergence in bits, 0 to 1, of the mean prediction (K,) from the reference class prior (K,)."""
    p, q = np.clip(mean_p, _TINY, None), np.clip(prior, _TINY, None)
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    return float(((p * np.log2(p / middle)).sum() + (q * np.log2(q / middle)).sum()) / 2)


def blend(mean_p: F64 | None, batch_p: F32, rows: int, memory_rows: float) -> F64:
    """Exponential mean (K,) over about ``memory_rows`` rows after ``rows`` more with the mean ``batch_p``."""
    keep = math.exp(-rows / memory_rows)
    new = batch_p.astype(np.float64)
    return new if mean_p is None else keep * mean_p + (1 - keep) * new


@functools.lru_cache(maxsize=16)  # batches are mostly full, and every signal asks for the same
def _decay(count: int, memory_rows: float) -> tuple[F64, float]:
    """Weights (count,) of so many rows, the newest 1, and their sum."""
    weights: F64 = np.exp(-np.arange(count - 1, -1, -1) / memory_rows)
    return weights, float(weights.sum())


class Level:
    """Exponential mean of a row signal over about ``memory_rows`` rows, bias-corrected; holds when nothing comes."""

    def __init__(self, memory_rows: float) -> None:
        self.memory_rows = memory_rows
        self._weight = 0.0
        self._total = 0.0

    def update(self, values: np.ndarray) -> None:
        """Take in (n,) values in order; those that are not finite are left out."""
        values = values[np.isfinite(values)]
        count = len(values)
        if not count:
            return
        decay, weight = _decay(count, self.memory_rows)
        keep = math.exp(-count / self.memory_rows)
        self._total = keep * self._total + float(decay @ values.astype(np.float64))
        self._weight = keep * self._weight + weight

    @property
    def value(self) -> float:
        """The mean, NaN before the first value."""
        return self._total / self._weight if self._weight > 0 else math.nan

    @property
    def rows(self) -> float:
        """Effective rows behind the mean, at most about ``memory_rows``."""
        return self._weight

    def reset(self) -> None:
        """Forget everything."""
        self._weight = self._total = 0.0

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"weight": self._weight, "total": self._total}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """From a checkpoint."""
        self._weight, self._total = float(state["weight"]), float(state["total"])
