"""What every detector of this package is: a small state machine that reads one number at a time.

A new detector is one file with one class, decorated with ``detectors.registry.register``. Keep the module light to
import (numpy only): a heavy library is imported when the detector is built.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


class Detector(ABC):
    """Reads a stream of finite, standardised values and says at which of them the stream has changed.

    After each update ``drift`` and ``warning`` speak about that update alone. After an alarm the detector restarts
    as if new. The ``threshold`` is the one knob that calibration turns: a greater one means fewer alarms, and a
    detector picks its scale so that the logarithm of the mean time between false alarms grows about linearly in it.
    """

    name: ClassVar[str] = ""
    """Name in the registry; set by ``register``."""
    assumes_independence: ClassVar[bool] = False
    """True where the method's own test takes the values as independent: they are then prewhitened first."""

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
    def options(self) -> dict[str, float]:
        """The constructor's arguments except the threshold: a calibrated threshold is valid for these alone."""

    @abstractmethod
    def with_threshold(self, threshold: float) -> Self:
        """A new detector, in its start state, with the same options and another threshold."""

    @abstractmethod
    def update(self, value: float) -> Self:
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
