"""What the detectors of rows have in common: a warm-up, windows of feature sums, and a state."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Self

import numpy as np

from detectors.arrays import pack, unpack
from detectors.base import F64, Detector, positive
from detectors.windows import STRIDES, WINDOWS, Index, Whole, Windows

AFTER_ALARM = 4
"""So much less is scanned at once just after an alarm: what lies behind the next alarm is scanned again."""
MIN_ROWS = 50
"""Fewest rows of a reference."""


class RowDetector(Detector):
    """Alarms when the sum of feature rows over one of ``WINDOWS`` is too unlikely under the reference.

    A subclass says what a row's features are (whole numbers, mean zero in the reference) and how unusual their sum
    over a window is; the statistic is the greatest such evidence over the windows, on the scale of minus the logarithm
    of a chance. Rows are numpy arrays or torch tensors on any device, (D,) or (B, D); a plain number or a (B,) array
    counts as D = 1.

    A detector that ``fit`` gave nothing takes its first ``warmup`` rows for its reference and raises no alarm
    meanwhile; after an alarm, and after ``reset``, it learns a new one.
    """

    reads = "rows"
    assumes_independence = True
    calibration_rows = 200_000

    FEATURE_TYPE: ClassVar[type[np.float64] | type[np.int32]] = np.float64
    LOOKS: ClassVar[Index] = STRIDES
    """Rows from one look at each of ``WINDOWS`` to the next (W,), divisors of ``PERIOD``."""

    def __init__(self, threshold: float, warmup: int, warn_at: float) -> None:
        if not (float(warmup).is_integer() and warmup >= MIN_ROWS):
            raise ValueError(f"warmup must be a whole number of at least {MIN_ROWS} rows, got {warmup!r}")
        self._warmup = int(warmup)
        self._warn_at = positive("warn_at", warn_at)
        self._threshold = positive("threshold", threshold)
        self._given = False
        self._begin_warmup()

    @abstractmethod
    def _learn(self, reference: F64) -> dict[str, F64]:
        """What is to be known of ``reference`` (N, D), finite, as named arrays."""

    @abstractmethod
    def _adopt(self, learnt: dict[str, F64]) -> tuple[int, int]:
        """Make ``learnt`` ready for use; returns D and the number R of features.

        Raises ``ValueError`` or ``KeyError`` if the arrays do not fit each other or the options.
        """

    @abstractmethod
    def _features(self, rows: F64) -> Whole:
        """Feature rows (B, R) of finite ``rows`` (B, D)."""

    @abstractmethod
    def _evidence(self, sums: Whole, k: Index) -> F64:
        """How unusual ``sums`` (B, R) over windows are (B,); ``k`` (B,) says over which of ``WINDOWS``."""

    def _host(self, values: Any) -> F64:
        """``values`` as float64 rows (B, D) in numpy. Raises ``ValueError`` for another number of dimensions."""
        if hasattr(values, "detach"):
            values = values.detach().cpu().double().numpy()
        rows = np.asarray(values, dtype=np.float64)
        if rows.ndim == 1:
            rows = rows[:, None]
        if rows.ndim != 2:
            raise ValueError(f"{self.name} needs rows (B, D), got shape {rows.shape}")
        return rows

    @property
    def threshold(self) -> float:
        """The bound of the evidence, in nats."""
        return self._threshold

    @property
    def statistic(self) -> float:
        """The greatest evidence over the windows as they were looked at last, in nats; 0 after an alarm."""
        return self._statistic

    def with_threshold(self, threshold: float) -> Self:
        """A new detector without evidence, that knows what ``fit`` learnt."""
        made = type(self)(threshold, **self.options())
        if self._given:
            made._use(self._learnt, given=True)
        return made

    def fit(self, reference: F64, *, gain: float = 1.0, jump: float = 1.0) -> Self:
        """A new detector that knows ``reference`` (N, D); ``gain`` and ``jump`` do not matter.

        Raises ``ValueError`` under 50 rows, or if one is not finite.
        """
        rows = self._host(reference)
        if len(rows) < MIN_ROWS:
            raise ValueError(f"{self.name} needs a reference of at least {MIN_ROWS} rows, got {len(rows)}: give more")
        self._check_finite(rows)
        made = type(self)(self._threshold, **self.options())
        made._use(made._learn(rows), given=True)
        return made

    def fitted(self) -> dict[str, Any]:
        """What ``fit`` learnt, each array as base64; empty before."""
        return {name: pack(array) for name, array in self._learnt.items()} if self._given else {}

    def with_fitted(self, fitted: dict[str, Any]) -> Self:
        """A new detector with what ``fitted`` gave. Raises ``ValueError`` if it does not fit."""
        made = type(self)(self._threshold, **self.options())
        if fitted:
            made._use({name: unpack(array) for name, array in fitted.items()}, given=True)
        return made

    def update(self, value: Any) -> Self:
        """Read one row (D,), or one number. Raises ``ValueError`` if it is not finite or not D long."""
        if not hasattr(value, "detach"):
            value = np.asarray(value, dtype=np.float64)
        self.update_many(value.reshape(1, -1))
        return self

    def update_many(self, values: Any) -> list[int]:
        """Read rows (B, D); indices of the alarms. Raises ``ValueError`` if one is not finite or not D long."""
        rows = self._host(values)
        if rows.size:
            self._check_finite(rows)
            self._check_columns(rows.shape[1])
        return self._read(rows, len(rows) if rows.size else 0)

    def _read(self, rows: Any, count: int) -> list[int]:
        alarms: list[int] = []
        at = 0
        while at < count:
            if self._learnt:
                at += self._scan(self._features(rows[at : at + self._windows.span]), at, alarms)
            else:
                at += self._collect(rows[at : at + self._warmup - self._collected])
        if count:
            self.drift = bool(alarms) and alarms[-1] == count - 1
        return alarms

    def _scan(self, features: Any, at: int, alarms: list[int]) -> int:
        """Read ``features`` (B, R), B up to ``span``, of the rows from ``at`` on; the number of rows that were read.

        Adds to ``alarms``. Only an alarm that asks for a new reference ends it before the last row.
        """
        windows = self._windows
        begin = first = windows.append(features)
        end = first + len(features)
        length = windows.span
        while begin < end:
            stop = min(begin + length, end)
            top, newest = self._top(begin, stop)
            hit = int(np.argmax(top > self._threshold))
            if not top[hit] > self._threshold:
                self._looks = newest
                self._statistic = float(self._looks.max())
                self.warning = self._statistic > self._warn_at * self._threshold
                begin, length = stop, min(2 * length, windows.span)
                continue
            begin, length = begin + hit + 1, windows.span // AFTER_ALARM
            alarms.append(at + begin - first - 1)
            windows.restart(begin - 1)
            self._looks = np.zeros(len(WINDOWS))
            self._statistic = 0.0
            self.warning = True
            if not self._given:
                self._begin_warmup()
                break
        return begin - first

    def _top(self, begin: int, end: int) -> tuple[F64, F64]:
        """Greatest evidence at the positions from ``begin`` to ``end`` (end - begin,), of the windows due there.

        And what each window showed when it was looked at last (W,).
        """
        sums, looks = self._windows.looks(begin, end)
        if not looks:
            return np.zeros(end - begin), self._looks
        # All windows in one call: most of them give a few sums only.
        evidence = self._evidence(sums, np.repeat([k for k, _, _ in looks], [count for _, _, count in looks]))
        top, newest, at = np.zeros(end - begin), self._looks.copy(), 0
        for k, first, count in looks:
            part, seen = evidence[at : at + count], top[first - begin :: self.LOOKS[k]]
            np.maximum(seen, part, out=seen)
            newest[k] = part[-1]
            at += count
        return top, newest

    def _begin_warmup(self) -> None:
        self._learnt: dict[str, F64] = {}
        self._columns = 0
        self._reference: list[F64] = []
        self._collected = 0
        self._looks = np.zeros(len(WINDOWS))
        self._statistic = 0.0

    def _collect(self, rows: Any) -> int:
        """Add ``rows`` (B, D), never more than are missing, to the reference; learn when it is complete."""
        rows = self._host(rows)
        self.warning = False
        self._columns = rows.shape[1]
        self._reference.append(rows.copy())
        self._collected += len(rows)
        if self._collected == self._warmup:
            self._use(self._learn(np.concatenate(self._reference)), given=False)
        return len(rows)

    def _use(self, learnt: dict[str, F64], *, given: bool) -> None:
        try:
            columns, width = self._adopt(learnt)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"{self.name}: what was learnt does not fit ({error}): fit it anew") from error
        self._begin_warmup()
        self._learnt, self._columns, self._given = learnt, columns, given
        self._windows = Windows(width, self.FEATURE_TYPE, self.LOOKS)
        self._width = width

    def _check_finite(self, rows: F64) -> None:
        if not np.isfinite(rows).all():
            raise ValueError(f"{self.name} needs finite values: drop the other rows first, as Calibrated does")

    def _check_columns(self, columns: int) -> None:
        if self._columns and columns != self._columns:
            raise ValueError(f"{self.name} has read rows of {self._columns} values and now got one of {columns}")

    def reset(self) -> None:
        """Drop the evidence, and a reference that the detector took from its own stream."""
        if self._given:
            self._windows.load(np.empty((0, self._width), dtype=np.int32), 0)
            self._looks = np.zeros(len(WINDOWS))
            self._statistic = 0.0
        else:
            self._begin_warmup()
        self.drift = self.warning = False

    def state_dict(self) -> dict[str, Any]:
        """The recent feature rows as little-endian int32, the own reference (in the making), the flags."""
        reference = np.concatenate(self._reference) if self._reference else np.empty(0)
        own = self._learnt and not self._given
        return {
            "threshold": self._threshold,
            "columns": self._columns,
            "reference": reference.astype("<f8").tobytes(),
            "learnt": {name: pack(array) for name, array in self._learnt.items()} if own else {},
            "recent": self._windows.recent().astype("<i4").tobytes() if self._learnt else b"",
            "phase": self._windows.phase if self._learnt else 0,
            "looks": self._looks.tolist(),
            "drift": self.drift,
            "warning": self.warning,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; the options, and what ``fit`` learnt, are those of this detector. Raises ``ValueError`` if not."""
        made = self.with_threshold(float(state["threshold"]))
        if self._given and (state["learnt"] or state["reference"] or state["columns"] != self._columns):
            raise ValueError(f"{self.name}: the state is of a detector with another reference: start it anew")
        if state["learnt"]:
            made._use({name: unpack(array) for name, array in state["learnt"].items()}, given=False)
        if made._learnt:
            recent = np.frombuffer(state["recent"], dtype="<i4").reshape(-1, made._width)
            made._windows.load(recent, int(state["phase"]))
        elif state["recent"]:
            raise ValueError(f"{self.name}: the state needs what fit learnt: build the detector with it first")
        elif columns := int(state["columns"]):
            rows = np.frombuffer(state["reference"], dtype="<f8").reshape(-1, columns)
            made._columns, made._reference, made._collected = columns, [rows.astype(np.float64)], len(rows)
        made._looks = np.array(state["looks"], dtype=np.float64)
        if made._looks.shape != (len(WINDOWS),):
            raise ValueError(f"{self.name}: the state is for other windows: start it anew")
        made._statistic = float(made._looks.max())
        made.drift, made.warning = bool(state["drift"]), bool(state["warning"])
        self.__dict__.update(made.__dict__)
