"""FHDDM, from river."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from detectors.registry import register
from detectors.wrapped import Wrapped, probability, whole

DEFAULT_THRESHOLD = -math.log(0.000001)
"""River's default confidence level, 1e-6."""


@register("fhddm")
class FHDDM(Wrapped):
    """Fast Hoeffding drift detection method: the mean of a sliding window has left the best that it has had.

        drift when u_max - u > sqrt(threshold / (2 W))

    where u is the share of the wanted value among the last W = ``sliding_window_size`` values and u_max its maximum
    since the restart. With ``short_window_size`` a second, shorter window is tested in the same way (stacking FHDDM).

    A. Pesaranghader, H. L. Viktor, "Fast Hoeffding drift detection method for evolving data streams", ECML PKDD 2016;
    A. Pesaranghader, H. Viktor, E. Paquet, "Reservoir of diverse adaptive learners and stacking fast Hoeffding drift
    detection methods for evolving data streams", Machine Learning 107, 2018.

    Reads 0 and 1. ``watch`` says which change is noticed: a "rise" of the share of ones, which are errors as for the
    other detectors here (the wanted value is 0), or a "fall" of it. The paper's input is 1 for a correct prediction,
    and ``river.drift.binary.FHDDM`` alarms at a fall of what it is given, although its documentation calls 1 an error.
    So the alarms are those of river's class reading the same values for "fall", and 1 - value for "rise".

    ``threshold`` is -ln of river's ``confidence_level``. The shares are multiples of 1 / W, so that thresholds between
    two of their steps alarm alike. No alarm comes before the window is full. It never warns.
    """

    domain = "binary"
    kept = ("n_one", "_u_max")

    def __init__(
        self,
        threshold: float = DEFAULT_THRESHOLD,
        *,
        sliding_window_size: int = 100,
        short_window_size: int | None = None,
        watch: str = "rise",
    ) -> None:
        size = whole("sliding_window_size", sliding_window_size)
        short = None if short_window_size is None else whole("short_window_size", short_window_size)
        if short is not None and short > size:
            raise ValueError(f"short_window_size must be at most sliding_window_size ({size}), got {short}")
        if watch not in ("rise", "fall"):
            raise ValueError(f"watch must be 'rise' or 'fall', got {watch!r}")
        super().__init__(threshold, sliding_window_size=size, short_window_size=short, watch=watch)

    def _new(self) -> Any:
        from river.drift.binary import FHDDM as River  # imports scipy: only for who builds one

        settings = {name: size for name, size in self._options.items() if name != "watch"}
        return River(confidence_level=probability(self._threshold), **settings)

    def _read(self, values: Any) -> Any:
        return 1.0 - values if self._options["watch"] == "rise" else values

    @property
    def statistic(self) -> float:
        """2 W (u_max - u)**2, to be compared with the threshold; 0 until the window is full.

        River's object drops the oldest value as soon as it has been tested, so that u is the mean of the last W - 1
        values here, and differs by up to 1 / W from the one tested.
        """
        river, size = self._river, self._options["sliding_window_size"]
        held = len(river._sliding_window)
        if held < max(1, size - 1):
            return 0.0
        fall = max(0.0, river._u_max - river.n_one / held)
        return float(2.0 * size * fall * fall)

    def _dump(self) -> dict[str, Any]:
        """With the window's values, and the maximum of the short window where there is one."""
        numbers = super()._dump() | {"_sliding_window": list(self._river._sliding_window)}
        if self._options["short_window_size"] is not None:
            numbers["_u_short_max"] = self._river._u_short_max
        return numbers

    def _fill(self, numbers: dict[str, Any]) -> None:
        super()._fill(numbers)
        self._river._sliding_window = deque(numbers["_sliding_window"], maxlen=self._options["sliding_window_size"])
        if self._options["short_window_size"] is not None:
            self._river._u_short_max = numbers["_u_short_max"]
