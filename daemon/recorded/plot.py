"""The plot of `homeostat detect` as one HTML file: SVG and style inside, no script, nothing from a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from daemon.recorded.figures import Figure, span, thinned, ticks
from daemon.recorded.watch import Watched
from daemon.records import F64

LEFT, RIGHT, WIDTH = 92, 12, 1000
"""Margins and width of a figure, in pixels where it is shown full size."""
INNER = WIDTH - LEFT - RIGHT
TOP, SIGNAL, LANE, STATISTIC, GAP, BOTTOM = 26, 170, 15, 78, 30, 26
COLOURS = 8
MARK = 2.0
"""Marks closer than this, in pixels, become one."""

STYLE = """\
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2433; --dim: #616b7d; --grid: #e6e9ef; --shade: #eaf1fb;
  --change: #b54708; --line: #3d4a60; --c0: #0072b2; --c1: #d55e00; --c2: #00805e; --c3: #a8428f; --c4: #8a6d00;
  --c5: #2f7fb8; --c6: #9c2f2f; --c7: #5b4bb3; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161f; --ink: #e5e9f0; --dim: #98a2b5; --grid: #262d3a;
  --shade: #1a2536; --change: #f79009; --line: #b4bfd1; --c0: #56b4e9; --c1: #f28b46; --c2: #2cc295; --c3: #df86c8;
  --c4: #e0c14a; --c5: #8cc8f0; --c6: #ee8080; --c7: #a99cf5; } }
body { margin: 0 auto; max-width: 1040px; padding: 24px 20px 48px; background: var(--paper); color: var(--ink);
  font: 14px/1.5 system-ui, sans-serif; }
