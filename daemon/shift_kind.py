"""Which shift is it: of the inputs, of the classes' shares, or of what the inputs mean.

A model sees P(x) change (covariate shift), P(y) change while each class looks as ever (label shift), or P(y | x) change
while the inputs look as ever (concept drift), which only labels can show. J. Moreno-Torres et al., "A unifying view on
dataset shift in classification", Pattern Recognition 45, 2012.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

KIND_ROWS = 512
"""Rows for which an alarm speaks for the kind of the shift."""
QUIET_ROWS = 2_048
"""Rows without an alarm after which the shift counts as over."""
LIKELY = 0.5
"""Share of its threshold that the statistic of another detector must have to speak before it alarms."""
_WITHIN_CLASS = ("class_shift",)
_PRIOR = ("prior",)
_LOOKS = ("input_shift", "feature_shift", "features", "output_shift", "entropy")


class ShiftKind(StrEnum):
    """What changed; ``NONE`` while nothing did."""

    NONE = "none"
    COVARIATE = "covariate"
    LABEL = "label"
    CONCEPT = "concept"


class ShiftTracker:
    """Names the kind of shift from what the detectors saw within the last ``KIND_ROWS`` rows.

    - Rows look unlike their predicted class did in the reference: covariate.
    - Else, the classes come in other shares: label. The inputs as a whole then look different too, each class does not.
    - Else, inputs, features or predictions look different: covariate.
    - Else, there are only more errors: concept.
    """

    def __init__(self) -> None:
        self._ages: dict[str, int] = {}
        """Rows since each signal's last alarm."""
        self._kind = ShiftKind.NONE

    @property
    def kind(self) -> ShiftKind:
        """The kind of the present shift."""
        return self._kind

    def observe(self, rows: int, alarms: Iterable[str], evidence: Mapping[str, float]) -> bool:
        """Take in ``rows`` rows; returns whether the kind is another than before.

        Args:
            rows: rows since the last call.
            alarms: signals that alarmed in them.
            evidence: each detector's statistic over its threshold, or its signal's level in bands if that is greater.
        """
        before, raised = self._kind, set(alarms)
        ages = {name: age + rows for name, age in self._ages.items() if age + rows < QUIET_ROWS}
        self._ages = ages | dict.fromkeys(raised, 0)
        if not self._ages:
            self._kind = ShiftKind.NONE
        elif any(age < KIND_ROWS for age in self._ages.values()):
            self._kind = self._verdict(evidence)
        return self._kind is not before

    def _verdict(self, evidence: Mapping[str, float]) -> ShiftKind:
        def seen(names: tuple[str, ...]) -> float:
            alarmed = any(self._ages.get(name, KIND_ROWS) < KIND_ROWS for name in names)
            return 1.0 if alarmed else max((min(evidence.get(name, 0.0), 0.999) for name in names), default=0.0)

        if seen(_WITHIN_CLASS) >= 1.0 or any(evidence.get(name, 0.0) > 1.0 for name in _WITHIN_CLASS):
            return ShiftKind.COVARIATE
        if seen(_PRIOR) >= 1.0:
            return ShiftKind.COVARIATE if seen(_WITHIN_CLASS) >= LIKELY else ShiftKind.LABEL
        if seen(_LOOKS) >= 1.0:
            return ShiftKind.LABEL if seen(_PRIOR) >= LIKELY > seen(_WITHIN_CLASS) else ShiftKind.COVARIATE
        if seen((*_WITHIN_CLASS, *_LOOKS)) >= LIKELY:
            return ShiftKind.COVARIATE
        return ShiftKind.LABEL if seen(_PRIOR) >= LIKELY else ShiftKind.CONCEPT

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"ages": dict(self._ages), "kind": self._kind.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self._ages = {name: int(age) for name, age in state["ages"].items()}
        self._kind = ShiftKind(state["kind"])
