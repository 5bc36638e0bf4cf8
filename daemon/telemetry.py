"""Every metric, declared in one place. Children are made at the start, so a rate exists before the first event.

The loop hands over arrays once a batch; per-record histograms are filled by one numpy call, not a call a record.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Info, disable_created_metrics
from prometheus_client.core import Exemplar as _Exemplar
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from daemon import __version__
from daemon.regulator import State
from daemon.shift_kind import ShiftKind
from daemon.streams.codecs import REASONS

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
MODELS = ("served", "adapted", "version", "frozen")
BUNDLES = ("taken", "refused", "failed")
BURSTS = ("promoted", "rejected", "declined", "failed", "overrun", "out_of_memory", "non_finite", "cancelled")
LABELS = ("joined", "late", "rejected")
QUERIES = ("representative", "uncertain")
MODEL_NOT_FINITE = "model_not_finite"
"""The reason of an answer that not even the frozen model could give."""
ANSWERED = ("model", "adapted", "aligned", "runs", "memory", "version", "both")
"""The model as it is; a fast method; what `auto` chose, the last of several that changed an answer; a version beside
`auto`, or both together."""
TRIPS = ("non_finite", "collapse", "harm", "proxy_harm", "version_harm")


# A second series per counter that says when it was made: twice the scrape for nothing that is asked here.
disable_created_metrics()  # type: ignore[no-untyped-call]


Exemplar = Mapping[str, str]
"""``trace_id`` and ``span_id`` in hexadecimal, 63 of the 128 characters that OpenMetrics 1.0 allows."""


class ArrayHistogram(Collector):
    """A Prometheus histogram that takes whole arrays: one binning a batch.

    Each bucket keeps the newest exemplar that fell into it; the OpenMetrics format alone shows them.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        self._name, self._text = name, text
        self._bounds = np.asarray(bounds, dtype=np.float64)
        self._counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        self._sum = 0.0
        self._exemplars: dict[int, _Exemplar] = {}
        registry.register(self)

    def observe(self, values: Any, exemplar: Exemplar | None = None) -> None:
        """Take in one value or an array of them; ``exemplar`` stands for the largest."""
        array = np.atleast_1d(np.asarray(values, dtype=np.float64))
        # Replaced, not changed in place: a scrape in another thread reads either the old or the new counts.
        self._counts = self._counts + np.bincount(
            np.searchsorted(self._bounds, array, side="left"), minlength=len(self._counts)
        )
        self._sum += float(array.sum())
        if exemplar is not None and len(array):
            largest = float(array.max())
            bucket = int(np.searchsorted(self._bounds, largest, side="left"))
            self._exemplars = self._exemplars | {bucket: _Exemplar(dict(exemplar), largest, time.time())}

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """For the registry."""
        totals = np.cumsum(self._counts)
        labels = [repr(float(bound)) for bound in self._bounds] + ["+Inf"]
        found = self._exemplars
        buckets: list[tuple[str, float] | tuple[str, float, _Exemplar]] = []
        for bucket, (label, total) in enumerate(zip(labels, totals.tolist(), strict=True)):
            buckets.append((label, total, found[bucket]) if bucket in found else (label, total))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class Telemetry:
    """The daemon's metrics on one registry."""

    def __init__(
        self, signals: Sequence[str], levels: Sequence[str], detectors: Sequence[str], early: Sequence[str] = ()
    ) -> None:
        """Every metric at its start.

        Args:
            signals: names of the signals, of ``homeostat_signal``.
            levels: those with a band.
            detectors: those with a detector that can alarm.
            early: those with an early warning.
        """
        self.registry = CollectorRegistry()
        kw: dict[str, Any] = {"registry": self.registry}
        self.build = Info("homeostat_build", "Version, model and method that run.", **kw)
        self.product_version = __version__
        self.build.info({"version": __version__})
        self.records_in = Counter("homeostat_records_in_total", "Records read from the source.", **kw)
        self.records_out = Counter("homeostat_records_out_total", "Answers handed to the sink.", **kw)
        self.records_rebuilt = Counter(
            "homeostat_records_rebuilt_total",
            "Records read again after a restart for the state, not answered twice.",
            **kw,
        )
        self.records_skipped = Counter(
            "homeostat_records_skipped_total",
            "Records jumped over at a start or after they were lost on the broker.",
            **kw,
        )
        self._invalid = Counter(
            "homeostat_records_invalid_total",
            "Records answered as invalid or sent to the dead letters.",
            ["reason"],
            **kw,
        )
        self.invalid = {reason: self._invalid.labels(reason) for reason in (*REASONS, MODEL_NOT_FINITE)}
        self._labels = Counter("homeostat_labels_total", "Late labels by what became of them.", ["result"], **kw)
        self.labels = {result: self._labels.labels(result) for result in LABELS}
        self._queries = Counter(
            "homeostat_label_queries_total", "Records that a label was asked for, by why.", ["why"], **kw
        )
        self.queries = {why: self._queries.labels(why) for why in QUERIES}
        self.batch_rows = ArrayHistogram("homeostat_batch_rows", "Rows of a batch.", ROWS, self.registry)
        self.batch_seconds = ArrayHistogram(
            "homeostat_batch_seconds", "Seconds from a decoded batch to its answers.", SECONDS, self.registry
        )
        self.end_to_end_seconds = ArrayHistogram(
            "homeostat_end_to_end_seconds",
            "Seconds from a record's time stamp (its arrival, for files and the simulator) to its answer.",
            SECONDS,
            self.registry,
        )
        self.adapt_seconds = ArrayHistogram(
            "homeostat_adapt_seconds", "Seconds of a predict-and-adapt call of the fast method.", SECONDS, self.registry
        )
        self.lag = Gauge(
            "homeostat_lag_records", "Records on the broker that are not read yet; NaN when unknown.", **kw
        )
        self.lag_seconds = Gauge(
            "homeostat_lag_seconds", "The same in seconds of work at the present rate; NaN when unknown.", **kw
        )
        self.overload_step = Gauge(
            "homeostat_overload_step",
            "What gives way: 0 nothing, 1 batches grow, 2 adaptation on a sample, 3 none, 4 oldest records skipped.",
            **kw,
        )
        self.records_shed = Counter(
            "homeostat_records_shed_total", "Records skipped unanswered because of overload (HOMEOSTAT_SHED).", **kw
        )
        self._in_state = Gauge("homeostat_state", "1 for the controller's state, 0 for the others.", ["state"], **kw)
        self.in_state = {state: self._in_state.labels(state.value) for state in State}
        self.in_state[State.STEADY].set(1)
        self._state_seconds = Counter("homeostat_state_seconds_total", "Seconds spent in each state.", ["state"], **kw)
        self.state_seconds = {state.value: self._state_seconds.labels(state.value) for state in State}
        self._bundles = Counter(
            "homeostat_bundle_changes_total",
            "Bundles that were given to the running daemon, by result.",
            ["result"],
            **kw,
        )
        self.bundles = {result: self._bundles.labels(result) for result in BUNDLES}
        self._answered = Counter(
            "homeostat_answered_rows_total",
            "Rows by what answered them: the model as it is, or what adapts it.",
            ["by"],
            **kw,
        )
        self.answered = {by: self._answered.labels(by) for by in ANSWERED}
        self.frozen = Gauge(
            "homeostat_frozen", "1 while an operator has stopped adaptation and learning (homeostat ctl freeze).", **kw
        )
        self.gain = Gauge("homeostat_gain_ratio", "The fast actuator, 0 (frozen) to 1.", **kw)
        self._signal = Gauge(
            "homeostat_signal",
            "Recent level of a signal, in its own unit.",
            ["signal"],
            **kw,
        )
        self.signal = {name: self._signal.labels(name) for name in signals}
        self._deviation = Gauge(
            "homeostat_signal_deviation_ratio",
            "Level against its reference, in units of its band: over 1 is out.",
            ["signal"],
            **kw,
        )
        self.deviation = {name: self._deviation.labels(name) for name in levels}
        self._statistic = Gauge("homeostat_detector_statistic", "A detector's statistic.", ["signal"], **kw)
        self.statistic = {name: self._statistic.labels(name) for name in detectors}
        self._threshold = Gauge("homeostat_detector_threshold", "Where a detector raises its alarm.", ["signal"], **kw)
        self.threshold = {name: self._threshold.labels(name) for name in detectors}
        self._drifts = Counter(
            "homeostat_drifts_total",
            "Alarms by signal and kind of shift: in the steady state, of prior and risk in every state.",
            ["signal", "kind"],
            **kw,
        )
        shifts = [kind.value for kind in ShiftKind if kind is not ShiftKind.NONE]
        self.drifts = {(name, kind): self._drifts.labels(name, kind) for name in detectors for kind in shifts}
        self._shift = Gauge("homeostat_shift", "1 for the kind of the present shift, 0 for the others.", ["kind"], **kw)
        self.shift = {kind: self._shift.labels(kind.value) for kind in ShiftKind}
        self.shift_is(ShiftKind.NONE)
        self._warnings = Counter(
            "homeostat_early_warnings_total",
            "Warnings that a signal becomes unsteady; never an alarm.",
            ["signal"],
            **kw,
        )
        self.warnings = {name: self._warnings.labels(name) for name in early}
        self._bursts = Counter("homeostat_slow_bursts_total", "Bursts of the slow loop by result.", ["result"], **kw)
        self.bursts = {result: self._bursts.labels(result) for result in BURSTS}
        self.slow_seconds = ArrayHistogram(
            "homeostat_slow_seconds", "Seconds of a burst with its judgement.", SECONDS, self.registry
        )
        self.version_failures = Counter(
            "homeostat_version_failures_total", "Decisions and version files that could not be written.", **kw
        )
        self.version = Gauge("homeostat_version", "Number of the served version; 0 is the frozen model.", **kw)
        self._error = Gauge(
            "homeostat_error_ratio",
            "Recent error (regression: squared error over the reference variance) by model.",
            ["model"],
            **kw,
        )
        self.error = {model: self._error.labels(model) for model in MODELS}
        self._trips = Counter("homeostat_guard_trips_total", "Times the no-harm guard took over.", ["reason"], **kw)
        self.trips = {reason: self._trips.labels(reason) for reason in TRIPS}
        self._evidence = Gauge(
            "homeostat_guard_evidence", "log10 of the evidence of harm; trips at -log10 of the level.", ["test"], **kw
        )
        self.evidence = {test: self._evidence.labels(test) for test in ("harm", "proxy_harm", "version_harm")}
        self.checkpoint_time = Gauge(
            "homeostat_checkpoint_timestamp_seconds", "When the newest checkpoint was written; 0: none yet.", **kw
        )
        self.checkpoint_seconds = ArrayHistogram(
            "homeostat_checkpoint_seconds", "Seconds of a checkpoint with flush and commit.", SECONDS, self.registry
        )
        self.checkpoint_failures = Counter(
            "homeostat_checkpoint_failures_total", "Checkpoints that could not be written.", **kw
        )
        self.device_memory = Gauge("homeostat_device_memory_bytes", "Memory of the model's device in use.", **kw)
        self.device_limit = Gauge(
            "homeostat_device_memory_limit_bytes", "Memory that the model's device, or the container, has.", **kw
        )
        self.progress_time = Gauge(
            "homeostat_progress_timestamp_seconds",
            "When the loop last moved an offset or was seen idle without lag.",
            **kw,
        )
        self.ready = Gauge("homeostat_ready", "1 when the model is warm and the source assigned and reachable.", **kw)
        self._renewing = threading.Lock()
        self._since = time.monotonic()
        self._state = State.STEADY
        self.lag.set(float("nan"))
        self.lag_seconds.set(float("nan"))
        for gauge in self.error.values():
            gauge.set(float("nan"))

    def enter(self, state: State) -> None:
        """The controller is in ``state`` from now on; also call it before a scrape to bring the seconds up to date."""
        with self._renewing:  # the loop and a scrape both call this
            now = time.monotonic()
            self.state_seconds[self._state.value].inc(now - self._since)
            self._since = now
            if state is not self._state:
                self.in_state[self._state].set(0)
                self.in_state[state].set(1)
                self._state = state

    def shift_is(self, kind: ShiftKind) -> None:
        """The shift at present is of this kind."""
        for each, gauge in self.shift.items():
            gauge.set(float(each is kind))

    def labels_seen(self, **totals: int) -> None:
        """Bring the label counters to their totals; they only ever go up."""
        with self._renewing:  # scrapes, the page and the end all call this
            for result, total in totals.items():
                self.labels[result].inc(max(0.0, total - self.labels[result]._value.get()))

    def seconds_in_state(self) -> dict[str, float]:
        """Seconds in each state so far."""
        self.enter(self._state)
        return {name: round(child._value.get(), 3) for name, child in self.state_seconds.items()}
