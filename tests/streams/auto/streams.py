"""Streams for `make bench-auto`: those of `tests.streams` with a draw for each seed, controls, gradual and recurring.

    drawn = draw("cifar_gradual", rows=1_500, seed=2)
    rows = arrange("bursts", drawn.y, drawn.regime, seed=2)

A draw is ``rows`` rows, no two the same, in the stream's native order. Recorded ones are cut out in stretches of
neighbouring rows, so that what is correlated in them stays so; every regime keeps its share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from daemon.streams.simulator import LIFE, SWAP_FROM, AgeingArray
from tests import streams
from tests.streams import data, orders, sources
from tests.streams.auto import sources as more
from tests.streams.corruptions import corrupt
from tests.streams.data import F32, I64

STRETCHES = 4
"""Pieces of neighbouring rows in which a regime of a recorded stream is cut out."""
ROOM = 0.8
"""Most of a recorded stream that a draw takes: of all rows there is but one draw, and seeds would be alike."""
GRADUAL = "contrast"
"""The corruption that grows; at its worst it costs every network dearly."""
RECURRING = ("clean", "a", "clean", "b", "a", "b", "clean", "a")
"""Visits of a stream whose regimes come back."""
CIFAR_VISITS = {"a": "gaussian_noise", "b": "contrast"}
MNIST_VISITS = {"a": "contrast", "b": "noise"}
SWAPPED = np.array([0, 1, 2, 5, 9, 3, 6, 7, 8, 4])


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """Rows x (N, *shape) with classes y (N,), in native order, and the regime (N,) that each belongs to.

    Where a regime comes back it has the number of its first visit; ``visit`` (N,) counts on.
    """

    x: F32
    y: I64
    regime: I64
    visit: I64


def draw(name: str, rows: int, seed: int) -> Drawn:
    """At most ``rows`` rows of the stream; fewer where it has no more. ValueError when there is no such stream."""
    if name not in DRAWS:
        raise ValueError(f"no stream is called {name!r}; there are: {', '.join(DRAWS)}")
    if rows < 1 or seed < 0:
        raise ValueError(f"rows is {rows} and seed is {seed}: give at least one row, and a seed from 0")
    return DRAWS[name](rows, np.random.default_rng([seed, *name.encode()]))


def stretches(regime: I64, rows: int, rng: np.random.Generator, pieces: int = STRETCHES) -> I64:
    """Positions of at most ``rows`` rows in ``pieces`` runs of neighbours per regime, evenly spread."""
    rows, found = min(rows, len(regime)), []
    for number in np.unique(regime):
        mine = np.flatnonzero(regime == number)
        wanted = max(1, len(mine) * rows // len(regime))
        free = len(mine) - wanted  # rows that are left out, before, between and after the pieces
        gap, moved = free // pieces, int(rng.integers(free // pieces + 1))
        lengths = np.diff(np.arange(pieces + 1) * wanted // pieces)
        starts = np.cumsum(np.r_[0, lengths[:-1]]) + np.arange(pieces) * gap + moved
        found += [mine[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    return np.sort(np.concatenate(found))


@lru_cache(maxsize=8)
def _recorded(name: str) -> streams.Stream:
    return streams.load(name)


def _recording(name: str) -> Callable[[int, np.random.Generator], Drawn]:
    def drawn(rows: int, rng: np.random.Generator) -> Drawn:
        stream = _recorded(name)
        chosen = stretches(stream.regime, min(rows, int(ROOM * len(stream.y))), rng)
        regime = stream.regime[chosen]
        return Drawn(x=stream.x[chosen], y=stream.y[chosen], regime=regime, visit=regime)

    return drawn


def _ageing_swap(rows: int, rng: np.random.Generator) -> Drawn:
    """The aged array before and after two of its lines change places; `tests.streams` has only what comes after."""
    first = SWAP_FROM - (LIFE - SWAP_FROM)
    x, y = AgeingArray(sources.SIMULATOR_SEED).rows(first, LIFE - first)
    regime = (np.arange(first, LIFE) >= SWAP_FROM).astype(np.int64)
    chosen = stretches(regime, rows, rng)
    return Drawn(x=x[chosen], y=y[chosen], regime=regime[chosen], visit=regime[chosen])


def _elec2(rows: int, rng: np.random.Generator) -> Drawn:
    """Neighbouring half-hours after the first tenth of the recording."""
    found = data.arrays("elec2.npz")
    x, y = found["x"][more.ELEC2_TRAIN :], found["y"][more.ELEC2_TRAIN :].astype(np.int64)
    chosen = stretches(np.zeros(len(y), np.int64), rows, rng, pieces=1)
    regime = np.zeros(len(chosen), np.int64)
    return Drawn(x=x[chosen], y=y[chosen], regime=regime, visit=regime)


def _control(name: str) -> Callable[[int, np.random.Generator], Drawn]:
    """Rows of the source that no model was trained or calibrated on; images in random order, recordings as recorded."""

    def drawn(rows: int, rng: np.random.Generator) -> Drawn:
        x, y = more.get(name).rows("control")
        regime = np.zeros(len(y), np.int64)
        chosen = rng.permutation(len(y))[:rows] if x.ndim == 4 else stretches(regime, rows, rng)
        return Drawn(x=x[chosen], y=y[chosen], regime=regime[chosen], visit=regime[chosen])

    return drawn


Corrupted = Callable[[data.Images, str, np.random.Generator], F32]


def _visits(
    images: data.Images, labels: I64, kinds: tuple[str, ...], rows: int, made: Corrupted, rng: np.random.Generator
) -> Drawn:
    """Visits of equal length to the kinds, one after the other; no image comes twice."""
    each = min(rows, len(labels)) // len(kinds)
    chosen = rng.permutation(len(labels))[: each * len(kinds)].reshape(len(kinds), each)
    numbers = list(dict.fromkeys(kinds))
    return Drawn(
        x=np.concatenate([made(images[part], kind, rng) for part, kind in zip(chosen, kinds, strict=True)]),
        y=labels[chosen.ravel()],
        regime=np.repeat([numbers.index(kind) for kind in kinds], each),
        visit=np.repeat(np.arange(len(kinds)), each),
    )


def _corrupted(images: data.Images, kind: str, rng: np.random.Generator) -> F32:
    """Images (N, 3, 32, 32) with a corruption written as ``gaussian_noise 5``, or ``clean``."""
    name, _, severity = kind.partition(" ")
    return data.channels_first(images if name == "clean" else corrupt(images, name, int(severity), rng))


def _digits(images: data.Images, kind: str, rng: np.random.Generator) -> F32:
    """Digits (N, 1, 28, 28) as `tests.streams.mnist` makes them."""
    x = data.channels_first(images)
    if kind == "noise":
        noisy: F32 = np.clip(x + rng.normal(0, 0.1, x.shape), 0, 1).astype(np.float32)
        return noisy
    if kind == "contrast":
        pale: F32 = 0.3 * x
        return pale
    if kind == "rotation":
        return data.rotated(x[:, 0], 30.0)[:, None]
    return x


def _cifar(kinds: tuple[str, ...]) -> Callable[[int, np.random.Generator], Drawn]:
    def drawn(rows: int, rng: np.random.Generator) -> Drawn:
        return _visits(*data.cifar10("test", sources.HELD_FROM), kinds, rows, _corrupted, rng)

    return drawn


def _mnist(kinds: tuple[str, ...], *, swap: bool = False) -> Callable[[int, np.random.Generator], Drawn]:
    def drawn(rows: int, rng: np.random.Generator) -> Drawn:
        made = _visits(*data.mnist("test", sources.HELD_FROM), kinds, rows, _digits, rng)
        if not swap:
            return made
        y = np.where(made.regime == 1, SWAPPED[made.y], made.y)
        return Drawn(x=made.x, y=y, regime=made.regime, visit=made.visit)

    return drawn


def _cifar_prior(rows: int, rng: np.random.Generator) -> Drawn:
    """Clean images of which, from the middle on, nine in ten are of three classes."""
    images, labels = data.cifar10("test", sources.HELD_FROM)
    half = min(rows, 4_000) // 2
    many = half * 9 // 10
    frequent = np.isin(labels, (1, 4, 8))
    skewed = np.concatenate(
        [
            rng.choice(np.flatnonzero(of), count, replace=False)
            for of, count in ((frequent, many), (~frequent, half - many))
        ]
    )
    even = rng.permutation(np.setdiff1d(np.arange(len(labels)), skewed))[:half]
    chosen = np.concatenate([even, rng.permutation(skewed)])
    regime = np.repeat([0, 1], half)
    return Drawn(x=data.channels_first(images[chosen]), y=labels[chosen], regime=regime, visit=regime)


def _recurring(kinds: dict[str, str]) -> tuple[str, ...]:
    return tuple(kinds.get(visit, visit) for visit in RECURRING)


DRAWS: dict[str, Callable[[int, np.random.Generator], Drawn]] = {
    "cifar": _cifar(tuple(f"{kind} 5" for kind in streams.CIFAR_KINDS)),
    "cifar3": _cifar(tuple(f"{kind} 3" for kind in streams.CIFAR_KINDS)),
    "cifar_gradual": _cifar(("clean", *(f"{GRADUAL} {severity}" for severity in range(1, 6)))),
    "cifar_recurring": _cifar(_recurring({key: f"{kind} 5" for key, kind in CIFAR_VISITS.items()})),
    "cifar_prior": _cifar_prior,
    "cifar_control": _control("cifar"),
    "mnist": _mnist(("clean", "noise", "contrast", "rotation")),
    "mnist_recurring": _mnist(_recurring(MNIST_VISITS)),
    "mnist_swap": _mnist(("clean", "swapped"), swap=True),
    "mnist_control": _control("mnist"),
    "har": _recording("har"),
    "har_control": _control("har_cnn_bn_wide"),
    "gas": _recording("gas"),
    "gas_control": _control("gas_mlp_bn_wide"),
    "insects": _recording("insects"),
    "insects_stress": _recording("insects_stress"),
    "insects_control": _control("insects_mlp_ln_wide"),
    "ageing": _recording("ageing"),
    "ageing_swap": _ageing_swap,
    "ageing_control": _control("ageing"),
    "elec2": _elec2,
}
"""By name, what makes a draw; the shifts, swaps and priors are those of `tests.streams`."""


def arrange(kind: str, drawn: Drawn, seed: int) -> I64:
    """Positions (N,) of the rows in the order ``kind``: one of `tests.streams.ORDERS`, or ``recurring``.

    ``recurring`` goes round the regimes in three blocks each, shuffled within; the other orders stay within a visit.
    """
    if kind != "recurring":
        return orders.order(kind, drawn.y, drawn.visit, seed)
    rng = np.random.default_rng([seed, len(orders.ORDERS)])
    numbers = dict.fromkeys(drawn.regime.tolist())
    blocks = {number: np.array_split(rng.permutation(np.flatnonzero(drawn.regime == number)), 3) for number in numbers}
    return np.concatenate([blocks[number][turn] for turn in range(3) for number in numbers])
