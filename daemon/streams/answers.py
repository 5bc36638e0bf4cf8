"""What leaves the daemon, and what comes back about it: answers to JSON, and labels from JSON."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from daemon.streams.fields import Number, RefusedError, Time, identity, label, seconds

_DIGITS = 4


class _Answer(msgspec.Struct, gc=False):
    id: str
    status: str
    y: Any
    version: int
    state: str
    confidence: float | msgspec.UnsetType = msgspec.UNSET
    p: list[float] | msgspec.UnsetType = msgspec.UNSET


class _Invalid(msgspec.Struct):
    id: str
    status: str
    reason: str


class _Label(msgspec.Struct, gc=False):
    id: str | int
    y: Number
    ts: Time | None = None


_encode = msgspec.json.Encoder().encode
_decode_label = msgspec.json.Decoder(_Label).decode


def encode_predictions(
    task: str,
    ids: list[str],
    y: ArrayLike,
    confidence: ArrayLike | None,
    version: int,
    state: str,
    probabilities: ArrayLike | None = None,
) -> list[bytes]:
    """One JSON answer per row: id, status "ok", y, version, state; confidence and p where they are given.

    Args:
        task: "classification" (y is the class) or "regression" (y is a number, or a list of them; no confidence).
        ids: (B,) the records' ids.
        y: (B,) classes, or (B,) or (B, D) values.
        confidence: (B,) in [0, 1], written with 4 digits; None to leave it out.
        version: of the parameters that answered.
        state: of the controller.
        probabilities: (B, K), written with 4 digits as ``p``; None to leave them out.

    Raises:
        ValueError: another task, or columns of different length.
    """
    if task == "classification":
        values = np.asarray(y).astype(np.int64, copy=False).tolist()
    elif task == "regression":
        values, confidence, probabilities = np.asarray(y, dtype=np.float64).tolist(), None, None
    else:
        raise ValueError(f"task is {task!r}; give classification or regression")
    unset = [msgspec.UNSET] * len(ids)
    shares = unset if confidence is None else _rounded(confidence)
    p = unset if probabilities is None else _rounded(probabilities)
    return [
        _encode(_Answer(name, "ok", value, version, state, share, row))
        for name, value, share, row in zip(ids, values, shares, p, strict=True)
    ]


def encode_invalid(name: str, reason: str) -> bytes:
    """The answer to a record whose input can't be used; ``reason`` is one of ``REASONS``."""
    return _encode(_Invalid(name, "invalid_input", reason))


def decode_label(value: bytes | None) -> tuple[str, int | float, float | None]:
    """A label ``{"id", "y", "ts"?}`` from JSON: id, class or value, seconds since the epoch (None: not given).

    Raises:
        ValueError: the text is one of ``REASONS``; true and false are no labels (wrong_type).
    """
    if not value:
        raise ValueError("tombstone" if value is None else "empty")
    try:
        found = _decode_label(value)
        return str(found.id), found.y, seconds(found.ts)
    except (ValueError, RecursionError):
        return _slowly(value)


def _slowly(value: bytes) -> tuple[str, int | float, float | None]:
    try:
        fields = json.loads(value.decode())
    except (ValueError, RecursionError):
        raise ValueError("undecodable") from None
    if not isinstance(fields, dict):
        raise ValueError("undecodable")
    try:
        name, y, ts = identity(fields.get("id")), label(fields.get("y")), seconds(fields.get("ts"))
    except RefusedError as refused:
        raise ValueError(refused.reason) from None
    if name is None or fields.get("y") is None:
        raise ValueError("missing_field")
    if y is None:
        raise ValueError("not_finite")
    return name, y, ts


def _rounded(column: ArrayLike) -> Any:
    # As float64: rounding in float32 would print 0.9876000285148621.
    return np.round(np.asarray(column, dtype=np.float64), _DIGITS).tolist()
