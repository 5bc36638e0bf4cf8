"""What `homeostat detect` found, as tables of text and as plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from daemon.recorded.score import Score, runs, score
from daemon.recorded.watch import Watched

HEADERS = ("row", "to", "alarms", "column", "detector", "statistic", "threshold")


def alarm_rows(found: Sequence[Watched], arl0: float, changes: Sequence[int]) -> list[tuple[str, ...]]:
    """One line of the table ``HEADERS`` per run of alarms, in the order of rows."""
    lines: list[tuple[int, tuple[str, ...]]] = []
    for watched in found:
        for run in runs(watched.alarms, arl0, changes):
            last = str(run.last) if run.count > 1 else ""
            numbers = (f"{run.statistic:.4g}", f"{watched.threshold:.4g}")
            name = f"{watched.detector} (warning)" if watched.advisory else watched.detector
            lines.append((run.first, (str(run.first), last, str(run.count), watched.label, name, *numbers)))
    return [line for _, line in sorted(lines, key=lambda item: item[0])]


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: to the right where all cells are numbers, else to the left."""
    cells = [headers, *rows]
    widths = [max(len(row[j]) for row in cells) for j in range(len(headers))]
    right = [all(not row[j] or _is_number(row[j]) for row in rows) for j in range(len(headers))]
    lines = []
    for row in cells:
        parts = [
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def summary(watched: Watched, arl0: float, changes: Sequence[int] | None) -> list[str]:
    """Lines: alarms, with the ARL0 asked for and reached; with ``changes`` what ``Score`` says; values left out."""
    kind = "warning" if watched.advisory else "alarm"
    alarms = _count(len(watched.alarms), kind)
    if (groups := len(runs(watched.alarms, arl0, changes or ()))) < len(watched.alarms):
        alarms += f" in {_count(groups, 'run')}"
    made = watched.calibration
    lines = [
        f"{watched.detector} on {watched.label}: {alarms}; ARL0 {arl0:.0f} asked, {made['reached_arl0']:.0f} in "
        f"calibration ({made['reached_low']:.0f} to {made['reached_high']:.0f})"
    ]
    if changes is not None:
        judged = _score(watched, changes)
        delays = [
            f"{change}: {'missed' if delay is None else delay}"
            for change, delay in zip(changes, judged.delays, strict=True)
        ]
        if delays:
            lines.append(f"delay after {', '.join(delays)} ({judged.missed} of {len(delays)} missed)")
        lines.append(_measured(judged, kind))
    if watched.ignored or watched.reference_ignored:
        watched_rows = _count(watched.ignored, "row")
        lines.append(f"not finite, left out: {watched_rows} watched, {watched.reference_ignored} in the reference")
    return lines


def _measured(judged: Score, kind: str) -> str:
    if not judged.rows:
        return "no row without a change to measure the ARL0 on"
    text = f"{_count(judged.false_alarms, f'false {kind}')} in {_count(judged.rows, 'row')} without a change"
    if not judged.false_alarms:
        return f"{text}: ARL0 above {judged.low:.0f} (95%)"
    return f"{text}: ARL0 {judged.arl0:.0f} ({judged.low:.0f} to {judged.high:.0f})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _score(watched: Watched, changes: Sequence[int]) -> Score:
    return score([alarm.row for alarm in watched.alarms], changes, watched.start, watched.live)


def as_json(watched: Watched, arl0: float, changes: Sequence[int] | None) -> dict[str, Any]:
    """The same in plain values; what is infinite or not a number is None."""
    made = watched.calibration
    content: dict[str, Any] = {
        "detector": watched.detector,
        "advisory": watched.advisory,
        "columns": watched.columns,
        "options": made["options"],
        "threshold": watched.threshold,
        "arl0": {
            "asked": arl0,
            "reached": _finite(made["reached_arl0"]),
            "low": _finite(made["reached_low"]),
            "high": _finite(made["reached_high"]),
            "method": made["method"],
        },
        "not_finite": {"watched": watched.ignored, "reference": watched.reference_ignored},
        "alarms": [{"row": alarm.row, "statistic_before": _finite(alarm.statistic)} for alarm in watched.alarms],
        "runs": [
            {"first": run.first, "last": run.last, "alarms": run.count}
            for run in runs(watched.alarms, arl0, changes or ())
        ],
    }
    if changes is not None:
        judged = _score(watched, changes)
        content["score"] = {
            "delays": [
                {"change": change, "delay": delay} for change, delay in zip(changes, judged.delays, strict=True)
            ],
            "missed": judged.missed,
            "false_alarms": judged.false_alarms,
            "rows_without_change": judged.rows,
            "arl0": _finite(judged.arl0),
            "low": _finite(judged.low),
            "high": _finite(judged.high),
        }
    return content


def _finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None
