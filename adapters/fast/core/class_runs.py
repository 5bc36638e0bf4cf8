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
_BLOCK = 64
"""Rows at once; what does not depend on the row before is computed for all of them."""
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
        likeliest, runs = len(LIKELIEST_ROWS), len(SWITCHING)
        self._calm = 1 + len(FOLLOWING_ROWS) + likeliest
        """How many hypotheses are without runs; those with them come last."""
        ends = np.array(SWITCHING)
        # Of those that need the posterior, row by row: π ← keep·π + take·posterior + back·m + flat
        self._take = np.r_[0.999 / np.array(LIKELIEST_ROWS), 1.0 - ends][:, None]
        self._keep = np.r_[0.999 * (1.0 - 1.0 / np.array(LIKELIEST_ROWS)), np.zeros(runs)][:, None]
        self._back = np.r_[np.zeros(likeliest), ends][:, None]
        self._flat = np.r_[np.full(likeliest, 0.001), np.zeros(runs)][:, None] / len(prior_K)
        self._first = np.r_[
            np.full(self._calm, (1.0 - PRIOR_OF_RUNS) / self._calm), np.full(runs, PRIOR_OF_RUNS / runs)
        ]
        self.restart()

    def restart(self) -> None:
        """Forget everything: another model answers from now on, or another regime began."""
        self._pi = np.tile(self._source, (len(self._first), 1))
        self._weights = self._first.copy()
        self._solved = np.zeros((1 + len(FOLLOWING_ROWS), 1 + len(self._source)))
        """By mean: running product and sum since the block's beginning."""
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
        rows = np.flatnonzero(np.isfinite(p_BK).all(1))
        while len(rows):
            # Blocks are counted over the stream: how the rows are cut into calls must not change a bit.
            block, rows = np.split(rows, [_BLOCK - self._rows % _BLOCK])
            ratios[block] = self._block((p_BK[block] + _BLUR / p_BK.shape[1]) / (1.0 + _BLUR))
        return ratios

    def _block(self, p_TK: F64) -> F64:
        count = 1 + len(FOLLOWING_ROWS)
        followed_CTK = self._follow(p_TK)
        base_TK = np.maximum(followed_CTK[0, :-1], _LEAST)
        likelihood_TK = p_TK / base_TK
        pi_THK = np.empty((len(p_TK) + 1, len(self._first) - count, p_TK.shape[1]))
        pi_THK[0] = self._pi[count:]
        explained_TH = np.empty(pi_THK.shape[:2])[1:]
        self._posteriors(pi_THK, likelihood_TK, followed_CTK[0, 1:], explained_TH)
        explained_TC = (followed_CTK[:, :-1] * likelihood_TK).sum(2).T
        explained_TR = np.concatenate((explained_TC, explained_TH), axis=1)
        weights_TR = self._weigh(explained_TR)
        runs = slice(self._calm, None)
        of_runs_T = weights_TR[:-1, runs].sum(1)
        sure = (of_runs_T >= SURE) & (self._rows + np.arange(len(p_TK)) >= LEAST_ROWS)
        ratios = np.zeros_like(p_TK)
        if sure.any():
            share_TR = weights_TR[:-1, runs][sure] / of_runs_T[sure, None]
            prior_TK = (share_TR[:, :, None] * pi_THK[:-1][sure, self._calm - count :]).sum(1)
            ratios[sure] = np.log(prior_TK) - np.log(base_TK[sure])
        self._pi = np.concatenate((followed_CTK[:, -1], pi_THK[-1]))
        self._weights = weights_TR[-1]
        self._rows += len(p_TK)
        return ratios

    def _follow(self, p_TK: F64) -> F64:
        """(1 + len(FOLLOWING_ROWS), T + 1, K): the mean prediction and those of short memory, before and after."""
        warming_T = 1.0 / (self._rows + START_ROWS + np.arange(1, len(p_TK) + 1))
        rates_CT = np.maximum(warming_T, 1.0 / np.array((BASE_ROWS, *FOLLOWING_ROWS))[:, None])
        before_CK = self._pi[: len(rates_CT)]
        if self._rows % _BLOCK == 0:
            self._solved = np.concatenate((np.ones((len(rates_CT), 1)), before_CK), axis=1)
        # mₜ = mₜ₋₁ + rₜ·(pₜ − mₜ₋₁), solved: mₜ = Dₜ·(m₀ + Σ rᵢ·pᵢ/Dᵢ) with D the running product of 1 − r, both
        # from the block's beginning on.
        decay_CT = np.cumprod(np.concatenate((self._solved[:, :1], 1.0 - rates_CT), axis=1), axis=1)
        terms_CTK = (rates_CT / decay_CT[:, 1:])[:, :, None] * p_TK
        sums_CTK = np.cumsum(np.concatenate((self._solved[:, None, 1:], terms_CTK), axis=1), axis=1)
        self._solved = np.concatenate((decay_CT[:, -1:], sums_CTK[:, -1]), axis=1)
        return np.concatenate((before_CK[:, None], decay_CT[:, 1:, None] * sums_CTK[:, 1:]), axis=1)

    def _posteriors(self, pi_THK: F64, likelihood_TK: F64, mean_TK: F64, explained_TH: F64) -> None:
        """Fill in π after each row, and each row's likelihood: the one part that has to go row by row."""
        back_THK = self._back * mean_TK[:, None] + self._flat
        keep_HK = np.repeat(self._keep, likelihood_TK.shape[1], axis=1)
        change_HK, scale_H = np.empty_like(pi_THK[0]), np.empty(len(self._take))
        scale_H1, take_H = scale_H[:, None], self._take[:, 0]
        steps = zip(pi_THK[:-1], pi_THK[1:], likelihood_TK, likelihood_TK[:, None], back_THK, explained_TH, strict=True)
        for pi, after, likelihood, across, back, explained in steps:
            # Calls with positional results: a row is ten calls on tiny arrays, so their overhead is all of its cost.
            pi.dot(likelihood, explained)
            np.divide(take_H, explained, scale_H)
            scale_H1.dot(across, change_HK)
            np.add(change_HK, keep_HK, change_HK)
            np.multiply(change_HK, pi, change_HK)
            np.add(change_HK, back, after)

    def _weigh(self, explained_TR: F64) -> F64:
        """(T + 1, R) probabilities of the hypotheses before each row and after the last."""
        weights_TR = np.empty((len(explained_TR) + 1, len(self._first)))
        weights_TR[0] = self._weights
        share = CHANGE * self._first
        for weights, after, explained in zip(weights_TR[:-1], weights_TR[1:], explained_TR, strict=True):
            np.multiply(weights, explained, after)
            np.multiply(after, (1.0 - CHANGE) / weights.dot(explained), after)
            np.add(after, share, after)
        return weights_TR

    def state(self) -> dict[str, Any]:
        """Return a copy of all that `update` changes."""
        parts = {"pi": self._pi.copy(), "weights": self._weights.copy(), "solved": self._solved.copy()}
        return {**parts, "rows": self._rows}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave; ValueError when it was of other classes or hypotheses."""
        pi, weights, solved = (np.array(state[name], np.float64) for name in ("pi", "weights", "solved"))
        if pi.shape != self._pi.shape or weights.shape != self._weights.shape:
            raise ValueError(f"runs of {pi.shape[-1]} classes and {len(pi)} hypotheses, not {self._pi.shape[::-1]}")
        self._pi, self._weights, self._solved, self._rows = pi, weights, solved, int(state["rows"])
