"""How many independent rows the rows of a stream are worth: few where classes come in runs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

BLOCK_ROWS = 32
MEMORY_BLOCKS = 16
"""Memory of the estimate, in blocks."""
LEAST_BLOCKS = 4
"""Blocks before there is one."""


class EffectiveRows:
    """Design effect of the model's predictions: rows of a block per independent one (L. Kish, Survey Sampling, 1965).

        deff = n·Var(mean of n rows) / Var(a row),    n = ``BLOCK_ROWS``, between 1 (independent) and n (one run)

    Both variances are summed over the classes. That of block means is half the mean square of the step from one block
    to the next, so that a slow change of the whole stream is not taken for runs of classes.
    """

    def __init__(self, width: int) -> None:
        """Expect rows (B, ``width``) of probabilities, or of values."""
        self._held = np.zeros((0, width))
        self._last: F64 | None = None
        self._between = self._rows = 0.0
        self._blocks = 0
        self.value = 1.0
        """The design effect now; 1 before there are a few blocks."""

    def update(self, p_BK: F64) -> None:
        """Take in the next rows; how they are cut into calls does not matter. Those not finite are left out."""
        p_BK = p_BK[np.isfinite(p_BK).all(1)]
        held = np.concatenate([self._held, p_BK]) if len(self._held) else p_BK
        whole = len(held) // BLOCK_ROWS * BLOCK_ROWS
        blocks = held[:whole].reshape(-1, BLOCK_ROWS, held.shape[1])
        means = blocks.mean(1)
        # Rows about a point m' are their variance and the distance of their mean from it: |mean − last|²/4 here.
        variances = np.einsum("nbk,nbk->n", blocks, blocks) / BLOCK_ROWS - np.einsum("nk,nk->n", means, means)
        if whole:
            steps = np.diff(means, axis=0, prepend=means[:1] if self._last is None else self._last[None])
            aparts = np.einsum("nk,nk->n", steps, steps)
            for apart, variance in zip(aparts.tolist(), variances.tolist(), strict=True):
                self._block(apart, max(variance, 0.0))
            self._last = means[-1].copy()
        self._held = held[whole:].copy()

    def _block(self, apart: float, variance: float) -> None:
        if self._blocks:
            keep = 1.0 - 1.0 / min(self._blocks, MEMORY_BLOCKS)
            self._between = keep * self._between + (1.0 - keep) * apart / 2
            self._rows = keep * self._rows + (1.0 - keep) * (variance + apart / 4)
            if self._blocks >= LEAST_BLOCKS:
                value = BLOCK_ROWS * self._between / max(self._rows, 1e-12)
                self.value = min(max(value, 1.0), float(BLOCK_ROWS))
        self._blocks += 1

    def state(self) -> dict[str, Any]:
        """Return a copy of all that `update` changes."""
        return {
            "held": self._held.copy(),
            "last": None if self._last is None else self._last.copy(),
            "between": self._between,
            "rows": self._rows,
            "blocks": self._blocks,
            "value": self.value,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave; ValueError when it was of rows of another width."""
        held = np.array(state["held"], np.float64)
        if held.ndim != 2 or held.shape[1] != self._held.shape[1]:
            raise ValueError(f"rows of shape {held.shape}, not (n, {self._held.shape[1]})")
        self._held = held
        self._last = None if state["last"] is None else np.array(state["last"], np.float64)
        self._between, self._rows = float(state["between"]), float(state["rows"])
        self._blocks, self.value = int(state["blocks"]), float(state["value"])
