"""The fields of a record, one at a time: its id, its label, its time, its numbers, and why one of them is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from itertools import chain
from typing import Annotated, Any

import msgspec

REASONS = (
    "tombstone",  # the record has no value
    "empty",  # the value has no bytes
    "too_large",  # longer than the codec's max_bytes: not looked at
    "undecodable",  # not of the format at all, or not a map
    "schema",  # breaks its schema, or names one that the registry does not have
    "missing_field",  # no x; in a label no id or no y
    "wrong_type",  # something else where a number, an id or a time belongs
    "wrong_shape",  # not as many numbers as the model takes, or nested otherwise
    "not_finite",  # NaN, infinite or null among the numbers
    "out_of_range",  # a number beyond float32
)
"""Why a row is invalid, a record is a dead letter, or a label is rejected: values of the metric's label."""

# A label beyond what a float holds exactly is no class and no measurement.
Number = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)] | float
# A time without its UTC offset could be off by half a day, so it is refused.
Time = float | Annotated[datetime, msgspec.Meta(tz=True)]

_DETAIL_CHARS = 200


class RefusedError(ValueError):
    """A record, or a field of it, that can't be used; ``reason`` is one of ``REASONS``."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail[:_DETAIL_CHARS]


def identity(value: object) -> str | None:
    """A record's ``id`` as text; None: it has none.

    Raises:
        RefusedError: wrong_type; undecodable for text that is not Unicode (a lone surrogate can't be answered).
    """
    if value is None:
        return None
    if type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise RefusedError("wrong_type", f"id is {_kind(value)}; give a string or an integer")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RefusedError("undecodable", f"id: {error}") from None
    return value


def label(value: object) -> int | float | None:
    """A record's ``y``; None: there is none. NaN and the infinities are how tables write a missing label.

    Raises:
        RefusedError: wrong_type.
    """
    if value is None:
        return None
    try:
        number: int | float = msgspec.convert(value, Number)
    except (ValueError, OverflowError) as error:
        raise RefusedError("wrong_type", f"y: {error}") from None
    return number if math.isfinite(number) else None


def seconds(value: object) -> float | None:
    """A record's ``ts`` (number, RFC 3339 text, datetime) in seconds since the epoch; None: there is none.

    Raises:
        RefusedError: wrong_type.
    """
    if value is None:
        return None
    try:
        time: float | datetime = msgspec.convert(value, Time)
    except (ValueError, OverflowError) as error:
        raise RefusedError("wrong_type", f"ts: {error}; give seconds, or RFC 3339 with an offset") from None
    if isinstance(time, datetime):
        return time.timestamp()
    return time if math.isfinite(time) else None


def flatten(x: Any, shape: Sequence[int]) -> list[float]:
    """The numbers of ``x`` in row-major order; ``x`` is nested like ``shape``, or flat. null becomes NaN.

    Raises:
        RefusedError: missing_field, wrong_type or wrong_shape.
        OverflowError: an integer beyond a double.
    """
    if not isinstance(x, list):
        problem = "missing_field" if x is None else "wrong_type"
        raise RefusedError(problem, f"x is {_kind(x)}; give numbers of shape {list(shape)}")
    found, level = [len(x)], x
    while level and type(level[0]) is list:
        width = len(level[0])
        if set(map(type, level)) != {list} or set(map(len, level)) != {width}:
            raise RefusedError("wrong_shape", f"x is ragged at depth {len(found)}; expected shape {list(shape)}")
        found.append(width)
        level = list(chain.from_iterable(level))
    kinds = set(map(type, level))
    if list in kinds:
        raise RefusedError("wrong_shape", f"x is ragged at depth {len(found)}; expected shape {list(shape)}")
    if wrong := kinds - {float, int, type(None)}:
        raise RefusedError("wrong_type", f"x holds {', '.join(sorted(kind.__name__ for kind in wrong))}; give numbers")
    if tuple(found) not in (tuple(shape), (math.prod(shape),)):
        raise RefusedError("wrong_shape", f"x has shape {found}; expected {list(shape)}")
    return level if kinds == {float} else [math.nan if value is None else float(value) for value in level]


def _kind(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