h1 { font-size: 20px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 32px 0 6px; overflow-wrap: anywhere; }
p, ul { margin: 4px 0; color: var(--dim); } ul { padding-left: 18px; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
text { font: 11px system-ui, sans-serif; fill: var(--dim); } text.name { fill: var(--ink); font-weight: 600; }
.frame { fill: none; stroke: var(--grid); } .grid { stroke: var(--grid); } .reference { fill: var(--shade); }
.change { stroke: var(--change); stroke-dasharray: 5 3; } .line { fill: none; stroke: var(--line); stroke-width: 1.1; }
.statistic { fill: none; stroke: var(--c); stroke-width: 1.2; } .threshold { stroke: var(--c); stroke-dasharray: 3 3; }
.alarm { fill: var(--c); } .lasting { stroke: var(--c); stroke-width: 3; opacity: 0.45; }
"""
STYLE += " ".join(f".d{index} {{ --c: var(--c{index}); }}" for index in range(COLOURS)) + "\n"


def page(figures: Sequence[Figure], title: str, lines: Sequence[str]) -> str:
    """The HTML of ``figures``, under ``title`` and ``lines`` of summary."""
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}: drift</title>\n<style>\n{STYLE}</style>\n</head>\n<body>",
        f"<h1>{escape(title)}</h1>",
        "<p>Shaded: the reference. Triangles: alarms, a bar where they went on. Dashed: thresholds; upright: known "
        "changes.</p>",
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>",
    ]
    parts += [f"<h2>{escape(figure.label)}</h2>\n{drawing(figure)}" for figure in figures]
    return "\n".join([*parts, "</body>\n</html>\n"])


def drawing(figure: Figure) -> str:
    """One figure as SVG."""
    lanes = TOP + SIGNAL
    first = lanes + LANE * len(figure.found) + GAP
    height = first + (STATISTIC + GAP) * len(figure.found) - GAP + BOTTOM
    signal = figure.signal()
    what = "signal" if figure.values.ndim == 1 else "root mean square of the standardised columns"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(figure.label)}">',
        *_panel(figure, TOP, SIGNAL, span(signal), what),
        _path(figure, np.arange(float(figure.rows)), signal, TOP, SIGNAL, span(signal), "line"),
    ]
    for index, watched in enumerate(figure.found):
        colour = f"d{index % COLOURS}"
        parts += [f'<g class="{colour}">', *_marks(figure, watched, lanes + LANE * index), "</g>"]
        top = first + (STATISTIC + GAP) * index
        parts += [f'<g class="{colour}">', *_statistic(figure, watched, top), "</g>"]
    for row in ticks(0, max(figure.rows - 1, 1), 8):
        if row == int(row):
            parts.append(f'<text x="{_x(figure, row):.1f}" y="{height - 8}" text-anchor="middle">{row:.0f}</text>')
    return "\n".join([*parts, "</svg>"])


def _x(figure: Figure, row: float) -> float:
    return LEFT + row / max(figure.rows - 1, 1) * INNER


def _panel(figure: Figure, top: float, height: float, bounds: tuple[float, float], name: str) -> list[str]:
    """Name, shaded reference, grid with its numbers, known changes, frame."""
    low, high = bounds
    parts = [f'<text class="name" x="{LEFT}" y="{top - 7}">{escape(name)}</text>']
    if figure.start:
        width = _x(figure, figure.start) - LEFT
        parts.append(f'<rect class="reference" x="{LEFT}" y="{top}" width="{width:.1f}" height="{height}"/>')
    for value in ticks(low, high, 4 if height > 100 else 2):
        y = top + height * (high - value) / (high - low)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    for change in figure.changes:
        x = f"{_x(figure, change):.1f}"
        parts.append(
            f'<line class="change" x1="{x}" x2="{x}" y1="{top}" y2="{top + height}"><title>change at row {change}'
            "</title></line>"
        )
    parts.append(f'<rect class="frame" x="{LEFT}" y="{top}" width="{INNER}" height="{height}"/>')
    return parts


def _path(
    figure: Figure, rows: F64, values: F64, top: float, height: float, bounds: tuple[float, float], kind: str
) -> str:
    """A line through ``values`` (P,) at ``rows`` (P,); what is out of bounds runs along the edge."""
    low, high = bounds
    places, values = thinned(rows, values, 0, max(figure.rows - 1, 1), INNER)
    y = top + height * (high - np.clip(values, low, high)) / (high - low)
    x = LEFT + places / max(figure.rows - 1, 1) * INNER
    commands, pen = [], "M"
    for across, down in zip(x.tolist(), y.tolist(), strict=True):
        if down == down:
            commands.append(f"{pen}{across:.1f} {down:.1f}")
            pen = "L"
        else:
            pen = "M"
    return f'<path class="{kind}" d="{"".join(commands)}"/>'


def _statistic(figure: Figure, watched: Watched, top: float) -> list[str]:
    """A panel with the statistic, traced for at least one row, and where the two can be compared its threshold."""
    rows, statistics, threshold = figure.statistic(watched)
    low, high = span(statistics)
    name = f"{watched.detector}: statistic (not what is compared with the threshold)"
    if threshold is not None:
        low, high = min(0.0, float(statistics.min())), 1.12 * max(threshold, float(statistics.max()))
        name = f"{watched.detector}: statistic, threshold {threshold:.4g}"
    parts = _panel(figure, top, STATISTIC, (low, high), name)
    if threshold is not None:
        y = f"{top + STATISTIC * (high - threshold) / (high - low):.1f}"
        parts.append(f'<line class="threshold" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
    parts.append(_path(figure, rows, statistics, top, STATISTIC, (low, high), "statistic"))
    return parts


def _marks(figure: Figure, watched: Watched, top: float) -> list[str]:
    """A triangle for each run of alarms, with a bar as long as it lasted; runs within ``MARK`` pixels share one."""
    shared: list[tuple[int, int, int]] = []
    for run in figure.runs(watched):
        if shared and _x(figure, run.first) - _x(figure, shared[-1][1]) < MARK:
            first, _, count = shared[-1]
            shared[-1] = (first, run.last, count + run.count)
        else:
            shared.append((run.first, run.last, run.count))
    middle = top + LANE / 2 + 1
    name = escape(watched.detector)
    parts = [f'<text x="{LEFT - 6}" y="{middle + 4}" text-anchor="end">{name}</text>']
    for first, last, count in shared:
        x, end = _x(figure, first), _x(figure, last)
        if count > 1:
            parts.append(f'<line class="lasting" x1="{x:.1f}" x2="{end:.1f}" y1="{middle}" y2="{middle}"/>')
        text = f"{name}: row {first}" + (f" to {last}, {count} alarms" if count > 1 else "")
        parts.append(
            f'<path class="alarm" data-row="{first}" data-alarms="{count}" '
            f'd="M{x:.1f} {middle - 5}l4.5 9h-9z"><title>{text}</title></path>'
        )
    return parts
