"""What calibration found out: plain numbers that a bundle keeps in ``calibration.json``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from detectors.base import F64, Detector
from detectors.bootstrap import describe
from detectors.threshold import find_threshold

MIN_ARL0 = 50


@dataclass(frozen=True, slots=True)
class Calibration:
    """A detector's threshold for one signal, and all that is needed to use it again."""

    detector: str
    """Name in the registry; the threshold is void for another detector or other options."""
    options: dict[str, float]
    threshold: float
    arl0: float
    """Mean rows between false alarms that was asked for."""
    reached_arl0: float
    """The same as measured at this threshold on fresh null streams, with a 95% interval."""
    reached_low: float
    reached_high: float
    method: str
    location: float
    scale: float
    clip: float
    """In standard deviations."""
    phi: float
    """Lag-1 autocorrelation with which values are prewhitened, if the detector assumes independence; else 0."""
    autocorrelation_time: float
    """Rows that weigh as much as one independent row."""
    rows: int
    """Finite reference values."""

    @classmethod
    def from_dict(cls, numbers: dict[str, Any]) -> Calibration:
        """From what ``to_dict`` gave, by way of JSON. Raises ``ValueError`` naming the entries that are wrong."""
        expected = {field.name for field in fields(cls)}
        if wrong := expected.symmetric_difference(numbers):
            raise ValueError(f"calibration: missing or unknown entries {sorted(wrong)}: calibrate anew")
        text = {"detector", "options", "method"}
        bad = [key for key in sorted(expected - text) if not _is_number(numbers[key])]
        bad += [key for key in ("threshold", "arl0", "scale", "clip") if key not in bad and not numbers[key] > 0]
        if bad:
            raise ValueError(f"calibration: not a usable number: {', '.join(bad)}: calibrate anew")
        return cls(**{**numbers, "options": dict(numbers["options"]), "rows": int(numbers["rows"])})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def check(self, detector: Detector) -> None:
        """Raise ``ValueError`` unless the calibration was made for ``detector`` with the same options."""
        if (self.detector, self.options) != (detector.name, detector.options()):
            raise ValueError(
                f"calibration was made for {self.detector} {self.options}, not for {detector.name} "
                f"{detector.options()}: calibrate anew"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_arl0(arl0: float) -> None:
    """Raise ``ValueError`` unless ``arl0`` is a number of rows that can be calibrated."""
    if not MIN_ARL0 <= arl0 < math.inf:
        raise ValueError(f"arl0 must be a finite number of rows, at least {MIN_ARL0}, got {arl0!r}")


def find(detector: Detector, reference: F64, arl0: float, seed: int) -> Calibration:
    """Calibrate ``detector`` on ``reference`` (N,). Raises ``ValueError`` for too few finite values or a bad arl0."""
    check_arl0(arl0)
    null = describe(reference)
    found = find_threshold(detector, null, arl0, seed)
    return Calibration(
        detector=detector.name,
        options=detector.options(),
        threshold=found.threshold,
        arl0=float(arl0),
        reached_arl0=found.reached,
        reached_low=found.low,
        reached_high=found.high,
        method=found.method,
        location=null.location,
        scale=null.scale,
        clip=null.clip,
        phi=null.phi if detector.assumes_independence else 0.0,
        autocorrelation_time=null.autocorrelation_time,
        rows=null.rows,
    )
