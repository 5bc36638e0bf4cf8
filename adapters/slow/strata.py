"""Which rows of a full memory give way: class and segment, age and cluster are kept in balance."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

CODE_WIDTH = 16
"""Numbers by which two inputs are compared; distances are kept to about a quarter (Johnson & Lindenstrauss 1984)."""
SEEDED_FROM = 1024
"""Rows at most from which the clusters' centres are drawn."""
SEEDED_EVERY = 8
"""Prunings for which the centres serve: drawing them costs more than all else, and a pruning takes few rows."""


class Codes:
    """Short float32 codes of inputs: standardised by the reference, then projected on fixed random directions."""

    def __init__(self, reference_x: NDArray[Any]) -> None:
        """Reference (r, *input_shape), for the inputs' mean and spread; with r < 2 they are taken as they are."""
        inputs = int(np.prod(reference_x.shape[1:]))
        flat = reference_x.reshape(len(reference_x), inputs).astype(np.float64)
        self.width = min(CODE_WIDTH, inputs)
        known = len(flat) >= 2
        scale = flat.std(0) if known else np.ones(inputs)
        if inputs > CODE_WIDTH:
            # The same for every memory: a state that was taken under another seed goes on with the same codes.
            directions = np.random.default_rng(0).normal(size=(inputs, self.width)) / np.sqrt(self.width)
        else:
            directions = np.eye(inputs)
        # An input that the reference never saw move has no scale of its own: it can't tell rows apart.
        scaled = np.divide(1, scale, out=np.zeros(inputs), where=scale > 0)[:, None] * directions
        self._directions = np.clip(scaled, -1e30, 1e30).astype(np.float32)
        self._mean = (flat.mean(0) if known else np.zeros(inputs)).astype(np.float32)

    def __call__(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """(n, *input_shape) to (n, width); inputs far out stay finite."""
        # Hostile inputs overflow here and are cut off; they only decide which row gives way.
        with np.errstate(over="ignore", invalid="ignore"):
            codes = (x.reshape(len(x), len(self._mean)) - self._mean) @ self._directions
        bounded: NDArray[np.float32] = np.clip(np.nan_to_num(codes), -1e6, 1e6)
        return bounded


def centres(codes: NDArray[np.float32], clusters: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(at most ``clusters``, width) rows of ``codes`` that lie far from each other.

    Those of k-means++ (Arthur & Vassilvitskii 2007): each is a row drawn by its squared distance from the ones before
    it, so that a small group far from the rest gets one of its own.
    """
    rows = codes if len(codes) <= SEEDED_FROM else codes[rng.choice(len(codes), SEEDED_FROM, replace=False)]
    found = [rows[int(rng.integers(len(rows)))]]
    distance = ((rows - found[0]) ** 2).sum(1)
    while len(found) < clusters and distance.max() > 0:
        total = distance.cumsum(dtype=np.float64)
        chosen = min(int(np.searchsorted(total, rng.random() * total[-1], side="right")), len(rows) - 1)
        found.append(rows[chosen])
        distance = np.minimum(distance, ((rows - found[-1]) ** 2).sum(1))
    return np.stack(found)


def cells(codes: NDArray[np.float32], among: NDArray[np.float32]) -> Ints:
    """(n,) the number of the nearest centre of each row."""
    nearest: Ints = (codes @ among.T - 0.5 * (among**2).sum(1)).argmax(1)
    return nearest


def _place_in_group(group: Ints, rank: Ints) -> Ints:
    """Place of each row in its group, by rank; rows of equal rank in the order in which they are given."""
    order = np.lexsort((rank, group))
    sorted_group = group[order]
    first = np.flatnonzero(np.r_[True, sorted_group[1:] != sorted_group[:-1]])
    starts = np.repeat(first, np.diff(np.r_[first, len(order)]))
    place = np.empty_like(order)
    place[order] = np.arange(len(order)) - starts
    return place


def survivors(levels: list[Ints], keep: int, priority: NDArray[np.uint64]) -> Ints:
    """Which ``keep`` of n rows stay, ascending: groups are filled in turns, so that a small one loses last.

    Among the groups of ``levels[0]`` (its strata) each loses nothing until it is among the largest; within a stratum
    the same holds for the groups of ``levels[1]``, and so on. Chrysakis & Moens,
    "Online Continual Learning from Imbalanced Data", ICML 2020, on more than one level; that of the clusters follows
    the pruning of Maharana et al., "Adapt-infinity", ICLR 2025.

    Args:
        levels: (n,) group numbers from 0 each, from the coarsest; a level counts within the ones before it.
        keep: rows that stay.
        priority: (n,) smaller ones stay within the last groups, and where groups are equal.
    """
    shuffled = np.argsort(priority, kind="stable")
    nested: list[Ints] = [levels[0][shuffled]]
    for level in levels[1:]:
        nested.append(nested[-1] * (int(level.max()) + 1) + level[shuffled])
    rank = np.zeros(len(shuffled), np.int64)
    for group in reversed(nested):
        rank = _place_in_group(group, rank)
    kept: Ints = np.sort(shuffled[np.argsort(rank, kind="stable")[:keep]])
    return kept


def priorities(arrival: Ints, seed: int) -> NDArray[np.uint64]:
    """(n,) numbers as if by chance, always the same for a row: the output of splitmix64 (Steele et al. 2014).

    Drawn anew at each pruning, chance would leave no row that is long in an octave of age: each pruning is one more
    that it must survive. With a number for life those with the smallest pass through.
    """
    z = arrival.astype(np.uint64) + np.uint64(seed % 2**32) * np.uint64(2**32)
    z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def age_band(age: Ints, unit: int) -> Ints:
    """Octave of an age in rows: 0 below ``unit``, 1 below 3 units, 2 below 7, so each spans twice the one before."""
    band: Ints = np.log2(1 + age / unit).astype(np.int64)
    return band


class Pruning:
    """Chooses the rows that stay, by class and segment, cluster and octave of age; has a chance of its own."""

    def __init__(self, clusters: int, width: int, seed: int) -> None:
        """For codes of ``width`` numbers, in ``clusters`` clusters."""
        self._clusters = clusters
        self._seed = seed
        self._rng = np.random.default_rng(seed)
        self._done = 0
        self._centres = np.zeros((0, width), np.float32)

    def __call__(
        self,
        label: Ints,
        segment: Ints,
        arrival: Ints,
        codes: NDArray[np.float32],
        *,
        now: int,
        unit: int,
        keep: int,
    ) -> Ints:
        """Which ``keep`` of n rows stay, ascending; at row number ``now``, ``unit`` the rows of the youngest octave."""
        segments, stratum = np.unique(segment, return_inverse=True)
        levels = [stratum + len(segments) * label]
        if self._clusters > 1:
            if self._done % SEEDED_EVERY == 0:
                self._centres = centres(codes, self._clusters, self._rng)
            self._done += 1
            levels.append(cells(codes, self._centres))
        levels.append(age_band(now - arrival, unit))
        return survivors(levels, keep, priorities(arrival, self._seed))

    def state_dict(self) -> dict[str, Any]:
        """The centres, and the state of chance as text: its integers have 128 bits."""
        return {
            "seed": self._seed,
            "done": self._done,
            "centres": self._centres.copy(),
            "rng": json.dumps(self._rng.bit_generator.state),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self._seed, self._done, self._centres = state["seed"], state["done"], np.array(state["centres"])
        self._rng.bit_generator.state = json.loads(state["rng"])
