"""What each way of answering would have answered lately, and what late labels say of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.fast.core.contest import Contest

F32 = NDArray[np.float32]

WINDOW_ROWS = 16_384
"""Newest rows whose labels may still count."""
ARMS = ("frozen", "aligned", "base", "runs", "chosen", "memory")
"""The frozen model; its aligned copy; the one of the two that served; that with the prior of runs; what was chosen of
all before; the memory of errors."""
CONTESTS = {"aligned": "frozen", "runs": "base", "memory": "chosen"}
"""Each arm, and the answer without it."""
LOST = 4.0
"""Squared error, in units of the source's, that counts as a lost row of a regression."""


class Arms:
    """Predictions of the latest rows by arm, and a contest of each arm against the answer without it."""

    def __init__(self, *, classes: bool, scale: float) -> None:
        """``scale`` is the source's mean squared error in regression."""
        self._classes, self._scale = classes, scale
        self._answers: dict[str, F32] = {name: np.full(WINDOW_ROWS, np.nan, np.float32) for name in ARMS}
        self._end = 0
        """Rows counted so far."""
        self.contests = {name: Contest() for name in CONTESTS}

    def predicted(self, first: int, answers: dict[str, F32]) -> None:
        """Remember predictions (B,) by arm, of rows that begin with number ``first``; NaN where an arm did not run."""
        count = len(answers["base"])
        kept = min(count, WINDOW_ROWS)
        places = np.arange(first + count - kept, first + count) % WINDOW_ROWS
        for name, ring in self._answers.items():
            ring[places] = answers[name][-kept:] if name in answers else np.nan
        self._end = first + count

    def weigh(self, numbers: NDArray[np.int64], y: NDArray[Any], design_effect: float) -> None:
        """Take in labels (n,) of rows by their numbers; rows that have left the window say nothing."""
        kept = (numbers >= 0) & (numbers < self._end) & (numbers >= self._end - WINDOW_ROWS)
        numbers, y = numbers[kept], y[kept]
        places = numbers % WINDOW_ROWS
        loss = {name: self._loss(ring[places], y) for name, ring in self._answers.items()}
        for arm, without in CONTESTS.items():
            self.contests[arm].update(numbers, loss[without] - loss[arm], design_effect)

    def _loss(self, answers: F32, y: NDArray[Any]) -> NDArray[np.float64]:
        known = np.isfinite(answers)
        if self._classes:
            lost = (answers != y).astype(np.float64)
        else:
            lost = np.minimum(np.square(answers.astype(np.float64) - y) / (LOST * self._scale), 1.0)
        return np.where(known, lost, np.nan)

    def forget(self, arm: str) -> None:
        """What was learnt about an arm is void: it begins anew."""
        self.contests[arm] = Contest()
        self._answers[arm][:] = np.nan

    def state(self) -> dict[str, Any]:
        """Return a copy of all that changes."""
        kept = min(self._end, WINDOW_ROWS)
        places = np.arange(self._end - kept, self._end) % WINDOW_ROWS
        return {
            "end": self._end,
            "answers": {name: ring[places] for name, ring in self._answers.items()},
            "contests": {name: contest.state() for name, contest in self.contests.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self._end = int(state["end"])
        kept = min(self._end, WINDOW_ROWS)
        places = np.arange(self._end - kept, self._end) % WINDOW_ROWS
        for name, ring in self._answers.items():
            answers = np.asarray(state["answers"][name], np.float32)
            if answers.shape != (kept,):
                raise ValueError(f"{answers.shape} answers of {name}, not ({kept},)")
            ring[:] = np.nan
            ring[places] = answers
        for name, contest in self.contests.items():
            contest.load(state["contests"][name])
