"""Early warning: a system that recovers ever more slowly from small disturbances is near a change. Advice, no alarm."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from typing import Any, ClassVar, Literal, Self

import numpy as np

from detectors.base import F64, Detector, positive
from detectors.registry import register

LEAST_POINTS = 8
"""Blocks below which the order of two indicators says nothing."""


@register("early_warning")
class EarlyWarning(Detector):
    """Warns when variance and lag-1 autocorrelation of the signal both keep rising: critical slowing down.

    The stream is cut into blocks of ``block`` values. In each, with the block's own mean taken out so that a slow drift
    of the level is not mistaken for variance,

        variance v = sum_t d_t^2 / block        autocorrelation a = sum_t d_t d_{t+1} / sum_t d_t^2

    Kendall's S of an indicator over the last ``points`` blocks is the number of pairs that rose minus those that
    fell; z = S / sqrt(n (n - 1) (2 n + 5) / 18) is about standard Gaussian where there is no trend. Looked at once per
    block, from 8 blocks on: statistic = min(z_v, z_a)^2 with ``need="both"``, max(z_v, z_a)^2 / 2 with ``need="one"``,
    where a z below 0 counts as 0.

    It is advisory: ``drift`` is never raised, for nothing has changed yet. Here "alarm" means warning: ``update_many``
    returns the indices at which a warning is raised, and the threshold is calibrated on them. After a warning the trend
    is looked for anew. Slowing down comes before some kinds of change only (a bifurcation reached slowly), not before
    a sudden one. A rising noise level raises v alone, but then a chance rise of a is all that is missing: noise that
    grows fourfold in 3,000 values is warned of in six cases of seven at the default threshold. Dependence within about
    a block is seen, longer one is not: choose ``block`` well above the signal's autocorrelation time. A trend shorter
    than 8 blocks is not seen.

    M. Scheffer et al., "Early-warning signals for critical transitions", Nature 461, 2009; V. Dakos et al., "Methods
    for detecting early warnings of critical transitions in time series", PLoS ONE 7, 2012.

    The default threshold gives independent Gaussian values one warning in about 10,000 where both must rise. In a
    correlated signal both indicators share a part of their noise: at a lag-1 autocorrelation of 0.8 the same threshold
    warns once in 2,400. ``Calibrated`` finds the threshold for it.
    """

    advisory: ClassVar[bool] = True
    calibration_rows: ClassVar[int] = 200_000

    def __init__(
        self, threshold: float = 2.0, *, block: int = 32, points: int = 32, need: Literal["both", "one"] = "both"
    ) -> None:
        if block < 4:
            raise ValueError(f"block must be at least 4 values, got {block}")
        if points < LEAST_POINTS:
            raise ValueError(f"points must be at least {LEAST_POINTS} blocks, got {points}")
        if need not in ("both", "one"):
            raise ValueError(f"need must be 'both' or 'one', got {need!r}")
        self._threshold = positive("threshold", threshold)
        self._block, self._points, self._need = int(block), int(points), need
        self._part: list[float] = []
        self._trends = (_Trend(self._points), _Trend(self._points))
        self._statistic = 0.0

    @property
    def threshold(self) -> float:
        """The statistic above which it warns; about the -ln of the chance of such trends in one look."""
        return self._threshold

    @property
    def statistic(self) -> float:
        """Size of the common trend at the end of the last block; 0 after a warning."""
        return self._statistic

    @property
    def trends(self) -> tuple[float, float]:
        """Kendall's tau of variance and of autocorrelation over the blocks at hand, from -1 to 1."""
        variance, autocorrelation = self._trends
        return variance.tau, autocorrelation.tau

    def options(self) -> dict[str, Any]:
        """``block``, ``points`` and ``need``."""
        return {"block": self._block, "points": self._points, "need": self._need}

    def with_threshold(self, threshold: float) -> Self:
        """A new detector without values and with another threshold."""
        return type(self)(threshold, **self.options())

    def update(self, value: float) -> Self:
        """Read one value. Raises ``ValueError`` if it is not finite."""
        value = float(value)
        if not math.isfinite(value):
            raise ValueError(f"EarlyWarning needs finite values, got {value!r}: drop the others first")
        self._part.append(value)
        self.warning = False
        if len(self._part) == self._block:
            self._look(np.array([self._part]))
            self._part = []
        return self

    def update_many(self, values: F64) -> list[int]:
        """Read ``values`` (B,); indices of the warnings. Raises ``ValueError`` if a value is not finite."""
        values = np.asarray(values, dtype=np.float64)
        if not values.size:
            return []
        if not math.isfinite(values.sum()):
            raise ValueError("EarlyWarning needs finite values: drop the others first, as Calibrated does")
        before = len(self._part)
        joined = np.concatenate((self._part, values))
        whole = joined.size - joined.size % self._block
        warned = self._look(joined[:whole].reshape(-1, self._block))
        self._part = joined[whole:].tolist()
        self.warning &= whole == joined.size
        return [(block + 1) * self._block - before - 1 for block in warned]

    def _look(self, blocks: F64) -> list[int]:
        """Take ``blocks`` (M, block) one after the other; which of them ended in a warning. ``warning``: the last."""
        self.warning = False
        warned: list[int] = []
        if not len(blocks):
            return warned
        centred = blocks - blocks.mean(1, keepdims=True)
        power = np.square(centred).sum(1)
        product = (centred[:, 1:] * centred[:, :-1]).sum(1)
        # A constant block has no autocorrelation.
        correlation = np.divide(product, power, out=np.zeros_like(power), where=power > 0.0)
        for index, indicators in enumerate(zip(power.tolist(), correlation.tolist(), strict=True)):
            z_v, z_a = (trend.add(value) for trend, value in zip(self._trends, indicators, strict=True))
            z = min(z_v, z_a) if self._need == "both" else max(z_v, z_a)
            self._statistic = max(z, 0.0) ** 2 * (1.0 if self._need == "both" else 0.5)
            self.warning = self._statistic > self._threshold
            if self.warning:
                warned.append(index)
                self._restart()
        return warned

    def _restart(self) -> None:
        self._trends = (_Trend(self._points), _Trend(self._points))
        self._statistic = 0.0

    def reset(self) -> None:
        """No values, no trend."""
        self._restart()
        self._part = []
        self.warning = False

    def state_dict(self) -> dict[str, Any]:
        """The unfinished block, the indicators of the last blocks, the statistic, the flag and the threshold."""
        variance, autocorrelation = self._trends
        return {
            "threshold": self._threshold,
            "part": list(self._part),
            "variance": list(variance.values),
            "autocorrelation": list(autocorrelation.values),
            "statistic": self._statistic,
            "warning": self.warning,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; the options are those of the constructor. Raises ``ValueError`` if the state does not fit them."""
        part, variance, autocorrelation = (
            [float(value) for value in state[key]] for key in ("part", "variance", "autocorrelation")
        )
        if len(part) >= self._block or len(variance) > self._points or len(variance) != len(autocorrelation):
            raise ValueError("early_warning: the state is for another block or other points: start it anew")
        self._threshold = positive("threshold", state["threshold"])
        self._part = part
        self._trends = (_Trend(self._points, variance), _Trend(self._points, autocorrelation))
        self._statistic, self.warning = float(state["statistic"]), bool(state["warning"])


class _Trend:
    """Kendall's S over the last ``points`` values, kept up to date: O(log points) per value, and two short moves."""

    def __init__(self, points: int, values: list[float] | None = None) -> None:
        self.points = points
        self.values: list[float] = []
        """In their order."""
        self._ranked: list[float] = []
        self.score = 0
        for value in values or []:
            self.add(value)

    def add(self, value: float) -> float:
        """Take one more value, forget the oldest if there are too many; z of S, 0 while there are too few."""
        if len(self.values) == self.points:
            oldest = self.values.pop(0)
            del self._ranked[bisect_left(self._ranked, oldest)]
            self.score -= self._above(oldest)
        self.score -= self._above(value)
        self.values.append(value)
        insort(self._ranked, value)
        n = len(self.values)
        return self.score / math.sqrt(n * (n - 1) * (2 * n + 5) / 18.0) if n >= LEAST_POINTS else 0.0

    def _above(self, pivot: float) -> int:
        """How many values are above ``pivot`` minus how many are below."""
        return len(self._ranked) - bisect_right(self._ranked, pivot) - bisect_left(self._ranked, pivot)

    @property
    def tau(self) -> float:
        """S over the number of pairs."""
        n = len(self.values)
        return 2.0 * self.score / (n * (n - 1)) if n > 1 else 0.0
