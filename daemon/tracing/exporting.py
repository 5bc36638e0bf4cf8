"""Spans on their way to a collector, beside the loop: what can't be sent is dropped, and never waited for.

OpenTelemetry's own variables are read by its SDK where ours are unset: OTEL_EXPORTER_OTLP_ENDPOINT, _HEADERS,
_CERTIFICATE and _TIMEOUT, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_BSP_* and
OTEL_SDK_DISABLED.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import structlog
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from daemon import __version__
from daemon.errors import SettingsError
from daemon.identity import worker_name
from daemon.loop import Loop
from daemon.seldom import Seldom, by_place, listen
from daemon.settings import Settings
from daemon.tracing.loops import TracedLoop
from daemon.tracing.naming import SCHEMA, place_of, source_of
from daemon.tracing.opening import Passing
from daemon.tracing.spans import Spans
from daemon.versioning.keeper import NoKeeper

if TYPE_CHECKING:
    from daemon.worker import Worker

log = structlog.get_logger("homeostat.traces")


class Traced(Passing):
    """Traces are on.

    Args:
        settings: all of the process.
        processor: takes the spans that are over; None: they are sent to the collector that the settings name.

    Raises:
        SettingsError: a variable of OpenTelemetry can't be used.
    """

    loop_type: type[Loop] = TracedLoop

    def __init__(self, settings: Settings, processor: SpanProcessor | None = None) -> None:
        self._settings = settings
        self._processor = processor
        self._provider: TracerProvider | None = None
        listen("opentelemetry", _sdk_log)
        try:
            self._exporter = OTLPSpanExporter(endpoint=settings.traces.url) if processor is None else None
        except Exception as error:  # whatever it says of the environment it is given
            raise _refused(error) from None

    def begin(self, worker: Worker) -> None:
        """Start the thread that sends, and have the worker's loop tell its spans."""
        super().begin(worker)
        settings = self._settings
        ratio = settings.traces.sample_ratio
        try:
            self._provider = TracerProvider(
                # None: the SDK's own, by its variables.
                sampler=None if ratio is None else ParentBased(TraceIdRatioBased(ratio)),
                resource=_resource(settings, worker.bundle.hash),
                shutdown_on_exit=False,  # it would wait half a minute for a collector that is away
            )
            processor = self._processor
            if processor is None:
                assert self._exporter is not None
                processor = BatchSpanProcessor(self._exporter)
            self._provider.add_span_processor(processor)
        except Exception as error:
            raise _refused(error) from None
        spans = Spans(
            self._provider.get_tracer("homeostat", __version__, schema_url=SCHEMA),
            source_of(settings),
            place_of(settings.sink),
            settings.traces.record_spans,
        )
        loop = worker.loop
        assert isinstance(loop, TracedLoop)
        loop.spans = spans
        self.follow(worker)

    def follow(self, worker: Worker) -> None:
        """Tell the bursts of the loop's present parts."""
        loop = worker.loop
        assert isinstance(loop, TracedLoop)
        loop.actions.keeper = _TracedKeeper(loop.actions.keeper, loop.spans)

    def close(self, timeout_s: float) -> None:
        """Send what is left, for at most ``timeout_s`` seconds."""
        provider, self._provider = self._provider, None
        if provider is None:
            return
        closing = threading.Thread(target=provider.shutdown, name="traces-close", daemon=True)
        closing.start()
        closing.join(timeout_s)
        if closing.is_alive():
            log.warning("the collector did not take the last spans in time: they are lost", waited_s=timeout_s)


class _TracedKeeper(NoKeeper):
    """Tells a span of each burst that ends, then does what the keeper behind it does."""

    def __init__(self, keeper: NoKeeper, spans: Spans) -> None:
        self._keeper, self._spans = keeper, spans

    def decided(self, event: str, record: Mapping[str, Any], *, version: int | None = None) -> None:
        """A burst has ended, or a version was withdrawn."""
        self._spans.burst(event, record, version)
        self._keeper.decided(event, record, version=version)


def _resource(settings: Settings, bundle: str) -> Resource:
    """What all spans share; what OpenTelemetry's variables say of it counts before what we would."""
    given = OTELResourceDetector().detect().attributes
    ours: dict[str, Any] = {
        "service.name": "homeostat",
        "service.version": __version__,
        "service.instance.id": worker_name(settings.state_dir),
        "homeostat.bundle": bundle,
    }
    return Resource.create({name: value for name, value in ours.items() if name not in given})


def _refused(error: Exception) -> SettingsError:
    return SettingsError([f"HOMEOSTAT_TRACES=on: a variable of OpenTelemetry can't be used: {error}"])


class _SdkLog(Seldom):
    """The SDK's own log: of a collector that is away it tells with every try, and of headers it tells their secrets."""

    def __init__(self) -> None:
        super().__init__(by_place)  # its texts have addresses in memory, and so are never the same

    def emit(self, record: logging.LogRecord) -> None:
        """Take one record of the SDK."""
        if record.name == "opentelemetry.util.re":
            record.msg = (
                "OTEL_EXPORTER_OTLP_HEADERS or another list of name=value holds an entry that is none: left out"
            )
            record.args = None
        super().emit(record)


_sdk_log = _SdkLog()
