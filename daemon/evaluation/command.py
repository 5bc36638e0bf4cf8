"""The options of `homeostat evaluate`; what does the work is imported when the command runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Replay a recorded stream through the daemon's own loop and, side by side, through what it has to beat: the frozen model,
copied labels, a periodic refit, and fast methods without a guard. Each batch is predicted, answered, scored, and only
then adapted to; labels come after their delay. Prints whether adapting is worth it here, and what it costs."""

TAIL = """\
The recording is FILE: an npz with x (N, *shape) and y, and where it has them ts, key and segment (another value begins
another regime); a CSV with y; or JSON lines. Without FILE it is what HOMEOSTAT_SOURCE names: a range of a Kafka topic,
with the labels of HOMEOSTAT_LABELS joined by id, or the simulator. Bundle and methods are the daemon's, by the
variables that `homeostat run` reads. Results are kept as they are made: a run that was killed goes on where it was.

examples:
  homeostat evaluate --records 5000
  homeostat evaluate recorded.npz --delay 500 --label-share 0.1 --seeds 0,1,2 --html out.html
  HOMEOSTAT_SOURCE=kafka://127.0.0.1:9092/sensors HOMEOSTAT_LABELS=kafka://127.0.0.1:9092/labels \\
    HOMEOSTAT_BUNDLE=./bundle homeostat evaluate --last 50000 --config tented:FAST=tent,SLOW__ENABLED=false"""


def add(commands: Any) -> None:
    """Add the command to ``commands``, what ``add_subparsers`` gave."""
    evaluate = commands.add_parser(
        "evaluate",
        help="replay a recording: is adapting worth it, and what does it cost?",
        description=DESCRIPTION,
        tail=TAIL,
    )
    evaluate.add_argument("path", type=Path, nargs="?", metavar="FILE", help="npz, CSV or JSON lines, by its ending")
    evaluate.add_argument("--records", type=_positive, metavar="N", help="the first N rows (all; simulator: 20000)")
    evaluate.add_argument("--last", type=_positive, metavar="N", help="the newest N rows")
    evaluate.add_argument("--from", dest="first", type=_count, metavar="OFFSET", help="Kafka: begin there")
    evaluate.add_argument("--to", dest="stop", type=_count, metavar="OFFSET", help="Kafka: end before it")
    evaluate.add_argument(
        "--order", choices=("native", "iid"), default="native", help="iid: shuffled, as if nothing had an order"
    )
    evaluate.add_argument(
        "--changes",
        type=_changes,
        metavar="ROWS",
        help="rows at which the world changed: 1000,2000, or `none`",
    )
    evaluate.add_argument("--batch", type=_positive, default=64, metavar="N", help="rows of a batch (64)")
    evaluate.add_argument("--delay", type=_count, default=200, metavar="N", help="rows until a label is known (200)")
    evaluate.add_argument(
        "--label-share", type=_share, default=1.0, metavar="S", help="share of the rows that get a label; 0: none (1)"
    )
    evaluate.add_argument(
        "--seeds", type=_seeds, default=[0], metavar="LIST", help="of the methods and of which labels come (0)"
    )
    evaluate.add_argument(
        "--methods",
        type=_names,
        metavar="LIST",
        help="fast methods to run unguarded, or `all` (one of each family)",
    )
    evaluate.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="NAME:SETTINGS",
        help="the daemon once more with other settings, for example tented:FAST=tent,SLOW__ENABLED=false",
    )
    evaluate.add_argument("--refit", type=_positive, default=500, metavar="N", help="labels between two refits (500)")
    evaluate.add_argument("--window", type=_positive, default=500, metavar="N", help="rows of the worst window (500)")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write all of it as JSON")
    evaluate.add_argument("--html", type=Path, metavar="FILE", help="write one page with a plot of the errors")
    evaluate.add_argument(
        "--state", type=Path, metavar="FOLDER", help="where finished replays are kept (HOMEOSTAT_STATE_DIR/evaluate)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from daemon.config import load_settings

    # A wrong variable answers before anything heavy is imported.
    load_settings()
    from daemon.evaluation.configurations import METHODS
    from daemon.evaluation.evaluating import Request, evaluate
    from daemon.evaluation.reading import Wanted
    from daemon.evaluation.recording import Plan

    return evaluate(
        Request(
            wanted=Wanted(
                file=arguments.path,
                records=arguments.records,
                first=arguments.first,
                stop=arguments.stop,
                last=arguments.last,
                changes=arguments.changes,
                order=arguments.order,
            ),
            plan=Plan(batch_rows=arguments.batch, delay=arguments.delay, label_share=arguments.label_share),
            seeds=arguments.seeds,
            methods=METHODS if arguments.methods is None else arguments.methods,
            configurations=arguments.config,
            refit_rows=arguments.refit,
            window=arguments.window,
            state=arguments.state,
            json=arguments.json,
            html=arguments.html,
        )
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number of rows")
    return int(text)


def _positive(text: str) -> int:
    if _count(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1")
    return value


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is not a list of seeds such as 0,1,2")
    return list(dict.fromkeys(map(int, parts)))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _changes(text: str) -> tuple[int, ...]:
    if text == "none":
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is not a list of rows such as 1000,2000, nor `none`")
    return tuple(sorted({int(part) for part in parts}))
