"""How a detector that looks at many values in one vectorised step goes through a stream and its alarms."""

from __future__ import annotations

from collections.abc import Callable

from detectors.base import F64


def alarms_in(values: F64, scan: Callable[[F64], int | None], shortest: int, longest: int) -> list[int]:
    """Indices of the alarms in ``values`` (B,).

    ``scan`` reads a piece of them and returns None, or the index of its first alarm; the detector's state is then that
    after the alarm. What lies behind an alarm is scanned again, so that the pieces are ``shortest`` after one and
    double up to ``longest``.
    """
    alarms: list[int] = []
    begin, span = 0, longest
    while begin < len(values):
        alarm = scan(values[begin : begin + span])
        if alarm is None:
            begin, span = begin + span, min(2 * span, longest)
        else:
            begin, span = begin + alarm + 1, shortest
            alarms.append(begin - 1)
    return alarms
