"""What was found, as a sentence, a table of text and plain values for JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.evaluation.answers import Frozen, Replayed
from daemon.evaluation.configurations import DAEMON
from daemon.evaluation.intervals import Interval
from daemon.evaluation.near import Near, chance
from daemon.evaluation.recording import Plan, Recording
from daemon.evaluation.score import RECOVERY_ROWS, TOLERANCE, Recovery, Score
from daemon.recorded.report import table

BEST = "best in hindsight"


@dataclass(frozen=True, slots=True)
class Line:
    """One configuration."""

    name: str
    kind: str
    score: Score | None
    runs: list[Replayed]
    """One per seed."""
    refused: str | None
    """Why there is no score."""


@dataclass(frozen=True, slots=True)
class Report:
    """All that a table, a JSON file and a page are made of."""

    recording: Recording
    task: str
    bundle: str
    plan: Plan
    seeds: list[int]
    lines: list[Line]
    near: Near
    loss_scale: float
    labels: int
    unreadable: int
    reused: int
    total: int
    store: Path
    window: int
    refit_rows: int
    twin: Frozen

    @property
    def classification(self) -> bool:
        """Whether errors are shares of wrong answers, shown in %."""
        return self.task == "classification"

    def line(self, name: str) -> Line:
        """The configuration called ``name``."""
        return next(line for line in self.lines if line.name == name)

    def best(self) -> Line | None:
        """The single fast method with the least error: nobody could have known."""
        methods = [line for line in self.lines if line.kind == "method" and line.score is not None]
        return min(methods, key=lambda line: _error(line), default=None)

    def shown(self) -> list[tuple[str, Line]]:
        """Lines of the table with their names; the best method once more at the end."""
        named = [(line.name, line) for line in self.lines]
        best = self.best()
        return named if best is None else [*named, (f"{BEST}: {best.name}", best)]

    def unit(self) -> str:
        """What an error is measured in."""
        return "% of the rows" if self.classification else "squared error over the reference variance"


def _error(line: Line) -> float:
    return math.inf if line.score is None else line.score.error.mean


def verdict(report: Report) -> str:
    """The answer in one sentence: is adapting worth it here, and what does it cost?"""
    served, frozen = report.line(DAEMON).score, report.line("frozen").score
    if served is None or frozen is None:
        return "The daemon could not be replayed."
    gain = served.against_frozen
    if gain.mean == gain.low == gain.high == 0.0:
        head = "Adapting changes nothing here: the daemon answers as the frozen model does"
    elif not gain.excludes_zero():
        head = "Adapting makes no difference here that this recording could show"
    elif gain.mean < 0:
        head = "Adapting is worth it here"
    else:
        head = "Adapting harms here"
    unit, points = ("%", " points") if report.classification else ("", "")
    wrong = f"{_number(served.error.mean, report)}{unit}"
    if served.error.mean != frozen.error.mean:
        wrong += f" instead of {_number(frozen.error.mean, report)}{unit}"
    change = f"difference {_interval(gain, report, sign=True)}{points}, 95% interval"
    slow = f" and {served.slow_ms_per_row:.3g} ms beside the stream" if served.slow_ms_per_row >= 5e-4 else ""
    return (
        f"{head}: error {wrong} ({change}), for {served.ms_per_row:.3g} ms a row instead of {frozen.ms_per_row:.3g}"
        f"{slow}; a backward pass ran on {served.backward_share:.1%} of the rows, and {served.same_share:.1%} were "
        "answered as by the frozen model, to the bit."
    )


def headers(report: Report) -> list[str]:
    """Names of the table's columns."""
    names = ["", "error", "95% interval", "against frozen", "worst window"]
    names += [] if report.classification else ["RMSE"]
    return [*names, "near future", "forgets", "ms/row", "beside", "backward", "as frozen", "memory"]


def cells(name: str, line: Line, report: Report) -> list[str]:
    """One row of the table."""
    found = line.score
    if found is None:
        return [name, *["–"] * (len(headers(report)) - 1)]
    row = [name, _number(found.error.mean, report), _range(found.error, report)]
    row.append(_interval(found.against_frozen, report, sign=True) if line.name != "frozen" else "")
    worst = found.worst
    row.append("–" if worst is None else f"{_number(worst.loss, report)} at {worst.row}")
    if not report.classification:
        row.append("–" if found.rmse is None else f"{found.rmse:.4g}")
    row.append("–" if found.near is None else _number(found.near, report))
    row.append("–" if found.forgetting is None else _number(found.forgetting, report, sign=True))
    row += [f"{found.ms_per_row:.3g}", f"{found.slow_ms_per_row:.2g}" if found.slow_ms_per_row >= 5e-4 else ""]
    row += [f"{found.backward_share:.1%}", f"{found.same_share:.1%}", f"{found.peak_bytes / 2**20:.0f} MiB"]
    return row


