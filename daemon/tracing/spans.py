"""The spans of the loop, through OpenTelemetry's API. Imported only where traces are on.

A batch has one span, with children for its steps; it is a trace of its own, and links to the spans that sent its
records (OpenTelemetry's messaging conventions, "Batch receiving"). A record whose sender sampled it also has a span of
its own in the sender's trace, and its answer carries that on: one trace goes from the sensor to who reads the answer.

No span holds a record's key, id, value or answer, or an error's text, which may repeat them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from opentelemetry.context import Context
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
    set_span_in_context,
)

from daemon.records import Batch, RawBatch
from daemon.tracing.context import PARENT, is_sampled, parent_of, traceparent
from daemon.tracing.naming import Place

if TYPE_CHECKING:
    from daemon.tracing.loops import Contexts

MOST_LINKS = 128
"""Of a batch's span, as many as OpenTelemetry's own limit."""
_EVENTS = {"homeostat.drifts": "drift", "homeostat.guard_trips": "guard trip"}
"""Counts whose growth is an event."""
_CHANGES = {"homeostat.version": "version changed", "homeostat.state": "state changed"}
"""Values whose change is an event."""
_NOTHING = nullcontext()


class Spans:
    """Makes the spans of one worker.

    Args:
        tracer: OpenTelemetry's.
        source: where records come from.
        sink: where answers go.
        most_records: spans of single records in one batch.
    """

    def __init__(self, tracer: Tracer, source: Place, sink: Place, most_records: int) -> None:
        self.tracer = tracer
        self.most_records = most_records
        process = {"messaging.operation.type": "process"}
        self.batch_name = f"process_batch {source.name}"
        self.batch_attributes: dict[str, Any] = {
            **source.attributes,
            **process,
            "messaging.operation.name": "process_batch",
        }
        self.record_name = f"process {source.name}"
        self.record_attributes: dict[str, Any] = {
            **source.attributes,
            **process,
            "messaging.operation.name": "process",
        }
        self.send_name = f"send {sink.name}"
        self.send_kind = SpanKind.PRODUCER if sink.broker else SpanKind.INTERNAL
        self.send_attributes: dict[str, Any] = {
            **sink.attributes,
            "messaging.operation.type": "send",
            "messaging.operation.name": "send",
        }
        self.numbered = source.attributes["messaging.system"] == "kafka"
        self._latest: SpanContext | None = None

    def batch(self, raw: RawBatch, contexts: Contexts) -> BatchTrace:
        """Begin the span of a batch; ``contexts`` came with its records."""
        made = BatchTrace(self, raw, contexts)
        self._latest = made.span.get_span_context()
        return made

    def burst(self, result: str, record: Mapping[str, Any], version: int | None) -> None:
        """A look for a better version has ended: its span, told when the loop takes the result.

        Args:
            result: promoted, rejected, declined, failed and so on, as `homeostat_slow_bursts_total` has them.
            record: its decision record; what is told of it are seconds, method and the version it began from.
            version: the number that it got; None: it is not kept.
        """
        now, seconds = time.time_ns(), record.get("seconds")
        if not isinstance(seconds, int | float):
            return  # an operator's act or a withdrawal, which took no time
        told = {"homeostat.result": result, "homeostat.method": record.get("method"), "homeostat.version": version}
        told["homeostat.from_version"] = record.get("from_version")
        span = self.tracer.start_span(
            "slow burst",
            context=Context(),
            attributes={name: value for name, value in told.items() if isinstance(value, str | int)},
            start_time=now - int(seconds * 1e9),
        )
        if self._latest is not None and self._latest.is_valid:
            span.add_link(self._latest)
        span.end(now)


class BatchTrace:
    """One batch's spans. Where it is not sampled, its methods do next to nothing."""

    def __init__(self, spans: Spans, raw: RawBatch, contexts: Contexts) -> None:
        self._spans = spans
        self._sampled = {origin: found for origin, found in contexts.items() if is_sampled(found)}
        self.span = spans.tracer.start_span(
            spans.batch_name,
            context=Context(),
            kind=SpanKind.CONSUMER,
            attributes=spans.batch_attributes,
        )
        self._inside = set_span_in_context(self.span, Context())
        self.recording = self.span.is_recording()
        """Whether it is sampled, or near enough to be told."""
        own = self.span.get_span_context()
        self.exemplar: dict[str, str] | None = None
        """Of the batch's latencies; None where nobody will find its trace."""
        if self.recording:
            self.span.set_attribute("messaging.batch.message_count", len(raw))
            if own.trace_flags.sampled:
                self.exemplar = {"trace_id": f"{own.trace_id:032x}", "span_id": f"{own.span_id:016x}"}
            self._link()
        self._left = spans.most_records

    def _link(self) -> None:
        seen: set[tuple[int, int]] = set()
        for context in self._sampled.values():
            sender = _sender(context)
            if (place := (sender.trace_id, sender.span_id)) in seen:
                continue  # many records of one sending span
            seen.add(place)
            self.span.add_link(sender)
            if len(seen) >= MOST_LINKS:
                return

    def step(
        self, name: str, kind: SpanKind = SpanKind.INTERNAL, attributes: Mapping[str, Any] | None = None
    ) -> AbstractContextManager[None]:
        """A part of the batch's way."""
        return self._step(name, kind, attributes) if self.recording else _NOTHING

    @contextmanager
    def _step(self, name: str, kind: SpanKind, attributes: Mapping[str, Any] | None) -> Iterator[None]:
        span = self._spans.tracer.start_span(name, context=self._inside, kind=kind, attributes=dict(attributes or {}))
        try:
            yield
        except BaseException as error:
            _fail(span, type(error).__name__)
            raise
        finally:
            span.end()

    def sending(self, rows: int) -> AbstractContextManager[None]:
        """The step that makes the answers and hands them over."""
        if not self.recording:
            return _NOTHING
        spans = self._spans
        attributes = {**spans.send_attributes, "messaging.batch.message_count": rows}
        return self.step(spans.send_name, spans.send_kind, attributes)

    def decoded(self, batch: Batch) -> None:
        """What became of the records. One that dies has no answer: its sender's trace ends here, and says why."""
        if self.recording and batch.invalid:
            self.span.set_attribute("homeostat.invalid_records", len(batch.invalid))
        if self.recording and batch.dead:
            self.span.set_attribute("homeostat.dead_letters", len(batch.dead))
        for letter in batch.dead if self._sampled else ():
            if (span := self._record((letter.partition, letter.offset))) is not None:
                _fail(span, letter.reason)
                span.end()

    def records(self, raw: RawBatch, rows: list[int], invalid: Mapping[int, str]) -> AbstractContextManager[None]:
        """Spans of single records while their answers are handed over; the batch's contexts name them from then on."""
        return self._records(raw, rows, invalid) if self._sampled else _NOTHING

    @contextmanager
    def _records(self, raw: RawBatch, rows: list[int], invalid: Mapping[int, str]) -> Iterator[None]:
        made: list[Span] = []
        for row in rows:
            origin = raw.partitions[row], raw.offsets[row]
            if self._left <= 0:
                break
            if (span := self._record(origin)) is None:
                continue
            own = span.get_span_context()
            self._sampled[origin][PARENT] = traceparent(own.trace_id, own.span_id, own.trace_flags)
            made.append(span)
            if row in invalid:
                _fail(span, invalid[row])
        try:
            yield
        except BaseException as error:
            for span in made:
                _fail(span, type(error).__name__)
            raise
        finally:
            for span in made:
                span.end()

    def _record(self, origin: tuple[str, int]) -> Span | None:
        """A span in the sender's trace, from the batch's beginning on; None where there is none to be."""
        context = self._sampled.get(origin)
        if context is None or self._left <= 0:
            return None
        sender = _sender(context)
        spans = self._spans
        attributes = spans.record_attributes
        if spans.numbered:
            number = origin[0].rpartition("/")[2]
            more = {"messaging.destination.partition.id": number, "messaging.kafka.offset": origin[1]}
            attributes = attributes | more
        inside = set_span_in_context(NonRecordingSpan(sender), Context())
        started = getattr(self.span, "start_time", None)
        span = spans.tracer.start_span(
            spans.record_name, context=inside, kind=SpanKind.CONSUMER, attributes=attributes, start_time=started
        )
        if not span.is_recording():
            return None  # the sampler of this process has another opinion than the sender
        self._left -= 1
        if self.exemplar is not None:
            span.add_link(self.span.get_span_context())
        return span

    def failed(self, error: BaseException) -> None:
        """The batch was not brought to its end."""
        _fail(self.span, type(error).__name__)

    def end(self, before: Mapping[str, int | str] | None, after: Mapping[str, int | str] | None) -> None:
        """The batch is over; ``before`` and ``after`` is what it may have changed, None where it is not recorded."""
        if before is not None and after is not None:
            for name, event in _EVENTS.items():
                if before[name] != after[name]:
                    self.span.add_event(event, {"homeostat.shift": after["homeostat.shift"]})
            for name, event in _CHANGES.items():
                if before[name] != after[name]:
                    self.span.add_event(event, {f"{name}.before": before[name], name: after[name]})
                self.span.set_attribute(name, before[name])
        self.span.end()


def _sender(context: dict[str, bytes]) -> SpanContext:
    parent = parent_of(context)
    assert parent is not None
    state = TraceState.from_header([parent.state]) if parent.state else None
    return SpanContext(parent.trace_id, parent.span_id, True, TraceFlags(parent.flags), state)


def _fail(span: Span, kind: str) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))
