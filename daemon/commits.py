"""What makes answers, state and offsets durable, in the order that the promise needs.

At least once: see every answer acknowledged, write the checkpoint, commit the offsets. A crash in between gives the
answers since then again.

Exactly once: answers and offsets are committed in one transaction, many times between two checkpoints, and each
checkpoint is written right after one. A crash leaves the group's offset ahead of the checkpoint: the records in between
are read again for the state, and not answered (`daemon.streams.resume`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from daemon import checkpoint
from daemon.assembly import Worker
from daemon.errors import CheckpointError
from daemon.places import checkpoint_folder
from daemon.records import Positions
from daemon.streams.base import AcknowledgedLabels, TransactionalSink, parts_of
from daemon.streams.resume import note_of

log = structlog.get_logger("homeostat.service")

FLUSH_S = 5.0
WANTED_S = 0.02
"""Least time between checkpoints that a source asks for."""


class Commits:
    """Checkpoints of one worker, and the commits of its offsets."""

    def __init__(self, worker: Worker, waiting: Callable[[str], None]) -> None:
        """``waiting`` is called with the reason while a sink can't take more; it may raise to give up."""
        self._worker = worker
        self._waiting = waiting
        self.store: checkpoint.Store | None = None
        self.id = checkpoint.new_id()
        """Line of descent of this worker's checkpoints."""
        self.sequence = 0
        """Of the newest of them; 0 before the first."""
        self._batches = 0
        self._records = self._saved = 0
        self._saved_at = time.monotonic()
        self._fresh = True
        """Whether nothing was saved since the start."""
        self.exact = worker.settings.delivery == "exactly-once"
        self._ended_at = time.monotonic()
        self._ended = 0

    def restore(self) -> tuple[Positions | None, Positions | None]:
        """Load the newest checkpoint into the worker; positions of records and of labels, None where there is none.

        Raises:
            CheckpointError: every checkpoint is damaged, or it does not fit.
        """
        folder = checkpoint_folder(self._worker.settings)
        if folder is None:
            return None, None
        if self.store is None:
            self.store = checkpoint.Store(folder, keep=self._worker.settings.checkpoint.keep)
            self.store.lock()
        snapshot = self.store.newest()
        for line in self.store.refused:
            log.error("checkpoint refused, using the one before", problem=line)
        if snapshot is None:
            return None, None
        self.id, self.sequence = snapshot.checkpoint_id, snapshot.sequence
        if self._worker.shared is not None:
            self._worker.shared.topic_id = snapshot.topic_id
        if snapshot.config_hash == self._worker.config_hash:
            try:
                self._worker.load_state_dict(snapshot.state)
            except (KeyError, ValueError, TypeError, RuntimeError) as error:
                raise CheckpointError(f"{snapshot.path}: does not fit this homeostat: {error!r}") from error
            log.info("restored", file=str(snapshot.path), positions=snapshot.positions)
        else:
            log.warning(
                "bundle or methods changed since the checkpoint: offsets are kept, the adapted state starts afresh",
                file=str(snapshot.path),
            )
        return snapshot.positions, snapshot.label_positions

    @property
    def settled(self) -> bool:
        """Whether transactions have committed all that was answered.

        Raises:
            TransactionError: one of them did not.
        """
        if not self.exact or self._ended != self._records or self._transactions.ending:
            return False
        self._transactions.verify()
        return True

    def moved(self, records: int) -> None:
        """A batch of so many records was answered or skipped."""
        self._batches += 1
        self._records += records

    @property
    def due(self) -> bool:
        """Whether a checkpoint should be written now."""
        fresh, worker = self._records - self._saved, self._worker
        shared, source, labels = worker.shared, worker.acknowledged, worker.acknowledged_labels
        asked = time.monotonic() - self._saved_at >= WANTED_S
        if asked and labels is not None and labels.wants_commit:
            return True
        again = shared is not None and shared.uncommitted
        if not (fresh or self._fresh or again):
            return False
        if asked and fresh and source is not None and source.wants_commit:
            return True
        every = worker.settings.checkpoint.every_batches
        if every is not None and self._batches >= every:
            return True
        # What lies between the checkpoint and the last transaction is read again after a crash: that way is bounded.
        if self.exact and fresh * 2 >= max(1, worker.settings.kafka.max_rebuild):
            return True
        return time.monotonic() - self._saved_at >= worker.settings.checkpoint.every_s

    def step(self) -> None:
        """With exactly-once: end the transaction when it is due, beside the loop.

        Raises:
            TransactionError: one was not committed; the worker has to go back to its checkpoint.
        """
        if not self.exact:
            return
        sink = self._transactions
        sink.verify()
        late = (time.monotonic() - self._ended_at) * 1000 >= self._worker.settings.kafka.transaction_ms
        if late and self._ended != self._records and not sink.ending:
            self._end()

    def _end(self) -> None:
        source = self._worker.shared
        assert source is not None
        self._transactions.end(source.offsets(self._positions(), self._note()), source.group_metadata())
        self._ended_at, self._ended = time.monotonic(), self._records

    @property
    def _transactions(self) -> TransactionalSink:
        for sink in parts_of(self._worker.sink):
            if isinstance(sink, TransactionalSink):
                return sink
        raise TypeError("no sink of this worker knows transactions")

    def _positions(self) -> Positions:
        """What may be committed. While state catches up, what lies before emit_from is the group's already."""
        loop = self._worker.loop
        return {name: max(offset, loop.emit_from.get(name, 0)) for name, offset in loop.positions.items()}

    def _note(self) -> str:
        return note_of(self.id, self.sequence)

    def save(self, timeout_s: float = FLUSH_S) -> bool:
        """Make all that was answered durable, and write a checkpoint; whether both happened.

        When the sink is not through yet, or the folder can't be written, the next turn tries again: at least once
        commits nothing then, exactly once has committed the answers, and their state is made again after a crash.

        Raises:
            DeliveryError: an answer was refused for good.
            TransactionError: see `step`.
        """
        started = time.monotonic()
        worker = self._worker
        self._saved_at, self._batches = started, 0
        try:
            if self.exact:
                self._settle(timeout_s)
            else:
                worker.sink.flush(timeout_s)
        except TimeoutError as error:
            self._waiting(str(error))
            return False
        if self.store is not None and not self._write():
            return False
        if not self.exact:
            worker.source.commit(self._positions(), self._note())
        if isinstance(worker.labels, AcknowledgedLabels):
            worker.labels.commit(worker.labels.positions())
        worker.telemetry.checkpoint_seconds.observe(time.monotonic() - started)
        self._saved, self._fresh = self._records, False
        worker.keeper.saved(self.sequence)
        return True

    def _settle(self, timeout_s: float) -> None:
        """Have everything committed that was answered."""
        deadline = time.monotonic() + timeout_s
        sink = self._transactions
        sink.settle(timeout_s)
        if self._ended != self._records:
            self._end()
            sink.settle(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Leave the folder of checkpoints to others."""
        if self.store is not None:
            self.store.close()

    def begin(self) -> None:
        """With exactly-once, before the first answer from a partition: a checkpoint that knows where it begins.

        Else a crash before the first one would find the group's offset alone, and the state before it lost.
        """
        if self.exact and self.store is not None and self._write():
            self._worker.keeper.saved(self.sequence)  # decisions from now on come after this one

    def _write(self) -> bool:
        worker, store = self._worker, self.store
        assert store is not None
        self.sequence += 1
        snapshot = checkpoint.Snapshot(
            sequence=self.sequence,
            checkpoint_id=self.id,
            config_hash=worker.config_hash,
            positions=dict(worker.loop.positions),
            label_positions={} if worker.labels is None else worker.labels.positions(),
            state=worker.state_dict(),
            topic_id="" if worker.shared is None else worker.shared.topic_id,
        )
        try:
            store.write(snapshot)
        except OSError as error:
            worker.telemetry.checkpoint_failures.inc()
            log.error("checkpoint not written, nothing committed", folder=str(store.folder), error=str(error))
            return False
        worker.telemetry.checkpoint_time.set(time.time())
        self._saved = self._records
        return True

    def rewind(self) -> int:
        """The worker goes back to its newest checkpoint; how many records it will read again."""
        again = self._records - self._saved
        self._records = self._ended = self._saved
        return again
