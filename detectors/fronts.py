"""What stands between a signal and its detector: made from the reference, and the null streams that come out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from detectors.base import F64, Detector
from detectors.bootstrap import (
    LARGEST,
    Null,
    autoregression,
    describe,
    residual_scale,
    simulate,
    simulate_white,
)
from detectors.rows_null import RowsNull, describe_rows, simulate_rows
from detectors.standardise import Standardiser

INDEPENDENT_ROWS = 20.0
"""A reference that weighs less than this says little; the method's description then says so."""


@dataclass(slots=True)
class Front:
    """A detector that has learnt its reference, what it reads through, and what it would read without drift."""

    detector: Detector
    standardise: Standardiser
    null: Null | RowsNull
    width: int | None
    domain: str
    base: float = 0.0
    span: float = 1.0
    seen: F64 = field(default_factory=lambda: np.empty(0))
    """The reference as the detector reads it."""

    @property
    def rows(self) -> int:
        """Finite values of the reference."""
        return self.null.rows

    @property
    def autocorrelation_time(self) -> float:
        """Rows that weigh as one independent row."""
        return self.null.autocorrelation_time

    def streams(self, chains: int, length: int, seed: int) -> list[F64]:
        """Null streams as the detector reads them: ``chains`` of (length,) or (length, D)."""
        if isinstance(self.null, RowsNull):
            return simulate_rows(self.null, chains, length, seed)
        if self.standardise.weights.size:
            paths = simulate_white(self.null, chains, length, seed)
        else:
            paths = simulate(self.null, chains, length, seed)
        if self.domain == "raw":
            return list(paths * self.null.scale + self.null.location)
        clip = self.standardise.clip if not self.standardise.weights.size else np.inf
        last = Standardiser(clip=clip, domain=self.domain, base=self.base, span=self.span)
        return [last.many(path) for path in paths]

    def describe(self) -> str:
        """How the null streams are made, in a few words."""
        null = self.null
        if isinstance(null, RowsNull):
            method = f"{null.rows} rows of {self.width} columns, blocks of {null.block}"
        elif null.constant:
            return f"Gaussian noise of the floor scale, since {null.rows} rows were constant"
        else:
            method = f"{null.rows} rows, AR({null.partial.size}) with blocks of {null.block} residuals"
            if count := null.frequencies.size:
                method += f" and {count} sine wave{'s' * (count > 1)}"
            if order := len(self.standardise.weights):
                method += f", prewhitened by AR({order})"
        if (independent := null.rows / null.autocorrelation_time) < INDEPENDENT_ROWS:
            method += f", a guess: they weigh as much as {independent:.0f} independent rows"
        return method


def prepare(detector: Detector, reference: Any) -> Front:
    """The front of ``detector`` for a signal like ``reference`` (N,), or (N, D) for one that reads rows.

    Raises ``ValueError`` for a wrong shape or too few finite values.
    """
    values = np.asarray(reference, dtype=np.float64)
    if detector.reads == "rows":
        return _of_rows(detector, values[:, None] if values.ndim == 1 else values.reshape(len(values), -1))
    if values.ndim > 1 and values.size != len(values):
        raise ValueError(f"{detector.name} reads single values, but the reference has shape {values.shape}")
    return _of_values(detector, values.ravel())


def _of_rows(detector: Detector, values: F64) -> Front:
    raw = detector.domain == "raw"
    null = describe_rows(values, raw=raw, whiten=detector.assumes_independence and not raw)
    clip = np.full(values.shape[1], LARGEST) if raw else null.clip
    standardise = Standardiser(
        null.location, null.scale, clip, weights=null.phi[None] if null.phi.any() else None, unit=null.unit
    )
    gain = float(np.median((1.0 - null.phi) / null.unit))
    fitted = detector.fit(null.white, gain=gain, jump=float(np.median(1.0 / null.unit)))
    return Front(fitted, standardise, null, values.shape[1], detector.domain, seen=null.white)


def _of_values(detector: Detector, values: F64) -> Front:
    null = describe(values)
    domain = detector.domain
    if domain == "raw":
        front = Front(detector, Standardiser(clip=LARGEST), null, None, domain)
        front.seen = null.values * null.scale + null.location
        front.detector = detector.fit(front.seen)
        return front
    kinds = np.unique(values[np.abs(values) < LARGEST][:1000]) if domain != "standard" else np.empty(0)
    two = kinds.size == 2 and bool(np.isin(values[np.abs(values) < LARGEST], kinds).all())
    partial = null.filter[:, None] if detector.assumes_independence and not two else np.empty((0, 1))
    order = len(partial)
    weights = autoregression(partial)[:, 0] if order else np.empty(0)
    unit = float(residual_scale(partial)[0]) if order else 1.0
    plain = Standardiser(null.location, null.scale, null.clip, weights=weights, unit=unit)
    gain, jump = ((1.0 - float(weights.sum())) / unit, 1.0 / unit) if order else (1.0, 1.0)
    # In units of the standardised value; describe has clipped the reference already.
    read = Standardiser(weights=weights, unit=unit).many(null.values)
    base, span = 0.0, 1.0
    if two:
        low, high = ((kinds - null.location) / null.scale).tolist()
        base, span = (0.5 * (low + high), 1.0) if domain == "binary" else (low, high - low)
    elif domain == "binary":
        base = float(np.median(read))
    elif domain == "unit":
        reach = float(np.abs(read).max()) or 1.0
        base, span = -reach, 2.0 * reach
    front = Front(detector, plain, null, None, domain, base, span)
    if domain != "standard":
        front.standardise = Standardiser(
            null.location, null.scale, null.clip, weights=weights, unit=unit, domain=domain, base=base, span=span
        )
        read = Standardiser(domain=domain, base=base, span=span).many(read)
    front.seen = read
    front.detector = detector.fit(read, gain=gain, jump=jump)
    return front
