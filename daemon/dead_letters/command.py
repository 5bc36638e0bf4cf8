"""The options of `homeostat replay-dlq`; what does the work is imported when the command runs."""

from __future__ import annotations

import argparse
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

from daemon.errors import SettingsError

if TYPE_CHECKING:
    from daemon.dead_letters.replaying import Store, Target
    from daemon.settings import Settings

DESCRIPTION = """\
Send the records of the dead letters again: those of HOMEOSTAT_DEAD_LETTERS (else the place beside HOMEOSTAT_SOURCE) to
HOMEOSTAT_SOURCE, or to --to. A record goes with its key, value and headers to the partition that it came from, in the
order of that partition, at least once. What was sent is noted (for Kafka in the group GROUP.replay-dlq, for a file in
FILE.replayed), so that the next call goes on. What was not asked for, or could not be sent, is left for a later one."""

TAIL = """\
A record that dies again carries how often it was replayed; one that was so as often as --max-replays is left. Times are
those of the records, not of their deaths. Letters that come while the command runs are for the next call. One call at a
time.

exit codes: 0: done; 2: a setting or stream is wrong; 3: some were refused or not delivered, and are left

examples:
  homeostat replay-dlq --dry-run
  homeostat replay-dlq --reason undecodable --reason wrong_shape --since 2h
  homeostat replay-dlq --partition 3 --offset 1200-1300 --limit 10
  homeostat replay-dlq --to kafka://127.0.0.1:9092/repaired --again"""

VARIABLES = (
    "HOMEOSTAT_SOURCE",
    "HOMEOSTAT_DEAD_LETTERS",
    "HOMEOSTAT_STATE_DIR",
    "HOMEOSTAT_KAFKA__GROUP",
)

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def add(commands: Any) -> None:
    """Add the command to ``commands``, what ``add_subparsers`` gave."""
    replay = commands.add_parser(
        "replay-dlq",
        help="send the records of the dead letters again",
        description=DESCRIPTION,
        variables=VARIABLES,
        tail=TAIL,
    )
    replay.add_argument("--to", metavar="URL", help="kafka://host:port/topic or file:path (HOMEOSTAT_SOURCE)")
    replay.add_argument(
        "--reason", action="append", default=[], metavar="R", help="only letters with this reason; may be repeated"
    )
    replay.add_argument("--since", type=_time, metavar="T", help="only records of this time or later: 2h, RFC 3339")
    replay.add_argument("--until", type=_time, metavar="T", help="only records before this time")
    replay.add_argument("--partition", metavar="P", help="only records of this partition: sensors/3, or 3")
    replay.add_argument("--offset", type=_offsets, metavar="N[-M]", help="only records of these offsets, M included")
    replay.add_argument("--limit", type=_positive, metavar="N", help="send at most N")
    replay.add_argument(
        "--max-replays", type=_positive, default=3, metavar="N", help="leave those replayed N times (3)"
    )
    replay.add_argument("--again", action="store_true", help="begin with the oldest letter, sent or not")
    replay.add_argument("--dry-run", action="store_true", help="list what would be sent, a line each; send nothing")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from daemon.config import load_settings

    settings = load_settings()
    from daemon.dead_letters.replaying import Wanted, replay
    from daemon.places import dead_letters_url

    url = dead_letters_url(settings)
    to = settings.source if arguments.to is None else arguments.to
    store = _store(settings, url)
    target = _target(settings, to, "HOMEOSTAT_SOURCE" if arguments.to is None else "--to")
    if to.rstrip("/") == url.rstrip("/"):
        raise SettingsError([f"--to={to}: that is where the dead letters lie; give another place"])
    first, last = arguments.offset or (None, None)
    wanted = Wanted(
        reasons=frozenset(arguments.reason),
        since_s=arguments.since,
        until_s=arguments.until,
        partition=arguments.partition,
        first=first,
        last=last,
        max_replays=arguments.max_replays,
        limit=arguments.limit,
    )
    try:
        store.open(again=arguments.again)
        if not arguments.dry_run:
            target.open()
        summary = replay(store, target, wanted, dry=arguments.dry_run, say=print)
    finally:
        target.close()
        store.close()
    print("\n".join(summary.lines(url, to, dry=arguments.dry_run)))
    return 3 if summary.refused else 0


def _store(settings: Settings, url: str) -> Store:
    scheme = url.partition(":")[0]
    if scheme == "kafka":
        from daemon.dead_letters.kafka import KafkaLetters

        return KafkaLetters(url, settings.kafka, variable="HOMEOSTAT_DEAD_LETTERS")
    if scheme == "file":
        from daemon.dead_letters.files import FileLetters

        return FileLetters(url, variable="HOMEOSTAT_DEAD_LETTERS")
    raise SettingsError(
        [f"HOMEOSTAT_DEAD_LETTERS={url}: nothing can be read there again; right would be kafka:// or file:"]
    )


def _target(settings: Settings, url: str, variable: str) -> Target:
    scheme = url.partition(":")[0]
    if scheme == "kafka":
        from daemon.dead_letters.kafka import KafkaTarget

        return KafkaTarget(url, settings.kafka, variable=variable)
    if scheme == "file" and variable == "--to":
        from daemon.dead_letters.files import FileTarget

        return FileTarget(url, variable=variable)
    if variable == "--to":
        raise SettingsError([f"--to={url}: records can't be sent there; right would be kafka:// or file:"])
    raise SettingsError([f"--to is needed: records can't be sent to HOMEOSTAT_SOURCE={url}; give kafka:// or file:"])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def _offsets(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and (not last.isdecimal() or int(last) < int(first))):
        raise argparse.ArgumentTypeError(f"{text} is not an offset, nor two such as 1200-1300")
    return int(first), int(last or first)


def _time(text: str) -> float:
    """Seconds since the epoch, from such, from RFC 3339 with its offset, or from how long ago: 90s, 30m, 2h, 7d."""
    number, unit = (text[:-1], _UNITS[text[-1]]) if text[-1:] in _UNITS else (text, 0.0)
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if 0.0 <= value < 1e12:
        return time.time() - value * unit if unit else value
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        right = "2h (ago), 2026-07-01T12:00:00Z or seconds since 1970"
        raise argparse.ArgumentTypeError(f"{text} is not a time; right would be {right}")
    return found.timestamp()
