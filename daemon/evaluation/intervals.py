"""Intervals of means over rows whose errors come in runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from daemon.records import F64

LEVEL = 0.95
DRAWS = 2_000
"""Bootstrap samples."""
_Z = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and what it may be."""

    mean: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Whether zero lies outside."""
        return not self.low <= 0.0 <= self.high

    def scaled(self, factor: float) -> Interval:
        """In another unit; ``factor`` above 0."""
        return Interval(self.mean * factor, self.low * factor, self.high * factor)


def block_length(values: F64) -> int:
    """Rows of a block for the circular block bootstrap of the mean of ``values`` (n,), in order of time.

    The rule of Politis and White ("Automatic block-length selection for the dependent bootstrap", Econometric Reviews,
    2004), with the correction of Patton, Politis and White (2009): from the spectral density at zero and its curvature,
    by a flat-top window that ends where correlations are over. At least 1, at most min(3 √n, n / 3).
    """
    rows = len(values)
    most = math.ceil(min(3 * math.sqrt(rows), rows / 3))
    centred = values - values.mean() if rows else values
    if rows < 8 or not np.any(centred):
        return 1
    calm = max(5, math.ceil(math.sqrt(math.log10(rows))))
    lags = min(math.ceil(math.sqrt(rows)) + calm, rows - 1)
    # By the fast Fourier transform: all lags at once.
    size = 1 << (2 * rows - 1).bit_length()
    spectrum = np.abs(np.fft.rfft(centred, size)) ** 2
    covariance = np.fft.irfft(spectrum, size)[: lags + 1] / rows
    insignificant = np.abs(covariance[1:] / covariance[0]) < 2 * math.sqrt(math.log10(rows) / rows)
    runs = np.convolve(insignificant, np.ones(calm), "valid") >= calm
    if runs.any():
        width = 2 * max(1, int(np.argmax(runs)))
    else:
        loud = np.flatnonzero(~insignificant)
        width = 2 * (int(loud[-1]) + 1 if len(loud) else 1)
    width = min(width, lags)
    lag = np.arange(1, width + 1)
    window = np.clip(2 * (1 - lag / width), 0.0, 1.0)
    density = covariance[0] + 2 * float((window * covariance[1 : width + 1]).sum())
    curvature = 2 * float((window * lag * covariance[1 : width + 1]).sum())
    if density <= 0:
        return 1
    return int(np.clip(round((1.5 * (curvature / density) ** 2 * rows) ** (1 / 3)), 1, most))


def mean_interval(values: F64, *, block: int | None = None, seed: int = 0) -> Interval:
    """Mean of ``values`` (n,) with its 95% interval by the circular moving-block bootstrap; NaN without values.

    Percentiles of `DRAWS` resampled means, stretched from the mean by Student's quantile over the normal one for as
    many values as there are blocks: of few blocks the spread is known badly. The same seed, number of rows and block
    draw the same blocks.
    """
    rows = len(values)
    if not rows:
        return Interval(math.nan, math.nan, math.nan)
    mean = float(values.mean())
    if rows == 1 or float(values.min()) == float(values.max()):
        return Interval(mean, mean, mean)
    block = min(block or block_length(values), rows)
    count = -(-rows // block)
    starts = np.random.default_rng(seed).integers(rows, size=(DRAWS, count))
    total = np.concatenate(([0.0], np.cumsum(np.concatenate((values, values[:block])) - mean)))
    means = (total[starts + block] - total[starts]).sum(axis=1) / (count * block)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    stretch = _student(max(2, count - 1)) / _Z
    return Interval(mean, mean + float(low) * stretch, mean + float(high) * stretch)


def _student(freedom: int) -> float:
    """Student's 97.5% quantile, by the Cornish-Fisher expansion: 0.05 off at 3 degrees of freedom, less above."""
    z, n = _Z, float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / n ** (power + 1) for power, term in enumerate(terms))
