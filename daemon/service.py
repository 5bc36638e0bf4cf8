"""The life of one worker: start, run, drain, stop; the proof of progress behind liveness."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import structlog

from daemon import checkpoint
from daemon.assembly import Worker, checkpoint_folder, warm_up
from daemon.batcher import Batcher
from daemon.errors import CheckpointError, DeliveryError
from daemon.progress import Progress
from daemon.records import RawBatch
from daemon.streams.base import PatientSink, SharedSource
from daemon.streams.resume import note_of
from daemon.web import Web

log = structlog.get_logger("homeostat.service")

IDLE_S = 0.1
FLUSH_S = 5.0
LAG_S = 0.5
FORCED_EXIT = 130


class Service:
    """Runs a worker until it is told to stop, has done its records, or its stream ends."""

    def __init__(self, worker: Worker, *, max_records: int | None = None) -> None:
        self.worker = worker
        self.max_records = max_records
        self.store: checkpoint.Store | None = None
        self._id = checkpoint.new_id()
        self._sequence = 0
        self._stop = threading.Event()
        self._warm = False
        self.progress = Progress(worker.settings.progress_timeout_s, worker.telemetry.progress_time)
        self.done = 0
        """Records of this run."""
        self._lag: int | None = None
        self._lag_at = 0.0
        self.first_at: float | None = None
        """When the first of them was taken in hand, by the monotonic clock."""
        self._batches = 0
        self._saved_at = time.monotonic()
        self._saved_records = -1
        self._drain_until: float | None = None
        self.web: Web | None = None
        self.started = time.monotonic()
        self.on_batch: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Open everything, restore the newest checkpoint, warm the model, announce readiness.

        Raises:
            HomeostatError: naming what can't be had.
        """
        worker = self.worker
        if worker.settings.http != "off":
            self.web = Web(worker.settings.http, worker.telemetry.registry, self.progress.alive, self.ready)
            self.web.before_scrape = self._refresh
            self.web.start()
        positions, label_positions = self._restore()
        worker.keeper.open(self._id, self._sequence or None)
        worker.loop.positions = dict(positions or {})
        if hasattr(worker.sink, "sinks") and callable(check := getattr(worker.source, "check", None)):
            check()  # its dead letters may be on its broker, and it is the source that is then wrong
        worker.sink.open()
        for sink in getattr(worker.sink, "sinks", (worker.sink,)):
            if isinstance(sink, PatientSink):
                sink.waiting = self._wait_for_sink
        if worker.labels is not None:
            worker.labels.open(label_positions)
        warm_up(worker)
        if isinstance(worker.source, SharedSource):
            worker.source.checkpoint_id = self._id
        worker.source.open(positions)
        self._warm = True
        self._batcher = Batcher(worker.source, worker.settings.batch_rows, worker.settings.linger_ms / 1000)
        log.info("started", seconds=round(time.monotonic() - self.started, 2), http=self.web and self.web.port)

    def _restore(self) -> tuple[dict[str, int] | None, dict[str, int] | None]:
        folder = checkpoint_folder(self.worker.settings)
        if folder is None:
            return None, None
        self.store = checkpoint.Store(folder, keep=self.worker.settings.checkpoint.keep)
        snapshot = self.store.newest()
        for line in self.store.refused:
            log.error("checkpoint refused, using the one before", problem=line)
        if snapshot is None:
            return None, None
        self._id, self._sequence = snapshot.checkpoint_id, snapshot.sequence
        if snapshot.config_hash == self.worker.config_hash:
            try:
                self.worker.load_state_dict(snapshot.state)
            except (KeyError, ValueError, TypeError, RuntimeError) as error:
                raise CheckpointError(f"{snapshot.path}: does not fit this homeostat: {error!r}") from error
            log.info("restored", file=str(snapshot.path), positions=snapshot.positions)
        else:
            log.warning(
                "bundle or methods changed since the checkpoint: offsets are kept, the adapted state starts afresh",
                file=str(snapshot.path),
            )
        return snapshot.positions, snapshot.label_positions

    def run(self) -> int:
        """Until stopped; returns the exit code."""
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while not self._stop.is_set() and not self._finished():
                self.turn()
            return self._drain()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def turn(self) -> None:
        """One turn: what an operator asked for, at most one batch, and a checkpoint when one is due."""
        if self.worker.keeper.step(self.worker.loop.actions):
            self.save()
        left = None if self.max_records is None else self.max_records - self.done
        raw = self._batcher.next(IDLE_S, left)
        self._follow_rebalance()
        if raw is not None and len(raw):
            self._process(raw)
            self.progress.moved()
            if time.monotonic() - self._lag_at > LAG_S:
                self._ask_lag()
        elif not self._batcher.held:
            self._idle()
        if self._checkpoint_due():
            self.save()

    def _process(self, raw: RawBatch) -> None:
        if self.first_at is None:
            self.first_at = raw.arrived
        self.worker.loop.process(raw)
        self.done += len(raw)
        self._batches += 1
        self.on_batch()

    def _finished(self) -> bool:
        if self.max_records is not None and self.done >= self.max_records:
            return True
        return self.worker.source.ended and not self._batcher.held

    def _idle(self) -> None:
        """Nothing to read. Without lag that is progress; with lag it is not, unless a broker is away or rebalancing."""
        lag = self._ask_lag()
        if not lag or not self.worker.source.ready():
            self.progress.moved()
        if lag == 0:
            self.worker.loop.idle()
        self.on_batch()

    def _ask_lag(self) -> int | None:
        # Here alone: the source's client is not for two threads, and a scrape comes in another.
        self._lag, self._lag_at = self.worker.source.lag(), time.monotonic()
        return self._lag

    def _wait_for_sink(self, reason: str) -> None:
        """The sink can't take more. The process is alive and says so; it is just not ready."""
        self.progress.wait(reason)
        if self._drain_until is not None and time.monotonic() > self._drain_until:
            raise DeliveryError(f"not delivered before the drain's end: {reason}; nothing is committed past it")

    def _follow_rebalance(self) -> None:
        source, loop = self.worker.source, self.worker.loop
        if not isinstance(source, SharedSource):
            return
        for name, start in source.take_starts().items():
            loop.positions[name] = start.offset
            if start.emit_from > start.offset:
                loop.emit_from[name] = start.emit_from
            self.worker.telemetry.records_skipped.inc(start.skipped)
        revoked, lost = source.take_revoked()
        if revoked or lost:
            dropped = self._batcher.drop(revoked | lost)
            log.info("partitions given up", revoked=sorted(revoked), lost=sorted(lost), unanswered=dropped)
            for name in lost:
                loop.positions.pop(name, None)
            if revoked:
                self.save()
            for name in revoked | lost:
                loop.positions.pop(name, None)
                loop.emit_from.pop(name, None)

    def _checkpoint_due(self) -> bool:
        settings = self.worker.settings.checkpoint
        if self._saved_records == self.done:
            return False
        by_count = settings.every_batches is not None and self._batches >= settings.every_batches
        return by_count or time.monotonic() - self._saved_at >= settings.every_s

    def save(self, flush_s: float = FLUSH_S) -> bool:
        """Flush the sink and see every acknowledgement, write the file, commit the offsets: in this order.

        Returns whether all three happened. When the sink is not through yet, or the folder can't be written, nothing
        is committed and the next turn tries again.
        """
        started = time.monotonic()
        worker = self.worker
        self._saved_at, self._batches = started, 0
        try:
            worker.sink.flush(flush_s)
        except TimeoutError as error:
            self._wait_for_sink(str(error))
            return False
        self.progress.waiting = None
        if self.store is not None:
            self._sequence += 1
            snapshot = checkpoint.Snapshot(
                sequence=self._sequence,
                checkpoint_id=self._id,
                config_hash=worker.config_hash,
                positions=dict(worker.loop.positions),
                label_positions={} if worker.labels is None else worker.labels.positions(),
                state=worker.state_dict(),
            )
            try:
                self.store.write(snapshot)
            except OSError as error:
                worker.telemetry.checkpoint_failures.inc()
                log.error("checkpoint not written, nothing committed", folder=str(self.store.folder), error=str(error))
                return False
            worker.telemetry.checkpoint_time.set(time.time())
        # While state catches up, what lies before emit_from is the group's already.
        positions = {
            name: max(offset, worker.loop.emit_from.get(name, 0)) for name, offset in worker.loop.positions.items()
        }
        worker.source.commit(positions, note_of(self._id, self._sequence))
        worker.telemetry.checkpoint_seconds.observe(time.monotonic() - started)
        self._saved_records = self.done
        worker.keeper.saved(self._sequence)
        return True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first signal asks for a drain, the second ends the process at once."""
        if self._stop.is_set():
            raise SystemExit(FORCED_EXIT)
        self.stop()

    def stop(self) -> None:
        """Ask for a drain, from any thread. Its time begins now: the loop itself may be waiting for the sink."""
        self._drain_until = time.monotonic() + self.worker.settings.drain_timeout_s
        self._stop.set()

    def _drain(self) -> int:
        """Answer what was read, flush, checkpoint, leave; within the drain's time."""
        budget = self.worker.settings.drain_timeout_s
        if self._drain_until is None:
            self._drain_until = time.monotonic() + budget
        log.info("draining", held=self._batcher.held, timeout_s=budget)
        raw = self._batcher.flush()
        if raw is not None and len(raw):
            self._process(raw)
        learner = self.worker.loop.actions.learner
        # At least once: the last batch may have taken all of the drain's time.
        while not (saved := self.save(max(0.1, min(FLUSH_S, self._drain_until - time.monotonic())))):
            if time.monotonic() >= self._drain_until:
                break
            time.sleep(0.1)
        learner.close(max(0.1, self._drain_until - time.monotonic()))
        self.worker.keeper.close(max(0.1, self._drain_until - time.monotonic()))
        self._refresh()
        if not saved:
            log.error("drain timed out: the newest records are answered again after a restart")
        return 0 if saved else DeliveryError.exit_code

    def close(self) -> None:
        """Give back connections and the port."""
        self._warm = False
        worker = self.worker
        for part in (worker.source, worker.labels, worker.sink):
            if part is not None:
                part.close()
        if self.web is not None:
            self.web.stop()

    def ready(self) -> tuple[bool, str]:
        """Model warm, source assigned and reachable, sink taking answers."""
        if not self._warm:
            return False, "starting"
        if self._stop.is_set():
            return False, "draining"
        if self.progress.waiting is not None:
            return False, f"waiting for the sink: {self.progress.waiting}"
        if not self.worker.source.ready():
            return False, "source not assigned or not reachable"
        return True, "ready"

    def _refresh(self) -> None:
        """Gauges that are read rather than counted; called before a scrape, not by the loop."""
        self.worker.loop.report(self._lag)
        self.worker.telemetry.ready.set(float(self.ready()[0]))
