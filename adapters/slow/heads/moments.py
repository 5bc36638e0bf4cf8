"""Weighted sums of features and targets: all that an exact head ever needs to know of the rows it has seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

FADED = 1e-12
"""Weight under which a class does not fade further: its mean stays known, and counts for nothing beside new rows."""


class Moments:
    """Sums over rows of features h (D) and targets t (T), in float64 on the host.

    With z = [h - origin, 1] it holds ``cross`` = sum w z t' (D + 1, T) and, where asked, ``gram`` = sum w z z'
    (D + 1, D + 1). The weight w of a row is 1, or ``keep ** age`` with its age in rows. Where t is a class in one-hot
    form, column k of ``cross`` is the sum and, as its last entry, the weight of class k. The origin only keeps the
    numbers small: the means and covariances that are read off do not depend on it.
    """

    def __init__(self, origin: F64, targets: int, *, gram: bool, one_hot: bool) -> None:
        width = len(origin) + 1
        self.origin = origin
        self.cross: F64 = np.zeros((width, targets))
        self.gram: F64 = np.zeros((width, width) if gram else (0, 0))
        self.weight = 0.0
        """Sum of the rows' weights."""
        self.squares = 0.0
        """Sum of the squared weights."""
        self._one_hot = one_hot

    def add(self, h: F64, t: F64, keep: float) -> None:
        """Take in rows, oldest first: h (n, D), t (n, T); each earlier row's weight is multiplied by ``keep`` ** n."""
        w = keep ** np.arange(len(h) - 1, -1, -1, dtype=np.float64)
        fade = keep ** len(h)
        z = np.concatenate((h - self.origin, np.ones((len(h), 1))), axis=1)
        if self._one_hot and fade < 1:
            known = self.cross[-1] > 0
            self.cross[:, known] *= np.maximum(fade, np.minimum(1, FADED / self.cross[-1, known]))
        else:
            self.cross *= fade
        weighted = z * w[:, None]
        self.cross += weighted.T @ t
        if self.gram.size:
            self.gram *= fade
            self.gram += weighted.T @ z
        self.weight = self.weight * fade + float(w.sum())
        self.squares = self.squares * fade**2 + float((w**2).sum())

    def with_prior(self, prior: Moments, weight: float) -> Moments:
        """The sums of both, those of ``prior`` scaled so that its rows weigh ``weight`` together."""
        factor = weight / prior.weight if prior.weight else 0.0
        total = Moments(self.origin, self.cross.shape[1], gram=self.gram.size > 0, one_hot=self._one_hot)
        total.cross = self.cross + factor * prior.cross
        total.gram = self.gram + factor * prior.gram
        total.weight = self.weight + factor * prior.weight
        total.squares = self.squares + factor**2 * prior.squares
        return total

    @property
    def effective_rows(self) -> float:
        """Kish's number of equally weighted rows that say as much as these; 0 without rows."""
        return self.weight**2 / self.squares if self.squares else 0.0

    @property
    def count(self) -> F64:
        """(K,) weight of each class."""
        count: F64 = self.cross[-1]
        return count

    def means(self) -> F64:
        """(K, D) mean of each class minus the origin; zero for a class without rows."""
        count = self.count
        means: F64 = np.divide(self.cross[:-1], count, out=np.zeros_like(self.cross[:-1]), where=count > 0)
        return np.ascontiguousarray(means.T)

    def within(self) -> F64:
        """(D, D) covariance within the classes, pooled by their weights (divided by the weight, not by weight - K)."""
        means = self.means()
        scatter: F64 = self.gram[:-1, :-1] - (means * self.count[:, None]).T @ means
        covariance: F64 = (scatter + scatter.T) / (2 * self.weight)
        return covariance

    def state_dict(self) -> dict[str, Any]:
        """Copies of the sums."""
        return {
            "cross": self.cross.copy(),
            "gram": self.gram.copy(),
            "weight": self.weight,
            "squares": self.squares,
            "origin": self.origin.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            ValueError: the sums are of features or targets of another number, or of another kind of head.
        """
        for name, own in (("cross", self.cross), ("gram", self.gram), ("origin", self.origin)):
            if state[name].shape != own.shape:
                raise ValueError(
                    f"the saved sums of the exact head have {name} {state[name].shape}, this head {own.shape}; "
                    "they belong to another model or method: start it empty"
                )
        self.cross, self.gram = np.array(state["cross"]), np.array(state["gram"])
        self.origin = np.array(state["origin"])
        self.weight, self.squares = float(state["weight"]), float(state["squares"])
