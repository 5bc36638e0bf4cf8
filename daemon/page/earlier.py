"""What was decided before a restart, out of the journal, for the list of last decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from daemon.chronicle import ENTRIES, Entry
from daemon.page.words import RESULTS
from daemon.versioning import journal

RESTART = "restarted"


def earlier(folder: Path, monotonic: Callable[[float], float]) -> list[Entry]:
    """The newest decisions of a folder of versions that still count, oldest first; none where it can't be read.

    Args:
        folder: STATE_DIR/versions.
        monotonic: from seconds since the epoch to the clock that entries are dated by.
    """
    try:
        lines = journal.read(folder)
    except OSError:
        return []
    found = []
    for line in [one for one in lines if not one["superseded"]][-ENTRIES:]:
        told = _told(line)
        try:
            at = datetime.fromisoformat(str(line.get("time"))).timestamp()
        except (ValueError, OverflowError):
            continue
        if told is not None:
            found.append(Entry(monotonic(at), *told))
    return found


def _told(line: journal.Entry) -> tuple[str, Mapping[str, Any]] | None:
    """Event and facts as the log has them."""
    record, event, version = line.get("record"), line["event"], line.get("version")
    facts = record if isinstance(record, dict) else {}
    if event == "promoted":
        return "version promoted", {**facts, "version": version}
    if event == "withdrawn":
        return "version withdrawn: worse than the frozen model", {"version": version}
    if event == "operator":
        return "asked by an operator", {**facts, "action": facts.get("asked")}
    if event == "bundle":
        return f"bundle {facts.get('result')}", facts
    if event == "rollback":
        return "version rolled back", {"version": version, "before": facts.get("from")}
    if event == journal.RESTORED:
        return RESTART, {"undone": line.get("undone")}
    return ("burst without a version", {**facts, "result": event}) if event in RESULTS else None
