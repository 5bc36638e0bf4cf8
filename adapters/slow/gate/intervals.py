"""Confidence intervals for paired differences that come in blocks; exact for few of them. Only numpy."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

EXACT_BLOCKS = 13
"""Blocks up to which every subset is taken."""
SUBSETS = 2**14 - 1
"""Subsets drawn for more blocks: levels down to 1/16384 can be proven."""


class Interval(NamedTuple):
    """An estimate between its two one-sided bounds, each missed with probability ``level`` at most; NaN for none."""

    estimate: float
    low: float
    high: float


@lru_cache(maxsize=8)
def _subsets(blocks: int) -> F64:
    """(S, blocks) of 0 and 1, no row empty: all subsets, or the same ones for a number of blocks."""
    if blocks <= EXACT_BLOCKS:
        numbers = np.arange(1, 2**blocks)[:, None]
        chosen = (numbers >> np.arange(blocks)) & 1
    else:
        rng = np.random.default_rng(blocks)
        chosen = rng.integers(0, 2, (SUBSETS, blocks))
        chosen[~chosen.any(1), 0] = 1
    return chosen.astype(np.float64)


def fewest_blocks(level: float) -> int:
    """Blocks of which all must agree before anything is proven at ``level``."""
    return math.ceil(-math.log2(level) - 1e-12)


def block_interval(sums: F64, sizes: F64, level: float) -> Interval:
    """Interval for the mean of a row from the sums (B,) of blocks of ``sizes`` (B,) rows.

    The means of the non-empty subsets of the blocks, in order, cut the line into pieces that hold the true mean with
    equal probability (J. A. Hartigan, "Using subsample values as typical values", JASA 1969). It needs that blocks are
    independent and that each is symmetric about the mean, nothing else, for any number of them; ``low > 0`` exactly
    when the one-sided test that flips the blocks' signs rejects at ``level``. The bounds are NaN where even blocks
    that all agree would be too few for the level.
    """
    if not len(sums) or sizes.sum() == 0:
        return Interval(math.nan, math.nan, math.nan)
    estimate = float(sums.sum() / sizes.sum())
    chosen = _subsets(len(sums))
    place = math.floor(level * (len(chosen) + 1) + 1e-9)
    if place < 1:
        return Interval(estimate, math.nan, math.nan)
    means = (chosen @ sums) / (chosen @ sizes)
    last = len(means) - place
    ordered = np.partition(means, sorted({place - 1, last}))
    return Interval(estimate, min(float(ordered[place - 1]), estimate), max(float(ordered[last]), estimate))


def winsorised(drops: F64, cap_quantile: float = 0.95) -> F64:
    """Drops over their ``cap_quantile`` count as that quantile; those below count in full.

    A few rows on which the candidate is far better can't carry it, while a few on which it is far worse sink it. So
    the estimate errs towards no gain.
    """
    return np.minimum(drops, np.quantile(drops, cap_quantile))
