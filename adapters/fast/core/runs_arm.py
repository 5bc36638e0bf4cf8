"""Runs of classes as something that may serve: when they are looked for, and whether what is seen can be believed."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from adapters.fast.core.class_distance import ClassDistance
from adapters.fast.core.class_runs import ClassRuns
from adapters.fast.core.dependence import RowDependence
from adapters.fast.core.seen import F32, F64

LOOK_FROM, LOOK_UNTIL = 2.0, 1.3
"""Design effect of the predictions from which on runs are looked for, and under which no longer: without runs all of
this is left out."""
WITHIN_REACH = 1.2
"""Mean class distance, in multiples of the source's, up to which predictions are good enough to see runs in them."""
MOST_DEPENDENT = 0.2
"""Autocorrelation of rows within their class from which on neighbours are no separate witnesses of it."""


class RunsArm:
    """`ClassRuns` where classes seem to come in runs, believed where predictions are good and rows independent."""

    def __init__(self, prior_K: F64, distance: ClassDistance) -> None:
        self._runs = ClassRuns(prior_K)
        self._distance = distance
        self._dependence = RowDependence()
        self.looking = False
        """Whether `ratios` is to be asked."""

    def restart(self) -> None:
        """Another model answers from now on."""
        self._runs.restart()
        self._dependence.restart()
        self.looking = False

    def ratios(self, p_BK: F64, features_BD: Tensor | None, answers_B: F32) -> F64:
        """(B, K) log ratios to add to each row's log p, by the rows before it; takes the rows in."""
        if features_BD is not None:
            z_BD = self._distance.residuals(features_BD, answers_B)
            self._dependence.update(z_BD.cpu().numpy().astype(np.float32), answers_B)
        if self._dependence.value > MOST_DEPENDENT:
            # Nothing that could be seen would be believed: a measured series need not pay for the search.
            self._runs.restart()
            return np.zeros_like(p_BK)
        return self._runs.update(p_BK)

    def believed(self, level: float) -> bool:
        """Whether the ratios may serve, with ``level`` the mean class distance of the model that they correct."""
        return level <= WITHIN_REACH * self._distance.level and self._dependence.value <= MOST_DEPENDENT

    def look(self, design_effect: float) -> None:
        """Begin or stop, by how many rows the predictions of one independent row are spread over."""
        looking = design_effect >= (LOOK_UNTIL if self.looking else LOOK_FROM)
        if self.looking and not looking:
            self.restart()
        self.looking = looking

    def state(self) -> dict[str, Any]:
        """Return a copy of all that changes."""
        return {"runs": self._runs.state(), "dependence": self._dependence.state(), "looking": self.looking}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self._runs.load(state["runs"])
        self._dependence.load(state["dependence"])
        self.looking = bool(state["looking"])
