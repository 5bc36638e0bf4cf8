"""Cuts the rows of a holdout into blocks that may be taken as independent of each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adapters.slow.gate.intervals import F64

MOST_BLOCKS = 24
"""More would add little to the power of a test, and shorter ones hide weak dependence."""
LEAST_BLOCKS = 7
"""Fewer prove nothing at the gate's levels."""
SHORT_RUN = 4.0
"""Mean length of runs of one class, in rows, from which on `runs` proves anything."""
WIDTH = 2.0
"""Length of a block in times of integrated autocorrelation: about 0.15 is then left between neighbours."""
FEW_BLOCKS = 8
"""Blocks that are not merged further: where neighbours are alike even then, there is no proof."""


class Blocks(NamedTuple):
    """Consecutive blocks of nearly equal length."""

    starts: NDArray[np.int64]
    """(B,) first row of each block; empty when there are too few to prove anything."""
    rows: int

    @property
    def number(self) -> int:
        """Number of blocks."""
        return len(self.starts)

    def sums(self, values: F64, where: NDArray[np.bool_] | None = None) -> tuple[F64, F64]:
        """Sums of ``values`` (n,) and numbers of rows by block, of the rows ``where``; blocks without rows left out."""
        if not self.number:
            return np.zeros(0), np.zeros(0)
        inside = np.ones(self.rows) if where is None else where.astype(np.float64)
        sums = np.add.reduceat(values * inside, self.starts)
        sizes = np.add.reduceat(inside, self.starts)
        return sums[sizes > 0], sizes[sizes > 0]


def correlation_rows(values: F64) -> float:
    """Integrated autocorrelation time of ``values`` (n,) in rows: rows that count as one; n where nearly all do.

        τ = 1 + 2·Σ ρ_k,    summed in pairs of lags while these are positive and falling

    C. J. Geyer, "Practical Markov chain Monte Carlo", Statistical Science 1992. The sample mean is taken out of the
    values, which lowers each ρ_k by τ/n: that is put back.
    """
    rows = len(values)
    centred = values - values.mean()
    power = float(centred @ centred)
    if rows < 4 or power <= 1e-24 * rows:
        return 1.0
    size = 1 << (2 * rows - 1).bit_length()
    spectrum = np.abs(np.fft.rfft(centred, size)) ** 2
    rho = np.fft.irfft(spectrum, size)[: rows // 2 * 2] / power
    pairs = (rho[0::2] + rho[1::2])[: max(1, rows // 4)]
    ended = np.flatnonzero(pairs <= 0)
    falling = np.minimum.accumulate(pairs[: ended[0]] if len(ended) else pairs)
    tau = max(2 * float(falling.sum()) - 1, 1.0)
    return min(tau / max(1 - 2 * tau / rows, 1 / rows), float(rows))


def label_rows(labels: NDArray[Any], shares: F64) -> float:
    """Rows that count as one for the mix of classes: 1 where labels change as often as independent ones would.

        r = changes / (n − 1) / (1 − Σ share²),    rows = (2 − r)/r

    which is exact where a label is kept or drawn anew from ``shares`` (K,) by chance. A single row between two of
    another class is not counted, as it may be an error, but one change more than seen. A holdout of one class says
    nothing of a stream of several: it is one row, not n.
    """
    others = 1.0 - float(np.square(shares).sum())
    expected = (len(labels) - 1) * others
    if expected <= 0:
        return 1.0
    lone = (labels[:-2] == labels[2:]) & (labels[1:-1] != labels[2:])
    lasting = labels.copy()
    lasting[1:-1][lone] = labels[2:][lone]
    changes = int((lasting[1:] != lasting[:-1]).sum()) + 1
    r = min(1.0, changes / expected)
    return (2 - r) / r


def _likeness(sums: F64) -> float:
    """Correlation of neighbouring blocks' sums, freed of its bias."""
    centred = sums - sums.mean()
    power = float(centred @ centred)
    return float(centred[1:] @ centred[:-1]) / power + 1 / len(sums) if power > 0 else 0.0


def _tame(values: F64) -> F64:
    """``values`` without their extremes: few rows far out would hide the correlation of all others."""
    clipped = np.clip(values, *np.quantile(values, [0.05, 0.95]))
    return clipped if np.ptp(clipped) > 0 else values


def cut(drops: Sequence[F64], least_rows: float = 1.0) -> Blocks:
    """Blocks for the paired differences ``drops``, each (n,) and oldest first; by the most dependent of them.

    They start ``WIDTH`` times the autocorrelation time long, or ``least_rows``, and are merged while neighbours are
    alike. What can't be seen in n rows is not found: dependence that is weak from row to row and lasts longer than
    the holdout. ``least_rows`` is how a longer memory of the stream comes in.
    """
    rows = len(drops[0])
    tame = [_tame(values) for values in drops]
    times = [correlation_rows(values) for values in tame]
    length = max(least_rows, *(WIDTH * time if time > 1 else 1.0 for time in times), 1.0)
    count = min(MOST_BLOCKS, math.floor(rows / length))
    while count >= LEAST_BLOCKS:
        starts = np.linspace(0, rows, count + 1).round().astype(np.int64)[:-1]
        alike = max(_likeness(np.add.reduceat(values, starts)) for values in tame)
        # One standard error of independent blocks.
        if alike <= 1 / math.sqrt(count):
            return Blocks(starts, rows)
        if count <= FEW_BLOCKS:
            break
        count = max(count // 2, FEW_BLOCKS)
    return Blocks(np.zeros(0, np.int64), rows)


def runs(labels: NDArray[Any], most_rows: int) -> Blocks:
    """Blocks of one class each, of ``most_rows`` rows at most, for rows whose classes last too long for `cut`.

    Neighbouring blocks of one long run then stand for two witnesses. That is right where the two models differ by
    chance within a class. Where one of them is better at a class as such, the classes of the day speak for all. Found
    for 0.05 asked and 160 rows, with gains and losses of 0.15 to 0.25 that each class has of its own and that cancel
    over all classes: 0.01 are promoted with runs of 20 rows, 0.05 of 50, 0.3 of 200, and 0.45 of one class alone.
    Labels that change often prove nothing here: their rows depend on each other for another reason.
    """
    rows = len(labels)
    cuts = np.r_[0, np.flatnonzero(labels[1:] != labels[:-1]) + 1, rows]
    lengths = np.diff(cuts)
    if lengths.mean() < SHORT_RUN:
        return Blocks(cuts[:0], rows)
    parts = [
        first + np.linspace(0, length, math.ceil(length / most_rows) + 1).round().astype(np.int64)[:-1]
        for first, length in zip(cuts, lengths, strict=False)
    ]
    starts = np.concatenate(parts)
    if len(starts) > MOST_BLOCKS:
        wanted = np.linspace(0, rows, MOST_BLOCKS + 1)[:-1]
        starts = np.unique(starts[np.minimum(np.searchsorted(starts, wanted), len(starts) - 1)])
    return Blocks(starts if len(starts) >= LEAST_BLOCKS else starts[:0], rows)
