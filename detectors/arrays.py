"""Numeric arrays in JSON: base64 of their little-endian bytes, with the shape."""

from __future__ import annotations

import base64
import binascii
import math
from typing import Any

import numpy as np

from detectors.base import F64

DTYPES = ("<f4", "<f8")


def pack(array: F64, *, single: bool = False) -> dict[str, Any]:
    """``array`` of any shape as plain JSON values; with ``single`` rounded to float32, half as long."""
    data = np.asarray(array, dtype="<f4" if single else "<f8")
    return {"dtype": data.dtype.str, "shape": list(data.shape), "base64": base64.b64encode(data.tobytes()).decode()}


def unpack(packed: Any) -> F64:
    """The array, float64 and writable, that ``pack`` wrote. Raises ``ValueError`` if it is damaged or not finite."""
    if not isinstance(packed, dict) or packed.keys() != {"dtype", "shape", "base64"}:
        raise ValueError("a stored array needs the keys dtype, shape and base64, and no others: write it with pack")
    if packed["dtype"] not in DTYPES:
        raise ValueError(f"a stored array must be of type {' or '.join(DTYPES)}, got {packed['dtype']!r}")
    shape = packed["shape"]
    if not isinstance(shape, list) or not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"a stored array's shape must be a list of lengths, got {shape!r}")
    try:
        data = base64.b64decode(packed["base64"], validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"a stored array is no base64: {error}") from error
    dtype = np.dtype(packed["dtype"])
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a stored array of shape {shape} has {len(data)} bytes: it is damaged")
    array = np.frombuffer(data, dtype=dtype).reshape(shape).astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError("a stored array has values that are not finite: it is damaged")
    return array
