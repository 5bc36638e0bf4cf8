"""Finds the few numbers that a matrix came from: a low rank, a scale per row, or both; None where there are none."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RANKS = (8, 32, 128, 256)
"""Ranks that are looked for, in turn; one above the last ships dense."""
SCALED_RANKS = (2, 4, 8, 16, 32, 64)
OVERSAMPLING = 8
SWEEPS = 40
"""Rounds of the search for scale and low rank at the most."""


class Factors(NamedTuple):
    """V (m, n) = scale[:, None] * W + up @ down, all float64 with the values of float32."""

    scale: Tensor | None
    """(m,); None for ones."""
    up: Tensor | None
    """(m, r); None without a low-rank part."""
    down: Tensor | None
    """(r, n)."""

    def product(self, base: Tensor) -> Tensor:
        """V for a base W (m, n) in float64; not rounded."""
        value = base if self.scale is None else self.scale[:, None] * base
        return value if self.up is None or self.down is None else value + self.up @ self.down

    @property
    def numbers(self) -> int:
        """How many they are."""
        return sum(0 if part is None else part.numel() for part in self)


def find(value: Tensor, base: Tensor, tolerance: float, limit: int) -> Factors | None:
    """The factors with fewer than ``limit`` numbers that give ``value`` to ``tolerance``; None when none are found.

    Args:
        value: (m, n) float64.
        base: (m, n) float64.
        tolerance: largest absolute error of an element.
        limit: as many numbers are too many.
    """
    m, n = value.shape
    if m < limit:
        scaled = Factors(_rounded(_row_ratio(value, base)), None, None)
        if _error(value, scaled.product(base)) <= tolerance:
            return scaled
    if m + n >= limit:
        return None
    found = _low_rank(value - base, tolerance, limit)
    if found is not None:
        return Factors(None, *found)
    return _scaled_low_rank(value, base, tolerance, limit) if 2 * m + n < limit else None


def _error(value: Tensor, other: Tensor) -> float:
    return float((value - other).abs().max())


def _rounded(x: Tensor) -> Tensor:
    return x.float().double()


def _row_ratio(value: Tensor, base: Tensor) -> Tensor:
    """(m,) the least-squares s of value = s base in each row; 1 where the base has nothing to scale."""
    power = base.square().sum(1)
    return torch.where(power > 0, (value * base).sum(1) / power.clamp_min(torch.finfo(power.dtype).tiny), 1.0)


def _range(matrix: Tensor, rank: int) -> Tensor:
    """(m, rank) orthonormal basis that holds the columns of a matrix of at most this rank.

    The randomised range finder with one power iteration: Halko, Martinsson, Tropp, "Finding Structure with Randomness",
    SIAM Review 2011. Draws the same numbers at each call.
    """
    draw = torch.Generator().manual_seed(0)
    columns = matrix @ torch.randn(matrix.shape[1], rank, generator=draw, dtype=matrix.dtype)
    q = torch.linalg.qr(columns).Q
    basis: Tensor = torch.linalg.qr(matrix @ (matrix.T @ q)).Q
    return basis


def _low_rank(difference: Tensor, tolerance: float, limit: int) -> tuple[Tensor, Tensor] | None:
    """``up`` (m, r) and ``down`` (r, n) of the smallest r that gives the difference; None when r (m + n) >= limit."""
    m, n = difference.shape
    most = min((limit - 1) // (m + n), m, n, RANKS[-1])
    for rank in RANKS:
        q = _range(difference, min(rank + OVERSAMPLING, m, n))
        small = q.T @ difference
        if _error(difference, q @ small) <= tolerance:
            u, s, vh = torch.linalg.svd(small, full_matrices=False)
            # Either factor takes its share of the size, so that rounding to float32 costs both alike.
            up, down = _rounded(q @ u * s.sqrt()), _rounded(s.sqrt()[:, None] * vh)
            low, high = 0, min(most, len(s))
            if _error(difference, up[:, :high] @ down[:high]) > tolerance:
                return None
            while high - low > 1:  # `high` is enough, `low` is not
                middle = (low + high) // 2
                enough = _error(difference, up[:, :middle] @ down[:middle]) <= tolerance
                low, high = (low, middle) if enough else (middle, high)
            return up[:, :high], down[:high]
        if rank >= most:
            return None
    return None


def _scaled_low_rank(value: Tensor, base: Tensor, tolerance: float, limit: int) -> Factors | None:
    """Scale and low rank together, as magnitude and direction learnt apart leave them (DoRA).

    With R the row space of the low-rank part, s_i follows from what lies across it,
    s_i = <v_i P, w_i P> / <w_i P, w_i P> with P = 1 - R^T R; and R follows from V - s W. In turn: the error shrinks by
    about sqrt(r / n) a round, or the rank is wrong.
    """
    m, n = value.shape
    for rank in SCALED_RANKS:
        if 4 * rank > min(m, n) or (m + n) + m >= limit:
            return None
        scale, last = _row_ratio(value, base), float("inf")
        for sweep in range(SWEEPS):
            difference = value - scale[:, None] * base
            q = _range(difference.T, rank)  # (n, rank): its row space
            across = difference - difference @ q @ q.T
            worst = float(across.abs().max())
            if worst <= tolerance / 4:
                rounded = _rounded(scale)
                found = _low_rank(value - rounded[:, None] * base, tolerance, limit - m)
                if found is not None:
                    return Factors(rounded, *found)
            if worst == 0.0 or (sweep >= 2 and worst > 0.8 * last):
                break
            last = worst
            inner = base - base @ q @ q.T
            scale = scale + (across * inner).sum(1) / inner.square().sum(1).clamp_min(torch.finfo(inner.dtype).tiny)
    return None
