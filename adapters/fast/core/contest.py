"""Which of two answers is the better one: by late labels, at any time one looks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.evidence import HarmEvidence

LEVEL = 0.05
"""Chance that an arm that is no better is ever taken for better, and the other way round."""
LEAST_LEVEL = 1e-6
"""Where that ends after many refutations."""


class Contest:
    """One arm against the one that serves without it, on the rows whose labels have come.

    Two anytime-valid tests (:class:`adapters.evidence.HarmEvidence`), of "no better" and of "no worse". Rows that stand
    closer together in the stream than its design effect, where classes come in runs, count as one observation. What
    was shown to be better and then to be worse has to show more the next time.
    """

    def __init__(self) -> None:
        self.verdict = 0
        """1: shown to be better; -1: shown to be worse; 0: neither."""
        self._bar = -math.log(LEVEL)
        self._restart()

    def _restart(self) -> None:
        self._better, self._worse = HarmEvidence(), HarmEvidence()
        self._first, self._total, self._count = 0, 0.0, 0

    def update(self, numbers: NDArray[np.int64], benefit: NDArray[np.float64], design_effect: float = 1.0) -> None:
        """Take in by how much less the arm lost on labelled rows (n,), in [-1, 1]; NaN: one of the two is unknown.

        ``numbers`` (n,) say where in the stream the rows were.
        """
        known = np.isfinite(benefit)
        means = []
        for number, value in zip(numbers[known].tolist(), benefit[known].tolist(), strict=True):
            if self._count and abs(number - self._first) >= design_effect:
                means.append(self._total / self._count)
                self._count = 0
            if not self._count:
                self._first, self._total = number, 0.0
            self._total += value
            self._count += 1
        observed = np.asarray(means)
        self._better.update(observed)
        self._worse.update(-observed)
        if self.verdict >= 0 and self._worse.log_peak >= self._bar:
            if self.verdict > 0:
                self._bar = min(self._bar + math.log(2), -math.log(LEAST_LEVEL))
            self.verdict = -1
            self._restart()
        elif self.verdict <= 0 and self._better.log_peak >= self._bar:
            self.verdict = 1
            self._restart()

    def state(self) -> dict[str, Any]:
        """Return a copy of all that `update` changes."""
        return {
            "verdict": self.verdict,
            "bar": self._bar,
            "better": self._better.state_dict(),
            "worse": self._worse.state_dict(),
            "first": self._first,
            "total": self._total,
            "count": self._count,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self.verdict, self._bar = int(state["verdict"]), float(state["bar"])
        self._better.load_state_dict(state["better"])
        self._worse.load_state_dict(state["worse"])
        self._first, self._total, self._count = int(state["first"]), float(state["total"]), int(state["count"])
