"""Drawing batches from rows and reference exemplars, and rows that stand still while they are drawn from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adapters.slow.rows import Array


class Draw(NamedTuple):
    """Which rows a batch is made of."""

    own: NDArray[np.int64]
    """Indices into the memory's own rows."""
    reference: NDArray[np.int64]
    """Indices into the reference exemplars."""


def draw(rng: np.random.Generator, n: int, reference_share: float, own_rows: int, reference_rows: int) -> Draw:
    """Draw ``n`` rows with replacement, ``round(n * reference_share)`` of them from the reference.

    All are reference exemplars while the memory has no rows of its own; none are when there are no exemplars.

    Raises:
        ValueError: there is nothing to draw from.
    """
    if own_rows + reference_rows == 0:
        raise ValueError("the replay memory is empty; add labelled rows or give reference exemplars first")
    from_reference = n if own_rows == 0 else 0 if reference_rows == 0 else round(n * reference_share)
    return Draw(
        rng.integers(0, max(own_rows, 1), n - from_reference),
        rng.integers(0, max(reference_rows, 1), from_reference),
    )


@dataclass(frozen=True)
class Snapshot:
    """Rows to draw from that no later ``Replay.add`` changes: what a burst in another thread is given."""

    x: Array = field(repr=False)
    y: Array = field(repr=False)
    reference_x: Array = field(repr=False)
    reference_y: Array = field(repr=False)

    def __len__(self) -> int:
        """Rows held, reference exemplars not counted."""
        return len(self.y)

    def sample(self, rng: np.random.Generator, n: int, reference_share: float) -> tuple[Array, Array]:
        """Draw rows as ``Replay.sample`` does; the same ones for the same ``rng``."""
        own, reference = draw(rng, n, reference_share, len(self.y), len(self.reference_y))
        return (
            np.concatenate((self.x[own], self.reference_x[reference])),
            np.concatenate((self.y[own], self.reference_y[reference])),
        )
