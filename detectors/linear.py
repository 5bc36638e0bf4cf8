"""Linear maps of rows without rounding error, so that a row's image does not depend on the rows beside it.

A matrix product adds in an order that depends on the number of rows, on threads and on the device, and its last bits
with it. Here both factors are multiples of a power of two, few enough bits long that every product and every partial
sum is exact in float64: then the order does not matter, and the CPU and a GPU agree bit for bit.
"""

from __future__ import annotations

import math

import numpy as np

from detectors.base import F64

GRID = float(2**12)
"""Steps in one deviation of a column: rounding adds 1e-4 deviations of noise."""
LARGEST = float(2**16)
"""Most steps: what lies beyond 16 deviations counts as 16."""
EXACT_BITS = 53
"""Integers of so many bits are exact in float64."""


def location_scale(reference: F64) -> tuple[F64, F64]:
    """Mean and deviation (D,) of the columns of ``reference`` (N, D); a constant one has a billionth of its value."""
    mean = reference.mean(0)
    return mean, np.maximum(reference.std(0), 1e-9 * np.maximum(np.abs(mean), 1.0))


def steps(rows: F64, mean: F64, scale: F64) -> F64:
    """``rows`` (B, D) less ``mean`` (D,), in units of ``scale`` (D,), as whole steps (B, D) of the grid."""
    whole = np.subtract(rows, mean)
    bound = LARGEST / GRID * scale
    # Before the division by a small scale, which could overflow.
    np.clip(whole, -bound, bound, out=whole)
    whole *= GRID / scale
    return np.rint(whole, out=whole)


def exact(matrix: F64) -> F64:
    """``matrix`` (D, K) rounded so that its product with any ``steps`` is free of rounding error in float64."""
    largest = LARGEST * float(np.abs(matrix).sum(0).max(initial=0.0))
    # One bit is left for what rounding adds to the sum of a column.
    unit = 2.0 ** (math.frexp(largest)[1] + 1 - EXACT_BITS) if largest > 0.0 else 1.0
    rounded: F64 = np.rint(matrix / unit) * unit
    return rounded


def bounded(vectors: F64, longest: float) -> F64:
    """``vectors`` (B, K) of whole numbers, those longer than ``longest`` shortened to it and rounded (B, K).

    A single wild row then weighs no more than a row at the edge of the reference.
    """
    norm = np.sqrt(np.einsum("bk,bk->b", vectors, vectors))
    if norm.max(initial=0.0) <= longest:
        return vectors
    shortened: F64 = np.rint(vectors * np.minimum(1.0, longest / np.maximum(norm, 1.0))[:, None])
    return shortened
