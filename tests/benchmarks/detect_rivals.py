"""The detectors of other libraries as they come, and one that is blind.

River 0.26 (https://riverml.xyz) and frouros 0.9 (https://frouros.readthedocs.io) are measured, not copied.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Read = Callable[[F64], list[Any]]
P_VALUE = 0.01
"""At which frouros' IncrementalKSTest, which only gives p-values, is taken to alarm."""
WINDOW = 100


class Watch(Protocol):
    """What a detector must have to be measured here."""

    def update_many(self, values: F64) -> list[int]: ...


class Restartable(Watch, Protocol):
    """A detector that can be used for the next run."""

    def reset(self) -> None: ...


class EveryN:
    """Looks at nothing: alarms every ``n`` rows, from a random row on."""

    def __init__(self, n: int, rng: np.random.Generator) -> None:
        self._n, self._rng = n, rng
        self.reset()

    def update_many(self, values: F64) -> list[int]:
        """Indices of the alarms."""
        alarms = list(range(self._left, len(values), self._n))
        self._left = (self._left - len(values)) % self._n
        return alarms

    def reset(self) -> None:
        """Another random row."""
        self._left = int(self._rng.integers(self._n))


class Raw:
    """A detector of another library with its own defaults, on raw values; new after each alarm."""

    def __init__(self, new: Callable[[], Callable[[Any], bool]], read: Read) -> None:
        self._new, self._read = new, read
        self._update = new()

    def update_many(self, values: F64) -> list[int]:
        """Indices of the alarms."""
        alarms = []
        for index, value in enumerate(self._read(values)):
            if self._update(value):
                alarms.append(index)
                self._update = self._new()
        return alarms

    def reset(self) -> None:
        """As new."""
        self._update = self._new()


def _floats(reference: F64) -> Read:
    return lambda values: values.tolist()


def _clipped(reference: F64) -> Read:
    return lambda values: np.clip(values, 0.0, 1.0).tolist()


def _errors(reference: F64) -> Read:
    middle = float(np.median(reference))
    return lambda values: (values > middle).tolist()


def _right(reference: F64) -> Read:
    middle = float(np.median(reference))
    return lambda values: (values <= middle).astype(int).tolist()


def _ones(reference: F64) -> Read:
    middle = float(np.median(reference))
    return lambda values: (values > middle).astype(int).tolist()


RIVER: dict[str, Callable[[F64], Read]] = {
    "ADWIN": _floats,
    "PageHinkley": _floats,
    "KSWIN": _floats,
    "binary.DDM": _errors,
    "binary.EDDM": _errors,
    "binary.FHDDM": _errors,
    "binary.HDDMA": _clipped,
    "binary.HDDMW": _clipped,
}
"""By name in ``river.drift``: how the raw values are read."""
FROUROS: dict[str, Callable[[F64], Read]] = {
    "CUSUM": _floats,
    "PageHinkley": _floats,
    "GeometricMovingAverage": _floats,
    "ADWIN": _floats,
    "KSWIN": _floats,
    "BOCD": _floats,
    "STEPD": _right,
    "ECDDWT": _ones,
    "RDDM": _ones,
}
"""By name in ``frouros.detectors.concept_drift``."""


def has_frouros() -> bool:
    """Whether frouros is installed; the command works without it."""
    return all(importlib.util.find_spec(name) for name in ("frouros", "tqdm"))


def river_raw(name: str, reference: F64) -> Raw:
    """``river.drift.<name>`` with its defaults."""
    from river import drift

    owner: Any = drift
    for part in name.split("."):
        owner = getattr(owner, part)
    options = {"seed": 0} if name == "KSWIN" else {}

    def new() -> Callable[[Any], bool]:
        detector = owner(**options)

        def update(value: Any) -> bool:
            detector.update(value)
            return bool(detector.drift_detected)

        return update

    return Raw(new, RIVER[name](reference))


def frouros_raw(name: str, reference: F64) -> Raw:
    """``frouros.detectors.concept_drift.<name>`` with its defaults, or the incremental KS test."""
    if name == "IncrementalKSTest":
        return Raw(lambda: _ks_test(reference), _floats(reference))
    return Raw(lambda: frouros_update(name, {}), FROUROS[name](reference))


def frouros_update(name: str, settings: dict[str, Any]) -> Callable[[Any], bool]:
    """Update of a new ``frouros.detectors.concept_drift.<name>``, which says whether it alarmed."""
    import frouros.detectors.concept_drift as library

    detector: Any = getattr(library, name)(getattr(library, f"{name}Config")(**settings))

    def update(value: Any) -> bool:
        detector.update(value=value)
        return bool(detector.drift)

    return update


def _ks_test(reference: F64) -> Callable[[Any], bool]:
    from frouros.detectors.data_drift import IncrementalKSTest

    test: Any = IncrementalKSTest(window_size=WINDOW)
    test.fit(X=reference)

    def update(value: Any) -> bool:
        result, _ = test.update(value=value)
        return result is not None and float(np.ravel(result.p_value)[0]) < P_VALUE

    return update
