"""The hot path: one batch from the source to the sink, then what it taught us.

    raw → decode → predict (then adapt) → guard → answer → labels → reading → regulator → act

An answer never depends on its own label, and is scored as it was emitted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import structlog
from numpy.typing import NDArray

from daemon.actions import Actions
from daemon.labels import FACTS, PLACES, Joined, LabelJoin
from daemon.load import Load
from daemon.monitor import Monitor
from daemon.predicted import Predicted
from daemon.queries import Queries
from daemon.records import Batch, Labels, Positions, RawBatch, slots_of
from daemon.regulator import Reading, Regulator
from daemon.resident import Resident
from daemon.shadow import Shadow
from daemon.signals import Rows
from daemon.streams.base import LabelSource, Sink
from daemon.streams.codecs import Codec, encode_invalid, encode_predictions
from daemon.tally import Tally
from daemon.telemetry import MODEL_NOT_FINITE, Exemplar, Telemetry

log = structlog.get_logger("homeostat.loop")

LABEL_WAIT_S = 10.0
"""Longest wait for labels that are due and on the broker but not fetched yet; once an outage, not once a batch."""


@dataclass
class Loop:
    """One worker's path from record to answer, with everything that it changes."""

    task: str
    codec: Codec
    sink: Sink
    labels: LabelSource | None
    resident: Resident
    monitor: Monitor
    regulator: Regulator
    join: LabelJoin | None
    actions: Actions
    telemetry: Telemetry
    tally: Tally
    live_times: bool = False
    probabilities: bool = False
    slots_by_key: bool = False
    """Each record key has a fast state of its own."""
    adapt: bool = False
    labels_overdue: bool = False
    """Labels that are due did not come in time; they are not waited for until they come again."""
    positions: Positions = field(default_factory=dict)
    """Next offset per partition: everything before it is answered (durably only after a flush)."""
    emit_from: Positions = field(default_factory=dict)
    """Offsets from which on records are answered; earlier ones were answered before a restart."""
    queries: Queries | None = None
    """Asks for the labels that are worth most; None: nobody is asked."""
    load: Load = field(default_factory=Load)
    """What gives way under overload (`daemon.pressure`)."""
    shadow: Shadow | None = None
    """A new bundle that is compared with what answers (`daemon.succession`)."""
    exemplar: Exemplar | None = None
    """The trace of the batch at hand, where it is traced (`daemon.tracing`)."""

    def __post_init__(self) -> None:
        # One that decides by itself is given every row, from the first on.
        self.adapt = self.adapt or self.actions.decides

    def process(self, raw: RawBatch) -> None:
        """Answer one raw batch and learn from it."""
        started = time.monotonic()
        batch = self._decode(raw)
        clean = not batch.invalid
        x = batch.x if clean else batch.x[batch.valid]
        given = self.load.given(self.tally.records)
        predicted = self._predict(x, self._slots(raw, batch, clean), given) if len(x) else None
        answered = dict(self.emit_from) if self.queries is not None else {}
        self._answer(raw, batch, predicted, clean)
        self.positions.update(raw.next_positions())
        if predicted is not None:
            self._remember(batch, predicted, x, clean)
            self.actions.learner.seen(x)
            if self.shadow is not None:
                self.shadow.seen(x, predicted.rows.prediction)
        self._learn(len(x), given)
        if self.queries is not None and predicted is not None:
            # After the labels: what is known by now is not asked for.
            waits = self.join.waits if self.join is not None and self.labels is not None else None
            self.queries.take(raw, batch, predicted.rows, x, answered=answered, waits=waits)
        self._count(raw, batch, predicted, time.monotonic() - started)

    def _decode(self, raw: RawBatch) -> Batch:
        return raw.batch if raw.batch is not None else self.codec.decode(raw)

    def _slots(self, raw: RawBatch, batch: Batch, clean: bool) -> NDArray[np.int64] | None:
        """Whose state each usable row adapts."""
        if not self.slots_by_key:
            return None
        slots = slots_of(raw.keys if len(batch) == len(raw) else [raw.keys[row] for row in batch.rows])
        return slots if clean else slots[batch.valid]

    def _predict(self, x: np.ndarray, slots: NDArray[np.int64] | None, given: bool) -> Predicted:
        # One that decides by itself answers out of the rows before: withheld, they would be missing from the answers.
        adapt = self.adapt and (given or self.actions.decides)
        predicted = self.resident.predict(x, adapt=adapt, serve=self.actions.trusted, slots=slots)
        if predicted.adapt_seconds is not None:
            self.telemetry.adapt_seconds.observe(predicted.adapt_seconds)
        trip = self.monitor.observe(predicted)
        if trip and predicted.served_adapted:
            # The batch at hand is answered by the model below, not by the one that just tripped.
            predicted.served_adapted, predicted.way = False, None
            predicted.rows = self.resident.measure_version(x)
            predicted.version = predicted.rows.prediction
        self.actions.answered(predicted)
        if (predicted.version_broken or not predicted.rows.finite()) and self.resident.current.number:
            self.actions.version_harm = True
            predicted.rows, predicted.number = self.resident.measure_frozen(x), 0
        return predicted

    def _answer(self, raw: RawBatch, batch: Batch, predicted: Predicted | None, clean: bool) -> None:
        for letter in batch.dead:
            if letter.offset >= self.emit_from.get(letter.partition, 0):
                self.sink.send_dead(letter)
        ids = batch.ids if clean else [name for name, fine in zip(batch.ids, batch.valid, strict=True) if fine]
        values = self._encode(ids, predicted.rows, predicted.number) if predicted is not None else []
        if not clean:
            fine = iter(values)
            values = [
                encode_invalid(batch.ids[row], batch.invalid[row]) if row in batch.invalid else next(fine)
                for row in range(len(batch))
            ]
        rows = batch.rows
        keys = raw.keys if len(batch) == len(raw) else [raw.keys[row] for row in rows]
        if self.emit_from:
            keep = self._not_yet_answered(raw, rows)
            keys, values = [keys[index] for index in keep], [values[index] for index in keep]
            rows = [rows[index] for index in keep]
        self._send(raw, rows, keys, values)
        self.telemetry.records_out.inc(len(values))

    def _send(self, raw: RawBatch, rows: list[int], keys: list[bytes | None], values: list[bytes]) -> None:
        """Answers to the rows of ``raw`` with these indexes."""
        self.sink.send(keys, values)

    def _encode(self, ids: list[str], rows: Rows, version: int) -> list[bytes]:
        state = self.regulator.state.value
        finite = rows.finite()
        prediction = rows.prediction if finite else np.nan_to_num(rows.prediction)
        probabilities = rows.probabilities if self.probabilities else None
        answers = encode_predictions(self.task, ids, prediction, rows.confidence, version, state, probabilities)
        if not finite:
            # Not even the frozen model has a number for these inputs: never emit one that isn't.
            bad = np.flatnonzero(~(np.isfinite(rows.prediction) & np.isfinite(rows.confidence)))
            for row in bad.tolist():
                answers[row] = encode_invalid(ids[row], MODEL_NOT_FINITE)
                self.telemetry.invalid[MODEL_NOT_FINITE].inc()
        return answers

    def _not_yet_answered(self, raw: RawBatch, rows: list[int]) -> list[int]:
        """Those of ``rows``, by index, not answered before the restart; a partition's mark goes once it is passed."""
        keep = [
            index for index, row in enumerate(rows) if raw.offsets[row] >= self.emit_from.get(raw.partitions[row], 0)
        ]
        self.telemetry.records_rebuilt.inc(len(rows) - len(keep))
        for partition, offset in raw.next_positions().items():
            if offset >= self.emit_from.get(partition, offset + 1):
                del self.emit_from[partition]
        return keep

    def _remember(self, batch: Batch, predicted: Predicted, x: np.ndarray, clean: bool) -> None:
        """Predictions wait for their labels; a label that came inside a record counts only now, after its answer."""
        if self.join is None:
            return
        rows = range(len(batch)) if clean else np.flatnonzero(batch.valid).tolist()
        inline = [(batch.ids[row], label) for row in rows if (label := batch.y[row]) is not None]
        if self.labels is None and not inline:
            return
        ids = batch.ids if clean else [batch.ids[row] for row in rows]
        times = batch.times_s if clean else batch.times_s[batch.valid]
        facts = np.empty((len(ids), len(FACTS)), np.float32)
        served = np.where(np.isfinite(predicted.rows.confidence), predicted.rows.prediction, np.nan)
        facts[:, 0], facts[:, 1] = served, predicted.adapted
        facts[:, 2], facts[:, 3], facts[:, 4] = predicted.version, predicted.frozen, predicted.weight
        facts[:, 5], facts[:, 6] = self.resident.epoch, self.resident.current.number
        by = predicted.changed_by
        facts[:, 7] = predicted.served_adapted if by is None or not predicted.served_adapted else by > 0
        facts[:, 8] = predicted.rows.confidence
        facts[:, 9] = np.nan if predicted.first is None else (predicted.first + np.arange(len(ids))) % PLACES
        facts[:, 10] = np.nan if predicted.both is None else predicted.both
        self.join.predicted(ids, x, facts, float(times.max()))
        if inline:
            self.join.offer(Labels([name for name, _ in inline], [y for _, y in inline], [-np.inf] * len(inline)))

    def _learn(self, rows: int, given: bool) -> None:
        """Late labels, one reading, one decision; its effects begin with the next batch."""
        actions = self.actions
        if self.join is not None:
            self._fetch_labels()
            self._labelled(self.join.due())
        if not rows:
            return
        learnt = actions.learn()
        actions.weigh()
        value, source = self.monitor.value()
        reading = Reading(
            rows=rows,
            value=value,
            drift=self.monitor.watch.drift(),
            dropped=self.load.dropped or not given,
            trip=actions.take_trip(),
            learner=learnt,
        )
        self.adapt = actions.apply(self.regulator.step(reading), reading, source)
        self.monitor.watch.taken()
        self.load.dropped = False

    def idle(self) -> None:
        """The stream has no more for now: labels that wait for its time are due by the wall clock."""
        if self.join is not None and self.labels is not None:
            # A simulated label stream has no end: what is read ahead is bounded by the window.
            while self.join.has_room() and len(labels := self.labels.poll(0.0)):
                self.join.offer(labels)
            if self.labels.at_end():
                self._labelled(self.join.due(time.time()))

    def _labelled(self, joined: Joined | None) -> None:
        """Score emitted answers, weigh the evidence of harm, keep the rows to learn from."""
        usable = None if joined is None else self.tally.usable(joined)
        if usable is None:
            return
        number = self.resident.current.number
        losses = self.monitor.labelled(usable, self.resident.epoch, number, fast=self.actions.trusted)
        if self.actions.decides and number:
            both = self.monitor.loss(usable.both, usable.y)
            self.resident.beside.weigh(losses["adapted"], losses["version"], both)
        self.tally.score(self.monitor, usable)
        if self.shadow is not None:
            self.shadow.labelled(usable.x, usable.y, losses["served"])
        if (self.load.adapt_share or self.actions.decides) and not self.actions.frozen:
            self.resident.learn(usable.x, usable.y, usable.place, usable.epoch)
        self.actions.learner.add(usable)

    def _fetch_labels(self) -> None:
        """Read labels up to the stream's time.

        What was learnt from must not hang on how fast a fetch came back, or state after a restart would differ.
        """
        if self.labels is None or self.join is None:
            return
        deadline, wait_s = time.monotonic() + LABEL_WAIT_S, 0.0
        while self.join.wants_more():
            labels = self.labels.poll(wait_s)
            if len(labels):
                self.join.offer(labels)
                self.labels_overdue = False
            elif self.labels_overdue or self.labels.at_end():
                return
            elif time.monotonic() > deadline:
                # Answers come before labels: from now on they are taken as they come.
                log.warning("labels are due and don't come: not waited for until they do", waited_s=LABEL_WAIT_S)
                self.labels_overdue = True
            else:
                wait_s = 0.05

    def _count(self, raw: RawBatch, batch: Batch, predicted: Predicted | None, seconds: float) -> None:
        telemetry, now, self.load.seconds = self.telemetry, time.time(), seconds
        telemetry.batch_rows.observe(len(raw))
        telemetry.batch_seconds.observe(seconds, self.exemplar)
        for reason in [*batch.invalid.values(), *(letter.reason for letter in batch.dead)]:
            telemetry.invalid[reason].inc()
        if self.live_times:
            latencies = np.maximum(0.0, now - np.asarray(raw.times_s))
        else:
            latencies = np.full(len(raw), time.monotonic() - raw.arrived)
        telemetry.end_to_end_seconds.observe(latencies, self.exemplar)
        self.tally.batch(len(raw), len(batch.invalid), len(batch.dead))
        if batch.dead:
            self.actions.chronicle.died(batch.dead)
        telemetry.progress_time.set(now)
        # Last: a scrape that counts a record shows all that came of it.
        telemetry.records_in.inc(len(raw))
