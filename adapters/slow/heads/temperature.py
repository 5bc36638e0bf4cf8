"""The one number by which a head's logits are multiplied so that its confidence is that of its newest answers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.slow.heads.moments import F64


def scale_of(logits: F64, y: NDArray[Any]) -> float:
    """The s above 0 under which labels y (n,) are likeliest given logits s * z (n, K).

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (s is one over their temperature). A label counts
    as (n + 1) / (n + K) of a class and the rest as 1 / (n + K) each (Platt 1999), so that s stays finite where every
    row is answered rightly. The loss is convex in s, so its slope is bisected over six decades.
    """
    z = logits - logits.max(1, keepdims=True)
    rows, classes = z.shape
    spread = float(-z.mean())
    if classes < 2 or not spread > 0:
        return 1.0
    share = np.full_like(z, 1 / (rows + classes))
    share[np.arange(rows), y] = (rows + 1) / (rows + classes)
    target = float((share * z).sum()) / rows
    low, high = np.log(1e-3 / spread), np.log(1e3 / spread)
    for _ in range(40):
        middle = (low + high) / 2
        p = np.exp(np.exp(middle) * z)
        slope = float(((p * z).sum(1) / p.sum(1)).mean()) - target
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(np.exp((low + high) / 2))


class Recent:
    """Features (n, D) and classes (n,) of the newest ``capacity`` rows, oldest first."""

    def __init__(self, capacity: int, width: int) -> None:
        self.capacity = capacity
        self.h: F64 = np.zeros((0, width))
        self.y: NDArray[Any] = np.zeros(0, np.int64)

    def add(self, h: F64, y: NDArray[Any]) -> None:
        """Take in rows, oldest first."""
        if self.capacity:
            self.h = np.concatenate((self.h, h))[-self.capacity :]
            self.y = np.concatenate((self.y, y))[-self.capacity :]

    def state_dict(self) -> dict[str, Any]:
        """Copies of the rows."""
        return {"h": self.h.copy(), "y": self.y.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; rows beyond the capacity are left out."""
        self.h = np.array(state["h"][-self.capacity :]) if self.capacity else self.h
        self.y = np.array(state["y"][-self.capacity :]) if self.capacity else self.y
