"""Which of two answers is the better one: by late labels, at any time one looks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.evidence import HarmEvidence
from adapters.runs import Runs

LEVEL = 0.05
"""Chance that an arm that is no better is ever taken for better, and the other way round."""
LEAST_LEVEL = 1e-6
"""Where that ends after many refutations."""


class Contest:
    """One arm against the one that serves without it, on the rows whose labels have come.

    Two anytime-valid tests (:class:`adapters.evidence.HarmEvidence`), of "no better" and of "no worse"; a run of one
    class counts as one observation. What was shown to be better and then to be worse has to show more the next time.
    """

    def __init__(self) -> None:
        self.verdict = 0
        """1: shown to be better; -1: shown to be worse; 0: neither."""
        self._bar = -math.log(LEVEL)
        self._restart()

    def _restart(self) -> None:
        self._better, self._worse, self._runs = HarmEvidence(), HarmEvidence(), Runs()
        self._held: list[float] = []

    def update(self, y: NDArray[Any], benefit: NDArray[np.float64], design_effect: float = 1.0) -> None:
        """Take in (n,) labels and by how much less the arm lost on them, in [-1, 1]; NaN: one of the two is unknown.

        ``design_effect`` runs are put together into one observation: short runs of the same few classes are alike too.
        """
        known = np.isfinite(benefit)
        self._held += self._runs.means(y[known], benefit[known]).tolist()
        size = max(1, round(design_effect))
        whole = len(self._held) // size * size
        means = np.asarray(self._held[:whole]).reshape(-1, size).mean(1) if whole else np.zeros(0)
        self._held = self._held[whole:]
        self._better.update(means)
        self._worse.update(-means)
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
            "runs": self._runs.state_dict(),
            "held": list(self._held),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self.verdict, self._bar = int(state["verdict"]), float(state["bar"])
        self._better.load_state_dict(state["better"])
        self._worse.load_state_dict(state["worse"])
        self._runs.load_state_dict(state["runs"])
        self._held = [float(value) for value in state["held"]]
