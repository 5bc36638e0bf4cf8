"""What calibration found out: plain numbers that a bundle keeps in ``calibration.json``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from detectors.base import F64, Detector
from detectors.fronts import Front, prepare
from detectors.standardise import Standardiser
from detectors.threshold import DOUBT, find_threshold

MIN_ARL0 = 50
POSITIVE = ("threshold", "arl0", "scale", "clip", "unit", "span")


@dataclass(frozen=True, slots=True)
class Calibration:
    """A detector's threshold for one signal, and all that is needed to use it again."""

    detector: str
    """Name in the registry; the threshold is void for another detector or other options."""
    options: dict[str, Any]
    threshold: float
    arl0: float
    """Mean rows between false alarms that was asked for."""
    reached_arl0: float
    """The same as measured at this threshold on fresh null streams, with a 95% interval."""
    reached_low: float
    reached_high: float
    method: str
    width: int | None
    """Columns of a row; None for a signal of single numbers. Of rows, the numbers below are lists."""
    location: Any
    scale: Any
    clip: Any
    """In standard deviations."""
    weights: list[Any]
    """The prewhitening filter (P,), the newest value first; (P, D) for rows; empty: none."""
    unit: Any
    """Standard deviation of what the filter leaves, relative to ``scale``."""
    domain: str
    base: float
    span: float
    """How the domains "unit" and "binary" come out of the standardised value, see ``Standardiser``."""
    autocorrelation_time: float
    """Rows that weigh as much as one independent row."""
    rows: int
    """Finite reference values."""
    fitted: dict[str, Any]
    """What the detector learnt from the reference."""
    rise: float | None = None
    """What the threshold rises by where the ARL0 is e times as long; None: not measured, as in older bundles."""

    @classmethod
    def from_dict(cls, numbers: dict[str, Any]) -> Calibration:
        """From what ``to_dict`` gave, by way of JSON. Raises ``ValueError`` naming the entries that are wrong."""
        numbers = {"rise": None, **numbers}
        expected = {field.name for field in fields(cls)}
        if wrong := expected.symmetric_difference(numbers):
            raise ValueError(f"calibration: missing or unknown entries {sorted(wrong)}: calibrate anew")
        other = {"detector", "options", "method", "width", "weights", "domain", "fitted"}
        other |= {"rise"} if numbers.get("rise") is None else set()
        bad = [key for key in sorted(expected - other) if not _numeric(numbers[key])]
        bad += [key for key in POSITIVE if key not in bad and not (np.asarray(numbers[key]) > 0).all()]
        bad += [key for key in ("weights",) if not all(_numeric(weight) for weight in numbers[key])]
        if bad:
            raise ValueError(f"calibration: not a usable number: {', '.join(bad)}: calibrate anew")
        return cls(**{**numbers, "options": dict(numbers["options"]), "rows": int(numbers["rows"])})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def at(self, arl0: float) -> Calibration:
        """The same for another mean time between false alarms, by the measured slope of the threshold.

        A calibration for that time would give about the same threshold, the more so the smaller the change: where log
        ARL0 is not linear in the threshold, as at the low end of page_hinkley and adwin, it is far off.

        Raises:
            ValueError: the slope was not measured, or it leads below a threshold of 0.
        """
        check_arl0(arl0)
        if self.rise is None:
            raise ValueError("it was calibrated without the slope of its threshold: calibrate anew")
        factor = arl0 / self.arl0
        threshold = self.threshold + self.rise * math.log(factor)
        if threshold <= 0.0:
            raise ValueError(f"calibrated for an ARL0 of {self.arl0:g}, it can't be set to {arl0:g}: calibrate anew")
        doubt = max(factor, 1.0 / factor) ** DOUBT
        return replace(
            self,
            threshold=threshold,
            arl0=float(arl0),
            reached_arl0=self.reached_arl0 * factor,
            reached_low=self.reached_low * factor / doubt,
            reached_high=self.reached_high * factor * doubt,
            method=f"{self.method}, set from an ARL0 of {self.arl0:g}",
        )

    def check(self, detector: Detector) -> None:
        """Raise ``ValueError`` unless the calibration was made for ``detector`` with the same options."""
        if (self.detector, self.options) != (detector.name, detector.options()):
            raise ValueError(
                f"calibration was made for {self.detector} {self.options}, not for {detector.name} "
                f"{detector.options()}: calibrate anew"
            )

    def standardiser(self) -> Standardiser:
        """What turns the signal into what the detector reads."""
        number = float if self.width is None else np.array
        return Standardiser(
            number(self.location),
            number(self.scale),
            number(self.clip),
            weights=np.array(self.weights),
            unit=number(self.unit),
            domain=self.domain,
            base=self.base,
            span=self.span,
        )


def _numeric(value: Any) -> bool:
    """A finite number, or a list of them (of any depth)."""
    if isinstance(value, list):
        return all(_numeric(item) for item in value)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_arl0(arl0: float) -> None:
    """Raise ``ValueError`` unless ``arl0`` is a number of rows that can be calibrated."""
    if not MIN_ARL0 <= arl0 < math.inf:
        raise ValueError(f"arl0 must be a finite number of rows, at least {MIN_ARL0}, got {arl0!r}")


def find(detector: Detector, reference: F64, arl0: float, seed: int) -> Calibration:
    """Calibrate ``detector`` on ``reference`` (N,), or (N, D) for one that reads rows.

    Raises ``ValueError`` for too few finite values, a bad arl0 or a wrong shape.
    """
    check_arl0(arl0)
    front: Front = prepare(detector, reference)
    fit = front.detector
    found = find_threshold(front, arl0, seed)
    return Calibration(
        detector=detector.name,
        options=detector.options(),
        threshold=found.threshold,
        arl0=float(arl0),
        reached_arl0=found.reached,
        reached_low=found.low,
        reached_high=found.high,
        method=found.method,
        width=front.width,
        location=_plain(front.standardise.location),
        scale=_plain(front.standardise.scale),
        clip=_plain(front.standardise.clip),
        weights=front.standardise.weights.tolist(),
        unit=_plain(front.standardise.unit),
        domain=front.standardise.domain,
        base=front.standardise.base,
        span=front.standardise.span,
        autocorrelation_time=front.autocorrelation_time,
        rows=front.rows,
        fitted=fit.fitted(),
        rise=found.rise,
    )


def _plain(number: Any) -> Any:
    return number.tolist() if isinstance(number, np.ndarray) else float(number)
