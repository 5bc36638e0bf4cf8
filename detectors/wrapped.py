"""What the detectors taken from river share: how one of its objects is fed, restarted, saved and restored."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from operator import attrgetter
from typing import Any, ClassVar, Self

import numpy as np

from detectors.base import F64, Detector, positive

_ACCEPTS: dict[str, Callable[[float], bool]] = {
    "standard": math.isfinite,
    "unit": lambda value: 0.0 <= value <= 1.0,
    "binary": lambda value: value == 0.0 or value == 1.0,
}


class Wrapped(Detector):
    """One detector of river 0.26 behind this package's interface: its alarms are exactly river's.

    A subclass builds river's object and lists the attributes that change as it reads. River starts anew at the update
    after an alarm; here the new object is made at the alarm itself, which gives the same alarms and leaves a
    ``statistic`` of 0 behind each. Building one imports ``river.drift``, and with it scipy: two seconds, once.
    """

    assumes_independence = True
    calibration_rows = 600_000
    kept: ClassVar[tuple[str, ...]] = ()
    """Attributes of river's object, dotted, that make up its state; each a number or None."""
    accepts: ClassVar[str] = ""
    """The domain of the values that it takes, where that is wider than ``domain``; else empty."""

    def __init__(self, threshold: float, **options: Any) -> None:
        self._options = options
        self._threshold = positive("threshold", threshold)
        self._river = self._new()

    @abstractmethod
    def _new(self) -> Any:
        """River's object with these options and this threshold, before its first value."""

    @property
    def threshold(self) -> float:
        """The bound in force; the class says in which unit."""
        return self._threshold

    def options(self) -> dict[str, Any]:
        """River's settings, without those that the threshold sets."""
        return dict(self._options)

    def with_threshold(self, threshold: float) -> Self:
        """A new detector with the same options and another threshold."""
        return type(self)(threshold, **self._options)

    def update(self, value: float) -> Self:
        """Read one value. Raises ``ValueError`` if it is not finite or outside the detector's domain."""
        domain = self.accepts or self.domain
        if not _ACCEPTS[domain](value):
            require_domain(self.name, domain, np.array([value], dtype=np.float64))
        self._river.update(self._read(float(value)))
        self._settle()
        return self

    def update_many(self, values: F64) -> list[int]:
        """Read ``values`` (B,); indices of the alarms. Raises ``ValueError`` as ``update`` does, before any is read."""
        values = np.asarray(values, dtype=np.float64)
        if not values.size:
            return []
        require_domain(self.name, self.accepts or self.domain, values)
        alarms: list[int] = []
        river = self._river
        update = river.update
        for index, value in enumerate(self._read(values).tolist()):
            update(value)
            if river.drift_detected:
                alarms.append(index)
                self._settle()
                river = self._river
                update = river.update
        # An alarm on the last value has replaced river's object, whose flags are taken already.
        if not alarms or alarms[-1] != values.size - 1:
            self._settle()
        return alarms

    def _read(self, values: Any) -> Any:
        """What river's object reads in place of ``values``, a float or an array (B,)."""
        return values

    def _settle(self) -> None:
        """Take over the flags of the last update, and start anew after an alarm."""
        self.drift = bool(self._river.drift_detected)
        self.warning = bool(getattr(self._river, "warning_detected", False))
        if self.drift:
            self._river = self._new()

    def reset(self) -> None:
        """As new."""
        self._river = self._new()
        self.drift = self.warning = False

    def state_dict(self) -> dict[str, Any]:
        """River's numbers by name, the flags and the threshold."""
        return {
            "threshold": self._threshold,
            "river": self._dump(),
            "drift": self.drift,
            "warning": self.warning,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; the options are those of the constructor. Raises ``ValueError`` if the state does not fit them."""
        restored = self.with_threshold(float(state["threshold"]))
        if wrong := set(restored._dump()).symmetric_difference(state["river"]):
            raise ValueError(
                f"{self.name}: missing or unknown numbers {sorted(wrong)} in the state: start the detector anew"
            )
        restored._fill(state["river"])
        if hasattr(restored._river, "_warning_detected"):
            # EDDM's warning stays where a value changes nothing.
            restored._river._warning_detected = bool(state["warning"])
        self._threshold, self._river = restored._threshold, restored._river
        self.drift, self.warning = bool(state["drift"]), bool(state["warning"])

    def _dump(self) -> dict[str, Any]:
        return {path: attrgetter(path)(self._river) for path in self.kept}

    def _fill(self, numbers: dict[str, Any]) -> None:
        """Put what ``_dump`` gave into river's object, which is new."""
        for path in self.kept:
            owner, _, attribute = path.rpartition(".")
            setattr(attrgetter(owner)(self._river) if owner else self._river, attribute, numbers[path])


def require_domain(name: str, domain: str, values: F64) -> None:
    """Raise ``ValueError``, in the name of detector ``name``, unless ``values`` (B,) are finite and in ``domain``."""
    if not np.isfinite(values).all():
        raise ValueError(f"{name} needs finite values: drop the others first, as Calibrated does")
    if domain == "binary":
        wrong, expected = values[(values != 0.0) & (values != 1.0)], "0 and 1 alone"
    elif domain == "unit":
        wrong, expected = values[(values < 0.0) | (values > 1.0)], "numbers from 0 to 1"
    else:
        return
    if wrong.size:
        raise ValueError(f"{name} reads {expected}, got {wrong[0]:g}: map the signal first, as Calibrated does")


def probability(threshold: float) -> float:
    """exp(-threshold), which must be above 0. Raises ``ValueError`` where it is not."""
    if not (level := math.exp(-positive("threshold", threshold))) > 0.0:
        raise ValueError(f"threshold must be under 745: exp(-threshold) is 0 at {threshold}")
    return level


def whole(name: str, value: float, least: int = 1) -> int:
    """``value`` as an int. Raises ``ValueError`` unless it is a whole number of at least ``least``."""
    if not (math.isfinite(value) and value == int(value) >= least):
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)
