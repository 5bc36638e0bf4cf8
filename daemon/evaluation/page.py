"""The report of `homeostat evaluate` as one HTML file: SVG and style inside, no script, nothing from a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from daemon.evaluation.configurations import DAEMON
from daemon.evaluation.report import Line, Report, cells, headers, notes, recoveries, verdict
from daemon.evaluation.score import running_mean, scored
from daemon.recorded.figures import thinned, ticks
from daemon.recorded.plot import COLOURS, INNER, LEFT, RIGHT, STYLE, WIDTH
from daemon.records import F64

TOP, HEIGHT, LANE, BOTTOM = 22, 340, 16, 26
STATES = ("steady", "fast", "slow", "settling", "fallback")
MARK = 3.0
"""Decisions closer than this, in pixels, share a mark."""
_TITLES = 12
"""Most log lines of one mark that are shown."""

MORE = """\
p.answer { font-size: 17px; color: var(--ink); margin: 10px 0 14px; }
table { border-collapse: collapse; font-size: 12.5px; width: 100%; } div.wide { overflow-x: auto; }
th, td { text-align: right; padding: 3px 8px; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--dim); font-weight: 500; }
tr.daemon td { font-weight: 600; } .curve { fill: none; stroke: var(--c); stroke-width: 1; opacity: 0.55; }
.curve.daemon { --c: var(--c0); stroke-width: 2.4; opacity: 1; } .curve.frozen { --c: var(--ink); stroke-width: 1.8;
  opacity: 1; stroke-dasharray: 6 3; } .mark { fill: var(--c0); } .swatch { fill: var(--c); }
.steady { fill: var(--grid); } .fast { fill: var(--c4); } .slow { fill: var(--c3); } .settling { fill: var(--c2); }
.fallback { fill: var(--c6); }
"""


def page(report: Report) -> str:
    """The whole page."""
    name = report.recording.name
    tables = [_table(headers(report), [cells(shown, line, report) for shown, line in report.shown()])]
    names, back = recoveries(report)
    if back:
        tables.append(f"<h2>Recoveries</h2>\n{_table(names, back)}")
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(name)}: is adapting worth it?</title>\n<style>\n{STYLE}{MORE}</style>\n</head>\n<body>",
        f'<h1>{escape(name)}</h1>\n<p class="answer">{escape(verdict(report))}</p>',
        f"<h2>Error over time</h2>\n<p>Mean over {_width(report)} rows. Upright lines: known changes. Triangles: what "
        "the daemon decided; its state is the band below. Hover for the text.</p>",
        drawing(report),
        "<h2>Numbers</h2>",
        *tables,
        "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes(report)) + "</ul>",
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names configurations."""
    lines = [
        f'<tr class="{"daemon" if row[0] == DAEMON else "other"}">'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    ]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    return "\n".join([f'<div class="wide"><table>\n<tr>{head}</tr>', *lines, "</table></div>"])


