"""Columns of the rows that a replay memory holds."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.slow.rows import Array, Rows

HALF_ROUNDING = 2.0**-11
"""Largest relative error of a float16."""


def fits_half(x: NDArray[np.float32]) -> bool:
    """Whether all values stay finite as float16."""
    return bool((np.abs(x) < np.finfo(np.float16).max).all())


def half_serves(x: NDArray[np.float32], tolerance: float = 0.01) -> bool:
    """Whether inputs like x (n, *input_shape), n >= 2, lose nothing that counts as float16.

    All stay finite, and where an input value differs between the rows, rounding costs at most ``tolerance`` of its
    standard deviation: a reading of 1000 that moves by 1 must not be kept in half. With n < 2 nothing is known.
    """
    if len(x) < 2 or not fits_half(x):
        return False
    flat = x.reshape(len(x), -1)
    spread = flat.std(0, dtype=np.float64)
    return bool(((np.abs(flat).max(0) * HALF_ROUNDING <= tolerance * spread) | (spread == 0)).all())


class Store:
    """Room for ``slots`` rows, taken at once."""

    def __init__(self, like: Rows, slots: int, code_width: int, *, half: bool) -> None:
        """``like`` gives the shapes and types of a row."""
        self.half = half
        self.x: Array = np.zeros((slots, *like.x.shape[1:]), np.float16 if half else np.float32)
        self.y: Array = np.zeros(slots, like.y.dtype)
        self.segment = np.zeros(slots, np.int64)
        self.arrival = np.zeros(slots, np.int64)
        """Number of each row among all that ever came."""
        self.codes = np.zeros((slots, code_width), np.float32)

    @staticmethod
    def row_bytes(like: Rows, code_width: int, *, half: bool) -> int:
        """Memory of one row."""
        return Store(like, 1, code_width, half=half).bytes

    @property
    def bytes(self) -> int:
        """Memory of all slots."""
        return sum(column.nbytes for column in (self.x, self.y, self.segment, self.arrival, self.codes))

    def write(self, slots: NDArray[np.int64], rows: Rows, arrival: Array, codes: Array) -> None:
        """Put rows into slots."""
        self.x[slots], self.y[slots], self.segment[slots] = rows
        self.arrival[slots], self.codes[slots] = arrival, codes

    def read(self, slots: NDArray[np.int64]) -> dict[str, Any]:
        """Copies of the columns by name, in the order of ``slots``."""
        names = ("x", "y", "segment", "arrival", "codes")
        return {name: getattr(self, name)[slots] for name in names}
