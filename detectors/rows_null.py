"""The null stream of rows (D,): more of the reference, resampled row by row, so that columns stay together.

Each column is prewhitened by an autoregression of its own, blocks of what is left are resampled. Each simulated chain
draws from a resample of the blocks of its own: mean, scale and correlations are known from a finite reference only, and
their errors are then those to expect (a double block bootstrap).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detectors.base import F64
from detectors.bootstrap import (
    BLOCK_TIMES,
    LARGEST,
    MIN_CLIP,
    MIN_REFERENCE,
    autocorrelation_time,
    autoregression,
    filtered,
    filters,
    moments,
    residual_scale,
)

MAX_COLUMNS_LOOKED_AT = 64
"""Columns whose autocorrelation times set the block length: evenly spread ones where there are more."""


@dataclass(frozen=True, slots=True)
class RowsNull:
    """What the reference rows say about the stream without drift."""

    location: F64
    """(D,), as are ``scale``, ``clip`` and ``unit``."""
    scale: F64
    clip: F64
    weights: F64
    """The filters (P, D), the newest row first; P is 0 where nothing is to be filtered."""
    unit: F64
    """Standard deviation that the filter leaves of each column; 1 where nothing is filtered."""
    autocorrelation_time: float
    """Rows that weigh as one independent row, in the slowest column."""
    white: F64
    """(N, D): what a detector reads of the reference."""
    block: int
    rows: int


def finite_rows(rows: F64) -> F64:
    """The rows (N, D) of which every number is finite and no square overflows."""
    usable: F64 = rows[(np.abs(rows) < LARGEST).all(1)]
    return usable


def describe_rows(reference: F64, *, raw: bool, whiten: bool) -> RowsNull:
    """The null model of ``reference`` (N, D), whose unusable rows are left out.

    ``raw`` keeps the numbers as they are; ``whiten`` filters standardised columns. Raises ``ValueError`` under
    ``MIN_REFERENCE`` finite rows.
    """
    values = finite_rows(np.asarray(reference, dtype=np.float64))
    rows, width = values.shape
    if rows < MIN_REFERENCE:
        raise ValueError(f"calibration needs at least {MIN_REFERENCE} finite reference rows, got {rows}: give more")
    looked_at = np.unique(np.linspace(0, width - 1, min(width, MAX_COLUMNS_LOOKED_AT)).astype(int))
    zeros, ones, none = np.zeros(width), np.ones(width), np.empty((0, width))
    if raw:
        times = [autocorrelation_time(values[:, j]) for j in looked_at]
        block = _block(times, rows)
        return RowsNull(zeros, ones, np.full(width, np.inf), none, ones, max(times), values, block, rows)
    location, scale = row_moments(values)
    z = (values - location) / scale
    clip = np.maximum(MIN_CLIP, np.quantile(np.abs(z), 0.995, axis=0))
    z = np.clip(z, -clip, clip)
    memory = max(autocorrelation_time(z[:, j]) for j in looked_at)
    if not whiten:
        times = [autocorrelation_time(z[:, j]) for j in looked_at]
        return RowsNull(location, scale, clip, none, ones, memory, z, _block(times, rows), rows)
    partial = filters(z - z.mean(0))
    weights, unit = autoregression(partial), residual_scale(partial)
    white = filtered(z, weights, unit)
    times = [autocorrelation_time(column) for j in looked_at for column in (white[:, j], np.abs(white[:, j]))]
    return RowsNull(location, scale, clip, weights, unit, memory, white, _block(times, rows), rows)


def row_moments(values: F64) -> tuple[F64, F64]:
    """Means and standard deviations (D,) of the columns of ``values`` (N, D), robust as ``moments``."""
    pairs = np.array([moments(column) for column in values.T])
    return pairs[:, 0], pairs[:, 1]


def _block(times: list[float], rows: int) -> int:
    return min(1 + round(BLOCK_TIMES * (max(times) - 1.0)), rows // 4)


def simulate_rows(null: RowsNull, chains: int, length: int, seed: int) -> list[F64]:
    """Null streams, ``chains`` of (length, D), as a detector reads them."""
    rng = np.random.default_rng(seed)
    count, block = len(null.white), null.block
    inside = np.arange(block)
    streams = []
    for _ in range(chains):
        known = rng.integers(count, size=max(4, -(-count // block)))
        starts = rng.choice(known, size=-(-length // block))
        # Circular blocks: each row is drawn equally often.
        streams.append(null.white[((starts[:, None] + inside).reshape(-1)[:length]) % count])
    return streams