def _width(report: Report) -> int:
    """Rows of the running mean: a fiftieth of the recording, between 50 and the worst window's."""
    return int(np.clip(len(report.recording) // 50, 50, max(50, report.window)))


def drawing(report: Report) -> str:
    """Errors over time as SVG."""
    lines = [line for line in report.lines if line.score is not None]
    curves = {line.name: _curve(line, report) for line in lines}
    finite = [means[np.isfinite(means)] for _, means in curves.values() if len(means)]
    high = max((float(values.max()) for values in finite if len(values)), default=1.0) or 1.0
    if not report.classification:
        # One method that blows up must not flatten all others.
        usual = [float(means.max()) for name, (_, means) in curves.items() if name in ("frozen", DAEMON) and len(means)]
        high = min(high, 3 * max(usual, default=high)) or 1.0
    legend = TOP + HEIGHT + 2 * LANE + BOTTOM
    height = legend + LANE * (-(-len(lines) // 4)) + 6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="error over time, {escape(report.recording.name)}">',
        f'<text class="name" x="{LEFT}" y="{TOP - 8}">error, {escape(report.unit())}</text>',
    ]
    for value in ticks(0.0, high, 6):
        y = _y(value, high)
        shown = f"{100 * value:.4g}" if report.classification else f"{value:.4g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{shown}</text>')
    for change in report.recording.changes:
        at = f"{_x(change, report):.1f}"
        parts.append(
            f'<line class="change" x1="{at}" x2="{at}" y1="{TOP}" y2="{TOP + HEIGHT}"><title>change at row {change}'
            "</title></line>"
        )
    # What matters most is drawn last, on top.
    for line in sorted(lines, key=lambda line: (line.name == DAEMON, line.name == "frozen")):
        parts.append(_path(line, *curves[line.name], high, report, _colour(line, lines)))
    parts.append(f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{INNER}" height="{HEIGHT}"/>')
    served = report.line(DAEMON)
    parts += _decisions(served, report, TOP + HEIGHT) + _states(served, report, TOP + HEIGHT + LANE)
    for row in ticks(0, max(len(report.recording) - 1, 1), 8):
        if row == int(row):
            y = TOP + HEIGHT + 2 * LANE + 16
            parts.append(f'<text x="{_x(row, report):.1f}" y="{y}" text-anchor="middle">{row:.0f}</text>')
    for number, line in enumerate(lines):
        x, y = LEFT + (number % 4) * INNER / 4, legend + LANE * (number // 4) + 10
        parts.append(f'<line class="{_colour(line, lines)}" x1="{x:.1f}" x2="{x + 22:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{x + 28:.1f}" y="{y + 4}">{escape(line.name)}</text>')
    return "\n".join([*parts, "</svg>"])


def _curve(line: Line, report: Report) -> tuple[F64, F64]:
    """Running mean loss over seeds and rows: the rows (P,) at which it stands, and the means (P,)."""
    recording, twin = report.recording, report.twin
    losses = np.mean([twin.loss(run.prediction, recording.y) for run in line.runs], axis=0)
    return running_mean(losses, scored(recording), _width(report))


def _colour(line: Line, lines: Sequence[Line]) -> str:
    if line.name in (DAEMON, "frozen"):
        return "curve daemon" if line.name == DAEMON else "curve frozen"
    return f"curve d{1 + [each.name for each in lines].index(line.name) % (COLOURS - 1)}"


def _path(line: Line, rows: F64, means: F64, high: float, report: Report, kind: str) -> str:
    places, values = thinned(rows, means, 0, max(len(report.recording) - 1, 1), INNER)
    points = [
        f"{_x(row, report):.1f} {_y(min(value, high), high):.1f}"
        for row, value in zip(places.tolist(), values.tolist(), strict=True)
        if value == value
    ]
    drawn = f'd="M{"L".join(points)}"' if points else 'd=""'
    return f'<path class="{kind}" {drawn}><title>{escape(line.name)}</title></path>'


def _decisions(served: Line, report: Report, top: float) -> list[str]:
    """A triangle for each decision of the first seed, close ones together, with what was logged."""
    groups: list[tuple[int, list[str]]] = []
    for row, text in served.runs[0].decisions if served.runs else []:
        if groups and _x(row, report) - _x(groups[-1][0], report) < MARK:
            groups[-1][1].append(f"row {row}: {text}")
        else:
            groups.append((row, [f"row {row}: {text}"]))
    parts = [f'<text x="{LEFT - 6}" y="{top + 12}" text-anchor="end">decisions</text>']
    for row, texts in groups:
        more = [f"and {len(texts) - _TITLES} more"] if len(texts) > _TITLES else []
        title = escape("\n".join([*texts[:_TITLES], *more]))
        parts.append(
            f'<path class="mark" data-row="{row}" d="M{_x(row, report):.1f} {top + 3}l4.5 9h-9z">'
            f"<title>{title}</title></path>"
        )
    return parts


def _states(served: Line, report: Report, top: float) -> list[str]:
    """The controller's state over time, of the first seed."""
    parts = [f'<text x="{LEFT - 6}" y="{top + 12}" text-anchor="end">state</text>']
    states, size = served.runs[0].states if served.runs else [], report.plan.batch_rows
    begin = 0
    for number in range(1, len(states) + 1):
        if number < len(states) and states[number] == states[begin]:
            continue
        first, last = begin * size, min(number * size, len(report.recording)) - 1
        x, end = _x(first, report), _x(last + 1, report)
        name = states[begin] if states[begin] in STATES else "steady"
        parts.append(
            f'<rect class="{name}" x="{x:.1f}" y="{top + 3}" width="{max(end - x, 0.5):.1f}" height="{LANE - 6}">'
            f"<title>{escape(states[begin])}: rows {first} to {last}</title></rect>"
        )
        begin = number
    return parts


def _x(row: float, report: Report) -> float:
    return LEFT + min(row / max(len(report.recording) - 1, 1), 1.0) * INNER


def _y(value: float, high: float) -> float:
    return TOP + HEIGHT * (1 - value / (1.05 * high))
