"""The held-back rows that a gate judges on, rotated into training; it counts how often they were looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapters.slow.rows import Rows, Screen


class Holdout:
    """The newest ``capacity_rows`` labelled rows of those held back; a row is trained on only after it has left.

    With ``stride`` 1 every row is held back first, so the newest labels of all are not learnt from yet. With a larger
    one only every ``stride``-th block of ``block_rows`` arriving rows is: the others are learnt from at once, and the
    same number of held-back rows spans ``stride`` times as long. Where neighbouring rows are alike, the blocks learnt
    from tell of the ones between, and a gate sees some of that as gain: keep the blocks longer than the dependence.

    Each look of a gate spends some of the rows' value as evidence: candidates that follow a rejected one are picked
    with knowledge of the rows. ``queries`` is the number of looks that any row present has gone through, which is
    that of the oldest one; it falls as looked-at rows rotate out and is 0 after a full rotation without a look. At
    ``max_queries`` the set is stale until enough fresh rows have come. Idea: Dwork et al., "The reusable holdout",
    Science 2015.

    Args:
        input_shape: shape of one input.
        capacity_rows: rows held back.
        classes: number of classes; None for regression.
        max_queries: looks after which the set is stale.
        stride: see above.
        block_rows: rows of one block; without a meaning at stride 1.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        capacity_rows: int,
        *,
        classes: int | None,
        max_queries: int = 8,
        stride: int = 1,
        block_rows: int = 16,
    ) -> None:
        if capacity_rows < 1 or max_queries < 1:
            raise ValueError(f"capacity_rows is {capacity_rows}, max_queries {max_queries}; both must be 1 or more")
        if stride < 1 or block_rows < 1:
            raise ValueError(f"stride is {stride}, block_rows {block_rows}; both must be 1 or more")
        self._screen = Screen(input_shape, classes)
        self.capacity_rows = capacity_rows
        self.max_queries = max_queries
        self.dropped = 0
        """Rows refused so far: not finite, or a label that is not a class."""
        self._stride, self._block_rows = stride, block_rows
        self._arrived = 0
        self._looks = 0
        self._arrivals = np.zeros(0, np.int64)
        self._rows = self._screen.empty(0)
        self._looks_before = np.zeros(0, np.int64)

    def __len__(self) -> int:
        """Rows held back now."""
        return len(self._rows.y)

    def add(self, x: ArrayLike, y: ArrayLike, segment: ArrayLike = 0) -> Rows:
        """Hold back new rows, oldest first.

        Args:
            x: (n, *input_shape).
            y: (n,) classes or targets.
            segment: one stratum for all rows, or (n,); it leaves with the row.

        Returns:
            Rows: those to learn from now, oldest first, for ``Replay.add(*rows)``: what leaves, and what was not held
            back. Unusable rows are in neither set, but counted in ``dropped``.

        Raises:
            ValueError: the shapes do not fit.
        """
        new = self._screen(x, y, segment)
        self.dropped += len(np.asarray(y)) - len(new.y)
        arrivals = np.arange(self._arrived, self._arrived + len(new.y))
        self._arrived += len(new.y)
        held = arrivals // self._block_rows % self._stride == 0
        joined = Rows(*(np.concatenate((own, column[held])) for own, column in zip(self._rows, new, strict=True)))
        looks = np.concatenate((self._looks_before, np.full(held.sum(), self._looks, np.int64)))
        known = np.concatenate((self._arrivals, arrivals[held]))
        leaving = max(0, len(joined.y) - self.capacity_rows)
        # Copied, so that the rows kept do not hold on to the memory of all that were ever joined to them.
        self._rows = Rows(*(column[leaving:].copy() for column in joined))
        self._looks_before, self._arrivals = looks[leaving:].copy(), known[leaving:].copy()
        # A row that was there before goes first, and a new one that leaves at once takes its place among the new.
        order = np.argsort(np.concatenate((known[:leaving], arrivals[~held])), kind="stable")
        left = (column[:leaving] for column in joined)
        return Rows(*(np.concatenate((old, column[~held]))[order] for old, column in zip(left, new, strict=True)))

    def rows(self) -> Rows:
        """Copies of the rows held back, oldest first."""
        return Rows(*(column.copy() for column in self._rows))

    @property
    def arrivals(self) -> NDArray[np.int64]:
        """(n,) number of each row held back among all usable rows that came, ascending: neighbours may be dependent."""
        return self._arrivals.copy()

    @property
    def queries(self) -> int:
        """Looks that the oldest row present has gone through."""
        return self._looks - int(self._looks_before[0]) if len(self) else 0

    @property
    def stale(self) -> bool:
        """Whether a gate must not look again before fresh rows have come."""
        return self.queries >= self.max_queries

    def look(self) -> int:
        """Count a gate's look; its number from 1, for ``judge(query=...)``. A refused look at a stale set is free."""
        number = self.queries + 1
        if not self.stale:
            self._looks += 1
        return number

    def state_dict(self) -> dict[str, Any]:
        """Copies of the rows and the looks that each has gone through."""
        return {
            **self.rows()._asdict(),
            "looks": self._looks,
            "looks_before": self._looks_before.copy(),
            "arrived": self._arrived,
            "arrivals": self._arrivals.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where ``state_dict`` was taken.

        Raises:
            ValueError: the state holds more rows than the capacity, or inputs of another shape.
        """
        x = state["x"]
        if len(x) > self.capacity_rows or x.shape[1:] != self._screen.input_shape:
            raise ValueError(
                f"the saved held-back rows have shape {x.shape}, this set takes {self.capacity_rows} of "
                f"{self._screen.input_shape}; start it empty"
            )
        if "arrivals" not in state:
            raise ValueError("the saved held-back rows are those of an older version without arrivals; start it empty")
        self._rows = Rows(*(np.array(state[name]) for name in Rows._fields))
        self._looks = state["looks"]
        self._looks_before = np.array(state["looks_before"])
        self._arrived, self._arrivals = state["arrived"], np.array(state["arrivals"])
