"""The aligned copy of a model as one that may serve: when it runs, with which memory, and whether it is better."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.fast.core.aligned import AlignedModel
from adapters.fast.core.class_distance import NearerToSource
from adapters.reference import Reference

OPEN_ROWS = 512
"""Rows that it sees in full once a shift is suspected; then it is sampled until it serves."""
OUTLIER, FAR = 10.0, 8.0
"""An input is an outlier if its mean distance from the source's mean, in deviations, is above ``OUTLIER`` and above
``FAR`` times the usual one."""
USUAL_ROWS = 256
REFRESH_ROWS = 256
"""Rows for which one shift is not taken for another."""
DEFF_POWER = 0.75
"""How the memory in rows grows with the design effect: labels that come in runs are worth fewer rows, and a memory as
much longer would be too slow for the shift."""


class AlignedArm:
    """Runs an `AlignedModel` while a shift is suspected and compares its features with the frozen model's.

    Args:
        model: the aligned copy.
        reference: of the source.
        memory_rows, most_rows, source_rows: see `adapters.fast.auto.Auto`.
    """

    def __init__(
        self, model: AlignedModel, reference: Reference, memory_rows: float, most_rows: float, source_rows: float
    ) -> None:
        self.model = model
        self.nearer = NearerToSource()
        self._memory, self._most, self._source = memory_rows, most_rows, source_rows
        scale = reference.input_var.clamp_min(0).sqrt()
        floor = torch.maximum(scale.mean() * 1e-3, reference.input_mean.abs() * 1e-6).clamp_min(1e-6)
        self._input_mean, self._input_inverse = reference.input_mean, torch.maximum(scale, floor).reciprocal()
        self._clear()

    def _clear(self) -> None:
        self.open = False
        """Whether it runs at all."""
        self.fine = True
        """Whether what `run` gave last was finite; else it has stopped, from nothing."""
        self._open_rows = 0
        self._rows = 0.0
        self._usual: float | None = None

    @property
    def settled(self) -> bool:
        """Whether it has had its time to show something since it was opened."""
        return self._open_rows >= OPEN_ROWS

    def refresh(self) -> None:
        """Another shift: what was seen so far does not count against it."""
        if self._open_rows > REFRESH_ROWS:
            self._open_rows = 0
            self.nearer.restart()

    def close(self) -> None:
        """Stop, and go back to the source's moments."""
        self.model.reset()
        self.nearer.restart()
        self._clear()

    def outliers(self, x: Tensor) -> NDArray[np.bool_]:
        """(B,) which rows are too far from all others to be taken into a mean. Updates what is usual."""
        z = (x.flatten(1).float() - self._input_mean).mul_(self._input_inverse).abs_().mean(1).cpu().numpy()
        z = np.nan_to_num(z.astype(np.float64), nan=np.inf)
        usual = float(np.median(z)) if self._usual is None else self._usual
        far = z > max(OUTLIER, FAR * usual)
        # Geometric: one wild row moves it little, a shift of all rows within a batch or a few.
        now = float(np.median(z[np.isfinite(z)])) if np.isfinite(z).any() else usual
        share = -math.expm1(-len(z) / USUAL_ROWS)
        self._usual = math.exp((1 - share) * math.log(max(usual, 1e-6)) + share * math.log(max(now, 1e-6)))
        return far

    def run(self, x: Tensor, design_effect: float) -> tuple[Tensor, Tensor | None]:
        """Outputs and features of x (B, *input_shape), which are taken into the moments if they are finite."""
        memory = min(self._memory * design_effect**DEFF_POWER, self._most)
        rows = self._rows + len(x)
        weight = -math.expm1(-len(x) / min(memory, rows + self._source * design_effect))
        outputs = self.model(x, weight)
        features = self.model.features
        self.fine = bool(outputs.isfinite().all()) and self.model.keep()
        if self.fine:
            self._rows = rows
        else:
            self.close()
            self.fine = False
        return outputs, features

    def passed(self, rows: int) -> None:
        """Count rows of the stream, seen or not."""
        self._open_rows = min(self._open_rows + rows, OPEN_ROWS) if self.open else 0

    def state(self) -> dict[str, Any]:
        """Return a copy of all that changes."""
        return {
            "model": self.model.state(),
            "nearer": self.nearer.state(),
            "open": self.open,
            "open_rows": self._open_rows,
            "rows": self._rows,
            "usual": self._usual,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self.model.load(state["model"])
        self.nearer.load(state["nearer"])
        self.open, self._open_rows = bool(state["open"]), int(state["open_rows"])
        self._rows = float(state["rows"])
        self._usual = None if state["usual"] is None else float(state["usual"])
