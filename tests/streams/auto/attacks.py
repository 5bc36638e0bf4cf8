"""What can go wrong with a stream that does not drift: a dead sensor, a constant row, outliers, copies of a few rows.

Each begins at row ``BEGINS`` of the rows and stays; labels are the true ones throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.streams.data import F32, I64

F64 = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

BEGINS = 0.4
"""Share of the rows that come before the attack."""
OUTLIERS = 0.01
WILD = (3.0, 6.0)
"""Outliers reach ten to these powers."""
COPIES = 0.9
COPIED = 4
"""So many rows are copied over and over."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Attacked:
    """Rows x (N, *shape) and classes y (N,) after the attack, and the positions of the rows that it touched."""

    x: F32
    y: I64
    touched: I64


def attack(kind: str, x: F32, y: I64, confidence: F64, rng: np.random.Generator) -> Attacked:
    """The rows, in their order, under the attack ``kind``; the caller's are left as they are.

    Args:
        kind: one of `ATTACKS`.
        x: (N, *shape) rows as they would come.
        y: (N,) their classes.
        confidence: (N, K) probabilities that the frozen model gives them.
        rng: of the draws.

    Raises:
        ValueError: there is no such attack, or too few rows for it.
    """
    if kind not in ATTACKS:
        raise ValueError(f"no attack is called {kind!r}; there are: {', '.join(ATTACKS)}")
    if len(y) < 50:
        raise ValueError(f"{kind}: {len(y)} rows are too few for an attack to begin in; give 50 at least")
    return ATTACKS[kind](x.copy(), y.copy(), confidence, begins(len(y)), rng)


def begins(rows: int) -> int:
    """The first row that an attack may touch."""
    return int(BEGINS * rows)


def _dead_sensor(x: F32, y: I64, confidence: F64, first: int, rng: np.random.Generator) -> Attacked:
    """One channel, column or block of image rows goes to 0, or stays at its last value."""
    if x.ndim == 4:  # an image sensor loses lines: a quarter of them, somewhere in the middle half
        height = x.shape[2] // 4
        top = int(rng.integers(height, 2 * height + 1))
        part: tuple[slice | int, ...] = (slice(None), slice(top, top + height))
    else:
        part = (int(rng.integers(x.shape[1])),)
    x[(slice(first, None), *part)] = 0.0 if rng.random() < 0.5 else x[(first - 1, *part)]
    return Attacked(x=x, y=y, touched=np.arange(first, len(y)))


def _constant(x: F32, y: I64, confidence: F64, first: int, rng: np.random.Generator) -> Attacked:
    """The same row for ever after."""
    x[first:], y[first:] = x[first], y[first]
    return Attacked(x=x, y=y, touched=np.arange(first, len(y)))


def _outliers(x: F32, y: I64, confidence: F64, first: int, rng: np.random.Generator) -> Attacked:
    """One row in a hundred has finite values far out, of either sign, in a quarter of its inputs."""
    count = max(2, round(OUTLIERS * (len(y) - first)))
    touched = np.sort(rng.choice(np.arange(first, len(y)), count, replace=False))
    shape = (count, *x.shape[1:])
    size = 10.0 ** rng.uniform(*WILD, shape) * rng.choice([-1.0, 1.0], shape)
    drawn = rng.random((count, x[0].size))
    hit = drawn <= np.maximum(0.25, drawn.min(1, keepdims=True))  # of few inputs one at least
    x[touched] = np.where(hit.reshape(shape), size, x[touched]).astype(np.float32)
    return Attacked(x=x, y=y, touched=touched)


def _duplicates(x: F32, y: I64, confidence: F64, first: int, rng: np.random.Generator) -> Attacked:
    """Nine rows in ten are copies of a few of one class: those of which the frozen model is surest.

    The class is drawn among those that the model gets right often enough to have such rows.
    """
    right = confidence.argmax(1) == y
    classes = [label for label in np.unique(y) if (right & (y == label)).sum() >= COPIED]
    if not classes:
        raise ValueError(f"duplicates: the model gets fewer than {COPIED} rows of every class right")
    mine = np.flatnonzero(right & (y == rng.choice(classes)))
    surest = mine[np.argsort(-confidence[mine].max(1), kind="stable")[:COPIED]]
    after = len(y) - first
    touched = np.sort(first + rng.permutation(after)[: round(COPIES * after)])
    copied = rng.choice(surest, len(touched))
    x[touched], y[touched] = x[copied], y[copied]
    return Attacked(x=x, y=y, touched=touched)


Attack = Callable[[F32, I64, F64, int, np.random.Generator], Attacked]
ATTACKS: dict[str, Attack] = {
    "dead_sensor": _dead_sensor,
    "constant": _constant,
    "outliers": _outliers,
    "duplicates": _duplicates,
}
