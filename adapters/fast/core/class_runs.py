"""Runs of classes: what the rows before say about the class of the next one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

SWITCHING = (0.005, 0.02, 0.08, 0.3)
"""Chances, from row to row, that a run ends."""
FOLLOWING_ROWS = (25.0, 100.0)
"""Memories, in rows, of the hypotheses that the shares of the classes only change slowly."""
LIKELIEST_ROWS = (10.0, 30.0, 100.0, 300.0)
"""The same with the likeliest shares instead of the mean prediction."""
BASE_ROWS = 200.0
"""Memory of the mean prediction against which all are measured; it begins with ``START_ROWS`` of the source's prior."""
START_ROWS = 20.0
PRIOR_OF_RUNS = 0.01
"""Probability of runs before the first row."""
CHANGE = 1 / 2000
"""Chance, from row to row, that another hypothesis holds from now on."""
SURE = 0.95
"""Probability of runs above which the next row's answer makes use of them."""
MOST_CLASSES = 256
"""Classes beyond which a row would cost more than tens of microseconds: runs are then not looked for."""
LEAST_ROWS = 64
"""Rows before the mean prediction is known well enough."""
_BLUR = 1e-3
_LEAST = 1e-3


class ClassRuns:
    """Bayesian test for runs of classes in a stream of predictions, and the prior that they give for the next row.

    With m the mean prediction over the latest rows, p(y | x) / m(y) stands for the likelihood of class y, so that a
    model that prefers a class is not taken for a run of it. Hypotheses, each with its own prior π for the next row:

        no runs      π = m;  a mean prediction of short memory;  or the shares that are likeliest (EM) in that memory
        runs         π = (1 − ε)·posterior of the row before + ε·m,    a hidden Markov chain, ε of ``SWITCHING``

    Their weights are the likelihoods Π Σ_y π(y)·p(y | x)/m(y), with a small chance of a change from row to row (M.
    Herbster and M. Warmuth, "Tracking the best expert", 1998). What only moves slowly, as a biased model's answers do
    after a shift, is explained as well without runs: only classes that stay for a while and then change are evidence.

    While runs have a probability of at least ``SURE``, `update` gives log π − log m of the next rows, else zeros.
    """

    def __init__(self, prior_K: F64) -> None:
        """Begin with the class prior of the source, (K,)."""
        self._source = prior_K / prior_K.sum()
        slow, likeliest, runs = len(FOLLOWING_ROWS), len(LIKELIEST_ROWS), len(SWITCHING)
        self._calm = 1 + slow + likeliest
        """How many hypotheses are without runs; those with them come last."""
        ends = np.array(SWITCHING)
        # π ← keep·π + take·posterior + follow·p + back·m
        self._take = np.r_[np.zeros(1 + slow), 0.999 / np.array(LIKELIEST_ROWS), 1.0 - ends][:, None]
        self._keep = np.r_[0.0, np.zeros(slow), 0.999 * (1.0 - 1.0 / np.array(LIKELIEST_ROWS)), np.zeros(runs)][:, None]
        self._back = np.r_[1.0, np.zeros(slow), np.zeros(likeliest), ends][:, None]
        self._flat = np.r_[np.zeros(1 + slow), np.full(likeliest, 0.001), np.zeros(runs)][:, None] / len(prior_K)
        self._first = np.r_[
            np.full(self._calm, (1.0 - PRIOR_OF_RUNS) / self._calm), np.full(runs, PRIOR_OF_RUNS / runs)
        ]
        self.restart()

    def restart(self) -> None:
        """Forget everything: another model answers from now on, or another regime began."""
        self._m = self._source.copy()
        self._pi = np.tile(self._source, (len(self._first), 1))
        self._weights = self._first.copy()
        self._rows = 0

    @property
    def probability(self) -> float:
        """Of runs, now."""
        return float(self._weights[self._calm :].sum())

    def update(self, p_BK: F64) -> F64:
        """Take in predictions (B, K) in their order; returns (B, K) log ratios to add to each row's log p.

        A row's ratio depends on the rows before it only. Rows that are not finite are passed over.
        """
        ratios = np.zeros_like(p_BK)
        finite = np.isfinite(p_BK).all(1)
        p_BK = (p_BK + _BLUR / p_BK.shape[1]) / (1.0 + _BLUR)
        slow = slice(1, 1 + len(FOLLOWING_ROWS))
        rates = 1.0 / np.array(FOLLOWING_ROWS)[:, None]
        pi, weights, m, runs = self._pi, self._weights, self._m, self._calm
        for row in np.flatnonzero(finite):
            p = p_BK[row]
            base = np.maximum(m, _LEAST)
            of_runs = weights[runs:]
            sure = of_runs.sum()
            if sure >= SURE and self._rows >= LEAST_ROWS:
                ratios[row] = np.log(of_runs @ pi[runs:] / sure) - np.log(base)
            posterior = pi * (p / base)
            likelihood = posterior.sum(1)
            weights = weights * likelihood
            weights = (1.0 - CHANGE) / weights.sum() * weights + CHANGE * self._first
            posterior /= likelihood[:, None]
            self._rows += 1
            rate = max(1.0 / (self._rows + START_ROWS), 1.0 / BASE_ROWS)
            m = m + rate * (p - m)
            followed = pi[slow] + np.maximum(rates, rate) * (p - pi[slow])
            pi = self._keep * pi + self._take * posterior + self._back * m + self._flat
            pi[slow] = followed
        self._pi, self._weights, self._m = pi, weights, m
        return ratios

    def state(self) -> dict[str, Any]:
        """Return a copy of all that `update` changes."""
        parts = {"m": self._m.copy(), "pi": self._pi.copy(), "weights": self._weights.copy()}
        return {**parts, "rows": self._rows}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave; ValueError when it was of other classes or hypotheses."""
        m, pi, weights = (np.array(state[name], np.float64) for name in ("m", "pi", "weights"))
        if m.shape != self._m.shape or pi.shape != self._pi.shape or weights.shape != self._weights.shape:
            raise ValueError(f"runs of {m.shape} classes and {len(pi)} hypotheses, not {self._pi.shape[::-1]}")
        self._m, self._pi, self._weights, self._rows = m, pi, weights, int(state["rows"])
