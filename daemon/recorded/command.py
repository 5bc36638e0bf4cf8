"""The options of `homeostat detect`; what does the work is imported when the command runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Run detectors over a recorded file and print where they would have alarmed. The first rows, or another file, are taken
for normal: on them each detector is calibrated so that it gives one false alarm in --arl0 rows. Rows count from 0, the
first below a CSV's header. Values that are not finite are left out and counted."""

TAIL = """\
CSV: columns by name or by number from 0; without --column all columns of numbers but id, y, ts and unnamed ones.
npz: an array by name, x[3] or x:3 for one column of an array (N, D); without --column the array x, or else all arrays.
Detectors of single values watch each column on its own, detectors of rows all columns together.

An alarm repeats while a shift lasts, unless --rebaseline takes what follows it for the new normal. Alarms that are
closer than a tenth of --arl0 are printed as one run. `statistic` is that of the row before an alarm, for the alarm
itself sets it back; of adwin it is a mean, not to be compared with the threshold. An alarm after a change counts for
that change, also where it repeats that of an earlier one.

examples:
  homeostat detect sensors.csv --column temperature --detector cusum e_detector --plot alarms.html
  homeostat detect recorded.npz --detector mmd --reference normal.npz --changes 1000,2000 --json alarms.json"""


def add(commands: Any) -> None:
    """Add the command to ``commands``, what ``add_subparsers`` gave."""
    detect = commands.add_parser(
        "detect",
        help="run drift detectors over a recorded CSV or npz",
        description=DESCRIPTION,
        tail=TAIL,
    )
    detect.add_argument("path", type=Path, metavar="FILE", help="CSV, or npz by its ending")
    detect.add_argument(
        "--column", nargs="+", action="extend", default=[], metavar="NAME", help="columns to watch; default below"
    )
    detect.add_argument(
        "--features",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="columns that make a row, for detectors of rows (those of --column)",
    )
    detect.add_argument(
        "--detector",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="detectors; a wrong name lists them (cusum)",
    )
    detect.add_argument(
        "--reference",
        type=_reference,
        metavar="N|0.2|FILE",
        help="rows taken for normal: the first N, a share of all, or a file with the same columns "
        "(the first quarter, at least 500)",
    )
    detect.add_argument(
        "--arl0", type=_arl0, default=10_000.0, metavar="R", help="mean rows between false alarms, 50 or more (10000)"
    )
    detect.add_argument(
        "--rebaseline",
        type=_count,
        default=0,
        metavar="N",
        help="take the N rows after an alarm for the new normal (0: never)",
    )
    detect.add_argument(
        "--changes",
        type=_changes,
        metavar="ROWS",
        help="rows at which the stream is known to have changed, for example 1000,2000, or `none`: "
        "adds delays, missed changes, false alarms and the measured ARL0",
    )
    detect.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw stream, alarms and statistics: .html, or .png with matplotlib"
    )
    detect.add_argument("--json", type=Path, metavar="FILE", help="write all of it as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from daemon.recorded.detecting import Request, detect

    return detect(
        Request(
            path=arguments.path,
            columns=arguments.column,
            features=arguments.features,
            # Each once, in the order given.
            detectors=list(dict.fromkeys(arguments.detector)) or ["cusum"],
            reference=arguments.reference,
            arl0=arguments.arl0,
            changes=arguments.changes,
            rebaseline=arguments.rebaseline,
            plot=arguments.plot,
            json=arguments.json,
        )
    )


def _reference(text: str) -> int | float | Path:
    if text.isdecimal():
        return _at_least_one(text)
    try:
        share = float(text)
    except ValueError:
        return Path(text)
    if not 0.0 < share < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is neither a number of rows, nor a share between 0 and 1, nor a file")
    return share


def _at_least_one(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number of rows")
    return int(text)


def _arl0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 50.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of rows, 50 or more")
    return value


def _changes(text: str) -> list[int]:
    if text == "none":
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is not a list of rows such as 1000,2000, nor `none`")
    return sorted({int(part) for part in parts})
