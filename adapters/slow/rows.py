"""Labelled rows in columns, and which of them may be learnt from at all."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


class Rows(NamedTuple):
    """Labelled rows. ``Replay.add(*rows)`` takes them as they are."""

    x: Array
    """(n, *input_shape) float32."""
    y: Array
    """(n,) int64 classes, or float32 targets."""
    segment: NDArray[np.int64]
    """(n,) stratum that a row belongs to, for example its device group or regime."""


class Screen:
    """Lets through only rows that can do no harm: finite inputs, and labels that the task knows.

    One NaN row would make every later gradient NaN, and a class out of range aborts a CUDA context.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int | None) -> None:
        if classes is not None and classes < 2:
            raise ValueError(f"classes is {classes}; it must be 2 or more, or None for regression")
        self.input_shape = tuple(input_shape)
        self.classes = classes
        self.y_dtype: type[np.generic] = np.float32 if classes is None else np.int64

    def empty(self, rows: int) -> Rows:
        """Room for ``rows`` rows, zeroed."""
        return Rows(
            np.zeros((rows, *self.input_shape), np.float32), np.zeros(rows, self.y_dtype), np.zeros(rows, np.int64)
        )

    def __call__(self, x: ArrayLike, y: ArrayLike, segment: ArrayLike = 0) -> Rows:
        """The usable rows, in their order.

        Args:
            x: (n, *input_shape).
            y: (n,) classes in [0, classes), or finite targets.
            segment: one stratum for all rows, or (n,).

        Raises:
            ValueError: the shapes do not fit.
        """
        x, y = np.asarray(x), np.asarray(y)
        if x.shape[1:] != self.input_shape or x.ndim != len(self.input_shape) + 1:
            raise ValueError(f"x has shape {x.shape}; it must be (rows, *{self.input_shape})")
        if y.shape != x.shape[:1]:
            raise ValueError(f"y has shape {y.shape}; it must be ({len(x)},), one label per row of x")
        # A value beyond float32 turns infinite here and is then screened out.
        with np.errstate(over="ignore"):
            x = x.astype(np.float32, copy=False)
            numbers: Array = y.astype(np.float64 if self.classes is not None else np.float32)
        usable = np.isfinite(numbers) & np.isfinite(x).all(axis=tuple(range(1, x.ndim)))
        if self.classes is not None:
            usable &= (numbers >= 0) & (numbers < self.classes) & (numbers == np.floor(numbers))
        segments = np.broadcast_to(np.asarray(segment, np.int64), y.shape)
        return Rows(x[usable], numbers[usable].astype(self.y_dtype), segments[usable])
