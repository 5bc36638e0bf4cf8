"""The memory of errors as something that may serve: on which rows it is tried, and what it learns from."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from adapters.fast.core.recent import RecentRows
from adapters.fast.core.seen import I64, Seen, rows_of
from adapters.fast.error_memory import ErrorMemory

TRIED_ROWS = 1_024
"""Rows on which it is tried in full after the first labels, and after each new suspicion; then on a sample."""
SAMPLE = 4
"""It is tried on every so many-th segment of rows then."""


class MemoryArm:
    """An `ErrorMemory` that gets the frozen model's outputs and features from who has run it already."""

    def __init__(self, memory: ErrorMemory) -> None:
        self._memory = memory
        self._recent = RecentRows()
        self._tried = 0
        self._suspected = False

    @property
    def ready(self) -> bool:
        """Whether there is a label in it."""
        return self._memory.labels > 0

    def answer(self, frozen: Seen, segment: I64, *, serving: bool) -> tuple[I64, Tensor] | None:
        """Positions (n,) of the rows that it is tried on, and their corrected probabilities or values (n, V); or None.

        ``frozen`` has seen the whole batch; ``segment`` (B,) numbers the segments of its rows.
        """
        every = serving or self._tried < TRIED_ROWS
        at: I64 = np.arange(len(segment)) if every else (segment % SAMPLE == 0).nonzero()[0]
        if not len(at):
            return None
        assert frozen.features is not None
        return at, self._memory.correct(rows_of(frozen.outputs, at), rows_of(frozen.features, at))

    def follow(self, first: int, frozen: Seen, *, suspected: bool) -> None:
        """Keep what the frozen model made of a whole batch that begins with row number ``first``, for its labels."""
        assert frozen.features is not None
        self._recent.put(first, frozen.outputs, frozen.features)
        self._tried = 0 if suspected and not self._suspected else min(self._tried + len(frozen.at), TRIED_ROWS)
        self._suspected = suspected

    def learn(self, x: Tensor, y: Tensor, numbers: I64 | None) -> None:
        """Learn labels y (B,); x (B, *input_shape) is only run again where the rows are not remembered any more."""
        known = None if numbers is None else self._recent.take(numbers)
        if known is None:
            self._memory.learn(x, y)
        else:
            self._memory.remember(*known, y)

    def state(self) -> dict[str, Any]:
        """Return a copy of all that changes."""
        return {
            "memory": self._memory.state_dict(),
            "recent": self._recent.state(),
            "tried": self._tried,
            "suspected": self._suspected,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self._memory.load_state_dict(state["memory"])
        self._recent.load(state["recent"], self._memory.device)
        self._tried, self._suspected = int(state["tried"]), bool(state["suspected"])
