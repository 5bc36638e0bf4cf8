"""One detector over recorded rows: where it alarmed, and how far its evidence stood from its threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import detectors
from daemon.records import F64
from detectors import Calibrated
from detectors.bootstrap import LARGEST

CHUNK = 4096
"""Rows looked at together where each alarm changes what follows (a new baseline)."""
TRACE_POINTS = 50_000
"""Most readings of a statistic for a plot: fifty to a pixel."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """A row, and the detector's statistic on the row before it: the alarm itself sets it back to the start."""

    row: int
    statistic: float


@dataclass(frozen=True, slots=True)
class Watched:
    """What a detector found in one column, or in the rows of several."""

    detector: str
    advisory: bool
    columns: list[str]
    calibration: dict[str, Any]
    """See ``detectors.calibration.Calibration``."""
    start: int
    """Row of the file at which the watch began."""
    alarms: list[Alarm]
    """Rows of the file; warnings of a detector that is advisory."""
    live: NDArray[np.bool_]
    """For each row from ``start`` on, whether it could alarm: it was finite and no baseline was being learnt."""
    ignored: int
    """Rows watched that were not finite."""
    reference_ignored: int
    """Rows of the reference that were not finite."""
    trace: tuple[F64, F64] | None = None
    """Rows (P,) of the file and the statistic (P,) there; the threshold where it alarmed."""

    @property
    def label(self) -> str:
        """The column's name, or what rows were made of."""
        if len(self.columns) <= 3:
            return " + ".join(self.columns)
        return f"{self.columns[0]} ... {self.columns[-1]} ({len(self.columns)})"

    @property
    def threshold(self) -> float:
        """The detector's calibrated threshold."""
        return float(self.calibration["threshold"])


def watch(
    detector: str,
    columns: Sequence[str],
    reference: F64,
    values: F64,
    *,
    arl0: float,
    start: int = 0,
    rebaseline: int = 0,
    traced: bool = False,
) -> Watched:
    """Calibrate ``detector`` on ``reference`` (M,) and read ``values`` (N,); (M, D) and (N, D) if it reads rows.

    Args:
        detector: name in the registry.
        columns: names of what is read.
        reference: rows without drift, in order of time.
        values: the rows to watch; the first is row ``start`` of the file.
        arl0: mean rows between false alarms to calibrate for.
        start: row of the file at which ``values`` begins.
        rebaseline: rows after an alarm that are taken for the new normal; 0: none.
        traced: also keep the statistic for a plot.

    Raises:
        ValueError: as ``detectors.calibrate``.
    """
    built = detectors.build(detector)
    calibration = detectors.calibrate(built, reference, arl0=arl0).calibration()

    def fresh() -> Calibrated:
        return Calibrated.from_calibration(detectors.build(detector), calibration)

    finite = _usable(values)
    alarms, ignored = _alarms(fresh(), fresh(), values, rebaseline)
    live = finite.copy()
    if rebaseline:
        usable = np.flatnonzero(finite)
        for alarm in alarms:
            after = int(np.searchsorted(usable, alarm.row, side="right"))
            live[usable[after : after + rebaseline]] = False
    trace = None
    if traced:
        rows, statistics = _trace(fresh(), values, [alarm.row for alarm in alarms], rebaseline)
        trace = (rows + start, statistics)
    return Watched(
        detector=detector,
        advisory=built.advisory,
        columns=list(columns),
        calibration=calibration,
        start=start,
        alarms=[Alarm(start + alarm.row, alarm.statistic) for alarm in alarms],
        live=live,
        ignored=ignored,
        reference_ignored=int((~_usable(reference)).sum()),
        trace=trace,
    )


def _usable(values: F64) -> NDArray[np.bool_]:
    """Which rows of ``values`` (N,) or (N, D) reach the detector, as ``Calibrated`` decides it."""
    usable: NDArray[np.bool_] = np.abs(values) < LARGEST
    return usable if values.ndim == 1 else np.all(usable, axis=1)


def _alarms(scout: Calibrated, behind: Calibrated, values: F64, rebaseline: int) -> tuple[list[Alarm], int]:
    """All alarms in ``values``, and the rows ignored.

    ``scout`` reads ahead, many rows at a time; ``behind`` follows and stops before each alarm, to tell the statistic.
    """
    alarms: list[Alarm] = []
    span = CHUNK if rebaseline else len(values)
    begin = 0
    while begin < len(values):
        part = values[begin : begin + span]
        done = 0
        for at in scout.update_many(part):
            if at > done:
                behind.update_many(part[done:at])
            alarms.append(Alarm(begin + at, float(behind.statistic)))
            behind.update_many(part[at : at + 1])
            done = at + 1
            if rebaseline:
                behind.rebaseline(rebaseline)
                scout.load_state_dict(behind.state_dict())
                break
        else:
            if done < len(part):
                behind.update_many(part[done:])
            done = len(part)
        begin += done
    return alarms, behind.ignored


def _trace(detector: Calibrated, values: F64, alarms: list[int], rebaseline: int) -> tuple[F64, F64]:
    """The statistic after each row, or after every few of a long stream; rows (P,) and statistics (P,)."""
    stride = -(-len(values) // TRACE_POINTS)
    alarmed = set(alarms)
    ends = sorted({*range(stride, len(values), stride), *(row + 1 for row in alarms), len(values)})
    statistics = np.empty(len(ends))
    begin = 0
    for point, end in enumerate(ends):
        detector.update_many(values[begin:end])
        begin = end
        if end - 1 in alarmed:
            statistics[point] = detector.threshold
            if rebaseline:
                detector.rebaseline(rebaseline)
        else:
            statistics[point] = detector.statistic
    return np.array(ends, dtype=np.float64) - 1.0, statistics
