"""Sums of feature rows over windows of dyadic length that end at the newest row, and how unusual they are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from detectors.base import F64

Whole = NDArray[Any]
"""Whole numbers, held in float64 or in int32."""

Index = NDArray[np.int64]

WINDOWS = (4, 8, 16, 32, 64, 128, 256, 512)
"""Lengths in rows: a change is looked for over one that is at most twice too long."""
LENGTHS = np.array(WINDOWS)
STRIDES = np.maximum(LENGTHS // 16, 1)
"""Rows from one look at a window to the next: a long one changes little from row to row."""
PERIOD = int(STRIDES[-1])
KEPT = WINDOWS[-1] - 1
"""Rows before the newest that the longest window still holds."""
FEWEST, MOST = 128, 1024
"""Rows scanned at once, by the width of their features."""
CACHED = 4096
"""Numbers of the rows scanned at once: their sums, about four times as many, stay in the processor's cache."""
LONGEST = float(2**17)
"""Bound of a feature row's Euclidean norm, in steps of its grid of whole numbers: the squared norm of a sum over 512
rows is then under 2**52, exact in float64, whatever the order in which it is added up."""
FEW = 16.0
"""Windows that must fit into the reference, one beside the other, for its serial dependence to be measured there."""
SURE = 2.0
"""Standard errors by which dependence must show before it counts."""


