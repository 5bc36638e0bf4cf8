"""The null stream: more of the reference, resampled with its autocorrelation and its tails.

Sieve and block bootstrap in one ("post-blackening": A. Davison, D. Hinkley, "Bootstrap Methods and their
Application", 1997, section 8.2): fit an autoregression, resample blocks of its residuals, run them through it again.
The recursion carries the long memory that blocks would cut, the blocks carry what it does not describe, the residuals
carry the tails. Sine waves that stand out of the spectrum are kept apart and added again with other phases: an
autoregression would make them come and go.

The reference is finite, so its mean, scale and autocorrelation are known up to an error only. Each simulated chain
draws them anew within their standard errors: the false-alarm rate is then the one to expect from a reference of this
length, and a short reference asks for a greater threshold. For a detector that reads prewhitened values it is the
filter that is drawn, not the process: a filter that is slightly wrong is what it will meet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from detectors.base import F64
from detectors.lines import draw_lines, find_lines

MIN_REFERENCE = 50
"""Finite values below which nothing can be said about autocorrelation or tails."""
LARGEST = 1e100
"""Values from here on, infinities and NaN are unusable: their squares would overflow."""
MIN_CLIP = 4.0
"""Standard deviations at which values are clipped at the least; one in 16,000 of a Gaussian signal."""
MAX_PHI = 0.999
TINY = 1e-300
BURN_IN_TIMES, MAX_BURN_IN = 5.0, 2000
"""Rows before a simulated stream, in autocorrelation times, so that it starts anywhere and not at its mean."""
MAX_KNOWN = 20_000
"""Rows from which a simulated filter is estimated at the most: a longer reference counts as this much."""
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
    partial: F64
    """Partial autocorrelations (P,) without the periodic part: the autoregression in its always stationary form;
    empty for independent rows."""
    filter: F64
    """The same (Q,) of the whole signal: the prewhitening filter, of the order with the least BIC; empty: none."""
    frequencies: F64
    """Cycles a row (L,) of the periodic part, empty if there is none; ``amplitudes`` (L,) in deviations."""
    amplitudes: F64
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


def partial_autocorrelations(z: F64) -> tuple[F64, int]:
    """Partial autocorrelations (P,) of ``z`` (N,), with mean 0, and the order with the least BIC, at most P.

    P is the order with the least AIC: a null stream should leave nothing out, a filter should hold nothing needless.
    The first one is corrected for its small-sample bias.
    """
    partial, fit = _fitted_orders(z[:, None])
    order = int(np.argmin(fit[:, 0] + 2.0 * np.arange(len(fit))))
    chosen = partial[:order, 0].copy()
    if order:
        chosen[0] = _unbiased(float(chosen[0]), z.size)
    return chosen, int(np.argmin((fit[:, 0] + math.log(z.size) * np.arange(len(fit)))[: order + 1]))


def filters(z: F64) -> F64:
    """Partial autocorrelations (P, D) of the columns of ``z`` (N, D), with mean 0, for prewhitening each.

    Each column has the order with the least BIC; P is the greatest of them, and beyond its own a column has zeros.
    """
    partial, fit = _fitted_orders(z)
    numbers = np.arange(len(fit))[:, None]
    orders = np.argmin(fit + math.log(len(z)) * numbers, axis=0)
    chosen: F64 = np.where(numbers[1:] <= orders, partial, 0.0)[: int(orders.max())]
    if len(chosen):
        first = np.clip(chosen[0] + (1.0 + 3.0 * chosen[0]) / len(z), -MAX_PHI, MAX_PHI)
        chosen[0] = np.where(orders > 0, first, 0.0)
    return chosen


def _fitted_orders(z: F64) -> tuple[F64, F64]:
    """Partial autocorrelations (P, D) of ``z`` (N, D), and N times the log error of each order from 0 on (P + 1, D)."""
    orders = int(10.0 * math.log10(len(z)))
    partial = levinson(_covariances(z, orders), orders)
    gains = np.cumsum(np.log1p(-(partial**2)), axis=0)
    return partial, len(z) * np.concatenate((np.zeros((1, z.shape[1])), gains))


def _covariances(z: F64, orders: int) -> F64:
    """Sums of products (orders + 1, C) of ``z`` (N, C) at the lags from 0 on; without the mean taken away."""
    power = np.abs(np.fft.rfft(z, 2 * len(z), axis=0)) ** 2
    sums: F64 = np.fft.irfft(power, axis=0)[: orders + 1]
    return sums


def levinson(covariances: F64, orders: int) -> F64:
    """Partial autocorrelations (orders, C) from autocovariances (orders + 1, C): the Levinson-Durbin recursion."""
    partial = np.zeros((orders, covariances.shape[1]))
    weights = np.empty((0, covariances.shape[1]))
    error = covariances[0].copy()
    for p in range(orders):
        partial[p] = (covariances[p + 1] - (weights * covariances[p:0:-1]).sum(0)) / np.maximum(error, TINY)
        # A signal that its past foretells exactly would leave no error to divide by.
        np.clip(partial[p], -MAX_PHI, MAX_PHI, out=partial[p])
        weights = np.concatenate((weights - partial[p] * weights[::-1], partial[p : p + 1]))
        error *= 1.0 - partial[p] ** 2
    return partial


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


def describe(reference: F64, *, limit: bool = True) -> Null:
    """The null model of ``reference`` (N,), whose unusable values are left out; ``limit`` clips its values.

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
        none = np.empty(0)
        gauss = np.array(_normal_quantiles(1000))
        return Null(location, scale, MIN_CLIP, none, none, none, none, 1.0, np.zeros(rows), gauss, 1, rows, True)
    z = (values - location) / scale
    clip = max(MIN_CLIP, float(np.quantile(np.abs(z), 0.995))) if limit else float(np.abs(z).max())
    z = np.clip(z, -clip, clip)
    z -= z.mean()
    frequencies, amplitudes, rest = find_lines(z)
    partial, order = partial_autocorrelations(rest)
    if frequencies.size:
        whole, order = partial_autocorrelations(z)
    else:
        whole = partial
    weights = autoregression(partial[:, None])[:, 0]
    residuals = np.convolve(rest, np.concatenate(([1.0], -weights)), mode="valid")
    residuals -= residuals.mean()
    left = autocorrelation_time(residuals)
    # Never below 1: a negative autocorrelation would promise more than n rows' worth, too much for an estimate.
    memory = max(1.0, float(residuals.var()) * left / (1.0 - float(weights.sum())) ** 2)
    # White residuals are drawn one by one: longer blocks would add the chance correlations of this sample, and the
    # threshold is exponentially sensitive to them. Their absolute values show bursts of variance.
    excess = max(left, autocorrelation_time(np.abs(residuals))) - 1.0
    block = min(1 + round(BLOCK_TIMES * excess), rows // 4)
    return Null(
        location, scale, clip, partial, whole[:order], frequencies, amplitudes, memory, z, residuals, block, rows, False
    )


def simulate(null: Null, chains: int, length: int, seed: int) -> F64:
    """Standardised null streams (chains, length), each with its own draw of mean, scale and autocorrelations."""
    rng = np.random.default_rng(seed)
    quantiles = np.array(_normal_quantiles(chains))
    error = 0.0 if null.constant else 1.0 / math.sqrt(null.rows)
    mean = rng.permutation(quantiles) * error * math.sqrt(null.autocorrelation_time)
    # The deviation of the residuals is an estimate too; its standard error follows from their kurtosis.
    kurtosis = float(np.mean(null.residuals**4) / np.mean(null.residuals**2) ** 2)
    scale = np.exp(rng.permutation(quantiles) * error * 0.5 * math.sqrt(kurtosis - 1.0))
    partial = null.partial[:, None]
    if order := null.partial.size:
        draws = np.stack([rng.permutation(quantiles) for _ in range(order)])
        partial = np.clip(partial + draws * error * np.sqrt(1.0 - partial**2), -MAX_PHI, MAX_PHI)
    path = _process(null, np.broadcast_to(partial, (order, chains)), scale, length, rng) + mean
    return np.ascontiguousarray(path.T)


def simulate_white(null: Null, chains: int, length: int, seed: int) -> F64:
    """Prewhitened null streams (chains, length), each with a filter estimated from a reference of its own."""
    rng = np.random.default_rng(seed)
    known, order = min(null.rows, MAX_KNOWN), null.filter.size
    partial = np.broadcast_to(null.partial[:, None], (null.partial.size, chains))
    path = _process(null, partial, np.ones(chains), known + order + length, rng)
    path = (path - path[:known].mean(0)) / path[:known].std(0)
    np.clip(path, -null.clip, null.clip, out=path)
    estimated = levinson(_covariances(path[:known], order), order)
    estimated[0] = np.clip(estimated[0] + (1.0 + 3.0 * estimated[0]) / known, -MAX_PHI, MAX_PHI)
    white = filtered(path[known:], autoregression(estimated), residual_scale(estimated))
    return np.ascontiguousarray(white.T)


def _process(null: Null, partial: F64, scale: F64, length: int, rng: np.random.Generator) -> F64:
    """Paths (length, C) of autoregressions with ``partial`` (P, C) on blocks of residuals times ``scale`` (C,)."""
    order, chains = partial.shape
    burn_in = min(MAX_BURN_IN, round(BURN_IN_TIMES * null.autocorrelation_time)) if order else 0
    rows = length + burn_in
    starts = rng.integers(null.residuals.size, size=(-(-rows // null.block), chains))
    inside = np.arange(null.block)[:, None]
    # Circular blocks: each residual is drawn equally often, so that the null stream is centred.
    index = (starts[:, None, :] + inside).reshape(-1, chains)[:rows] % null.residuals.size
    path: F64 = null.residuals[index] * scale
    if order:
        backwards = autoregression(partial)[::-1].copy()
        for t in range(1, rows):
            past = path[max(0, t - order) : t]
            path[t] += np.einsum("pc,pc->c", backwards[-past.shape[0] :], past)
    path = path[burn_in:]
    if null.frequencies.size:
        phases = rng.uniform(0.0, 2.0 * math.pi, size=(null.frequencies.size, chains))
        path = path + draw_lines(null.frequencies, null.amplitudes, length, phases)
    return path


def residual_scale(partial: F64) -> F64:
    """Standard deviations (C,) that filters with ``partial`` (P, C) leave of a process with deviation 1."""
    scale: F64 = np.sqrt(np.prod(1.0 - partial**2, axis=0))
    return scale


def filtered(path: F64, weights: F64, scale: F64) -> F64:
    """``(path[t] - sum_i weights[i] path[t-1-i]) / scale``: (T, C) by weights (P, C), scale (C,) to (T - P, C)."""
    order = len(weights)
    white: F64 = path[order:].copy()
    for lag, weight in enumerate(weights, start=1):
        white -= weight * path[order - lag : len(path) - lag]
    white /= scale
    return white
