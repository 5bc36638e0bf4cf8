"""What is known of one batch after its prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from daemon.records import F32
from daemon.signals import Rows

Way = Literal["fast", "version", "both"]
"""Who answers where a deciding adapter and a version stand beside each other."""


@dataclass(slots=True)
class Predicted:
    """One batch: what is answered, and what the other layers would have answered (NaN where they did not run)."""

    rows: Rows
    """The answer: the adapted model's where it is served, else the version's."""
    adapted: F32
    """(B,) prediction of the fast adapter, served or in shadow."""
    version: F32
    """(B,) prediction of the current version without fast adaptation."""
    frozen: F32
    """(B,) prediction of the frozen model."""
    weight: F32
    """(B,) one over the chance that the twins ran on a row."""
    number: int = 0
    """Which version answers."""
    served_adapted: bool = False
    """Whether the adapter's answer is what goes out, for at least one row."""
    base: Rows | None = None
    """What the signals are read from where it isn't ``rows``: a deciding adapter's answer before its corrections."""
    watched: Rows | None = None
    """What the detectors read where it isn't ``base``: the version's own rows, where a deciding adapter ran it."""
    changed_by: NDArray[np.int8] | None = None
    """(B,) what a deciding adapter answered each row with, 0 for the version; None for other adapters."""
    both: F32 | None = None
    """(B,) prediction of a deciding adapter and the version together; None where only one of them ran."""
    way: Way | None = None
    """Which of the two answers, or both; None where only one of them ran."""
    version_broken: bool = False
    """Whether the version beside a deciding adapter gave values that are not finite."""
    first: int | None = None
    """Number of the first row in the state of a deciding adapter; None where that was not asked."""
    adapt_seconds: float | None = None
    adapted_rows: Rows | None = None
    version_mean_p: F32 | None = None
    proxy: F32 | None = None
    """(n,) adapted minus version feature shift, on the rows where both ran."""


def scatter(blank: F32, index: np.ndarray, values: F32) -> F32:
    """``values`` (n,) at ``index`` of a copy of ``blank`` (B,)."""
    if len(index) == len(blank):
        return values
    result = blank.copy()
    result[index] = values
    return result


def sampled(first: int, count: int, share: float) -> np.ndarray:
    """Which of ``count`` rows that begin with number ``first`` are in a sample of this share.

    By a hash of the number, so that sensors taking turns don't alias with it.
    """
    if share >= 1.0:
        return np.arange(count)
    index = np.arange(first, first + count, dtype=np.uint64) * np.uint64(2654435761)
    return np.flatnonzero((index & np.uint64(0xFFFFFFFF)) < np.uint64(share * 2**32))
