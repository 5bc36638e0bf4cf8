"""Drawing batches from rows and reference exemplars, and rows that stand still while they are drawn from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from adapters.slow.rows import Array


class Draw(NamedTuple):
    """Which rows a batch is made of."""

    own: NDArray[np.int64]
    """Indices into the memory's own rows, oldest first."""
    reference: NDArray[np.int64]
    """Indices into the reference exemplars."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How a batch is put together from the memory's own rows."""

    recency: float = 0.0
    """Share drawn from the newest rows alone."""
    balance: float = 0.0
    """Weight of a draw that gives every class held the same chance, against one that gives it to every row."""

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        for name in ("recency", "balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")

    def draw(self, rng: np.random.Generator, n: int, reference_share: float, y: Array, recent: int, known: int) -> Draw:
        """Draw ``n`` rows with replacement, ``round(n * reference_share)`` of them from the reference.

        All are reference exemplars while the memory has no rows of its own; none are when there are no exemplars.

        Args:
            rng: where chance comes from.
            n: rows of the batch.
            reference_share: see above.
            y: (m,) labels of the memory's own rows, oldest first.
            recent: how many of them, from the end, are the newest.
            known: number of reference exemplars.

        Raises:
            ValueError: there is nothing to draw from.
        """
        if len(y) + known == 0:
            raise ValueError("the replay memory is empty; add labelled rows or give reference exemplars first")
        from_reference = n if len(y) == 0 else 0 if known == 0 else round(n * reference_share)
        own = n - from_reference
        from_recent = round(own * self.recency) if recent else 0
        parts = [self._among(rng, own - from_recent, y), len(y) - recent + self._among(rng, from_recent, y[-recent:])]
        return Draw(np.concatenate(parts), rng.integers(0, max(known, 1), from_reference))

    def _among(self, rng: np.random.Generator, n: int, y: Array) -> NDArray[np.int64]:
        if not self.balance or not len(y):
            return rng.integers(0, max(len(y), 1), n)
        _, inverse, count = np.unique(y, return_inverse=True, return_counts=True)
        chance = (1 - self.balance) / len(y) + self.balance / len(count) / count[inverse]
        total = chance.cumsum()
        chosen: NDArray[np.int64] = np.searchsorted(total, rng.random(n) * total[-1], side="right")
        return chosen.clip(max=len(y) - 1)


@dataclass(frozen=True)
class Snapshot:
    """Rows to draw from that no later ``Replay.add`` changes: what a burst in another thread is given."""

    x: Array = field(repr=False)
    """(n, *input_shape), oldest first; float16 where the memory keeps half precision."""
    y: Array = field(repr=False)
    reference_x: Array = field(repr=False)
    reference_y: Array = field(repr=False)
    recent: int = 0
    """Rows at the end that are the newest."""
    mix: Mix = Mix()
    pinned: bool = False
    """Whether batches come in page-locked memory, from where a GPU fetches them without waiting."""

    def __len__(self) -> int:
        """Rows held, reference exemplars not counted."""
        return len(self.y)

    def sample(self, rng: np.random.Generator, n: int, reference_share: float) -> tuple[Array, Array]:
        """Draw rows as ``Replay.sample`` does; the same ones for the same ``rng``."""
        drawn = self.mix.draw(rng, n, reference_share, self.y, self.recent, len(self.reference_y))
        return gather(drawn, (self.x, self.y), (self.reference_x, self.reference_y), pinned=self.pinned)


def gather(
    drawn: Draw, own: tuple[Array, Array], reference: tuple[Array, Array], *, pinned: bool
) -> tuple[Array, Array]:
    """The drawn rows, x float32 and y; in page-locked memory where asked."""
    n, split = len(drawn.own) + len(drawn.reference), len(drawn.own)
    shape = (n, *reference[0].shape[1:])
    x = torch.empty(shape, pin_memory=True).numpy() if pinned else np.empty(shape, np.float32)
    x[:split], x[split:] = own[0][drawn.own], reference[0][drawn.reference]
    return x, np.concatenate((own[1][drawn.own], reference[1][drawn.reference]))
