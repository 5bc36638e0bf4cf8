"""What every detector of this package is: a small state machine that reads one value, or one row, at a time.

A new detector is one file with one class, decorated with ``detectors.registry.register``. Keep the module light to
import (numpy only): a heavy library is imported when the detector is built.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


class Detector(ABC):
    """Reads a stream of finite, standardised values and says at which of them the stream has changed.

    A detector with ``reads = "rows"`` takes a row of D numbers where others take one number: ``values`` is then (B, D).

    After each update ``drift`` and ``warning`` speak about that update alone. After an alarm the detector restarts
    as if new. The ``threshold`` is the one knob that calibration turns: a greater one means fewer alarms, and a
    detector picks its scale so that the logarithm of the mean time between false alarms grows about linearly in it.
    """

    name: ClassVar[str] = ""
    """Name in the registry; set by ``register``."""
    reads: ClassVar[Literal["values", "rows"]] = "values"
    """Whether an update is one number or one row (D,) of them."""
    domain: ClassVar[Literal["standard", "unit", "binary", "raw"]] = "standard"
    """What ``Calibrated`` makes of the signal: mean 0 and deviation 1; numbers from 0 to 1; only 0 and 1 (of a signal
    with two values the greater is 1, of others what exceeds the reference's median); or the finite values as they
    are."""
    assumes_independence: ClassVar[bool] = False
    """True where the method's own test takes the values as independent: they are then prewhitened first."""
    calibration_rows: ClassVar[int] = 1_200_000
    """Most rows that one calibration may simulate; less where an update is slow."""
    advisory: ClassVar[bool] = False
    """True where the detector only warns: ``drift`` stays False, ``update_many`` gives the indices of warnings."""

    drift: bool = False
    warning: bool = False

    @property
    @abstractmethod
    def threshold(self) -> float:
        """The bound in force; positive."""

    @property
    @abstractmethod
    def statistic(self) -> float:
        """The evidence so far, for a metric."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The constructor's arguments except the threshold: a calibrated threshold is valid for these alone."""

    @abstractmethod
    def with_threshold(self, threshold: float) -> Self:
        """A new detector, in its start state, with the same options, what ``fit`` learnt, and another threshold."""

    def fit(self, reference: F64, *, gain: float = 1.0, jump: float = 1.0) -> Self:
        """A new detector, in its start state, with what it needs to know of ``reference``; the threshold stays.

        Args:
            reference: values without drift as they will be read (standardised, perhaps prewhitened), (N,) or (N, D).
            gain: what a lasting shift of the signal by one standard deviation adds to each value read; under 1 where
                prewhitening takes a part of it away.
            jump: what it adds to the first value read after the shift.
        """
        return self.with_threshold(self.threshold)

    def fitted(self) -> dict[str, Any]:
        """What ``fit`` learnt, JSON-able; empty for a detector that needs nothing."""
        return {}

    def with_fitted(self, fitted: dict[str, Any]) -> Self:
        """A new detector, in its start state, with what ``fitted`` gave. Raises ``ValueError`` if it does not fit."""
        if fitted:
            raise ValueError(f"{self.name} learns nothing from a reference, but was given {sorted(fitted)}")
        return self.with_threshold(self.threshold)

    @abstractmethod
    def update(self, value: Any) -> Self:
        """Read one finite value. Returns itself, so that ``detector.update(v).drift`` reads well."""

    @abstractmethod
    def update_many(self, values: F64) -> list[int]:
        """Read ``values`` (B,) in order; return the indices at which ``drift`` was raised.

        The state afterwards is bit-identical to that after ``update`` value by value, so that it does not depend
        on how a stream was cut into batches.
        """

    @abstractmethod
    def reset(self) -> None:
        """Go back to the start state; options and threshold stay."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on bit-identically, threshold included; plain values only."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave. Raises ``ValueError`` if it does not fit."""


def positive(name: str, value: float) -> float:
    """``value`` as a float. Raises ``ValueError`` unless it is finite and above zero."""
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)
