"""The options of `homeostat simulate`; what does the work is imported when the command runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add(commands: Any, positive: Callable[[str], int]) -> None:
    """Add the command to ``commands``, what ``add_subparsers`` gave; ``positive`` reads a count."""
    simulate = commands.add_parser(
        "simulate",
        help="write the simulated stream to a sink, with late labels",
        description="Write the simulated stream as JSON records, and its labels 200 rows late.",
    )
    simulate.add_argument("--to", required=True, metavar="URL", help="kafka://host:port/topic, file://path or -")
    simulate.add_argument("--labels-to", default="", metavar="URL", help="where the late labels go")
    simulate.add_argument("--records", type=positive, default=20_000, metavar="N", help="rows (20000)")
    simulate.add_argument("--rate", type=float, default=0.0, metavar="R", help="rows per second; 0: at full speed")
    simulate.add_argument("--bundle", type=Path, metavar="FOLDER", help="also pack the simulator's own model there")
    simulate.add_argument("--seed", type=int, default=7, metavar="N", help="seed of the array (7)")


def run(arguments: argparse.Namespace) -> int:
    """Write the stream; the exit code."""
    from daemon.simulating import simulate

    if arguments.bundle is not None:
        from daemon.streams.simbundle import make_bundle

        make_bundle(arguments.bundle, arguments.seed, progress=lambda text: print(text, file=sys.stderr, flush=True))
    return simulate(arguments.to, arguments.labels_to, arguments.records, arguments.rate, arguments.seed)
