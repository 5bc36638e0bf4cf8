"""A detector with a known false-alarm rate, in the signal's own unit, that no bad value can break."""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np

from detectors.base import F64, Detector
from detectors.bootstrap import LARGEST, MIN_REFERENCE, moments
from detectors.calibration import Calibration, check_arl0, find
from detectors.rows_null import row_moments
from detectors.standardise import Standardiser

SCALE_FACTOR = 2.0
SCALE_ROWS = 20.0
"""A new baseline takes over the new scale if it differs by more than this factor, and only from as many independent
rows (at 20 the estimate's error is 16%: a factor of 2 is four standard errors away). Else the scale stays: the
reference knows it better than a short baseline does."""


class Calibrated:
    """Standardises a signal and feeds it to a detector whose threshold gives one false alarm in ``arl0`` rows.

    ``Calibrated(ADWIN(), arl0=10_000)`` takes its first ``warmup`` finite values for its reference; the update that
    completes them takes a second or two. ``calibrate`` does it beforehand from values at hand, ``from_calibration``
    from stored numbers.

    Values that are not finite, or beyond 1e100, where squares overflow, never reach the detector; they are counted
    in ``ignored``. ``drift`` and ``warning`` speak about the last update alone. Location and scale stay those of the
    reference until ``rebaseline``.
    """

    def __init__(self, detector: Detector, arl0: float = 10_000, *, seed: int = 0, warmup: int = 1000) -> None:
        check_arl0(arl0)
        if warmup < MIN_REFERENCE:
            raise ValueError(f"warmup must be at least {MIN_REFERENCE} rows, got {warmup}")
        self._detector = detector.with_threshold(detector.threshold)
        self._arl0, self._seed = float(arl0), int(seed)
        self._warmup = int(warmup)
        self._calibration: Calibration | None = None
        self._standardise = Standardiser()
        self._baseline: list[Any] | None = []
        self._baseline_rows = self._warmup
        self.ignored = 0
        self.drift = self.warning = False

    @classmethod
    def from_calibration(cls, detector: Detector, calibration: dict[str, Any]) -> Self:
        """Ready for use, without a simulation. Raises ``ValueError`` if ``calibration`` does not fit ``detector``."""
        made = Calibration.from_dict(calibration)
        self = cls(detector, made.arl0)
        self._adopt(made)
        return self

    def calibration(self) -> dict[str, Any]:
        """What ``from_calibration`` takes, JSON-able. Raises ``ValueError`` before the reference is complete."""
        if self._calibration is None:
            raise ValueError(f"not calibrated yet: {self.learning} more finite values are needed")
        return self._calibration.to_dict()

    @property
    def name(self) -> str:
        """The detector's name in the registry."""
        return self._detector.name

    @property
    def arl0(self) -> float:
        """Mean rows between false alarms that was asked for."""
        return self._arl0

    @property
    def reached_arl0(self) -> float:
        """The same as measured in calibration; NaN before."""
        return math.nan if self._calibration is None else self._calibration.reached_arl0

    @property
    def threshold(self) -> float:
        """The detector's threshold."""
        return self._detector.threshold

    @property
    def statistic(self) -> float:
        """The detector's statistic."""
        return self._detector.statistic

    @property
    def reads(self) -> str:
        """Whether an update takes a number ("values") or a row (D,) of them ("rows")."""
        return self._detector.reads

    @property
    def location(self) -> Any:
        """The level taken for normal, in the signal's unit; (D,) for rows."""
        return self._standardise.location

    @property
    def scale(self) -> Any:
        """The standard deviation taken for normal, in the signal's unit; (D,) for rows."""
        return self._standardise.scale

    @property
    def learning(self) -> int:
        """Finite values still missing until alarms are possible (again); 0 in normal service."""
        return 0 if self._baseline is None else self._baseline_rows - len(self._baseline)

    def retarget(self, arl0: float) -> None:
        """Raise a false alarm in ``arl0`` rows from now on; location, scale and the evidence so far stay.

        Raises ``ValueError``, and changes nothing, where the calibration does not tell the threshold for it.
        """
        check_arl0(arl0)
        if self._calibration is not None and arl0 != self._arl0:
            made = self._calibration.at(arl0)
            detector = self._detector.with_threshold(made.threshold)
            detector.load_state_dict({**self._detector.state_dict(), "threshold": made.threshold})
            self._calibration, self._detector = made, detector
        self._arl0 = float(arl0)

    def rebaseline(self, rows: int) -> None:
        """Take the mean of the next ``rows`` finite values for the new location; no alarm meanwhile.

        The threshold stays, and so does the scale unless it is clearly another (see ``SCALE_FACTOR``). The mean of
        ``rows`` values has a standard error of ``scale * sqrt(autocorrelation_time / rows)``: at a tenth of the scale
        (100 autocorrelation times) and above, false alarms become clearly more frequent than asked. During the
        warm-up it starts the warm-up again. Raises ``ValueError`` if ``rows`` is under 2.
        """
        if rows < 2:
            raise ValueError(f"a new baseline needs at least 2 rows, got {rows}")
        self._baseline = []
        self._baseline_rows = self._warmup if self._calibration is None else int(rows)
        self.reset()

    def update(self, value: Any) -> Self:
        """Read one value of the signal, in its own unit; a row (D,) if the detector reads rows."""
        if self._detector.reads == "rows":
            self.update_many(_as_rows(value, one=True))
            return self
        value = float(value)
        if not -LARGEST < value < LARGEST:
            self.ignored += 1
            self.drift = self.warning = False
        elif self._baseline is not None:
            self._learn(self._baseline, [value])
        elif (standard := self._standardise.one(value)) is None:
            self.drift = self.warning = False
        else:
            detector = self._detector.update(standard)
            self.drift, self.warning = detector.drift, detector.warning
        return self

    def update_many(self, values: Any) -> list[int]:
        """Read ``values`` (B,), or (B, D), in order; indices at which ``drift`` was raised.

        Same state as value by value. Raises ``ValueError`` for another shape.
        """
        if self._detector.reads == "rows":
            values = _as_rows(values)
            width = None if self._calibration is None else self._calibration.width
            if width is not None and values.shape[1] != width:
                raise ValueError(f"{self.name} was calibrated for rows of {width} numbers, got {values.shape[1]}")
            finite = (np.abs(values) < LARGEST).all(1)
        else:
            values = np.asarray(values, dtype=np.float64)
            if values.ndim != 1:
                raise ValueError(f"values must have one dimension, got shape {values.shape}")
            finite = np.abs(values) < LARGEST
        if not len(values):
            return []
        kept = None if finite.all() else np.flatnonzero(finite)
        used = values if kept is None else values[kept]
        self.ignored += len(values) - len(used)
        skipped = 0
        if self._baseline is not None:
            skipped = min(self.learning, len(used))
            self._learn(self._baseline, list(used[:skipped]))
        alarms: list[int] = []
        if len(used) > skipped:
            standard = self._standardise.many(used[skipped:])
            skipped = len(used) - len(standard)
            alarms = self._detector.update_many(standard)
            seen = len(standard) > 0
            self.drift, self.warning = seen and self._detector.drift, seen and self._detector.warning
        if not finite[-1]:
            self.drift = self.warning = False
        if kept is None and not skipped:
            return alarms
        return [skipped + i if kept is None else int(kept[skipped + i]) for i in alarms]

    def reset(self) -> None:
        """Drop the evidence so far. Location, scale, threshold and a baseline in the making stay."""
        self._detector.reset()
        self._standardise.reset()
        self.drift = self.warning = False

    def _learn(self, baseline: list[Any], values: list[Any]) -> None:
        """Add finite ``values``, never more than are missing, to ``baseline``; when it is complete, start service."""
        self.drift = self.warning = False
        baseline += values
        if len(baseline) < self._baseline_rows:
            return
        collected = np.array(baseline)
        if self._calibration is None:
            self._adopt(find(self._detector, collected, self._arl0, self._seed))
            return
        self._baseline = None
        if self._calibration.domain == "standard":
            self._move_baseline(collected, len(collected) / self._calibration.autocorrelation_time)

    def _move_baseline(self, collected: F64, independent: float) -> None:
        standardise = self._standardise
        location, scale = row_moments(collected) if collected.ndim == 2 else moments(collected)
        standardise.location = location
        ratio = np.asarray(scale / standardise.scale)
        changed = (ratio < 1.0 / SCALE_FACTOR) | (ratio > SCALE_FACTOR)
        if independent >= SCALE_ROWS and changed.any():
            standardise.scale = np.where(changed, scale, standardise.scale) if collected.ndim == 2 else scale

    def _adopt(self, made: Calibration) -> None:
        made.check(self._detector)
        self._calibration, self._arl0 = made, made.arl0
        self._detector = self._detector.with_fitted(made.fitted).with_threshold(made.threshold)
        self._standardise = made.standardiser()
        self._baseline = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that moves, and the calibration in force."""
        return {
            "calibration": None if self._calibration is None else self._calibration.to_dict(),
            "detector": self._detector.state_dict(),
            "standardise": self._standardise.state_dict(),
            "baseline": None if self._baseline is None else np.array(self._baseline, dtype=np.float64),
            "baseline_rows": self._baseline_rows,
            "ignored": self.ignored,
            "drift": self.drift,
            "warning": self.warning,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave. Raises ``ValueError`` if it belongs to another detector or options."""
        if state["calibration"] is not None:
            self._adopt(Calibration.from_dict(state["calibration"]))
        else:
            self._calibration = None
            self._standardise = Standardiser()
        self._detector.load_state_dict(state["detector"])
        self._standardise.load_state_dict(state["standardise"])
        baseline = state["baseline"]
        self._baseline = None if baseline is None else list(np.asarray(baseline, dtype=np.float64))
        self._baseline_rows = int(state["baseline_rows"])
        self.ignored = int(state["ignored"])
        self.drift, self.warning = bool(state["drift"]), bool(state["warning"])


def calibrate(detector: Detector, reference: Any, arl0: float = 10_000, seed: int = 0) -> Calibrated:
    """``detector`` with the threshold that gives one false alarm in ``arl0`` rows of a stream like ``reference``.

    ``reference`` is (N,), or (N, D) for a detector that reads rows.

    ``reference`` is in order of time: its autocorrelation counts. Non-finite values are left out. The result is the
    same for the same ``seed``. Raises ``ValueError`` under 50 finite values.
    """
    found = find(detector, reference, arl0, seed)
    return Calibrated.from_calibration(detector, found.to_dict())


def _as_rows(rows: Any, *, one: bool = False) -> F64:
    """(B, D) float64 on the host, of an array, a tensor on any device or a nested list; a number is a row of one."""
    if hasattr(rows, "detach"):
        rows = rows.detach().cpu().numpy()
    values = np.asarray(rows, dtype=np.float64)
    if one:
        return values.reshape(1, -1)
    return values[:, None] if values.ndim == 1 else values.reshape(len(values), math.prod(values.shape[1:]))
