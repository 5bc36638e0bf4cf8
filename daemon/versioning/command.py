"""The options of `homeostat versions`; what does the work is imported when the command runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """\
The versions that the slow loop made: why each was kept, and which one serves. They lie in HOMEOSTAT_STATE_DIR/versions:
decisions.jsonl, one line a decision, and one small file a version (what differs from the frozen model). Without an
action: list."""

TAIL = """\
pin, unpin, import and rollback leave a request. A running daemon takes it up between two batches, within a second; a
stopped one at its next start. Nothing is served that the daemon did not check.

examples:
  homeostat versions
  homeostat versions list --all --json
  homeostat versions rollback 4 --hold
  homeostat versions merge 3 5 --out both.safetensors && homeostat versions import both.safetensors"""

ROLLBACK = """\
Serve version N again; 0 is the frozen model. N is any version that the list shows. The running burst is thrown away,
and so is the evidence that was gathered on the version before. Learning goes on: the next version that is proven better
than N is promoted. With --hold nothing is promoted until `homeostat versions rollback --resume`. The guard may still
withdraw a version that is shown to be worse than the frozen model, held or not."""

VARIABLES = ("HOMEOSTAT_STATE_DIR", "HOMEOSTAT_BUNDLE", "HOMEOSTAT_FACTORY", "HOMEOSTAT_APP_DIR", "HOMEOSTAT_VERSIONS")


def add(commands: Any) -> None:
    """Add the command to ``commands``, what ``add_subparsers`` gave."""
    versions = commands.add_parser(
        "versions",
        help="list, show, export, pin, merge, import, and roll back what was learnt",
        description=DESCRIPTION,
        variables=VARIABLES,
        tail=TAIL,
    )
    versions.add_argument("--state", type=Path, metavar="FOLDER", help="the daemon's folder (HOMEOSTAT_STATE_DIR)")
    actions = versions.add_subparsers(dest="action", metavar="ACTION", parser_class=type(versions))

    def action(name: str, text: str, description: str | None = None) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = actions.add_parser(name, help=text, description=description or text)
        return made

    listed = action("list", "the versions with their gains; --all: every decision, those against a version as well")
    listed.add_argument("--all", action="store_true", help="also every decision, with its reasons")
    listed.add_argument("--json", action="store_true", help="as JSON, with every decision")
    show = action("show", "one version: its record, its parents, what it changes")
    show.add_argument("number", type=_number, metavar="N")
    show.add_argument("--json", action="store_true", help="as JSON")
    export = action("export", "copy a version's file, for another daemon of the same bundle")
    export.add_argument("number", type=_number, metavar="N")
    export.add_argument("file", type=Path, metavar="FILE")
    merge = action(
        "merge", "average versions into one file", "Average what versions change: of products, not of factors."
    )
    merge.add_argument("sources", nargs="+", metavar="N|FILE", help="versions by number, or files")
    merge.add_argument("--weights", type=_weights, metavar="LIST", help="one for each, for example 2,1 (equal)")
    merge.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")
    for name, text in (
        ("pin", "keep a version until it is unpinned"),
        ("unpin", "let a pinned version go with the others of its age"),
    ):
        pin = action(name, text)
        pin.add_argument("number", type=_number, metavar="N")
        _waiting(pin)
    taken = action("import", "hand a version's file to the daemon: it is numbered and pinned, and not served")
    taken.add_argument("file", type=Path, metavar="FILE")
    _waiting(taken)
    rollback = action("rollback", "serve a version again; 0: the frozen model", ROLLBACK)
    rollback.add_argument("number", type=_number, nargs="?", metavar="N")
    rollback.add_argument("--hold", action="store_true", help="promote nothing until --resume")
    rollback.add_argument("--resume", action="store_true", help="without N: end the hold")
    _waiting(rollback)


def _waiting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wait", type=_seconds, default=3.0, metavar="S", help="seconds to wait for the daemon's answer (3)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from daemon.config import load_settings

    settings = load_settings()
    from daemon.versioning import operating

    folder = (arguments.state or settings.state_dir) / "versions"
    match arguments.action:
        case None:
            return operating.listed(folder)
        case "list":
            return operating.listed(folder, everything=arguments.all, as_json=arguments.json)
        case "show":
            return operating.show(folder, arguments.number, as_json=arguments.json)
        case "export":
            return operating.export(folder, arguments.number, arguments.file)
        case "merge":
            return operating.merge(folder, settings, arguments.sources, arguments.weights, arguments.out)
        case "import":
            return operating.take_in(folder, settings, arguments.file, wait_s=arguments.wait)
        case "rollback":
            return operating.rollback(
                folder, arguments.number, hold=arguments.hold, resume=arguments.resume, wait_s=arguments.wait
            )
        case action:
            return operating.ask(folder, action, number=arguments.number, wait_s=arguments.wait)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not the number of a version")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 600.0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from 0 to 600")
    return value


def _weights(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0.0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"{text} is not a list of weights above 0, such as 2,1")
    return values
