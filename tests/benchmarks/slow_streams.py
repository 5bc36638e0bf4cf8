"""The streams of `make bench-slow`: whole recordings in their own order, two made of CIFAR-10, and how labels come.

Gas and insects are whole: of those a seed chooses which labels come and the seeds of the daemon, not the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from daemon.evaluation.recording import Plan, Recording
from tests.models import gas
from tests.streams import data, sources
from tests.streams.auto import streams
from tests.streams.data import F32, I64

Labels = Literal["100%", "10%", "1%", "none"]

SHARES: dict[Labels, float] = {"100%": 1.0, "10%": 0.1, "1%": 0.01, "none": 0.0}
DELAYS = (0, 200, 2_000)
BATCH_ROWS = 64
IMAGES = 3_000
"""Rows of the streams of images, which cost the most."""
ALL = 1_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Rows x (N, *shape) with classes y (N,), in the order in which they come, and where another regime begins."""

    x: F32
    y: I64
    changes: tuple[int, ...]


def _gas(seed: int) -> Rows:
    """Sensors that age over 36 months, from the second month group on."""
    x, y, segment = gas.load()
    later = segment > 1
    return _marked(x[later], y[later], segment[later])


def _insects(seed: int) -> Rows:
    """Wing beats while the temperature changes, the two stretches of nearly one class among them."""
    found = data.arrays("insects_gradual.npz")
    x, y, segment = (found[name][sources.INSECTS_TRAIN :] for name in ("x", "y", "segment"))
    return _marked(x.astype(np.float32), y.astype(np.int64), segment.astype(np.int64))


def _har(seed: int) -> Rows:
    """Activities of people the model has not seen: from the phone it knows, then from a watch."""
    drawn = streams.draw("har", ALL, seed)
    return _marked(drawn.x, drawn.y, drawn.visit)


def _cifar_swap(seed: int) -> Rows:
    """Clean images; from the middle on two pairs of labels have changed places, which only labels show."""
    images, labels = data.cifar10("test", sources.HELD_FROM)
    chosen = np.random.default_rng([seed, *b"cifar_swap"]).permutation(len(labels))[:IMAGES]
    y = labels[chosen]
    swapped = np.arange(len(y)) >= len(y) // 2
    y = np.where(swapped, streams.SWAPPED[y], y)
    return _marked(data.channels_first(images[chosen]), y, swapped.astype(np.int64))


def _cifar_recurring(seed: int) -> Rows:
    """Clean, noisy and pale images in visits of equal length, each kind more than once; shuffled within a visit."""
    drawn = streams.draw("cifar_recurring", IMAGES, seed)
    rows = streams.arrange("iid", drawn, seed)
    return _marked(drawn.x[rows], drawn.y[rows], drawn.visit[rows])


def _marked(x: F32, y: I64, regime: I64) -> Rows:
    return Rows(x=x, y=y, changes=tuple((np.flatnonzero(np.diff(regime)) + 1).tolist()))


STREAMS: dict[str, tuple[str, Callable[[int], Rows]]] = {
    "gas": ("gas_mlp_bn", _gas),
    "insects": ("insects_mlp_bn", _insects),
    "har": ("har_cnn_bn", _har),
    "cifar_swap": ("cifar", _cifar_swap),
    "cifar_recurring": ("cifar", _cifar_recurring),
}
"""By name: the source model that serves it, and what makes its rows for a seed."""


def model_of(stream: str) -> str:
    """Name of the source model; ValueError when there is no such stream."""
    if stream not in STREAMS:
        raise ValueError(f"no stream is called {stream!r}; there are: {', '.join(STREAMS)}")
    return STREAMS[stream][0]


@lru_cache(maxsize=4)
def recording(stream: str, seed: int) -> Recording:
    """The stream's rows; MissingData where its data is not here, ValueError when there is no such stream."""
    model_of(stream)
    rows = STREAMS[stream][1](seed)
    times_s = np.arange(len(rows.y), dtype=np.float64)
    return Recording(x=rows.x, y=rows.y, times_s=times_s, changes=rows.changes, name=stream)


def plan(labels: Labels, delay: int, seed: int) -> Plan:
    """How labels come."""
    return Plan(batch_rows=BATCH_ROWS, delay=delay, label_share=SHARES[labels], seed=seed)
