"""What is measured on each row: one small matrix on the device, one copy to the host a batch.

A row's shift is the mean absolute z-score against the reference, clipped, so that one wild channel can't drown the
others; its entropy is normalised by ln K. Detectors get these values row by row, so that an alarm doesn't depend on how
the stream was cut into batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapters.reference import Reference
from daemon.records import F32, F64

CLASSIFICATION = ("input_shift", "feature_shift", "entropy")
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

    def finite(self) -> bool:
        """Whether every output is a finite number."""
        return bool(np.isfinite(self.prediction).all() and np.isfinite(self.confidence).all())


class Meter:
    """Computes the signals of one task against one reference, on the model's device."""

    def __init__(self, task: str, reference: Reference, *, keep_probabilities: bool = False) -> None:
        self.task = task
        self.names = names(task)
        self._keep = keep_probabilities
        self._input = _centre_scale(reference.input_mean, reference.input_var)
        self._feature: tuple[Tensor, Tensor] | None = None
        if reference.feature_mean is not None and reference.feature_var is not None:
            self._feature = _centre_scale(reference.feature_mean, reference.feature_var)
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
                host = columns.cpu().numpy()
                return Rows(host[:, 0], host[:, 1], host[:, 2:], None)
            p_BK = outputs.float() if kind == "probs" else outputs.float().softmax(1)
            confidence, predicted = p_BK.max(1)
            entropy = -(p_BK * p_BK.clamp_min(_TINY).log()).sum(1) / math.log(max(2, p_BK.shape[1]))
            columns = torch.stack((predicted.float(), confidence, input_shift, feature_shift, entropy), 1)
            # A row per class mean rides along, so that one copy brings everything.
            flat = torch.cat((columns.flatten(), p_BK.flatten() if self._keep else p_BK.mean(0))).cpu().numpy()
        rows, classes = p_BK.shape
        host = flat[: rows * 5].reshape(rows, 5)
        tail = flat[rows * 5 :]
        probabilities = tail.reshape(rows, classes) if self._keep else None
        mean_p = tail if probabilities is None else probabilities.mean(0)
        return Rows(host[:, 0], host[:, 1], host[:, 2:], mean_p, probabilities)


def _centre_scale(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    # A channel that is constant in the reference must not turn float noise into a shift.
    scale = var.clamp_min(0).sqrt()
    floor = torch.maximum(scale.mean() * 1e-3, mean.abs() * 1e-6).clamp_min(1e-6)
    return mean, torch.maximum(scale, floor).reciprocal()


def _shift(values: Tensor, mean: Tensor, inverse_scale: Tensor) -> Tensor:
    return ((values.float() - mean) * inverse_scale).abs().clamp(max=CLIP).mean(1)


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
        decay = np.exp(-np.arange(count - 1, -1, -1) / self.memory_rows)
        keep = math.exp(-count / self.memory_rows)
        self._total = keep * self._total + float(decay @ values.astype(np.float64))
        self._weight = keep * self._weight + float(decay.sum())

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
