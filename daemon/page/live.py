"""The page's side of the daemon: the loop leaves it a sample a second, the web server's threads read."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from daemon.chronicle import Entry
from daemon.page import words
from daemon.page.document import document
from daemon.page.earlier import earlier
from daemon.page.history import History, Sample
from daemon.page.state import state
from daemon.versioning import durable
from daemon.versioning.keeper import Keeper

if TYPE_CHECKING:
    from daemon.assembly import Worker
    from daemon.versions import Version

EVERY_S = 1.0
"""Between two samples."""
RATE_TICKS = 10
"""Samples over which a rate is taken."""
FRESH_S = 0.4
"""For so long all readers get the same answer: many of them cost no more than one."""
GONE = 40
"""Versions that are shown though nothing can go back to them any more."""
VERSIONS = {
    "version promoted": "promoted",
    "version rolled back": "rolled back",
    "version withdrawn: worse than the frozen model": "withdrawn",
}
"""Decisions about versions, and their marks in the history."""
RANKS = {name: rank for rank, name in enumerate(words.STATES)}

Probe = Callable[[], tuple[bool, str]]
Answer = tuple[HTTPStatus, str, bytes, Mapping[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """When things last happened, in monotonic seconds; None: not in this run."""

    state_at: float
    """The present state was entered."""
    drift_at: float | None = None
    """A drift was noticed in the steady state."""
    out_at: float | None = None
    """The working range was left."""
    frozen_at: float | None = None
    """An operator froze the model."""
    trip: str | None = None
    """Why the guard last stepped in."""


class Page:
    """Answers ``/`` and ``/state``.

    The loop calls `tick`, and its decisions come by way of the chronicle; both leave values that are replaced as a
    whole or read under a lock, so that a reader neither waits for the loop nor holds it up.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        ready: Probe,
        alive: Probe,
        refresh: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Begin a history.

        Args:
            worker: what is shown.
            ready: whether records are answered, and why not.
            alive: whether there is progress.
            refresh: brings the gauges up to date, as before a scrape.
            clock: monotonic seconds.
            wall: seconds since the epoch.
        """
        self.worker, self.ready, self.alive, self.refresh, self.clock = worker, ready, alive, refresh, clock
        self._wall = wall
        self.operator = worker.settings.operator.token_file is not None
        self.started = clock()
        self.history = History()
        self.moments = Moments(state_at=self.started)
        self.chronicle = worker.loop.actions.chronicle
        self.chronicle.heard = self._heard
        self.ticks: tuple[tuple[float, float, float], ...] = ()
        """Moment, records read and answers given, at the last ticks."""
        self.versions: tuple[dict[str, Any], ...] = ()
        self.held = False
        self._due = self.started
        self._shown: object = None
        self._cards: dict[int, dict[str, Any]] = {}
        self._html, self._headers = document(operator=self.operator)
        self._lock = threading.Lock()
        self._fresh_until, self._body = -1.0, b""

    def open(self) -> None:
        """The state is restored, and the keeper open: what was decided before this start is shown too."""
        if isinstance(self.worker.keeper, Keeper):
            now, wall = self.clock(), self._wall()
            self.chronicle.before(earlier(self.worker.keeper.folder, lambda at: min(now, now - wall + at)))
        self.moments = replace(self.moments, state_at=self.clock())

    def tick(self) -> None:
        """Take a sample if one is due; for the loop, between two batches."""
        now = self.clock()
        if now < self._due:
            return
        self._due = now + EVERY_S
        loop, telemetry = self.worker.loop, self.worker.telemetry
        errors = loop.monitor.errors
        rank = RANKS.get(loop.regulator.state.value, 0)
        self.history.add(now, Sample(errors["served"].value, errors["frozen"].value, rank))
        counts = (now, telemetry.records_in._value.get(), telemetry.records_out._value.get())
        self.ticks = (*self.ticks[1 - RATE_TICKS :], counts)
        self._look_at_versions()

    def _look_at_versions(self) -> None:
        versions = self.worker.loop.resident.versions
        there = [versions.find(number) for number in versions.numbers()]
        self.held = versions.held
        # A record is replaced, never changed: the same object says the same.
        shown = [versions.current.number, sorted(versions.pins), [(one.number, id(one.record)) for one in there]]
        if shown == self._shown:
            return
        self._shown = shown
        kept = {one.number for one in there}
        for one in there:
            if one.number:
                self._cards[one.number] = _card(one)
        gone = sorted(self._cards.keys() - kept)
        for number in gone[: max(0, len(gone) - GONE)]:
            del self._cards[number]
        cards = [
            {
                **card,
                "kept": number in kept,
                "serves": number == versions.current.number,
                "pinned": number in versions.pins,
            }
            for number, card in sorted(self._cards.items(), reverse=True)
        ]
        original: dict[str, Any] = {
            "number": 0,
            "parent": None,
            "made_at": None,
            "words": "The frozen model: as it was delivered, without anything learnt here.",
            "record": {},
            "kept": True,
            "serves": versions.current.number == 0,
            "pinned": False,
        }
        self.versions = (*cards, original)

    def _heard(self, entry: Entry) -> None:
        """A decision, in the loop's thread."""
        at, facts, version = entry.at, entry.facts, entry.facts.get("version")
        match entry.event:
            case "drift":
                self.history.mark(at, "drift")
                self.moments = replace(self.moments, drift_at=at)
            case name if kind := VERSIONS.get(name):
                self.history.mark(at, kind, version)
                self._look_at_versions()
            case "asked by an operator" if facts.get("done") and facts.get("action") in ("freeze", "resume"):
                frozen = facts["action"] == "freeze"
                self.history.mark(at, "frozen" if frozen else "resumed")
                self.moments = replace(self.moments, frozen_at=at if frozen else None)
            case "decision" if facts.get("state") != facts.get("before"):
                self._entered(at, str(facts.get("state")), str(facts.get("before")), facts)

    def _entered(self, at: float, now: str, before: str, facts: Mapping[str, Any]) -> None:
        moments = replace(self.moments, state_at=at)
        calm = ("steady", "settling")
        if before in calm and now not in calm:
            # The drift that led here was noticed by the same reading; one from an earlier excursion says nothing.
            drift = moments.drift_at if moments.drift_at is not None and at - moments.drift_at < EVERY_S else None
            moments = replace(moments, out_at=at, drift_at=drift)
        elif now in calm:
            moments = replace(moments, out_at=None, drift_at=None)
        if now == "fallback":
            moments = replace(moments, trip=str(facts.get("trip")))
            self.history.mark(at, "safety stop")
        self.moments = moments

    def answer(self, path: str) -> Answer | None:
        """What ``path`` holds, with content type and headers; None: nothing. From any thread."""
        if path == "/":
            return HTTPStatus.OK, "text/html; charset=utf-8", self._html, self._headers
        if path == "/state":
            return HTTPStatus.OK, "application/json", self._state(), {"Referrer-Policy": "no-referrer"}
        return None

    def _state(self) -> bytes:
        with self._lock:
            if self.clock() >= self._fresh_until:
                found = durable.plain(state(self, self._wall()))
                self._body = json.dumps(found, allow_nan=False, separators=(",", ":")).encode() + b"\n"
                self._fresh_until = self.clock() + FRESH_S
            return self._body


def _card(version: Version) -> dict[str, Any]:
    record = durable.plain(version.record)
    return {
        "number": version.number,
        "parent": version.parent,
        "made_at": record.get("made_at"),
        "words": words.version(record),
        "record": {name: value for name, value in record.items() if name != "parent"},
    }
