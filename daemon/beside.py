"""A fast adaptation and a promoted version beside each other: which of the two answers, or both together."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from daemon.predicted import Predicted, Way
from daemon.records import F64
from daemon.signals import Meter

WAYS: tuple[Way, ...] = ("fast", "version", "both")
MEMORY_ROWS = 200.0
"""Labelled rows that the comparison remembers."""
SURE = 1.0
"""By how many standard errors one of the two has to be better than both together before it answers alone."""
CREDIT = 3.0
"""Errors that the fast adaptation has in hand where a first version was worse than it on the rows that judged it, and
that a version has in hand where the adaptation was shown to harm."""
WORST_LOSS = 4.0
"""Largest loss of one row, in units of the reference's variance: of a regression."""


class Beside:
    """Chooses by late labels who answers while there is a version and an adapter that decides by itself.

    The adapter sits on the frozen model and knows nothing of the version; the version was trained and has nothing of
    the adapter. They err on different rows, so the mean of their probabilities is mostly better than either (L. K.
    Hansen and P. Salamon, "Neural network ensembles", IEEE PAMI 1990): it answers unless one alone has lost
    less, over the newest labels, by more than chance. Forgetting lets the best one change (M. Herbster and M. Warmuth,
    "Tracking the best expert", Machine Learning 1998).
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """No version serves any more."""
        self.way: Way = "fast"
        self._sums, self._squares = np.zeros(2), np.zeros(2)

    def promoted(self, *, first: bool, version_error: float, fast_error: float) -> None:
        """A version was promoted.

        Args:
            first: whether no version served before it; else what is known of its parent stands for it.
            version_error: its mean loss on the rows that judged it, NaN when unknown.
            fast_error: the adapter's on the newest labelled rows, NaN where it has not answered.
        """
        if first:
            self.restart()
        if version_error > fast_error:
            if first:
                self._sums[0], self._squares[0] = CREDIT, CREDIT
            return
        # What the adapter had in hand, it had against the parent.
        self._sums[0] = min(self._sums[0], 0.0)
        if self.way == "fast":
            self.way = "both"

    def fast_reset(self) -> None:
        """The adapter begins anew, since it was shown to harm: the version answers until labels speak against it."""
        self.restart()
        self.way = "version"
        self._sums[1], self._squares[1] = CREDIT, CREDIT

    def weigh(self, fast: F64, version: F64, both: F64) -> None:
        """Take in the losses (n,) of newly labelled rows, oldest first; rows on which one is not known say nothing."""
        known = np.isfinite(fast) & np.isfinite(version) & np.isfinite(both)
        count = int(known.sum())
        if not count:
            return
        drops = np.stack((both[known] - fast[known], both[known] - version[known])).clip(-WORST_LOSS, WORST_LOSS)
        weights = (1.0 - 1.0 / MEMORY_ROWS) ** np.arange(count - 1, -1, -1.0)
        kept = (1.0 - 1.0 / MEMORY_ROWS) ** count
        self._sums = kept * self._sums + drops @ weights
        self._squares = kept * self._squares + np.square(drops) @ weights
        errors = self._sums / np.sqrt(np.maximum(self._squares, 1e-12))
        best = int(errors.argmax())
        if errors[best] > SURE:
            self.way = WAYS[best]
        elif self.way == "both" or errors[WAYS.index(self.way)] <= 0.0:
            self.way = "both"

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"way": self.way, "sums": self._sums.copy(), "squares": self._squares.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.way = WAYS[WAYS.index(state["way"])]
        self._sums, self._squares = np.array(state["sums"]), np.array(state["squares"])


def join_version(
    predicted: Predicted,
    meter: Meter,
    x_B: Tensor,
    fast: Tensor,
    version: Tensor,
    features: Tensor | None,
    kind: str,
    way: Way,
) -> None:
    """Put a version beside the adapter whose answers are in ``predicted``: ``way`` says who answers.

    Whatever answers, the detectors go on reading the frozen model's rows, and the signals the adapter's.

    Args:
        predicted: changed.
        meter: measures rows.
        x_B: (B, *input_shape).
        fast: (B, K) logits of the adapter, or (B, 1) or (B,) values.
        version: the same of the version.
        features: (B, D) of the version, or None.
        kind: ``logits`` or ``values``.
        way: the adapter, the version, or the mean of their probabilities.
    """
    predicted.watched, predicted.base = predicted.watched or predicted.rows, predicted.base or predicted.rows
    own = meter.measure(x_B, version, features, kind=kind)
    if kind == "values":
        both = meter.measure(x_B, (fast.float().reshape(version.shape) + version.float()) / 2, None, kind=kind)
    else:
        both = meter.measure(x_B, (fast.float().softmax(1) + version.float().softmax(1)) / 2, None, kind="probs")
    predicted.version_broken = not own.finite()
    predicted.version, predicted.both, predicted.way = own.prediction, both.prediction, way
    predicted.rows = {"fast": predicted.rows, "version": own, "both": both}[way]
