"""`homeostat detect`: detectors over a recorded file, as they would have alarmed on the stream."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import detectors
from daemon.errors import SettingsError, StreamError
from daemon.recorded.report import HEADERS, alarm_rows, as_json, summary, table
from daemon.recorded.source import Recording, read_recording
from daemon.recorded.watch import Watched, watch
from daemon.records import F64

LEAST_REFERENCE = 500
"""Rows of the reference where none is asked for: a quarter of the file, but not fewer."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to look at and how; see the help of the command."""

    path: Path
    columns: Sequence[str] = ()
    features: Sequence[str] = ()
    """Columns of a row, for detectors that read rows; ``columns`` if empty."""
    detectors: Sequence[str] = ("cusum",)
    reference: int | float | Path | None = None
    """Rows, a share of them between 0 and 1, or a file."""
    arl0: float = 10_000
    changes: Sequence[int] | None = None
    """Rows of the file at which the stream changed; empty: it never did; None: nobody knows."""
    rebaseline: int = 0
    plot: Path | None = None
    json: Path | None = None


def detect(request: Request) -> int:
    """Run it and print what was found; returns 0.

    Raises:
        HomeostatError: naming the option, or the file and the column, and what to do.
    """
    _check(request)
    recording = read_recording(request.path)
    other = read_recording(request.reference) if isinstance(request.reference, Path) else None
    figures: dict[str, tuple[F64, list[Watched]]] = {}
    found: list[Watched] = []
    tasks = list(_tasks(request, recording, other))
    for number, (detector, columns, values, known) in enumerate(tasks, start=1):
        rows = 0 if other else _reference_rows(request, len(values))
        _check_changes(request.changes or (), rows, len(values), request.path)
        name = ", ".join(columns[:3]) + (", ..." if len(columns) > 3 else "")
        print(f"detect: {number} of {len(tasks)}: {detector} on {name}", file=sys.stderr, flush=True)
        try:
            watched = watch(
                detector,
                columns,
                values[:rows] if known is None else known,
                values[rows:],
                arl0=request.arl0,
                start=rows,
                rebaseline=request.rebaseline,
                traced=request.plot is not None,
            )
        except ValueError as error:
            source = request.reference if other else request.path
            raise StreamError(f"{source}: {detector} on {name}: {error}") from None
        found.append(watched)
        figures.setdefault(watched.label, (values, []))[1].append(watched)
    _print(request, found)
    if request.json is not None:
        _write(request.json, "--json", json.dumps(_content(request, found), indent=1, allow_nan=False) + "\n")
    if request.plot is not None:
        _plot(request.plot, request, figures)
    return 0


def _tasks(
    request: Request, recording: Recording, other: Recording | None
) -> Iterator[tuple[str, list[str], F64, F64 | None]]:
    """Detector, names of what it reads, the values of the file, and those of another file as reference."""
    for detector in request.detectors:
        rows = detectors.build(detector).reads == "rows"
        wanted = (request.features or request.columns) if rows else request.columns
        chosen = recording.choose(wanted)
        reference = None if other is None else other.choose(list(chosen))
        if rows:
            known = None if reference is None else np.column_stack(list(reference.values()))
            yield detector, list(chosen), np.column_stack(list(chosen.values())), known
        else:
            for name, values in chosen.items():
                yield detector, [name], values, None if reference is None else reference[name]


def _check(request: Request) -> None:
    """All that can be known to be wrong before a file is read."""
    problems = []
    for detector in request.detectors:
        try:
            detectors.build(detector)
        except ValueError as error:
            problems.append(f"--detector={detector}: {error}")
    for option, path in (("--json", request.json), ("--plot", request.plot)):
        if path is not None and not path.parent.is_dir():
            problems.append(f"{option}={path}: no such folder")
    if request.plot is not None and request.plot.suffix not in (".html", ".png"):
        problems.append(f"--plot={request.plot}: give a name that ends in .html or .png")
    elif request.plot is not None and request.plot.suffix == ".png":
        from daemon.recorded.png import available

        if not available():
            problems.append(f"--plot={request.plot}: PNG needs matplotlib, which is not installed: use .html")
    if request.rebaseline == 1:
        problems.append("--rebaseline=1: a new normal needs at least 2 rows")
    if problems:
        raise SettingsError(problems)


def _reference_rows(request: Request, rows: int) -> int:
    asked = request.reference
    if asked is None:
        count = max(rows // 4, LEAST_REFERENCE)
    else:
        count = int(asked * rows) if isinstance(asked, float) else int(str(asked))
    if count >= rows:
        raise StreamError(
            f"{request.path}: {rows} rows, and a reference of {count} leaves none to watch: "
            "give fewer rows, or another file, with --reference"
        )
    return count


def _check_changes(changes: Sequence[int], start: int, rows: int, path: Path) -> None:
    if wrong := [change for change in changes if not start <= change < rows]:
        problem = "lies in the reference" if wrong[0] < start else "lies behind the end"
        raise SettingsError([f"--changes={wrong[0]}: {problem}: rows {start} to {rows - 1} of {path} are watched"])


def _print(request: Request, found: Sequence[Watched]) -> None:
    if lines := alarm_rows(found, request.arl0, request.changes or ()):
        print(table(HEADERS, lines))
    else:
        print("no alarms")
    print()
    for watched in found:
        print("\n  ".join(summary(watched, request.arl0, request.changes)))


def _content(request: Request, found: Sequence[Watched]) -> dict[str, object]:
    first = found[0]
    return {
        "file": str(request.path),
        "rows": first.start + len(first.live),
        "reference": {
            "file": str(request.reference if isinstance(request.reference, Path) else request.path),
            "rows": int(first.calibration["rows"]) + first.reference_ignored,
        },
        "arl0": request.arl0,
        "changes": None if request.changes is None else list(request.changes),
        "rebaseline": request.rebaseline,
        "results": [as_json(watched, request.arl0, request.changes) for watched in found],
    }


def _plot(path: Path, request: Request, figures: dict[str, tuple[F64, list[Watched]]]) -> None:
    from daemon.recorded.figures import Figure

    made = [
        Figure(label, values, watched, request.changes or (), request.arl0)
        for label, (values, watched) in figures.items()
    ]
    if path.suffix == ".png":
        from daemon.recorded.png import draw

        try:
            draw(path, made, request.path.name)
        except (OSError, ValueError) as error:
            raise StreamError(f"--plot={path}: {error}: fewer columns, or .html, may help") from None
    else:
        from daemon.recorded.plot import page

        found = [watched for figure in made for watched in figure.found]
        lines = ["; ".join(summary(watched, request.arl0, request.changes)) for watched in found]
        _write(path, "--plot", page(made, request.path.name, lines))


def _write(path: Path, option: str, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StreamError(f"{option}={path}: {error}") from None
