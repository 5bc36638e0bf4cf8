"""Kolmogorov-Smirnov distance of the newest rows from the reference, over all features at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from detectors.base import F64
from detectors.registry import register
from detectors.rows import RowDetector
from detectors.windows import LENGTHS, STRIDES, WINDOWS, Index, growth

COUNT = 2**20
"""What one row counts, in whole numbers: 512 rows stay under 2**31."""
CUTS = 5
COORDINATES = 320
"""Features times cuts by default: from 65 features on there are fewer cuts, at least ``FEWEST``."""
FEWEST = 3
TABLE = 2048
"""Steps from 0 to 1 at which the evidence of a frequency is tabulated."""


@register("ks")
class KS(RowDetector):
    """Greatest distance between a window's and the reference's distribution functions, over features and windows.

        F_j(q) = share of rows with x_j <= q, at the quantiles q of the reference at the levels 1/10 .. 9/10
        evidence of a window of w rows: w KL(F_w,j(q) || F_j(q)), the greatest over features j and cuts q counts
        drift when the greatest over the windows of 4 to 512 rows > threshold

    KL is the divergence of two binary distributions: near F it is the squared Kolmogorov-Smirnov distance over twice
    its variance, and exp(-w KL) bounds the chance also far from it and for four rows, where the normal scale is wrong
    by orders of magnitude. Notices any lasting change of a single feature's distribution that moves its deciles, and
    says nothing of correlations. It does not mind wild values: a row counts the same however far out. The calibrated
    threshold does what Bonferroni's correction would do, and knows how the features depend on each other.

    A feature with few different values has fewer cuts. ``warmup`` and the state: see ``RowDetector``. The default
    threshold gives about one false alarm in 10,000 independent Gaussian rows with D = 5 when the detector is used
    alone with 500 rows of warm-up.

    A. Kolmogorov 1933, N. Smirnov 1948 (the distance); R. H. Berk, D. H. Jones, "Goodness-of-fit test statistics that
    dominate the Kolmogorov statistics", Zeitschrift für Wahrscheinlichkeitstheorie 47, 1979 (the divergence in its
    place).

    ``cuts`` is the number of quantiles of each feature, by default 5, and fewer from 65 features on.
    """

    FEATURE_TYPE = np.int32
    # Every fourth row: a look at all cuts of all features is dear, and a frequency needs rows anyway.
    LOOKS = np.maximum(STRIDES, 4)
    calibration_rows = 100_000

    def __init__(
        self, threshold: float = 10.3, *, cuts: int | None = None, warmup: int = 500, warn_at: float = 0.7
    ) -> None:
        if cuts is not None and not 1 <= cuts <= 99:
            raise ValueError(f"cuts must be from 1 to 99, or None for the number that suits D, got {cuts}")
        self._cuts = None if cuts is None else int(cuts)
        super().__init__(threshold, warmup, warn_at)

    def options(self) -> dict[str, Any]:
        """All but the threshold."""
        return {"cuts": self._cuts, "warmup": self._warmup, "warn_at": self._warn_at}

    def _learn(self, reference: F64) -> dict[str, F64]:
        columns = reference.shape[1]
        cuts = self._cuts or max(FEWEST, min(CUTS, COORDINATES // columns))
        levels = np.arange(1, cuts + 1) / (cuts + 1)
        # A level that no cut of a feature is near to has an empty slot: nothing is under -inf, as expected.
        values = np.full((cuts, columns), -np.finfo(np.float64).max)
        shares = np.zeros((cuts, columns))
        for j, column in enumerate(reference.T):
            _place(column, levels, values[:, j], shares[:, j])
        learnt = {"values": values, "shares": np.rint(shares * COUNT), "growth": np.ones(len(WINDOWS))}
        features = _counted(reference, values, learnt["shares"]) / COUNT
        learnt["growth"] = growth(features - features.mean(0))
        return learnt

    def _adopt(self, learnt: dict[str, F64]) -> tuple[int, int]:
        self._values, self._shares, growths = learnt["values"], learnt["shares"], learnt["growth"]
        cuts, columns = self._values.shape
        if (self._shares.shape, growths.shape) != ((cuts, columns), (len(WINDOWS),)) or cuts != (self._cuts or cuts):
            raise ValueError(f"{cuts} cuts of {columns} columns, {self._shares.shape} shares")
        levels = np.arange(1, cuts + 1)[:, None] / (cuts + 1)
        frequency = np.arange(TABLE + 1) / TABLE
        self._table = _divergence(frequency, levels).ravel()
        self._offsets = np.arange(cuts) * (TABLE + 1)
        self._expected = levels[:, 0] * TABLE
        self._per_count = (TABLE / COUNT / LENGTHS)[:, None]
        self._weights = LENGTHS / growths
        return columns, cuts * columns

    def _features(self, rows: F64) -> NDArray[np.int32]:
        return _counted(rows, self._values, self._shares)

    def _evidence(self, sums: NDArray[np.int32], k: Index) -> F64:
        by_level = sums.reshape(len(sums), *self._values.shape)
        per_count = self._per_count[k]
        # At one level the evidence grows with the distance on either side: only the ends can be greatest.
        above = self._divergence(by_level.max(2) * per_count)
        below = self._divergence(by_level.min(2) * per_count)
        greatest: F64 = np.maximum(above, below, out=above).max(1)
        greatest *= self._weights[k]
        return greatest

    def _divergence(self, distance: F64) -> F64:
        """Divergence (B, L) of frequencies at a ``distance`` (B, L) from the levels, in steps of the table."""
        distance += self._expected
        at = np.rint(distance, out=distance).astype(np.int64)
        np.clip(at, 0, TABLE, out=at)
        at += self._offsets
        return self._table.take(at)


def _place(column: F64, levels: F64, values: F64, shares: F64) -> None:
    """Put the cuts of ``column`` (N,) and the shares of rows up to them where ``levels`` (L,) are nearest."""
    ordered = np.sort(column)
    cuts = np.unique(np.quantile(ordered, levels, method="inverted_cdf"))
    if ordered[0] == ordered[-1]:
        # A constant that begins to move is seen on both sides.
        cuts = np.append(np.nextafter(cuts, -np.inf), cuts)
    reached = np.searchsorted(ordered, cuts, side="right") / ordered.size
    nearest = np.abs(reached[:, None] - levels).argmin(1)
    values[nearest], shares[nearest] = cuts, reached


def _counted(rows: F64, values: F64, shares: F64) -> NDArray[np.int32]:
    """``COUNT`` where a row is up to a cut, less its mean: (B, L * D) of ``rows`` (B, D) and cuts (L, D)."""
    below = rows[:, None, :] <= values
    counted = below * np.int32(COUNT)
    counted -= shares.astype(np.int32)
    return counted.reshape(len(rows), -1)


def _divergence(p: F64, q: F64) -> F64:
    """Kullback-Leibler divergence of Bernoulli(``p``) from Bernoulli(``q``), 0 < q < 1, in nats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(p > 0.0, p * np.log(p / q), 0.0)
        second = np.where(p < 1.0, (1.0 - p) * np.log((1.0 - p) / (1.0 - q)), 0.0)
    total: F64 = first + second
    return total
