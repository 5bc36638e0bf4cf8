"""The null stream: more of the reference, resampled with its autocorrelation and its tails.

Sieve and block bootstrap in one ("post-blackening": A. Davison, D. Hinkley, "Bootstrap Methods and their
Application", 1997, section 8.2): fit an autoregression, resample blocks of its residuals, run them through it again.
The recursion carries the long memory that blocks would cut, the blocks carry what it does not describe, the residuals
carry the tails.

The reference is finite, so its mean, scale and autocorrelation are known up to an error only. Each simulated chain
draws them anew within their standard errors: the false-alarm rate is then the one to expect from a reference of this
length, and a short reference asks for a greater threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from detectors.base import F64

MIN_REFERENCE = 50
"""Finite values below which nothing can be said about autocorrelation or tails."""
LARGEST = 1e100
"""Values from here on, infinities and NaN are unusable: their squares would overflow."""
MIN_CLIP = 4.0
"""Standard deviations at which values are clipped at the least; one in 16,000 of a Gaussian signal."""
MAX_PHI = 0.999
BLOCK_TIMES = 10.0
"""Block length in autocorrelation times of the residuals, of what exceeds white noise."""
SCALE_FLOOR = 1e-6
"""Least scale, relative to the greatest magnitude in the reference (absolute where squares would vanish). It is that of
a constant signal: any change visible in float32 then counts as a deviation or more."""


@dataclass(frozen=True, slots=True)
class Null:
    """What the reference says about the stream without drift."""

    location: float
    scale: float
    clip: float
    phi: float
    """Lag-1 autocorrelation, corrected for its small-sample bias; 0 where it can't be told from 0."""
    partial: F64
    """Partial autocorrelations (P,): the autoregression in its always stationary form; empty for independent rows."""
    autocorrelation_time: float
    """Rows that weigh as one independent row: the variance of a mean of n rows is scale**2 * this / n."""
    values: F64
    """The reference (N,), standardised and clipped."""
    residuals: F64
    """What the autoregression leaves of the values (N - P,)."""
    block: int
    rows: int
    constant: bool


def moments(values: F64) -> tuple[float, float]:
    """Mean and standard deviation of ``values`` (N,), the deviation never under the scale floor.

    Values far outside the range of the middle 98% (by more than twice its width) are drawn in to that bound, so that
    from 100 rows on a single broken reading can't make a detector blind.
    """
    low, high = np.quantile(values, (0.01, 0.99), method="inverted_cdf")
    if width := float(high - low):
        values = np.clip(values, low - 2.0 * width, high + 2.0 * width)
    return float(values.mean()), max(float(values.std()), _floor(values))


def _floor(values: F64) -> float:
    greatest = float(np.abs(values).max())
    return SCALE_FLOOR * (greatest if greatest * LARGEST > 1.0 else 1.0)


def autocorrelation_time(values: F64) -> float:
    """Integrated autocorrelation time of ``values`` (N,) in rows, at least 1.

    The sum of autocorrelations is cut at the first lag above five times itself (A. Sokal, "Monte Carlo methods in
    statistical mechanics", 1989).
    """
    centred = values - values.mean()
    power = np.abs(np.fft.rfft(centred, 2 * centred.size)) ** 2
    correlation = np.fft.irfft(power)[: centred.size]
    if not correlation[0] > 0.0:
        return 1.0
    times = 2.0 * np.cumsum(correlation / correlation[0]) - 1.0
    enough = np.arange(times.size) >= 5.0 * times
    lag = int(enough.argmax()) if enough.any() else times.size - 1
    return max(1.0, float(times[lag]))


def partial_autocorrelations(z: F64) -> F64:
    """Partial autocorrelations (P,) of ``z`` (N,), with mean 0; the order P is the one with the least AIC.

    Levinson-Durbin recursion on the sample autocovariances. The first one is corrected for its small-sample bias.
    """
    orders = int(10.0 * math.log10(z.size))
    power = np.abs(np.fft.rfft(z, 2 * z.size)) ** 2
    covariance = np.fft.irfft(power)[: orders + 1]
    partial = np.zeros(orders)
    weights = np.empty(0)
    error = float(covariance[0])
    best, order = z.size * math.log(error), 0
    for p in range(orders):
        partial[p] = (covariance[p + 1] - np.dot(weights, covariance[p:0:-1])) / error
        weights = np.append(weights - partial[p] * weights[::-1], partial[p])
        error *= 1.0 - partial[p] ** 2
        if not error > 0.0:
            break
        score = z.size * math.log(error) + 2.0 * (p + 1)
        if score < best:
            best, order = score, p + 1
    chosen = np.clip(partial[:order], -MAX_PHI, MAX_PHI)
    if order:
        chosen[0] = _unbiased(float(chosen[0]), z.size)
    return chosen


