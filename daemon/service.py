"""The life of one worker: start, run, drain, stop; the proof of progress behind liveness."""

from __future__ import annotations

import gc
import math
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import structlog

from daemon.assembly import Worker, warm_up
from daemon.batcher import Batcher
from daemon.commits import FLUSH_S, Commits
from daemon.errors import AwayError, DeliveryError, TransactionError
from daemon.membership import follow
from daemon.pressure import Pressure
from daemon.progress import Progress
from daemon.records import RawBatch
from daemon.streams.base import CheckedSource, PatientSink, SharedSource, parts_of
from daemon.streams.codec_registry import RegistryCodec
from daemon.web import Web

log = structlog.get_logger("homeostat.service")

IDLE_S = 0.1
LAG_S = 0.5
AWAY_S = 1.0
"""Between two looks for a broker."""
AGAIN, AGAIN_S = 10, 600.0
"""How often, within how many seconds, lost transactions are taken for something that passes."""
FORCED_EXIT = 130


class Service:
    """Runs a worker until it is told to stop, has done its records, or its stream ends."""

    def __init__(self, worker: Worker, *, max_records: int | None = None) -> None:
        self.worker = worker
        self.max_records = max_records
        self.commits = Commits(worker, self._wait_for_sink)
        self._stop = threading.Event()
        self._warm = False
        self.progress = Progress(worker.settings.progress_timeout_s, worker.telemetry.progress_time)
        self.done = 0
        """Records of this run."""
        self._lag: int | None = None
        self._lag_at = 0.0
        self.first_at: float | None = None
        """When the first of them was taken in hand, by the monotonic clock."""
        self._lost_at: list[float] = []
        """When transactions were lost."""
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
        self._open()
        # What is there by now stays: a collection that walks through all of torch would hold the answers up.
        gc.collect()
        gc.freeze()
        log.info("started", seconds=round(time.monotonic() - self.started, 2), http=self.web and self.web.port)

    def _open(self) -> None:
        """Bring the state up from the newest checkpoint, and open the streams where it left them."""
        worker, commits = self.worker, self.commits
        positions, label_positions = commits.restore()
        worker.keeper.open(commits.id, commits.sequence or None)
        worker.loop.positions = dict(positions or {})
        sinks = parts_of(worker.sink)
        if len(sinks) > 1 and isinstance(worker.source, CheckedSource):
            worker.source.check()  # its dead letters may be on its broker, and it is the source that is then wrong
        if isinstance(worker.loop.codec, RegistryCodec):
            worker.loop.codec.check()
            worker.loop.codec.waiting = self._wait_for_sink
        worker.sink.open()
        for sink in sinks:
            if isinstance(sink, PatientSink):
                sink.waiting = self._wait_for_sink
        if worker.labels is not None:
            worker.labels.open(label_positions)
        row_seconds = None
        if not self._warm:
            row_seconds = warm_up(worker)
        if isinstance(worker.source, SharedSource):
            worker.source.checkpoint_id = commits.id
        worker.source.open(positions)
        self._warm = True
        self._batcher = Batcher(worker.source, worker.settings.batch_rows, worker.settings.linger_ms / 1000)
        self.pressure = Pressure(
            worker.settings,
            worker.loop,
            worker.source,
            live=isinstance(worker.source, SharedSource),
            row_bytes=4 * math.prod(worker.bundle.manifest.input_shape),
            row_seconds=row_seconds,
        )

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
        try:
            self._turn()
        except TransactionError as error:
            self._begin_again(str(error))

    def _turn(self) -> None:
        worker = self.worker
        if worker.keeper.step(worker.loop.actions):
            self.save()
        left = None if self.max_records is None else self.max_records - self.done
        self._batcher.rows = self.pressure.rows
        raw = self._batcher.next(IDLE_S, left)
        follow(worker, self._batcher, self.commits, self.pressure)
        if raw is not None and len(raw):
            self._process(raw)
            self.progress.moved()
            if time.monotonic() - self._lag_at > LAG_S:
                self._ask_lag()
        elif not self._batcher.held:
            self._idle()
        self.commits.step()
        if self.commits.due:
            self.save()

    def _process(self, raw: RawBatch) -> None:
        if self.first_at is None:
            self.first_at = raw.arrived
        self.worker.loop.process(raw)
        self.pressure.batch(len(raw))
        self.done += len(raw)
        self.commits.moved(len(raw))
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
        if shed := self.pressure.lag(self._lag):
            self.commits.moved(shed)
            self.save()  # at once: what was skipped must not be read again for the state
        return self._lag

    def _wait_for_sink(self, reason: str) -> None:
        """The sink can't take more. The process is alive and says so; it is just not ready."""
        self.progress.wait(reason)
        self.pressure.waiting()
        if self._drain_until is not None and time.monotonic() > self._drain_until:
            raise DeliveryError(f"not delivered before the drain's end: {reason}; nothing is committed past it")

    def save(self, flush_s: float = FLUSH_S) -> bool:
        """Make what was answered durable and write a checkpoint; whether both happened."""
        saved = self.commits.save(flush_s)
        if saved:
            self.progress.waiting = None
        return saved

    def _begin_again(self, reason: str) -> None:
        """Go back to the newest checkpoint, as after a crash: what was answered since then is void.

        Raises:
            TransactionError: that was necessary too often: most likely another worker has this one's name.
        """
        now = time.monotonic()
        self._lost_at = [at for at in self._lost_at if now - at < AGAIN_S] + [now]
        if len(self._lost_at) > AGAIN:
            raise TransactionError(
                f"{reason}; for the {len(self._lost_at)}th time within {AGAIN_S / 60:.0f} minutes. Is there another "
                "worker with the same HOMEOSTAT_KAFKA__GROUP and HOMEOSTAT_KAFKA__INSTANCE_ID?"
            )
        log.warning("beginning again from the checkpoint", reason=reason)
        self._batcher.flush()
        self.done -= self.commits.rewind()
        self._close_streams()
        self.worker.loop.emit_from.clear()
        self.worker.loop.actions.learner.cancel()
        while not self._open_again():
            if self._stop.wait(AWAY_S):
                raise DeliveryError(f"stopped while no broker could be reached; {reason}")
        self.progress.moved()

    def _open_again(self) -> bool:
        """Whether that worked: what made the transaction fail may last."""
        try:
            self._open()
        except AwayError as error:
            self._close_streams()
            self.progress.wait(str(error))
            return False
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
        saved = self._save_last()
        learner.close(max(0.1, self._drain_until - time.monotonic()))
        self.worker.keeper.close(max(0.1, self._drain_until - time.monotonic()))
        self._refresh()
        if not saved:
            log.error("drain timed out: the newest records are answered again after a restart")
        return 0 if saved else DeliveryError.exit_code

    def _save_last(self) -> bool:
        assert self._drain_until is not None
        # At least once: the last batch may have taken all of the drain's time.
        try:
            while not self.save(max(0.1, min(FLUSH_S, self._drain_until - time.monotonic()))):
                if time.monotonic() >= self._drain_until:
                    return False
                time.sleep(0.1)
        except TransactionError as error:
            log.error("the last answers are void", reason=str(error))
            return False
        return True

    def close(self) -> None:
        """Give back connections and the port."""
        self._warm = False
        self._close_streams()
        self.commits.close()
        if self.web is not None:
            self.web.stop()

    def _close_streams(self) -> None:
        for part in (self.worker.source, self.worker.labels, self.worker.sink):
            if part is not None:
                part.close()

    def ready(self) -> tuple[bool, str]:
        """Model warm, source assigned and reachable, sink taking answers."""
        if not self._warm:
            return False, "starting"
        if self._stop.is_set():
            return False, "draining"
        if self.progress.waiting is not None:
            return False, f"waiting: {self.progress.waiting}"
        if not self.worker.source.ready():
            return False, "source not assigned or not reachable"
        return True, "ready"

    def _refresh(self) -> None:
        """Gauges that are read rather than counted; called before a scrape, not by the loop."""
        self.worker.loop.report(self._lag)
        self.worker.telemetry.ready.set(float(self.ready()[0]))
