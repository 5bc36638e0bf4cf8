"""ADWIN, from river's compiled core."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import compress, count
from typing import Any, Self

import numpy as np

from detectors.base import F64, Detector, positive
from detectors.registry import register

DEFAULT_THRESHOLD = math.log(2.0 / 0.002)
"""River's default confidence level, 0.002."""


@register("adwin")
class ADWIN(Detector):
    """Adaptive windowing: drift when two parts of a growing window differ in mean by more than chance allows.

    A. Bifet, R. Gavalda, "Learning from time-changing data with adaptive windowing", SIAM SDM 2007.

    The bound takes the values as independent, so ``Calibrated`` prewhitens them first. ADWIN learns its own mean and
    variance: it needs no reference for the location, and after an alarm it takes the new level for normal. It tests
    every ``clock`` values only, so that an alarm can come up to ``clock`` values late. It never warns.

    ``threshold`` is ln(2 / delta), as it stands in the paper's bound; delta is river's confidence level. The bound is
    conservative, so that a calibrated delta is often near 1. ``statistic`` is the mean of the window, not to be
    compared with the threshold: river does not give out the quantity that it tests.

    The alarms are those of ``river.drift.ADWIN`` with the same settings (a test compares them). The compiled class
    (river >= 0.25) is taken from ``river._river_rust``, from where river itself takes it: importing ``river.drift``
    would also import scipy and river's data sets, three seconds at each start of the process. The state is the
    extension's own binary form (no Python pickle) and therefore tied to river's version; each restored state is
    checked against the window's width, total and variance.
    """

    assumes_independence = True

    def __init__(
        self,
        threshold: float = DEFAULT_THRESHOLD,
        *,
        clock: int = 32,
        max_buckets: int = 5,
        min_window_length: int = 5,
        grace_period: int = 10,
    ) -> None:
        from river._river_rust.drift import AdaptiveWindowing  # loads the extension: only for who builds an ADWIN

        self._threshold = positive("threshold", threshold)
        if not (delta := 2.0 * math.exp(-self._threshold)) > 0.0:
            raise ValueError(f"threshold must be under 745: delta = 2 exp(-threshold) is 0 at {threshold}")
        self._options: dict[str, int] = {
            "clock": int(positive("clock", clock)),
            "max_buckets": int(positive("max_buckets", max_buckets)),
            "min_window_length": int(positive("min_window_length", min_window_length)),
            "grace_period": int(positive("grace_period", grace_period)),
        }
        self._new: Callable[[], Any] = partial(AdaptiveWindowing, delta=delta, **self._options)
        self._window = self._new()

    @property
    def threshold(self) -> float:
        """ln(2 / delta)."""
        return self._threshold

    @property
    def statistic(self) -> float:
        """Mean of the current window, in the values' unit; 0 while it is empty."""
        width = float(self._window.get_width())
        return float(self._window.get_total()) / width if width else 0.0

    def options(self) -> dict[str, float]:
        """River's settings, delta excepted."""
        return dict(self._options)

    def with_threshold(self, threshold: float) -> Self:
        """An empty ADWIN with delta = 2 exp(-threshold)."""
        return type(self)(threshold, **self._options)

    def update(self, value: float) -> Self:
        """Read one value. Raises ``ValueError`` if it is not finite."""
        if not math.isfinite(value):
            raise ValueError(f"ADWIN needs finite values, got {value!r}: drop the others first, as Calibrated does")
        self.drift = bool(self._window.update(value))
        if self.drift:
            self._window = self._new()
        return self

    def update_many(self, values: F64) -> list[int]:
        """Read ``values`` (B,); indices of the alarms. Raises ``ValueError`` if a value is not finite."""
        values = np.asarray(values, dtype=np.float64)
        if not values.size:
            return []
        if not np.isfinite(values).all():
            raise ValueError("ADWIN needs finite values: drop the others first, as Calibrated does")
        alarms: list[int] = []
        rest = iter(values.tolist())
        # One pass in C up to each alarm: a Python loop would cost more than the updates.
        while (alarm := next(compress(count(), map(self._window.update, rest)), None)) is not None:
            alarms.append(alarm + (alarms[-1] + 1 if alarms else 0))
            self._window = self._new()
        self.drift = bool(alarms) and alarms[-1] == values.size - 1
        return alarms

    def reset(self) -> None:
        """An empty window."""
        self._window = self._new()
        self.drift = False

    def state_dict(self) -> dict[str, Any]:
        """The window in the extension's binary form, three of its numbers as a check, the threshold and the flag."""
        return {
            "threshold": self._threshold,
            "window": bytes(self._window.__getstate__()),
            "check": self._fingerprint(),
            "drift": self.drift,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore. Raises ``ValueError`` if the window was not written by this version of river."""
        restored = self.with_threshold(float(state["threshold"]))
        try:
            restored._window.__setstate__(state["window"])
        except BaseException as error:
            # A Rust panic reaches Python as pyo3's PanicException, which is no Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError("ADWIN's window is damaged or from another version of river: start it anew") from error
        if restored._fingerprint() != [float(number) for number in state["check"]]:
            raise ValueError("ADWIN's window is from another version of river: start it anew")
        self._threshold, self._new, self._window = restored._threshold, restored._new, restored._window
        self.drift = bool(state["drift"])

    def _fingerprint(self) -> list[float]:
        window = self._window
        return [float(window.get_width()), float(window.get_total()), float(window.get_variance())]
