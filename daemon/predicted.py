"""What is known of one batch after its prediction, and of one version of the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from daemon.records import F32
from daemon.signals import Rows


@dataclass(slots=True)
class Version:
    """A promoted set of weights: what changed against the frozen model, and why it was kept."""

    number: int
    delta: dict[str, Tensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


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
    first: int | None = None
    """Number of the first row in the state of a deciding adapter; None where that was not asked."""
    adapt_seconds: float | None = None
    adapted_rows: Rows | None = None
    version_mean_p: F32 | None = None
    proxy: F32 | None = None
    """(n,) adapted minus version feature shift, on the rows where both ran."""
