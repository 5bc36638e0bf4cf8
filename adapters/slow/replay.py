"""The replay memory: the newest rows, a class-balanced rest, and reference exemplars that are never evicted."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapters.slow.rows import Array, Rows, Screen
from adapters.slow.snapshot import Snapshot, draw
from adapters.slow.strata import BalancedSlots, Stratum


class Replay:
    """Bounded memory of labelled rows, on the host.

    A row first enters a first-in-first-out part of ``round(recent_share * capacity_rows)`` rows. What falls out of it
    enters the balanced part (``BalancedSlots``: strata by class and segment), so that a class which the stream has
    not shown for long is not forgotten.

    Reference exemplars come on top of ``capacity_rows``, are never evicted and are not part of the state: they belong
    to the bundle. Rows with a value that is not finite or a label that is not a class are dropped and counted.

    Args:
        input_shape: shape of one input.
        capacity_rows: most rows kept, reference exemplars not counted.
        classes: number of classes; None for regression, whose strata are the segments alone.
        seed: of the evictions.
        reference_x: (r, *input_shape) exemplars; None for none.
        reference_y: (r,) their labels.
        recent_share: share of the capacity that holds the newest rows.

    Raises:
        ValueError: a number is out of range, the shapes do not fit, or a reference exemplar is unusable.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        capacity_rows: int,
        *,
        classes: int | None,
        seed: int,
        reference_x: ArrayLike | None = None,
        reference_y: ArrayLike | None = None,
        recent_share: float = 0.5,
    ) -> None:
        if capacity_rows < 1:
            raise ValueError(f"capacity_rows is {capacity_rows}; it must be 1 or more")
        if not 0 <= recent_share <= 1:
            raise ValueError(f"recent_share is {recent_share}; it must be in [0, 1]")
        self._screen = Screen(input_shape, classes)
        self._reference = self._screen.empty(0)
        if reference_x is not None and reference_y is not None:
            self._reference = self._screen(reference_x, reference_y)
            if lost := len(np.asarray(reference_y)) - len(self._reference.y):
                raise ValueError(f"{lost} reference exemplars are not finite or have no valid label; pack them again")
        elif reference_x is not None or reference_y is not None:
            raise ValueError("reference_x and reference_y go together; give both or neither")
        self.capacity_rows = capacity_rows
        self.dropped = 0
        """Rows refused so far: not finite, or a label that is not a class."""
        self._recent_rows = round(recent_share * capacity_rows)
        # Slots [0, recent_rows) are a ring, of which _recent are in use; the rest is the balanced part.
        self._rows = self._screen.empty(capacity_rows)
        self._recent = 0
        self._oldest = 0
        self._balanced = BalancedSlots(capacity_rows - self._recent_rows, seed)

    def __len__(self) -> int:
        """Rows held, reference exemplars not counted."""
        return self._recent + self._balanced.used

    @property
    def reference_rows(self) -> int:
        """Number of protected reference exemplars."""
        return len(self._reference.y)

    @property
    def reference_x(self) -> Array:
        """(r, *input_shape) protected reference exemplars."""
        return self._reference.x

    @property
    def reference_y(self) -> Array:
        """(r,) their labels."""
        return self._reference.y

    @property
    def bytes(self) -> int:
        """Host memory of the rows and the reference exemplars; taken at construction, it does not grow."""
        return sum(array.nbytes for rows in (self._rows, self._reference) for array in rows)

    def add(self, x: ArrayLike, y: ArrayLike, segment: ArrayLike = 0) -> int:
        """Take in rows, oldest first.

        Args:
            x: (n, *input_shape).
            y: (n,) classes or targets.
            segment: one stratum for all rows, or (n,).

        Returns:
            int: rows taken; the others are counted in ``dropped``.

        Raises:
            ValueError: the shapes do not fit.
        """
        rows = self._screen(x, y, segment)
        self.dropped += len(np.asarray(y)) - len(rows.y)
        for index in range(len(rows.y)):
            if self._recent < self._recent_rows:
                slot = self._recent
                self._recent += 1
            elif self._recent_rows:
                slot = self._oldest
                self._oldest = (slot + 1) % self._recent_rows
                self._keep(self._rows, slot)
            else:
                self._keep(rows, index)
                continue
            self._write(slot, rows, index)
        return len(rows.y)

    def _keep(self, rows: Rows, index: int) -> None:
        """Enter row ``index`` of ``rows`` into the balanced part."""
        if self._balanced.capacity:
            label = int(rows.y[index]) if self._screen.classes is not None else 0
            stratum: Stratum = (label, int(rows.segment[index]))
            self._write(self._recent_rows + self._balanced.place(stratum), rows, index)

    def _write(self, slot: int, rows: Rows, index: int) -> None:
        for own, new in zip(self._rows, rows, strict=True):
            own[slot] = new[index]

    def _slots(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Slots of the rows numbered [0, len(self)): the recent part, then the balanced one."""
        return indices + (indices >= self._recent) * (self._recent_rows - self._recent)

    def sample(self, rng: np.random.Generator, n: int, reference_share: float) -> tuple[Array, Array]:
        """Draw ``n`` rows with replacement: x (n, *input_shape) float32 and y (n,).

        ``round(n * reference_share)`` of them are reference exemplars; all are while the memory has no rows of its
        own, none are when there are no exemplars.

        Raises:
            ValueError: there is nothing to draw from.
        """
        own, reference = draw(rng, n, reference_share, len(self), self.reference_rows)
        slots = self._slots(own)
        return (
            np.concatenate((self._rows.x[slots], self._reference.x[reference])),
            np.concatenate((self._rows.y[slots], self._reference.y[reference])),
        )

    def rows(self) -> Rows:
        """Copies of all rows held, reference exemplars not among them."""
        slots = self._slots(np.arange(len(self)))
        return Rows(self._rows.x[slots], self._rows.y[slots], self._rows.segment[slots])

    def snapshot(self) -> Snapshot:
        """A copy to draw from in another thread; the reference exemplars are shared, as nothing ever writes them."""
        rows = self.rows()
        return Snapshot(rows.x, rows.y, self._reference.x, self._reference.y)

    def _fingerprint(self) -> dict[str, int]:
        """What must be the same for a state to fit: the sizes, and the exemplars' checksum."""
        crc = zlib.crc32(self._reference.y.tobytes(), zlib.crc32(self._reference.x.tobytes()))
        return {"capacity_rows": self.capacity_rows, "recent_rows": self._recent_rows, "reference_crc": crc}

    def state_dict(self) -> dict[str, Any]:
        """Copies of the rows held and all that later evictions hang on; without the reference exemplars."""
        return {
            **self._fingerprint(),
            **self.rows()._asdict(),
            "recent": self._recent,
            "oldest": self._oldest,
            "dropped": self.dropped,
            "balanced": self._balanced.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where ``state_dict`` was taken.

        Raises:
            ValueError: the state is of a memory of another size, input shape or with other reference exemplars.
        """
        for name, own in self._fingerprint().items():
            if state[name] != own:
                raise ValueError(f"the saved replay memory has {name} {state[name]}, this one {own}; start it empty")
        if state["x"].shape[1:] != self._screen.input_shape:
            raise ValueError(
                f"the saved replay memory holds inputs of shape {state['x'].shape[1:]}, "
                f"this one {self._screen.input_shape}; start it empty"
            )
        self._recent = state["recent"]
        self._oldest = state["oldest"]
        self.dropped = state["dropped"]
        self._balanced.load_state_dict(state["balanced"])
        slots = self._slots(np.arange(len(self)))
        for name, own_rows in self._rows._asdict().items():
            own_rows[slots] = state[name]
