"""Carries out what the regulator decides: gain, reset, bursts, promotion, rollback; one log line per decision."""

from __future__ import annotations

from typing import Any

import numpy as np
import structlog

from daemon.chronicle import Chronicle
from daemon.learner import Learner
from daemon.monitor import Monitor
from daemon.predicted import Predicted
from daemon.regulator import Decision, Event, Reading, RegulatorLimits, State
from daemon.resident import Resident
from daemon.shift_kind import ShiftKind
from daemon.tally import Tally
from daemon.telemetry import Telemetry
from daemon.versioning.durable import now
from daemon.versioning.keeper import NoKeeper
from daemon.watch import REPORTED

log = structlog.get_logger("homeostat.regulator")

WAYS_ROWS, MOST_WAYS_ROWS = 64, 2**18
"""Rows at the least between two log lines on what answers: twice as many after each line that came soon."""


class Actions:
    """The hands of the controller."""

    def __init__(
        self,
        resident: Resident,
        monitor: Monitor,
        learner: Learner,
        telemetry: Telemetry,
        tally: Tally,
        limits: RegulatorLimits,
    ) -> None:
        self.resident = resident
        self.monitor = monitor
        self.learner = learner
        self._telemetry = telemetry
        self._tally = tally
        self.limits = limits
        self._state = State.STEADY
        self._ways: tuple[str, ...] = ()
        self._since_ways = self._ways_gap = WAYS_ROWS
        self.trip: str | None = None
        """The guard's reason, for the next reading."""
        self.version_harm = False
        """The promoted version must go: it is shown to be worse than the frozen model, or not finite."""
        self.chronicle = Chronicle()
        self.keeper = NoKeeper()
        """Told of every burst's end and every withdrawal."""
        self._given_up = False
        """A burst was wanted by the regulator and taken away by an operator; it is to hear of that."""
        self.rests = False
        """Under overload: no burst begins, and a deciding adapter has no copy run that doesn't answer."""
        self.frozen = False
        """An operator has stopped all adaptation and learning; part of the checkpoint."""
        self.trusted = self.decides
        """Whether the fast adaptation is served; else it runs in shadow."""

    @property
    def decides(self) -> bool:
        """Whether the fast adapter decides by itself when to differ from the version: it needs no shadow period."""
        return self.resident.deciding is not None

    def learn(self) -> Event:
        """Start or finish a burst; a promoted candidate is served from the next batch on."""
        if self._given_up and not self.learner.busy:
            self._given_up = False
            return "rejected"
        held = self.resident.versions.held or self.frozen
        labelled = self.monitor.trust.labels_come()
        if self.learner.wanted and (held or not (labelled or self.learner.settings.pseudo_labels)):
            self.learner.cancel()
            self._ended("cancelled", {"reason": "an operator holds the version" if held else "no labels to learn from"})
            return "rejected"
        if held or not self.learner.settings.enabled:
            return "idle"
        if self.rests and (self.learner.wanted or not self.learner.busy):
            return "busy" if self.learner.wanted else "idle"
        error = self.monitor.errors["served"].value if labelled else float("nan")
        outcome = self.learner.step(self.resident.version_model, self.resident.current.number, error)
        if outcome is None:
            return "busy" if self.learner.busy else "idle"
        given_up, self._given_up = self._given_up, False
        self._telemetry.slow_seconds.observe(outcome.seconds)
        record = {**outcome.record, "reason": outcome.reason, "seconds": round(outcome.seconds, 3)}
        if outcome.result != "promoted":
            self._ended(outcome.result, record)
            if not given_up and not outcome.record.get("asked", True):
                # A look of its own accord: what the regulator asked for is still to come.
                return "busy" if self.learner.busy else "idle"
            return "rejected" if outcome.result in ("rejected", "declined", "cancelled") else "failed"
        first = self.resident.current.number == 0
        told = {**record, "trigger": self._why(outcome.record), "made_at": now()}
        version = self.resident.promote(outcome.delta, told, over_frozen=outcome.over_frozen)
        if self.decides:
            fast_error = self.monitor.errors["adapted"].value
            self.resident.beside.promoted(first=first, version_error=outcome.error, fast_error=fast_error)
        self.learner.keep(version.delta, outcome)
        self.monitor.forget_version()
        self._tally.versions += 1
        self._telemetry.bursts["promoted"].inc()
        self.chronicle.tell(log.info, "version promoted", version=version.number, **record)
        self.keeper.decided("promoted", version.record, version=version.number)
        return "promoted"

    def _ended(self, result: str, record: dict[str, Any]) -> None:
        """A burst without a version."""
        self._telemetry.bursts[result].inc()
        self.chronicle.tell(log.info, "burst without a version", result=result, **record)
        self.keeper.decided(result, {**record, "trigger": self._why(record)})

    def _why(self, record: dict[str, Any]) -> dict[str, Any]:
        """What a look was made for: what the regulator asked it for, or the labels alone."""
        if record.get("asked", True):
            return self.resident.versions.trigger
        return {"reasons": ["new labels, and the error is above the source's"], "signal": "error"}

    def rollback(self, number: int) -> None:
        """Serve version ``number`` from the next batch on, because an operator asks for it.

        Raises:
            VersionError: it is not kept; nothing changes.
        """
        before = self.resident.current.number
        self.resident.rollback(number)
        self._given_up = self.learner.busy
        self.learner.cancel()
        self.version_harm = False
        self.monitor.forget_version()
        self.monitor.rebaseline(self.limits.settle_rows)
        self.chronicle.tell(log.info, "version rolled back", version=number, before=before)

    def freeze(self) -> None:
        """The current version answers as it is: nothing adapts, no burst begins, and the running one is thrown away."""
        self.frozen = True
        self._given_up = self.learner.busy
        self.learner.cancel()
        if self.trusted:
            self.monitor.forget_served()
        self.trusted = False

    def unfreeze(self) -> None:
        """Adapt and learn again, from where the fast state was."""
        self.frozen = False

    def forget_fast(self) -> None:
        """Begin the fast adaptation again from nothing, because an operator asks for it."""
        self.resident.reset_fast()
        self.monitor.forget_fast()

    def answered(self, predicted: Predicted) -> None:
        """Count what answered the rows of a batch; log when most of them are answered in another way than before."""
        rows, by = len(predicted.version), predicted.changed_by
        if predicted.way is not None and predicted.way != "fast":
            self._telemetry.answered[predicted.way].inc(rows)
            ways: tuple[str, ...] = (predicted.way,)
        elif by is None or not predicted.served_adapted:
            self._telemetry.answered["adapted" if predicted.served_adapted else "model"].inc(rows)
            ways = ()
        else:
            names = self.resident.deciding.ways if self.resident.deciding is not None else ()
            last = np.bincount(np.frexp(by.astype(np.float64))[1], minlength=len(names) + 1)
            for name, count in zip(("model", *names), last.tolist(), strict=True):
                self._telemetry.answered[name].inc(count)
            ways = tuple(name for bit, name in enumerate(names) if (by >> bit & 1).mean() > 0.5)
        self._since_ways += rows
        if ways != self._ways and self._since_ways >= self._ways_gap and self.decides:
            log.info("answered by", ways=list(ways) or ["model"], before=list(self._ways) or ["model"])
            gap = 2 * self._ways_gap if self._since_ways < 8 * self._ways_gap else WAYS_ROWS
            self._ways, self._since_ways, self._ways_gap = ways, 0, min(gap, MOST_WAYS_ROWS)

    def weigh(self) -> None:
        """What the evidence says of the layers: serve the fast one, take it away, withdraw a version."""
        verdict = self.monitor.fast_guard.verdict()
        if verdict is not None and self.trusted and (self.decides or verdict != "harm"):
            self.trip = self.trip or verdict
        elif verdict is not None:
            # Labels showed it: back into the shadow, from nothing, until labels show the opposite. That is its
            # cool-down; the slow loop goes on. What never answered a record did no harm and isn't counted as a trip.
            if self.trusted:
                self._count_trip(verdict)
                self.monitor.trust.raise_bar()
            self.chronicle.tell(log.info, "fast adaptation reset", reason=verdict, served=self.trusted)
            self.resident.reset_fast()
            self.monitor.forget_fast()
        self.version_harm |= self.monitor.slow_guard.verdict() is not None
        trusted = self._trusted(self._state)
        if trusted != self.trusted:
            where = "served" if trusted else "in shadow"
            self.chronicle.tell(log.info, f"fast adaptation {where}", gain=self.resident.gain)
            self.monitor.forget_served()
        self.trusted = trusted

    def _trusted(self, state: State) -> bool:
        if self.frozen:
            return False
        if self.decides:
            return state is not State.FALLBACK and self.monitor.fast_guard.verdict() is None
        return self.monitor.trusted()

    def take_trip(self) -> str | None:
        """The reason to fall back now, once; takes a harmful version out of service."""
        trip, self.trip = self.trip, None
        if self.version_harm:
            self.version_harm = False
            trip = "version_harm"
            removed = self.resident.current.number
            self.resident.versions.withdraw(trip)
            self.resident.rollback(self.resident.versions.parent())
            self.monitor.forget_version()
            self.keeper.decided("withdrawn", {"reason": trip}, version=removed)
            self.chronicle.tell(log.error, "version withdrawn: worse than the frozen model", version=removed)
        if trip is not None:
            self._count_trip(trip)
        return trip

    def _count_trip(self, reason: str) -> None:
        self._telemetry.trips[reason].inc()
        self._tally.guard_trips += 1

    def apply(self, decision: Decision, reading: Reading, source: str) -> bool:
        """Act on a decision; returns whether the next batch adapts."""
        self._report_alarms(reading)
        if decision.cancel_slow:
            self.learner.cancel()
        if decision.reset_fast and not (self.decides and reading.learner == "promoted"):
            self.resident.reset_fast()
            self.monitor.forget_fast()
        self.resident.set_gain(decision.gain)
        if decision.ask_slow:
            self.resident.versions.trigger = self._trigger(decision, reading, source)
            self.learner.ask()
        if decision.rebaseline:
            self.monitor.rebaseline(self.limits.settle_rows)
        if decision.changed or decision.reasons:
            self.chronicle.tell(
                log.info,
                "decision",
                state=decision.state.value,
                before=self._state.value,
                gain=round(decision.gain, 4),
                value=round(reading.value, 3),
                source=source,
                shift=self.monitor.watch.shift.kind.value,
                trip=reading.trip,
                learner=reading.learner,
                version=self.resident.current.number,
                reasons=list(decision.reasons),
            )
        self._state = decision.state
        self._telemetry.enter(decision.state)
        if self.decides and not self.frozen:
            # Every row counts as evidence, in every state; only what costs a forward pass waits for an alarm.
            self.resident.set_alert(decision.adapt and not self.rests)
            self.trusted = self._trusted(decision.state)
            return decision.state is not State.FALLBACK
        return decision.adapt and not self.frozen

    def _trigger(self, decision: Decision, reading: Reading, source: str) -> dict[str, Any]:
        """Why the slow loop is asked: a part of the record of what it makes."""
        watch = self.monitor.watch
        return {
            "reasons": list(decision.reasons),
            "detectors": list(watch.alarms),
            "shift": watch.shift.kind.value,
            "value": round(reading.value, 3),
            "signal": source,
        }

    def _report_alarms(self, reading: Reading) -> None:
        watch, steady = self.monitor.watch, self._state is State.STEADY
        kind = watch.judge(self.monitor.stream_deviations)
        for name in (each for each in watch.alarms if steady or each in REPORTED):
            # A risk that stays high is no shift of its own: it counts for the one at hand.
            kind_now = ShiftKind.CONCEPT if watch.shift.kind is ShiftKind.NONE else watch.shift.kind
            self._telemetry.drifts[name, kind_now.value].inc()
        if reading.drift and steady:
            self._tally.drifts += 1
            value = round(reading.value, 3)
            self.chronicle.tell(log.info, "drift", signals=watch.alarms, shift=watch.shift.kind.value, value=value)
        elif kind is ShiftKind.NONE:
            self.chronicle.tell(log.info, "no shift any more")
        elif kind is not None:
            self.chronicle.tell(log.info, "shift", kind=kind.value, signals=watch.alarms)
        for name in watch.warnings:
            self._telemetry.warnings[name].inc()
            self.chronicle.tell(log.info, "early warning: variance or memory of a signal grows", signal=name)

    def resume(self, state: State) -> None:
        """Go on in ``state`` after a restart."""
        self.trusted = self._trusted(state)
        self._state = state
        self._telemetry.enter(state)
