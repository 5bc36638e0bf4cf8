"""The plot of `homeostat detect` as PNG, where matplotlib is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from daemon.recorded.figures import Figure, span, thinned
from daemon.records import F64

PIXELS = 1000


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(path: Path, figures: Sequence[Figure], title: str) -> None:
    """Write ``figures`` to ``path``, one below the other.

    Raises ``OSError`` where it can't be written, ``ValueError`` where it would be too high.
    """
    # The object interface: no display is looked for, no state is left behind.
    canvas = importlib.import_module("matplotlib.figure").Figure
    heights = [height for figure in figures for height in (2.2, *(1.0 for _ in figure.found))]
    image = canvas(figsize=(11.0, 0.6 + 1.25 * sum(heights)), layout="constrained")
    image.suptitle(title)
    axes = image.subplots(len(heights), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})[:, 0]
    panels = iter(axes)
    for figure in figures:
        _draw(figure, [next(panels) for _ in range(1 + len(figure.found))])
    axes[-1].set_xlabel("row")
    image.savefig(path, dpi=110)


def _draw(figure: Figure, panels: list[Any]) -> None:
    signal = figure.signal()
    low, high = span(signal)
    top = panels[0]
    _line(top, figure, np.arange(float(figure.rows)), signal, "0.35")
    room = 0.07 * (high - low)
    top.set_ylim(low - room * (1 + len(figure.found)), high + room)
    top.set_title(figure.label, loc="left", fontsize=10)
    for index, watched in enumerate(figure.found):
        colour, panel = f"C{index % 10}", panels[1 + index]
        first = [run.first for run in figure.runs(watched)]
        top.plot(first, np.full(len(first), low - room * (index + 0.6)), "^", color=colour, label=watched.detector)
        rows, statistics, threshold = figure.statistic(watched)
        _line(panel, figure, rows, statistics, colour)
        if threshold is not None:
            panel.axhline(threshold, color=colour, linestyle="--", linewidth=0.8)
        panel.set_ylabel(watched.detector, fontsize=8)
    top.legend(loc="upper left", fontsize=8)
    for panel in panels:
        if figure.start:
            panel.axvspan(0, figure.start, color="tab:blue", alpha=0.1, linewidth=0)
        for change in figure.changes:
            panel.axvline(change, color="tab:orange", linestyle="--", linewidth=1.0)


def _line(panel: Any, figure: Figure, rows: F64, values: F64, colour: str) -> None:
    panel.plot(*thinned(rows, values, 0.0, max(figure.rows - 1, 1), PIXELS), color=colour, linewidth=0.9)
