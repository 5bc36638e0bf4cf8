"""The versions' keeper: writes decisions and files, and carries out what an operator asks for.

In the daemon's life: `open` after the state is restored, `decided` at every decision, `step` between batches, `saved`
after every checkpoint, `close` at the end. All but `step` answer at once and never raise because of a disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import structlog

import adapters.slow as slow
from daemon.resident import Resident
from daemon.versioning import durable, files, journal
from daemon.versioning.requests import Inbox, Request, payload
from daemon.versioning.shelf import Shelf, Wanted
from daemon.versions import VersionError

log = structlog.get_logger("homeostat.versions")

FEW = 16
"""Offsets of at most this many partitions are written into a decision; of more, their number alone."""


class Hands(Protocol):
    """What changes the served version: the daemon's `Actions`."""

    def rollback(self, number: int) -> None:
        """Serve this version from the next batch on; raises VersionError where it is not kept."""


class NoKeeper:
    """Where nothing is kept: a replay, or the simulator without a folder for checkpoints."""

    def open(self, lineage: str, sequence: int | None) -> None:
        """Nothing to do."""

    def decided(self, event: str, record: Mapping[str, Any], *, version: int | None = None) -> None:
        """Nothing to do."""

    def step(self, hands: Hands) -> bool:
        """Nobody asks."""
        return False

    def saved(self, sequence: int) -> None:
        """Nothing to do."""

    def close(self, timeout_s: float) -> None:
        """Nothing to do."""


class Keeper(NoKeeper):
    """Journal, files and requests in one folder."""

    def __init__(
        self,
        folder: Path,
        resident: Resident,
        *,
        bundle: str,
        position: Callable[[], tuple[int, Mapping[str, int]]],
        failed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is read or written before `open`.

        Args:
            folder: STATE_DIR/versions.
            resident: whose versions these are.
            bundle: hash of its frozen model's bundle.
            position: rows so far, and the next offset by partition.
            failed: called when something could not be written.
            clock: seconds, monotonic.
        """
        self.folder = folder
        self._resident = resident
        self._versions = resident.versions
        self._position = position
        self._failed = failed
        base = dict(resident.frozen.named_parameters(remove_duplicate=False))
        self._base, self._bundle = base, bundle
        self._journal = journal.Journal(folder)
        self._shelf = Shelf(folder, base, bundle=bundle, failed=failed)
        self._inbox = Inbox(folder, clock=clock)
        self._done: list[Request] = []
        self._lineage, self._after = "", 0
        self._last = 0

    def open(self, lineage: str, sequence: int | None) -> None:
        """The state is what checkpoint ``sequence`` of ``lineage`` holds (None: none, a fresh start).

        Marks decisions that this undoes, takes pinned versions back in that the state does not know, never gives a
        number again that is on disk for good, and writes files that are missing.
        """
        self._lineage, self._after = lineage, sequence or 0
        entries: list[journal.Entry] = []
        try:
            entries = journal.read(self.folder)
        except OSError as error:
            self._complain("the journal of decisions can't be read", str(error))
        live = journal.live(entries)
        kept = [entry for entry in live if not journal.beyond(entry, lineage, sequence)]
        self._inbox.settle({str(entry["request"]) for entry in kept if "request" in entry})
        self._adopt()
        self._versions.reserve(entry["version"] for entry in kept if type(entry.get("version")) is int)
        serves = self._versions.current.number
        if len(kept) < len(live) or (entries and entries[-1].get("serves") != serves):
            self._write(journal.RESTORED, {"after": sequence, "undone": len(live) - len(kept)})
        self._ask()

    def _adopt(self) -> None:
        for number, path in files.files(self.folder).items():
            if not path.name.endswith(".pinned.safetensors"):
                continue
            self._versions.reserve([number])
            if number in self._versions.numbers():
                continue
            try:
                card, delta = files.read(path, self._base, bundle=self._bundle)
                slow.apply_delta(self._resident.frozen, delta)
                self._versions.adopt(delta, {**card.record, "parent": card.parent}, number)
            except (VersionError, ValueError, OSError) as error:
                log.warning("a pinned version is left on disk alone", problem=str(error))

    def decided(self, event: str, record: Mapping[str, Any], *, version: int | None = None) -> None:
        """Write one decision; ``version`` is the one it is about."""
        self._write(event, {"version": version, "record": record})
        if event in ("promoted", "withdrawn"):
            self._ask()

    def _write(self, event: str, more: Mapping[str, Any]) -> None:
        rows, positions = self._position()
        entry = {
            "event": event,
            "time": durable.now(),
            "lineage": self._lineage,
            "after": self._after,
            "at": {"rows": rows, "positions": dict(positions) if len(positions) <= FEW else len(positions)},
            "serves": self._versions.current.number,
            **more,
        }
        if not self._journal.append(entry):
            self._complain("decision not written, tried again later", self._journal.problem)

    def _complain(self, text: str, problem: str) -> None:
        self._failed()
        log.error(text, problem=problem)

    def _ask(self) -> None:
        versions = self._versions
        there = [versions.find(number) for number in versions.numbers() if number]
        self._shelf.ask([Wanted(version, version.number in versions.pins) for version in there])

    def step(self, hands: Hands) -> bool:
        """Take up what was asked, at most once a second; True: the state changed and a checkpoint should be written."""
        requests = self._inbox.take()
        for line in self._inbox.refused:
            log.error("request refused", problem=line)
        self._inbox.refused = []
        for request in requests:
            self._carry_out(request, hands)
            self._done.append(request)
        if requests:
            self._ask()
        return bool(requests)

    def _carry_out(self, request: Request, hands: Hands) -> None:
        number, versions = request.number, self._versions
        record: dict[str, Any] = {"asked": request.action, "hold": versions.held}
        try:
            if request.action == "rollback":
                record["from"] = versions.current.number
                hands.rollback(number)
                versions.held |= request.hold
                record["hold"] = versions.held
            elif request.action == "resume":
                versions.held = False
                record["hold"] = False
            elif request.action == "pin":
                versions.pin(number)
            elif request.action == "unpin":
                versions.unpin(number)
            else:
                number, record = self._take_in(request)
        except (VersionError, ValueError, OSError) as error:
            record["reason"] = str(error)
            log.error("request refused", asked=request.action, version=number, problem=str(error))
            self._write("refused", {"version": number, "record": record, "request": request.name})
            return
        log.info("request done", asked=request.action, version=number, serves=versions.current.number)
        self._write(request.action, {"version": number, "record": record, "request": request.name})

    def _take_in(self, request: Request) -> tuple[int, dict[str, Any]]:
        card, delta = files.read(payload(self.folder, request), self._base, bundle=self._bundle)
        slow.apply_delta(self._resident.frozen, delta)
        origin = {"number": card.number, "parent": card.parent, "record": card.record}
        record = {"method": str(card.record.get("method", "import")), "imported": origin, "made_at": durable.now()}
        # Its parent is a number of another daemon, or of many: here it stands on the frozen model.
        return self._versions.adopt(delta, {**record, "parent": 0}).number, record

    def saved(self, sequence: int) -> None:
        """A checkpoint was written, or none is kept: what was asked before it is done for good."""
        self._after = sequence
        for request in self._done:
            self._inbox.done(request)
        self._done.clear()
        if not self._journal.flush():
            self._complain("decisions not written, tried again later", self._journal.problem)
        if self._shelf.stale:
            self._ask()

    def close(self, timeout_s: float) -> None:
        """Wait for the files."""
        if not self._shelf.wait(timeout_s):
            log.warning("version files not finished: written at the next start", folder=str(self.folder))
