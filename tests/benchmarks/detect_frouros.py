"""Detectors of frouros 0.9 (https://frouros.readthedocs.io) with a threshold that calibration can turn."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

from detectors.base import Detector, positive
from tests.benchmarks.detect_rivals import F64, frouros_update


class Frouros(Detector):
    """A detector of frouros behind this package's interface, its own knob as the threshold."""

    assumes_independence = True
    calibration_rows = 100_000
    method: ClassVar[str] = ""
    default: ClassVar[float] = 1.0

    def __init__(self, threshold: float | None = None) -> None:
        self._threshold = positive("threshold", self.default if threshold is None else threshold)
        self.reset()

    def _settings(self) -> dict[str, Any]:
        """The knob; of a sum, its bound."""
        return {"lambda_": self._threshold}

    @property
    def threshold(self) -> float:
        """The knob, rising with ARL0."""
        return self._threshold

    @property
    def statistic(self) -> float:
        """Not given out by frouros under one name."""
        return math.nan

    def options(self) -> dict[str, Any]:
        """None: frouros' defaults."""
        return {}

    def with_threshold(self, threshold: float) -> Self:
        """A new one."""
        return type(self)(threshold)

    def update(self, value: Any) -> Self:
        """Read one value."""
        self.drift = self._next(value)
        if self.drift:
            self._next = frouros_update(self.method, self._settings())
        return self

    def update_many(self, values: F64) -> list[int]:
        """Read ``values`` (B,)."""
        read = values.astype(int) if self.domain == "binary" else values
        return [index for index, value in enumerate(read.tolist()) if self.update(value).drift]

    def reset(self) -> None:
        """As new."""
        self.drift = False
        self._next = frouros_update(self.method, self._settings())

    def state_dict(self) -> dict[str, Any]:
        """Refused: a rival is measured, not saved."""
        raise NotImplementedError(f"{self.name} is for measurements: its state is not saved")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refused, as ``state_dict``."""
        raise NotImplementedError(f"{self.name} is for measurements: its state is not saved")


class FrourosCUSUM(Frouros):
    """Bound ``lambda_``, upwards alone."""

    name, method, default = "frouros CUSUM", "CUSUM", 50.0


class FrourosPageHinkley(Frouros):
    """Bound ``lambda_``, upwards alone."""

    name, method, default = "frouros PageHinkley", "PageHinkley", 50.0


class FrourosGeometricMovingAverage(Frouros):
    """Bound ``lambda_``, upwards alone."""

    name, method = "frouros GeometricMovingAverage", "GeometricMovingAverage"


class FrourosRDDM(Frouros):
    """Drift level; the warning level keeps its proportion to it."""

    name, method, default = "frouros RDDM", "RDDM", 2.258
    domain = "binary"

    def _settings(self) -> dict[str, Any]:
        return {"drift_level": self._threshold, "warning_level": self._threshold * 1.773 / 2.258}


WRAPPED: dict[str, type[Frouros]] = {
    cls.method: cls
    for cls in (
        FrourosCUSUM,
        FrourosPageHinkley,
        FrourosGeometricMovingAverage,
        FrourosRDDM,
    )
}
"""Those whose knob is a continuous one and whose update takes under 10 us: what can be calibrated within the run."""
