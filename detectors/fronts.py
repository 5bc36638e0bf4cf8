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

NARROW = 0.1
"""A signal within [0, 1] that spans less than this is not taken for a share of something."""
INDEPENDENT_ROWS = 20.0
"""A reference that weighs less than this says little; the method's description then says so."""


@dataclass(slots=True)
class Front:
    """A detector that has learnt its reference, what it reads through, and what it would read without drift."""

    detector: Detector
    standardise: Standardiser
    null: Null | RowsNull
    width: int | None
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
            white = simulate_white(self.null, chains, length, seed)
            return [self.standardise.limited(path) for path in white]
        paths = simulate(self.null, chains, length, seed) * self.null.scale + self.null.location
        return [self.standardise.many(path) for path in paths]

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
        null.location,
        null.scale,
        clip,
        weights=null.weights,
        unit=null.unit,
        domain=detector.domain,
    )
    gain = float(np.median((1.0 - null.weights.sum(0)) / null.unit))
    fitted = detector.fit(null.white, gain=gain, jump=float(np.median(1.0 / null.unit)))
    return Front(fitted, standardise, null, values.shape[1], seen=null.white)


def _of_values(detector: Detector, values: F64) -> Front:
    domain = detector.domain
    usable = values[np.abs(values) < LARGEST]
    natural = _natural(domain, usable)
    null = describe(values, limit=natural is None)
    if natural is not None:
        # Nothing is filtered or clipped: 0 and 1 have to stay what they are.
        front = Front(detector, natural, null, None)
        front.seen = natural.many(usable)
        front.detector = detector.fit(front.seen)
        return front
    partial = null.filter[:, None] if detector.assumes_independence else np.empty((0, 1))
    weights = autoregression(partial)[:, 0]
    unit = float(residual_scale(partial)[0]) if len(partial) else 1.0
    # In units of the standardised value; describe has clipped the reference already.
    read = Standardiser(weights=weights, unit=unit).many(null.values)
    base, span = 0.0, 1.0
    if domain == "binary":
        base = float(np.median(read))
    elif domain == "unit":
        reach = float(np.abs(read).max()) or 1.0
        base, span = -reach, 2.0 * reach
    standardise = Standardiser(
        null.location, null.scale, null.clip, weights=weights, unit=unit, domain=domain, base=base, span=span
    )
    front = Front(detector, standardise, null, None, seen=standardise.limited(read))
    gain, jump = ((1.0 - float(weights.sum())) / unit, 1.0 / unit) if len(partial) else (1.0, 1.0)
    front.detector = detector.fit(front.seen, gain=gain, jump=jump)
    return front


def _natural(domain: str, values: F64) -> Standardiser | None:
    """The map of ``values`` (N,) that are in the domain already, or are two values only; else None."""
    if domain == "raw":
        return Standardiser(clip=LARGEST, domain=domain)
    if domain == "standard" or not values.size:
        return None
    low, high = float(values.min()), float(values.max())
    two = bool(((values == low) | (values == high)).all())
    if low >= 0.0 and high <= 1.0 and (domain == "unit" or two) and (high - low > NARROW or {low, high} <= {0.0, 1.0}):
        low, high = 0.0, 1.0
    elif not two:
        return None
    return Standardiser(low, (high - low) or 1.0, LARGEST, domain=domain, base=0.5 if domain == "binary" else 0.0)