def autoregression(partial: F64) -> F64:
    """Coefficients (P, C) of the autoregressions with partial autocorrelations ``partial`` (P, C)."""
    weights = np.empty((0, partial.shape[1]))
    for last in partial:
        weights = np.concatenate((weights - last * weights[::-1], last[None]))
    return weights


def _unbiased(phi: float, rows: int) -> float:
    """Kendall's correction: the estimate is too small by (1 + 3 phi) / n on average."""
    return min(max(phi + (1.0 + 3.0 * phi) / rows, -MAX_PHI), MAX_PHI)


def _normal_quantiles(count: int) -> list[float]:
    return [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]


def describe(reference: F64) -> Null:
    """The null model of ``reference`` (N,), whose unusable values are left out.

    Raises ``ValueError`` under ``MIN_REFERENCE`` finite values. A constant reference is described as independent
    Gaussian noise of the floor scale.
    """
    values = np.asarray(reference, dtype=np.float64).ravel()
    values = values[np.abs(values) < LARGEST]
    rows = values.size
    if rows < MIN_REFERENCE:
        raise ValueError(f"calibration needs at least {MIN_REFERENCE} finite reference values, got {rows}: give more")
    location, scale = moments(values)
    if np.ptp(values) <= _floor(values):
        gauss = np.array(_normal_quantiles(1000))
        return Null(location, scale, MIN_CLIP, 0.0, np.empty(0), 1.0, np.zeros(rows), gauss, 1, rows, True)
    z = (values - location) / scale
    clip = max(MIN_CLIP, float(np.quantile(np.abs(z), 0.995)))
    z = np.clip(z, -clip, clip)
    z -= z.mean()
    partial = partial_autocorrelations(z)
    phi = float(np.dot(z[1:], z[:-1]) / np.dot(z, z))
    phi = 0.0 if abs(phi) < 2.0 / math.sqrt(rows) else _unbiased(phi, rows)
    weights = autoregression(partial[:, None])[:, 0]
    residuals = np.convolve(z, np.concatenate(([1.0], -weights)), mode="valid")
    residuals -= residuals.mean()
    left = autocorrelation_time(residuals)
    # Never below 1: a negative autocorrelation would promise more than n rows' worth, too much for an estimate.
    memory = max(1.0, float(residuals.var()) * left / (1.0 - float(weights.sum())) ** 2)
    # White residuals are drawn one by one: longer blocks would add the chance correlations of this sample, and the
    # threshold is exponentially sensitive to them. Their absolute values show bursts of variance.
    excess = max(left, autocorrelation_time(np.abs(residuals))) - 1.0
    block = min(1 + round(BLOCK_TIMES * excess), rows // 4)
    return Null(location, scale, clip, phi, partial, memory, z, residuals, block, rows, False)


def simulate(null: Null, chains: int, length: int, seed: int) -> F64:
    """Standardised null streams (chains, length), each with its own draw of mean, scale and autocorrelations."""
    rng = np.random.default_rng(seed)
    quantiles = np.array(_normal_quantiles(chains))
    error = 0.0 if null.constant else 1.0 / math.sqrt(null.rows)
    mean = rng.permutation(quantiles) * error * math.sqrt(null.autocorrelation_time)

    starts = rng.integers(null.residuals.size, size=(-(-length // null.block), chains))
    inside = np.arange(null.block)[:, None]
    # Circular blocks: each residual is drawn equally often, so that the null stream is centred.
    index = (starts[:, None, :] + inside).reshape(-1, chains)[:length] % null.residuals.size
    # The deviation of the residuals is an estimate too; its standard error follows from their kurtosis.
    kurtosis = float(np.mean(null.residuals**4) / np.mean(null.residuals**2) ** 2)
    path = null.residuals[index] * np.exp(rng.permutation(quantiles) * error * 0.5 * math.sqrt(kurtosis - 1.0))
    if order := null.partial.size:
        draws = np.stack([rng.permutation(quantiles) for _ in range(order)])
        spread = error * np.sqrt(1.0 - null.partial**2)
        partial = np.clip(null.partial[:, None] + draws * spread[:, None], -MAX_PHI, MAX_PHI)
        backwards = autoregression(partial)[::-1].copy()
        for t in range(1, length):
            past = path[max(0, t - order) : t]
            path[t] += np.einsum("pc,pc->c", backwards[-past.shape[0] :], past)
    path += mean
    return np.ascontiguousarray(path.T)
