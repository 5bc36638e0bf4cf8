"""Whether to learn at all: what a burst may be expected to win back, against what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

HOPE = 0.5
"""Share of what the error is above the source's that a first burst is expected to win back."""
FADING = 0.5
"""What a fruitless try leaves of the hope."""
LATER, LATEST = 1.5, 8.0
"""By how much longer each fruitless look lets the next one wait, and by how much at the most."""
RISEN = 0.05
"""Rise of the error that ends the waiting."""
PASSES = 3.0
"""Forward passes that a row of a gradient step costs: one forward, two backward."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What was expected of a burst, in loss per row: error rate, or share of the target's variance."""

    expected: float
    needed: float

    @property
    def pays(self) -> bool:
        """Whether the burst is worth its price."""
        return self.expected > self.needed

    @property
    def said(self) -> str:
        """The comparison in words."""
        pays = "a burst pays" if self.pays else "a burst would not pay"
        return f"{pays}: {self.expected:.4f} of error to be expected, {self.needed:.4f} needed for its cost"


class Worth:
    """Predicts the gain of a burst from the error now, the error when one was last tried, and what came of that.

        expected = hope·(error − source's)  +  (error − error at the last try)₊
        needed   = price · forward passes of a burst / rows served since the last try

    The first term is what is left to win, with a hope that each fruitless try halves and each promotion restores; the
    second is a shift since the last try, which the last try says nothing about. Cost is in forward passes for each row
    served, and the price says how much error one of them has to win back, so that fast streams learn
    more often than slow ones only if it pays, and a fruitless slow loop fades out by itself. In the manner of the
    first-session measures and learning curves of J. Hestness et al., arXiv 1712.00409, with no curve fitted: a
    handful of tries is all there ever is.
    """

    def __init__(self, price: float, source_error: float) -> None:
        self.price = price
        self.source_error = source_error
        """Mean loss on held-out source rows: what there is to come back to."""
        self.reset()

    def reset(self) -> None:
        """Nothing was tried yet."""
        self._hope = HOPE
        self._error_then = self._looked = math.nan
        self._rows = 0
        self.patience = 1.0
        """By how much longer than usual the next look should wait while the error stays as it is."""

    def served(self, rows: int) -> None:
        """Count answered rows."""
        self._rows += rows

    def estimate(self, error: float, step_rows: int) -> Estimate:
        """What a burst of ``step_rows`` rows in gradient steps promises while the served error is ``error``."""
        needed = self.price * PASSES * step_rows / max(self._rows, 1)
        if not math.isfinite(error):
            return Estimate(0.0, needed)
        above = max(0.0, error - self.source_error)
        shifted = max(0.0, error - self._error_then) if math.isfinite(self._error_then) else 0.0
        return Estimate(min(above, self._hope * above + shifted), needed)

    def wait(self, error: float) -> float:
        """By how much longer than usual to wait for the next look while the served error is ``error``."""
        return 1.0 if error - self._looked > RISEN else self.patience

    def tried(self, error: float, *, promoted: bool, burst: bool) -> None:
        """A look that began at ``error`` has ended; ``burst``: not only what costs next to nothing was tried."""
        self.patience = 1.0 if promoted else min(LATER * self.wait(error), LATEST)
        self._looked = error
        if promoted:
            self._hope = HOPE
        elif burst:
            self._hope *= FADING
        if promoted or burst:
            self._error_then, self._rows = error, 0

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "hope": self._hope,
            "error_then": self._error_then,
            "looked": self._looked,
            "rows": self._rows,
            "patience": self.patience,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self._hope, self._error_then = float(state["hope"]), float(state["error_then"])
        self._looked = float(state["looked"])
        self._rows, self.patience = int(state["rows"]), float(state["patience"])
