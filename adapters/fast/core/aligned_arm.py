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
USUAL_ROWS, LEAST_ROWS = 256, 8
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
        self._usual, self._usual_rows = 0.0, 0
        """Logarithm of the usual distance, at the source about 1, and the rows behind it."""

    @property
    def settled(self) -> bool:
        """Whether it has had its time to show something since it was opened."""
        return self._open_rows >= OPEN_ROWS

    def refresh(self) -> bool:
        """Another shift: what was seen so far does not count against it; False so soon after the one before."""
        if self._open_rows <= REFRESH_ROWS:
            return False
        self._open_rows = 0
        self.nearer.restart()
        return True

    def close(self) -> None:
        """Stop, and go back to the source's moments."""
        self.model.reset()
        self.nearer.restart()
        self._clear()

    def outliers(self, x: Tensor) -> NDArray[np.bool_]:
        """(B,) which rows are too far from all others to be taken into a mean. Updates what is usual."""
        z = (x.flatten(1).float() - self._input_mean).mul_(self._input_inverse).abs_().mean(1).cpu().numpy()
        z = np.nan_to_num(z.astype(np.float64), nan=np.inf)
        log_z = np.log(np.maximum(z[np.isfinite(z)], 1e-6))
        now = float(np.median(log_z)) if len(log_z) else 0.0
        # Enough rows at once say by themselves what is usual, whatever the shift; of a few one may be the outlier.
        usual = max(self._usual, now) if len(log_z) >= LEAST_ROWS else self._usual
        far = z > max(OUTLIER, FAR * math.exp(usual))
        # Geometric, so that one wild row moves it little.
        share = max(len(z) / (self._usual_rows + len(z) + 1.0), -math.expm1(-len(z) / USUAL_ROWS))
        self._usual += share * (now - self._usual)
        self._usual_rows = min(self._usual_rows + len(z), USUAL_ROWS)
        return far

    def run(self, x: Tensor, design_effect: float) -> tuple[Tensor, Tensor | None]:
        """Outputs and features of x (B, *input_shape), which are taken into the moments if they are finite."""
        memory = min(self._memory * design_effect**DEFF_POWER, self._most)
        rows = self._rows + len(x)
        start = rows + self._source * design_effect
        weight = max(len(x) / start, -math.expm1(-len(x) / memory))
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
            "usual_rows": self._usual_rows,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self.model.load(state["model"])
        self.nearer.load(state["nearer"])
        self.open, self._open_rows = bool(state["open"]), int(state["open_rows"])
        self._rows = float(state["rows"])
        self._usual, self._usual_rows = float(state["usual"]), int(state["usual_rows"])