def recoveries(report: Report) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table of recoveries; no rows without known changes."""
    changes = [str(change) for change in report.recording.changes]
    rows = [
        [line.name, *map(_back, line.score.recoveries)]
        for line in report.lines
        if line.score is not None and report.recording.changes
    ]
    return ["back after change at row", *changes], rows


def _back(recovery: Recovery) -> str:
    if math.isnan(recovery.bound):
        return "–"
    return "never" if recovery.rows is None else str(recovery.rows)


def _number(value: float, report: Report, *, sign: bool = False) -> str:
    form = "+" if sign else ""
    return format(100 * value, f"{form}.2f") if report.classification else format(value, f"{form}.4f")


def _range(interval: Interval, report: Report) -> str:
    low, high = max(0.0, interval.low), interval.high
    high = min(1.0, high) if report.classification else high
    return f"{_number(low, report)}–{_number(high, report)}"


def _interval(interval: Interval, report: Report, *, sign: bool) -> str:
    mean, low, high = (_number(value, report, sign=sign) for value in (interval.mean, interval.low, interval.high))
    return f"{mean} ({low} to {high})"


def notes(report: Report) -> list[str]:
    """What the table doesn't say of itself."""
    recording, plan = report.recording, report.plan
    level = chance(report.near, recording, report.loss_scale)
    lines = [
        f"error: {report.unit()}, {int(recording.known.sum()):,} rows scored; intervals by a block bootstrap of the "
        f"rows, blocks from the data ({_blocks(report)} rows); against frozen: paired, row by row",
        f"labels: {report.labels:,} of {len(recording):,} rows, each {plan.delay} rows after its answer; batches of "
        f"{plan.batch_rows}",
        f"worst window: the largest error over {report.window} rows, and its first row",
    ]
    if recording.changes:
        lines.append(
            f"back after a change: rows until {RECOVERY_ROWS} rows in a row have an error no more than the larger of "
            f"{_number(TOLERANCE, report)} and two standard errors above the configuration's own before the change"
        )
    if level is not None:
        lines.append(
            f"near future: error, classes balanced, on rows {report.near.skipped} and more ahead, where the labels at "
            f"hand say nothing; the same answer for all rows can't be below {_number(level, report)}"
        )
    lines += [
        "forgets: error on the bundle's source rows afterwards, minus the frozen model's",
        "ms/row: processor time from decoded row to encoded answer; beside: of learning beside the stream; memory: on "
        "top of what the process had",
    ]
    if invalid := int((~recording.valid).sum()):
        lines.append(f"{invalid:,} rows are not finite: answered as invalid_input, counted as wrong for all")
    if report.unreadable:
        lines.append(f"{report.unreadable:,} records could not be decoded: they are no rows here")
    lines += [f"{line.name}: {line.refused}" for line in report.lines if line.refused is not None]
    lines += list(dict.fromkeys(text for line in report.lines for run in line.runs for text in run.warnings))
    if report.reused:
        lines.append(f"{report.reused} of {report.total} replays were known from {report.store}")
    return lines


def _blocks(report: Report) -> str:
    sizes = [line.score.block for line in report.lines if line.score is not None]
    return f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"


def terminal(report: Report) -> str:
    """Sentence, table and notes."""
    parts = [verdict(report), "", table(headers(report), [cells(name, line, report) for name, line in report.shown()])]
    names, back = recoveries(report)
    if back:
        parts += ["", table(names, back)]
    return "\n".join([*parts, "", *notes(report)])


def as_json(report: Report) -> dict[str, Any]:
    """All of it in plain values; what is not a number is None."""
    best = report.best()
    recording = report.recording
    return {
        "verdict": verdict(report),
        "recording": {
            "name": recording.name,
            "rows": len(recording),
            "scored": int(recording.known.sum()),
            "not_finite": int((~recording.valid).sum()),
            "unreadable": report.unreadable,
            "digest": recording.digest(),
            "changes": list(recording.changes),
        },
        "task": report.task,
        "bundle": report.bundle,
        "plan": {
            "batch_rows": report.plan.batch_rows,
            "delay": report.plan.delay,
            "label_share": report.plan.label_share,
            "seeds": report.seeds,
            "refit_rows": report.refit_rows,
            "window": report.window,
        },
        "near_future": {
            "skipped": report.near.skipped,
            "points": len(report.near.asks),
            "chance": chance(report.near, recording, report.loss_scale),
        },
        "best_in_hindsight": None if best is None else best.name,
        "replays": {"all": report.total, "known": report.reused},
        "notes": notes(report),
        "configurations": [_line_json(line) for line in report.lines],
    }


def _line_json(line: Line) -> dict[str, Any]:
    found = line.score
    content: dict[str, Any] = {"name": line.name, "kind": line.kind, "refused": line.refused}
    if found is None:
        return content
    worst = found.worst
    return content | {
        "error": _plain(found.error),
        "error_by_seed": found.by_seed,
        "against_frozen": _plain(found.against_frozen),
        "block_rows": found.block,
        "rmse": found.rmse,
        "worst_window": None if worst is None else {"row": worst.row, "rows": worst.rows, "error": worst.loss},
        "recoveries": [
            {
                "change": each.change,
                "level": _finite(each.level),
                "bound": _finite(each.bound),
                "rows": each.rows,
            }
            for each in found.recoveries
        ],
        "near_future": found.near,
        "forgetting": found.forgetting,
        "ms_per_row": found.ms_per_row,
        "slow_ms_per_row": found.slow_ms_per_row,
        "backward_share": found.backward_share,
        "same_as_frozen_share": found.same_share,
        "adapted_share": found.adapted_share,
        "peak_bytes": found.peak_bytes,
        "decisions": [{"row": row, "text": text} for row, text in line.runs[0].decisions],
    }


def _plain(interval: Interval) -> dict[str, float | None]:
    return {"mean": _finite(interval.mean), "low": _finite(interval.low), "high": _finite(interval.high)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
