"""The detectors of a running daemon: one for each signal, and those that only report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import detectors
from daemon.records import F64
from daemon.shift_kind import ShiftKind, ShiftTracker
from daemon.signals import Rows

CLASS_GROUPS = 64
"""Predicted classes beyond this many are watched in groups: class modulo this."""
MIN_ERROR_BASELINE = 32
PRIOR, RISK, FEATURES, ERROR = "prior", "risk", "features", "error"
REPORTED = (PRIOR, RISK)
"""Alarms that are counted and logged but start no adaptation: other shares of the classes are no fault of the model,
and adapting statistics to them harms; a served risk above the reference's says that adapting is not enough."""
EARLY = ("feature_shift",)
"""Signals with an early warning, which only warns."""


def detector_names(signals: Sequence[str], task: str, detector: str, features: str | None) -> dict[str, str]:
    """Which detector watches which signal, for signals that can alarm."""
    names = {signal: detector for signal in (*signals, ERROR)}
    names[RISK] = "risk_monitor"
    if task == "classification":
        names[PRIOR] = "label_shift"
    if features is not None:
        names[FEATURES] = features
    return names


def class_index(prediction: Any) -> F64:
    """What the detector of the classes' shares reads of predictions (B,)."""
    return np.asarray(prediction, dtype=np.float64) % CLASS_GROUPS


class Watch:
    """Calibrated detectors over the signals of one stream."""

    def __init__(
        self, signals: Sequence[str], task: str, calibration: dict[str, Any], detector: str, features: str | None
    ) -> None:
        self._signals = tuple(signals)
        kept = calibration["detectors"]
        self.detectors = {
            signal: _restored(name, kept[name][signal])
            for signal, name in detector_names(signals, task, detector, features).items()
        }
        self.early = {
            signal: _restored("early_warning", kept["early_warning"][signal]) for signal in signals if signal in EARLY
        }
        self._calibrated = float(calibration["arl0"]), [detector.arl0 for detector in self._every()]
        self.arl0 = self._calibrated[0]
        """Mean rows between false alarms of all together."""
        self.shift = ShiftTracker()
        self.alarms: list[str] = []
        """Signals that alarmed since the last reading; labels may raise one while no row comes."""
        self.warnings: list[str] = []
        """Signals with an early warning since the last reading."""
        self._rows = 0

    def rows(self, rows: Rows) -> None:
        """Take in one batch as measured."""
        for column, name in enumerate(self._signals):
            values = rows.signals[:, column].astype(np.float64)
            self._read(name, values)
            if name in self.early and self.early[name].update_many(values):
                self.warnings.append(name)
        if PRIOR in self.detectors:
            self._read(PRIOR, class_index(rows.prediction))
        if FEATURES in self.detectors and rows.features is not None:
            self._read(FEATURES, rows.features)
        self._rows += len(rows.prediction)

    def losses(self, losses: F64) -> None:
        """Take in the losses (n,) of emitted answers; NaN where there was none."""
        clipped = np.clip(losses, 0.0, 10.0)
        self._read(ERROR, clipped)
        self._read(RISK, clipped)

    def _read(self, signal: str, values: Any) -> None:
        if self.detectors[signal].update_many(values) and signal not in self.alarms:
            self.alarms.append(signal)

    def drift(self) -> bool:
        """Whether a signal that adaptation may answer to alarmed since the last reading."""
        return any(name not in REPORTED for name in self.alarms)

    def judge(self, deviations: Callable[[], Mapping[str, float]]) -> ShiftKind | None:
        """Name the kind of shift with the rows since the last call; None when it is the same as before.

        A detector is soon used to a shift, the level of its signal (``deviations``, in bands) goes on to show it. A
        risk that stays high is no news of a shift.
        """
        if not self.alarms and self.shift.kind is ShiftKind.NONE:
            self._rows = 0
            return None
        evidence = {name: detector.statistic / detector.threshold for name, detector in self.detectors.items()}
        for name, deviation in deviations().items():
            if math.isfinite(deviation):
                evidence[name] = max(evidence[name], deviation)
        alarms = [name for name in self.alarms if name != RISK]
        changed = self.shift.observe(self._rows, alarms, evidence)
        self._rows = 0
        return self.shift.kind if changed else None

    def aim(self, arl0: float | None) -> None:
        """One false alarm in ``arl0`` rows (None: as calibrated) of all together from now on; the evidence stays.

        Raises:
            ValueError: naming a detector whose calibration does not tell its threshold for that; nothing has changed.
        """
        before, rate = self._states(), self.arl0
        self.arl0 = self._calibrated[0] if arl0 is None else arl0
        try:
            self._retarget()
        except ValueError:
            self.arl0 = rate
            self._restore(before)
            raise

    def _retarget(self) -> None:
        together, alone = self._calibrated
        for detector, arl0 in zip(self._every(), alone, strict=True):
            try:
                detector.retarget(arl0 * (self.arl0 / together))
            except ValueError as error:
                raise ValueError(f"{detector.name}: {error}") from None

    def _every(self) -> list[detectors.Calibrated]:
        return [*self.detectors.values(), *self.early.values()]

    def taken(self) -> None:
        """The alarms were acted on."""
        self.alarms, self.warnings = [], []

    def rebaseline(self, rows: int) -> None:
        """What comes in now is the new normal for the detectors of signals."""
        for name, detector in self.detectors.items():
            if name not in REPORTED:
                detector.rebaseline(rows if name != ERROR else max(MIN_ERROR_BASELINE, rows // 4))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            **self._states(),
            "shift": self.shift.state_dict(),
            "alarms": list(self.alarms),
            "warnings": list(self.warnings),
            "rows": self._rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint; the rate of false alarms stays what it is here."""
        self._restore(state)
        self._retarget()
        self.shift.load_state_dict(state["shift"])
        self.alarms, self.warnings = list(state["alarms"]), list(state["warnings"])
        self._rows = int(state["rows"])

    def _states(self) -> dict[str, Any]:
        return {
            "detectors": {name: detector.state_dict() for name, detector in self.detectors.items()},
            "early": {name: detector.state_dict() for name, detector in self.early.items()},
        }

    def _restore(self, states: dict[str, Any]) -> None:
        for group, items in (("detectors", self.detectors), ("early", self.early)):
            for name, item in items.items():
                item.load_state_dict(states[group][name])


def _restored(name: str, calibration: dict[str, Any]) -> detectors.Calibrated:
    return detectors.Calibrated.from_calibration(detectors.build(name), calibration)
