"""The life of one worker: start, run, drain, stop; the proof of progress behind liveness."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import structlog

from daemon import gauges
from daemon.assembly import Worker, warm_up
from daemon.batcher import Batcher
from daemon.commits import FLUSH_S, Commits
from daemon.errors import AwayError, DeliveryError, TransactionError
from daemon.front.opening import front
from daemon.front.web import Web
from daemon.losses import Losses
from daemon.membership import follow
from daemon.operating.hands import Hands
from daemon.operating.reloading import reload
from daemon.page.live import Page
from daemon.pressure import Pressure
from daemon.progress import Progress
from daemon.records import RawBatch
from daemon.streams.base import CheckedSource, PatientSink, parts_of
from daemon.streams.codec_registry import RegistryCodec
from daemon.succession import Succession
from daemon.told import Signals

log = structlog.get_logger("homeostat.service")

IDLE_S = 0.1
LAG_S = 0.5
AWAY_S = 1.0
"""Between two looks for a broker."""


class Service:
    """Runs a worker until it is told to stop, has done its records, or its stream ends."""

    def __init__(self, worker: Worker, *, max_records: int | None = None) -> None:
        self.worker = worker
        self.max_records = max_records
        self.commits = Commits(worker, self._wait_for_sink)
        self.hands = Hands(worker, self.save, self.stop, lambda: reload(self))
        self.succession = Succession(worker, lambda: (self.commits.id, self.commits.sequence), self.save)
        self._stop = threading.Event()
        self._warm = self._turning = False
        self.progress = Progress(worker.settings.progress_timeout_s, worker.telemetry.progress_time)
        self.done = 0
        """Records of this run."""
        self._lag: int | None = None
        self._lag_at = 0.0
        self.first_at: float | None = None
        """When the first of them was taken in hand, by the monotonic clock."""
        self._losses = Losses()
        self._drain_until: float | None = None
        self.web: Web | None = None
        self.page = Page(worker, ready=self.ready, alive=self.progress.alive, refresh=self._refresh)
        self.started = time.monotonic()
        self.on_batch: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Open everything, restore the newest checkpoint, warm the model, announce readiness.

        Raises:
            HomeostatError: naming what can't be had.
        """
        worker = self.worker
        self.web = front(worker, self.hands.desk, self.progress.alive, self.ready, self.page)
        if self.web is not None:
            self.web.before_scrape = self._refresh
            self.web.start()
        self._open()
        self.page.open()
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
        if worker.shared is not None:
            worker.shared.checkpoint_id = commits.id
        worker.source.open(positions)
        self._warm = True
        self.batcher = Batcher(worker.source, worker.settings.batch_rows, worker.settings.linger_ms / 1000)
        self.pressure = Pressure(
            worker.settings,
            worker.loop,
            worker.source,
            live=worker.shared is not None,
            row_bytes=4 * math.prod(worker.bundle.manifest.input_shape),
            row_seconds=row_seconds,
        )

    def run(self, begun: Callable[[], None] = lambda: None) -> int:
        """Until stopped; returns the exit code. ``begun`` is called once a signal to stop is heeded."""
        with Signals(self.stop, self._stop.is_set, self.hands.hang_up):
            self._turning = True
            begun()
            while not self._stop.is_set() and not self._finished():
                self.turn()
            return self._drain()

    def turn(self) -> None:
        """One turn: what an operator asked for, at most one batch, and a checkpoint when one is due."""
        self._turning = True
        try:
            self._turn()
        except TransactionError as error:
            self._begin_again(str(error))

    def _turn(self) -> None:
        worker = self.worker
        self.hands.step()
        self.succession.step()
        if worker.keeper.step(worker.loop.actions):
            self.save()
        left = None if self.max_records is None else self.max_records - self.done
        self.batcher.rows = self.pressure.rows
        raw = self.batcher.next(IDLE_S, left)
        follow(worker, self.batcher, self.commits, self.pressure)
        if raw is not None and len(raw):
            self._process(raw)
            self.progress.moved()
            if time.monotonic() - self._lag_at > LAG_S:
                self._ask_lag()
        elif not self.batcher.held:
            self._idle()
        self.page.tick()
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
        return self.worker.source.ended and not self.batcher.held

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
        self._losses.count(reason)
        log.warning("beginning again from the checkpoint", reason=reason)
        self.batcher.flush()
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

    def stop(self) -> None:
        """Ask for a drain, from any thread. Its time begins now: the loop itself may be waiting for the sink."""
        self._drain_until = time.monotonic() + self.worker.settings.drain_timeout_s
        self._stop.set()

    def _drain(self) -> int:
        """Answer what was read, flush, checkpoint, leave; within the drain's time."""
        budget = self.worker.settings.drain_timeout_s
        if self._drain_until is None:
            self._drain_until = time.monotonic() + budget
        log.info("draining", held=self.batcher.held, timeout_s=budget)
        raw = self.batcher.flush()
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
        """Model warm, signals heeded, source assigned and reachable, sink taking answers."""
        if not (self._warm and self._turning):
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
        gauges.refresh(self.worker.loop, self._lag)
        self.worker.telemetry.ready.set(float(self.ready()[0]))
