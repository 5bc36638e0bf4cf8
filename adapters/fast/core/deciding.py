"""The contract of an adapter that decides by itself when to answer otherwise than the model that it is given."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from adapters.fast.core.base import FastAdapter
from adapters.fast.core.seen import Seen


class DecidingAdapter(FastAdapter):
    """Answers as the given model does until it has shown, to itself, that another answer is better.

    It is given every batch, whatever is known of a shift; who watches the stream tells it so by `alert`.
    """

    labelled = True

    alert: bool | None = None
    """Whether the caller's detectors see a shift; None: it has none."""
    numbered = 0
    """Usable rows that `forward` has been given, so the number of the next one."""
    ways: tuple[str, ...] = ()
    """Names of what can change an answer; `changed_by` has a bit for each, the lowest for the first."""
    changed_by: NDArray[np.int8] = np.zeros(0, np.int8)
    """(B,) what answered each usable row of the latest call: 0, the given model to the bit, or the bits of `ways`."""
    frozen_share = 1.0
    """Chance that the given model was run on a row of the latest call."""
    base_outputs: Tensor | None = None
    """(B, V) of the latest call before corrections that features know nothing of: with them they make sense."""
    frozen: Seen | None = None
    """What the given model made of those rows of the latest call that it was run on."""
