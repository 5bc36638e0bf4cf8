"""The same detector on thousands of streams at once: one vectorised call per row of readings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detectors import cusum, e_detector
from detectors.base import F64, positive
from detectors.bootstrap import LARGEST
from detectors.cusum import CUSUM
from detectors.e_detector import EDetector

Mask = NDArray[np.bool_]


class Many(ABC):
    """S detectors of the same kind and threshold, slot by slot bit-identical to the single one.

    A slot's reading is standardised with its own ``location`` and ``scale`` (S,), which may be changed at any time. A
    reading that is not finite, or 1e100 deviations away, leaves its slot as it was and is counted in ``ignored``
    (S,). After an alarm that slot alone restarts as if new. ``warning`` (S,) speaks about the last update alone.
    """

    def __init__(self, slots: int, threshold: float, *, location: ArrayLike, scale: ArrayLike) -> None:
        self.slots = int(positive("slots", slots))
        self._threshold = positive("threshold", threshold)
        self.location: F64 = np.broadcast_to(np.asarray(location, dtype=np.float64), (self.slots,)).copy()
        self.scale: F64 = np.broadcast_to(np.asarray(scale, dtype=np.float64), (self.slots,)).copy()
        if not np.isfinite(self.location).all():
            raise ValueError("location must be finite in each slot")
        if not (np.isfinite(self.scale) & (self.scale > 0.0)).all():
            raise ValueError("scale must be finite and above 0 in each slot")
        self.ignored: NDArray[np.int64] = np.zeros(self.slots, dtype=np.int64)
        self.warning: Mask = np.zeros(self.slots, dtype=bool)

    @property
    def threshold(self) -> float:
        """The bound of all slots."""
        return self._threshold

    @property
    @abstractmethod
    def statistic(self) -> F64:
        """The evidence so far in each slot (S,); 0 after its alarm."""

    def update(self, values: ArrayLike, active: ArrayLike | None = None) -> NDArray[np.intp]:
        """Read one value in each slot, or only where ``active`` (S,) is true.

        Args:
            values: readings (S,), in the signals' own units.
            active: which slots have a reading; the others stay as they are, whatever stands in ``values``.

        Returns:
            Indices of the slots that alarmed, ascending.

        Raises:
            ValueError: ``values`` or ``active`` is not (S,).
        """
        readings = np.asarray(values, dtype=np.float64)
        if readings.shape != (self.slots,):
            raise ValueError(f"values must be ({self.slots},), one for each slot, got {readings.shape}")
        with np.errstate(over="ignore", invalid="ignore"):
            z = (readings - self.location) / self.scale
        live = np.abs(z) < LARGEST
        if active is None:
            self.ignored += ~live
        else:
            chosen = np.asarray(active, dtype=bool)
            if chosen.shape != (self.slots,):
                raise ValueError(f"active must be ({self.slots},), one for each slot, got {chosen.shape}")
            self.ignored += chosen & ~live
            live &= chosen
        alarms = np.flatnonzero(self._advance(np.where(live, z, 0.0), live))
        self._restart(alarms)
        return alarms

    @abstractmethod
    def _advance(self, z: F64, live: Mask) -> Mask:
        """Add the standardised ``z`` (S,) to the slots that are ``live`` (S,), set ``warning``; which alarmed (S,)."""

    @abstractmethod
    def _restart(self, slots: NDArray[np.intp] | slice) -> None:
        """No evidence in ``slots``."""

    def reset(self, slots: ArrayLike | None = None) -> None:
        """Back to the start state: ``slots`` (indices), or all. Location, scale and counts stay."""
        chosen = slice(None) if slots is None else np.asarray(slots, dtype=np.intp)
        self._restart(chosen)
        self.warning[chosen] = False

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on bit-identically: copies of the arrays, and the threshold."""
        return {
            "threshold": self._threshold,
            "location": self.location.copy(),
            "scale": self.scale.copy(),
            "ignored": self.ignored.copy(),
            "warning": self.warning.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave. Raises ``ValueError`` if it has another number of slots."""
        if np.shape(state["location"]) != (self.slots,):
            raise ValueError(f"the state has {np.size(state['location'])} slots, not {self.slots}: start it anew")
        self._threshold = positive("threshold", state["threshold"])
        self.location = np.array(state["location"], dtype=np.float64)
        self.scale = np.array(state["scale"], dtype=np.float64)
        self.ignored = np.array(state["ignored"], dtype=np.int64)
        self.warning = np.array(state["warning"], dtype=bool)


class ManyCUSUM(Many):
    """``CUSUM`` on S streams: state (S,) twice. See ``CUSUM`` for the method and for ``shift`` and ``warn_at``.

    With S slots the mean time to the first false alarm of any is about 1/S of a single one's: pick the threshold for
    the ARL0 of one slot times S, if one alarm of any slot counts.
    """

    def __init__(
        self,
        slots: int,
        threshold: float = 5.0,
        *,
        shift: float = 1.0,
        warn_at: float = 0.7,
        location: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
    ) -> None:
        super().__init__(slots, threshold, location=location, scale=scale)
        # The single detector checks the options and is what each slot must equal.
        options = CUSUM(threshold, shift=shift, warn_at=warn_at).options()
        self._warn_at = options["warn_at"]
        self._slack = float(round(0.5 * options["shift"] * cusum.GRID))
        self._up, self._down = np.zeros(self.slots), np.zeros(self.slots)

    @property
    def statistic(self) -> F64:
        """The greater of both sums in each slot (S,), in standard deviations; 0 after its alarm."""
        return np.maximum(self._up, self._down) / cusum.GRID

    def _advance(self, z: F64, live: Mask) -> Mask:
        step = np.rint(z * cusum.GRID)
        up = np.maximum(self._up + step - self._slack, 0.0)
        down = np.maximum(self._down - step - self._slack, 0.0)
        np.copyto(self._up, up, where=live)
        np.copyto(self._down, down, where=live)
        top = np.maximum(up, down)
        limit = self._threshold * cusum.GRID
        self.warning = (top > limit * self._warn_at) & live
        return (top > limit) & live

    def _restart(self, slots: NDArray[np.intp] | slice) -> None:
        self._up[slots] = self._down[slots] = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Both sums in grid units, and what every ``Many`` has."""
        return super().state_dict() | {"up": self._up.copy(), "down": self._down.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; the options are those of the constructor. Raises ``ValueError`` for another number of slots."""
        super().load_state_dict(state)
        self._up = np.array(state["up"], dtype=np.float64)
        self._down = np.array(state["down"], dtype=np.float64)


class ManyEDetector(Many):
    """``EDetector`` on S streams: state (K, S). All slots share ``detector``'s components and what its ``fit`` learnt.

    The guarantee of one slot, a mean time to a false alarm of at least exp(threshold) over the sum of its weights,
    becomes that of all by adding log S to the threshold. ``detector`` is read, not changed; ``threshold`` is its own
    if not given.
    """

    def __init__(
        self,
        slots: int,
        threshold: float | None = None,
        *,
        detector: EDetector | None = None,
        location: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
    ) -> None:
        single = EDetector() if detector is None else detector
        self._single = single.with_threshold(single.threshold if threshold is None else threshold)
        super().__init__(slots, self._single.threshold, location=location, scale=scale)
        options = self._single.options()
        self._warn_at = float(options["warn_at"])
        self._sums = np.zeros((2 * len(options["shifts"]) + len(options["scales"]), self.slots))

    @property
    def statistic(self) -> F64:
        """The greatest of the weighted sums in each slot (S,), in nats; 0 where none has anything."""
        top: F64 = (self._sums + self._handicap).max(0) / e_detector.GRID
        return np.maximum(top, 0.0)

    @property
    def _handicap(self) -> F64:
        """Log weights of the components (K, 1), in grid units."""
        return np.asarray(self._single._handicap[:, None], dtype=np.float64)

    def _advance(self, z: F64, live: Mask) -> Mask:
        steps, first = self._single._increments(z)
        steps += self._sums
        if first is not None:
            np.maximum(steps[: len(first)], first, out=steps[: len(first)])
        np.maximum(steps, 0.0, out=steps)
        np.copyto(self._sums, steps, where=live)
        steps += self._handicap
        top: F64 = steps.max(0)
        limit = self._threshold * e_detector.GRID
        self.warning = (top > limit * self._warn_at) & live
        alarms: Mask = (top > limit) & live
        return alarms

    def _restart(self, slots: NDArray[np.intp] | slice) -> None:
        self._sums[:, slots] = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The sums in grid units, what the components learnt, and what every ``Many`` has."""
        return super().state_dict() | {"sums": self._sums.copy(), "fitted": self._single.fitted()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; the options are those of the constructor. Raises ``ValueError`` if the state does not fit them."""
        if np.shape(state["sums"]) != self._sums.shape:
            raise ValueError(f"the state's sums are {np.shape(state['sums'])}, not {self._sums.shape}: start it anew")
        single = self._single.with_fitted(state["fitted"])
        super().load_state_dict(state)
        self._single = single.with_threshold(self._threshold)
        self._sums = np.array(state["sums"], dtype=np.float64)