class Windows:
    """Running sums of feature rows (R,), whole numbers in ``dtype``, since the start.

    Rows from before the start count as zero. The sums are exact: in float64 because they stay under 2**53, in int32
    because a difference is right even where a running sum has wrapped around, while the sum of a window stays under
    2**31.
    """

    def __init__(
        self, width: int, dtype: type[np.float64] | type[np.int32], strides: NDArray[np.int64] = STRIDES
    ) -> None:
        self.span = min(max(CACHED // max(width, 1), FEWEST), MOST)
        """Most rows that may be added at once."""
        self._sums = np.zeros((KEPT + 1 + 8 * self.span, width), dtype=dtype)
        self._scratch = np.empty((int((self.span // strides + 1).sum()), width), dtype=dtype)
        self._strides: list[int] = strides.tolist()
        self._start = self._newest = 0
        self._phase = 0
        """Rows read before position 0, modulo ``PERIOD``: looks are at multiples of their stride."""

    def append(self, features: Whole) -> int:
        """Add ``features`` (B, R), B up to ``span``. Returns the position of the first of them."""
        end = self._newest + len(features)
        if end >= len(self._sums):
            kept = max(self._start, self._newest - KEPT)
            self._sums[: self._newest - kept + 1] = self._sums[kept : self._newest + 1] - self._sums[kept]
            self._start, self._newest, end = 0, self._newest - kept, end - kept
            self._phase = (self._phase + kept) % PERIOD
        first = self._newest + 1
        added = self._sums[first : end + 1]
        np.add.accumulate(features, axis=0, out=added)
        added += self._sums[self._newest]
        self._newest = end
        return first

    def looks(self, begin: int, end: int) -> tuple[Whole, list[tuple[int, int, int]]]:
        """Sums (M, R) over all windows that are due at the positions from ``begin`` to ``end``, window after window.

        With them, for each such window, its index, its first position and the number of its sums. Valid until the
        next call.
        """
        looks, at = [], 0
        for k, (window, stride) in enumerate(zip(WINDOWS, self._strides, strict=True)):
            first = begin + (-(self._phase + begin)) % stride
            if not (count := len(range(first, end, stride))):
                continue
            short = min(count, len(range(first, self._start + window, stride)))
            later = first + short * stride
            out = self._scratch[at : at + count]
            np.subtract(self._sums[first:later:stride], self._sums[self._start], out=out[:short])
            if short < count:
                before = self._sums[later - window : end - window : stride]
                np.subtract(self._sums[later:end:stride], before, out=out[short:])
            looks.append((k, first, count))
            at += count
        return self._scratch[:at], looks

    def restart(self, position: int) -> None:
        """Start anew after ``position``: the rows up to it count as zero from now on."""
        self._start = position

    def recent(self) -> NDArray[np.int32]:
        """The feature rows that later sums still need, oldest first (up to KEPT, R)."""
        kept = max(self._start, self._newest - KEPT)
        return np.diff(self._sums[kept : self._newest + 1], axis=0).astype(np.int32)

    @property
    def phase(self) -> int:
        """Rows read so far, modulo ``PERIOD``."""
        return (self._phase + self._newest) % PERIOD

    def load(self, recent: NDArray[np.int32], phase: int) -> None:
        """Go on from what ``recent`` and ``phase`` gave. Raises ``ValueError`` if there are too many rows."""
        if len(recent) > KEPT:
            raise ValueError(f"at most {KEPT} feature rows can be restored, got {len(recent)}: the state is damaged")
        self._start, self._newest = 0, len(recent)
        self._phase = (int(phase) - len(recent)) % PERIOD
        self._sums[0] = 0
        np.cumsum(recent, axis=0, dtype=self._sums.dtype, out=self._sums[1 : len(recent) + 1])


def growth(features: F64) -> F64:
    """Variance of a window's sum beside that of as many independent rows, for each window (W,).

    ``features`` (N, R) are those of the reference, with mean zero. One factor is their serial dependence, measured
    where ``FEW`` windows fit into the reference, carried over to longer ones, and left at 1 where chance explains it.
    The other is 1 + window / N: the mean, which is subtracted, is itself an estimate from N rows.
    """
    rows = len(features)
    spread, square, _ = _traces(features)
    sums = np.concatenate((np.zeros((1, features.shape[1])), np.cumsum(features, axis=0)))
    factors = np.empty(len(WINDOWS))
    factor = 1.0
    for k, window in enumerate(WINDOWS):
        if FEW * window <= rows and spread > 0.0:
            over = sums[window:] - sums[:-window]
            share = float(np.einsum("br,br->", over, over)) / (len(over) * window * spread * (1.0 - window / rows))
            # Overlapping windows: the integral of their squared correlation is two thirds of a window.
            error = np.sqrt(2.0 * square * 2.0 * window / (3.0 * rows)) / spread
            factor = max(factor, share) if share > 1.0 + SURE * error else factor
        factors[k] = factor * (1.0 + window / rows)
    return factors


def gauge(features: F64) -> F64:
    """What ``evidence`` needs to read the squared norm of a sum of such ``features`` (N, R): (W, 4).

    The squared norm is close to a weighted sum of chi-squares. The shifted chi-square with the same mean, variance
    and skewness stands for it (J. P. Imhof, "Computing the distribution of quadratic forms in normal variables",
    Biometrika 48, 1961), and its cube root is nearly normal (E. B. Wilson, M. M. Hilferty, "The distribution of
    chi-square", PNAS 17, 1931). The variance of a short window has a term for the rows' own kurtosis.
    """
    spread, square, cube = _traces(features)
    if not spread > 0.0:
        # Nothing moves in the reference: a step of the grid is then one deviation.
        spread, square, cube = 1.0, 1.0, 1.0
    norms = np.einsum("br,br->b", features, features)
    freedom = square**3 / cube**2
    windows = LENGTHS.astype(np.float64)
    larger = growth(features)
    variance = 2.0 * square + (float(norms.var()) - 2.0 * square) / windows
    slope = np.sqrt(2.0 / (freedom * variance)) / (larger * windows)
    offset = 1.0 - spread * np.sqrt(2.0 / (freedom * variance))
    deviation = np.sqrt(2.0 / (9.0 * freedom))
    ones = np.ones_like(windows)
    return np.stack([slope, offset, (1.0 - 2.0 / (9.0 * freedom)) * ones, ones / deviation], axis=1)


def deviations(sums: F64, gauged: F64) -> F64:
    """How many deviations the squared norms of ``sums`` (B, R) lie above their mean (B,).

    ``gauged`` is the row of ``gauge`` (4,) for their window, or the rows (B, 4) of one window each.
    """
    slope, offset, mean, steepness = gauged.T
    cube_root: F64 = np.cbrt(slope * np.einsum("br,br->b", sums, sums) + offset)
    cube_root -= mean
    cube_root *= steepness
    return cube_root


def evidence(z: F64) -> F64:
    """z**2 / 2 where z (B,) is positive, else 0: about minus the logarithm of the chance of so much or more."""
    positive: F64 = np.maximum(z, 0.0)
    half: F64 = 0.5 * positive * positive
    return half


def _traces(features: F64) -> tuple[float, float, float]:
    """Traces of the first three powers of the covariance of ``features`` (N, R), whose mean is zero."""
    covariance = features.T @ features / len(features)
    product = covariance @ covariance
    return float(np.trace(covariance)), float(np.trace(product)), float(np.einsum("ij,ji->", product, covariance))
