"""A bet against "the entropies are those of the source": how sure it is of a shift, and which way to go."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Values = npt.NDArray[np.float64]

BET_STATE = 4
"""Numbers that a bettor remembers: ε, the sum of squared gradients, the log of its wealth, the rows it has seen."""


SMALLEST = 1e-30
"""Entropies below it are 0."""


class EntropyCdf:
    """The distribution of the source's entropies, F, piecewise linear between 0 and the largest possible value.

    F strictly rises, so F⁻¹(F(h)) = h everywhere, also beyond the entropies it was made of: without a bet there is
    nothing to correct. Entropies that occur several times lie in the middle of their step, and F's mean over the
    source is ½.
    """

    def __init__(self, entropies: Tensor, largest: float, weights: Tensor | None = None) -> None:
        """``entropies`` (N,) of the source in [0, ``largest``]; ``weights`` (N,) ≥ 0 their shares, by default equal."""
        h = entropies.detach().double().cpu().numpy().clip(0.0, largest)
        # A step from 0 to a number that small would have a slope that is none.
        h[h < SMALLEST] = 0.0
        w = np.ones_like(h) if weights is None else weights.detach().double().cpu().numpy()
        usable = np.isfinite(h) & (w > 0)
        x, position = np.unique(h[usable], return_inverse=True)
        if not len(x):
            raise ValueError("there is no source row with a finite entropy")
        mass = np.bincount(position, w[usable]) / w[usable].sum()
        y = mass.cumsum() - mass / 2
        if x[0] > 0.0:
            x, y = np.append(0.0, x), np.append(0.0, y)
        if x[-1] < largest:
            x, y = np.append(x, largest), np.append(y, 1.0)
        self._x, self._y = x, y

    def __call__(self, h: Values) -> Values:
        """Return F(h)."""
        values: Values = np.interp(h, self._x, self._y)
        return values

    def inverse(self, u: Values) -> Values:
        """Return F⁻¹(u)."""
        values: Values = np.interp(u, self._y, self._x)
        return values


def new_bettor() -> Tensor:
    """Return the (4,) state of a bettor that has seen nothing."""
    return torch.zeros(BET_STATE, dtype=torch.float64)


def bet(u: Values, index: list[int] | None, states: Values, gamma: float, clip: float) -> Values:
    """Bet on u (B,) in order and return Q(u) (B,), where u would be if the bet at its time described its density.

        wealth ← wealth·(1 + ε·(u − ½)),    Q(u) = ∫₀ᵘ 1 + ε·(v − ½) dv = u − ½·ε·u·(1 − u)
        g = (u − ½)/(1 + ε·(u − ½)),    ε ← clip(ε + γ·g/√Σg², ±clip)       (scale-free online gradient ascent)

    For u uniform on [0, 1] the wealth is a martingale that starts at 1: that it ever exceeds c has a probability of at
    most 1/c. Q is computed with the ε from before u was seen. ``states`` (G, 4) are moved on in place, ``index`` names
    the bettor of each row; None: the first. An u that is not finite is no bet, and answered as it is.
    """
    moved = u.copy()
    rows: list[list[float]] = states.tolist()
    for b, value in enumerate(u.tolist()):
        if not math.isfinite(value):
            continue
        state = rows[0 if index is None else index[b]]
        epsilon, squares, wealth, seen = state
        moved[b] = value - 0.5 * epsilon * value * (1.0 - value)
        return_on_bet = 1.0 + epsilon * (value - 0.5)
        gradient = (value - 0.5) / return_on_bet
        if gradient and not (abs(epsilon) >= clip and gradient * epsilon > 0):
            squares += gradient * gradient
            epsilon = min(max(epsilon + gamma * gradient / math.sqrt(squares), -clip), clip)
        state[:] = epsilon, squares, wealth + math.log(return_on_bet), seen + 1.0
    states[:] = rows
    return moved
