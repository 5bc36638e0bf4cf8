"""The journal of decisions: one JSON line for each, appended and fsynced, never changed.

A line says what was decided (``event``), when (``time``, and ``at``: rows and offsets of the stream), what serves since
then (``serves``), and after which checkpoint it was made (``lineage``, ``after``). After a crash the stream is replayed
from the newest checkpoint and the same decisions are made again. So a start writes a line ``restored``, and every
earlier line that was made after the checkpoint restored from is *superseded*: still there to read, it counts no more.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from daemon.versioning import durable

Entry = dict[str, Any]

NAME = "decisions.jsonl"
RESTORED = "restored"
MAX_BYTES = 4 << 20
"""Size at which the journal becomes ``decisions.jsonl.1`` and a new one begins: with it, twice this is on disk."""
PENDING = 256
"""Lines kept while the folder can't be written; the oldest are dropped first."""
LONGEST_LINE = 64 << 10


class Journal:
    """Appends decisions to a folder's journal. Nothing here raises because of a disk: failures are counted."""

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.path = folder / NAME
        self.max_bytes = max_bytes
        self.failures = 0
        self.problem = ""
        """What the last failure was; empty since the last success."""
        self.dropped = 0
        self._pending: deque[bytes] = deque()

    def append(self, entry: Entry) -> bool:
        """Write one decision, after those that could not be written before; whether all are on disk."""
        data = json.dumps(durable.plain(entry), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        if len(data) > LONGEST_LINE:
            # Whatever made it so long, the decision itself must be readable.
            kept = {name: value for name, value in durable.plain(entry).items() if len(str(value)) < 1_000}
            data = json.dumps({**kept, "left_out_bytes": len(data)}).encode()
        self._pending.append(data + b"\n")
        while len(self._pending) > PENDING:
            self._pending.popleft()
            self.dropped += 1
        return self.flush()

    def flush(self) -> bool:
        """Write what is pending; whether nothing is left."""
        if not self._pending:
            return True
        try:
            self._write(b"".join(self._pending))
        except OSError as error:
            self.failures += 1
            self.problem = f"{self.path}: {error.strerror or error}"
            return False
        self._pending.clear()
        self.problem = ""
        return True

    def _write(self, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self.path.stat().st_size if self.path.exists() else 0
        if size and size + len(data) > self.max_bytes:
            os.replace(self.path, self.path.with_name(NAME + ".1"))
            size = 0
        with open(self.path, "ab+") as file:
            if size:
                file.seek(size - 1)
                # A crash or a full disk cut the last line short: it must not swallow the next one.
                data = data if file.read(1) == b"\n" else b"\n" + data
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, size)
                raise
        if not size:
            durable.sync_folder(self.path.parent)


def is_journal(folder: Path) -> bool:
    """Whether decisions were written there."""
    return (folder / NAME).is_file() or (folder / (NAME + ".1")).is_file()


def read(folder: Path) -> list[Entry]:
    """Every decision on disk, oldest first, each with ``superseded``: whether a restart has undone it.

    Lines that can't be read (cut short by a crash) are passed over.

    Raises:
        OSError: the folder can't be read.
    """
    entries: list[Entry] = []
    for name in (NAME + ".1", NAME):
        path = folder / name
        if not path.is_file():
            continue
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("event"), str):
                entries.append(entry)
    return fold(entries)


def fold(entries: Iterable[Entry]) -> list[Entry]:
    """Mark what later starts have undone, in copies."""
    result: list[Entry] = []
    for entry in entries:
        if entry["event"] == RESTORED:
            for earlier in result:
                if beyond(earlier, str(entry.get("lineage")), entry.get("after")):
                    earlier["superseded"] = True
        result.append({**entry, "superseded": False})
    return result


def beyond(entry: Entry, lineage: str, sequence: Any) -> bool:
    """Whether a decision is no part of the past of checkpoint ``sequence`` of ``lineage``; None: of a fresh start."""
    if sequence is None or entry.get("lineage") != lineage:
        return True
    after = entry.get("after")
    # Made after that very checkpoint was written, or after a later one.
    return isinstance(after, int) and after >= sequence


def live(entries: Iterable[Entry]) -> list[Entry]:
    """What counts: neither superseded nor a start's mark."""
    return [entry for entry in entries if not entry["superseded"] and entry["event"] != RESTORED]
