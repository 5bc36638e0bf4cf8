"""What models made of the rows of one batch, and putting together whose answer is whose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.fast.core.class_distance import ClassDistance

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(slots=True)
class Seen:
    """What one model made of n rows of a batch."""

    at: I64
    """(n,) positions in the batch, ascending."""
    outputs: Tensor
    """(n, V) logits or values."""
    features: Tensor | None
    """(n, D)."""
    answer: F32
    """(n,) predicted class, or value."""
    distance: F64
    """(n,) class distance; NaN where there is none."""
    p: F64
    """(n, K) probabilities, or (n, 1) values."""

    def spread(self, count: int) -> F32:
        """(count,) answers of the whole batch, NaN where it did not run."""
        if len(self.at) == count:
            return self.answer
        answers = np.full(count, np.nan, np.float32)
        answers[self.at] = self.answer
        return answers


def look(at: I64, outputs: Tensor, features: Tensor | None, classes: int, distance: ClassDistance | None) -> Seen:
    """What a model's ``outputs`` (n, V) and ``features`` (n, D) say, in one copy to the host; 0 classes: values."""
    nothing = np.full(len(at), np.nan)
    if not classes:
        values = outputs.float().reshape(len(at), -1)[:, :1].cpu().numpy()
        return Seen(at, outputs, features, values[:, 0], nothing, values.astype(np.float64))
    p_BK = outputs.float().softmax(1)
    predicted = outputs.argmax(1)
    parts = [predicted[:, None].to(p_BK.dtype), p_BK]
    if distance is not None and features is not None:
        parts.append(distance(features, predicted)[:, None])
    host = torch.cat(parts, 1).cpu().numpy()
    p, rest = host[:, 1 : 1 + p_BK.shape[1]].astype(np.float64), host[:, 1 + p_BK.shape[1] :]
    return Seen(at, outputs, features, host[:, 0], rest[:, 0].astype(np.float64) if rest.size else nothing, p)


def rows_of(x: Tensor, at: I64) -> Tensor:
    """The rows of x (B, ...) at these positions; x itself when they are all."""
    return x if len(at) == len(x) else x[torch.from_numpy(at).to(x.device)]


def merged(count: int, frozen: Seen | None, other: Seen | None) -> tuple[Tensor, Tensor | None, F64, NDArray[np.bool_]]:
    """Outputs, features, p of a whole batch: the other model's where it ran, else the frozen one's; and where it did.

    Between them they have seen every row.
    """
    if other is None or frozen is None or len(other.at) == count:
        seen = frozen if other is None else other
        assert seen is not None and len(seen.at) == count
        return seen.outputs, seen.features, seen.p, np.full(count, other is not None)
    place = torch.from_numpy(other.at).to(frozen.outputs.device)
    outputs, p, features = frozen.outputs.clone(), frozen.p.copy(), frozen.features
    outputs[place], p[other.at] = other.outputs.to(outputs.dtype), other.p
    if features is not None and other.features is not None:
        features = features.clone()
        features[place] = other.features.to(features.dtype)
    by_other = np.zeros(count, np.bool_)
    by_other[other.at] = True
    return outputs, features, p, by_other


def falls(frozen: Seen, other: Seen) -> tuple[F64, F64]:
    """(n,) by how much the other's class distance and entropy are less, on the rows that both saw, in their order."""
    _, mine, theirs = np.intersect1d(frozen.at, other.at, assume_unique=True, return_indices=True)
    return frozen.distance[mine] - other.distance[theirs], _entropy(frozen.p[mine]) - _entropy(other.p[theirs])


def _entropy(p_nK: F64) -> F64:
    """(n,) in units of ln K."""
    entropy: F64 = -(p_nK * np.log(np.maximum(p_nK, 1e-30))).sum(1) / math.log(max(2, p_nK.shape[1]))
    return entropy


class RunningMean:
    """Exponential mean over about ``memory_rows`` rows, of all rows alike until there are so many."""

    def __init__(self, memory_rows: float) -> None:
        self._memory = memory_rows
        self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self.value = math.nan
        """The mean; NaN before the first row."""
        self.rows = 0.0
        """How many rows it is worth."""

    def update(self, values: F64) -> None:
        """Take in (n,) values; those that are not finite are left out."""
        values = values[np.isfinite(values)]
        if len(values):
            self.add(float(values.mean()), len(values))

    def add(self, mean: float, rows: int) -> None:
        """Take in so many rows with this mean."""
        share = max(rows / (self.rows + rows), -math.expm1(-rows / self._memory))
        before = self.value if self.rows else 0.0
        self.value = before + share * (mean - before)
        self.rows = min(self.rows + rows, 2.0 * self._memory)

    def state(self) -> dict[str, Any]:
        """Return a copy of all that `update` changes."""
        return {"value": self.value, "rows": self.rows}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self.value, self.rows = float(state["value"]), float(state["rows"])
