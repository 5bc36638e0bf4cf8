"""The spans of a batch, read from the SDK's exporter in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from daemon.assembly import Worker, assemble, keep_versions
from daemon.records import RawBatch, RowHeaders
from daemon.tracing.context import context_of, parent_of
from daemon.tracing.exporting import Traced
from daemon.tracing.naming import place_of
from tests.unit.worlds import MemorySink, raw, record, records, settings

TOPIC = "kafka://127.0.0.1:9092/sensors"


class HeaderMemory(MemorySink):
    """Keeps the answers' headers too."""

    takes_headers = True

    def __init__(self) -> None:
        super().__init__()
        self.headers: list[Any] = []
        self.failing = False

    def send(self, keys: list[bytes | None], values: list[bytes], headers: RowHeaders | None = None) -> None:
        if self.failing:
            raise OSError("secret")
        super().send(keys, values)
        self.headers += [None] * len(values) if headers is None else list(headers)


class World:
    """A worker whose spans are kept."""

    def __init__(self, folder: Path, **traces: Any) -> None:
        self.exporter = InMemorySpanExporter()
        given = settings(folder, traces={"mode": "on", **traces})
        self.worker: Worker = assemble(given)
        self.worker.tracing.close(0.0)
        # On Kafka, as far as the spans know; none of its clients is made.
        self.tracing = Traced(given.model_copy(update={"source": TOPIC, "sink": TOPIC + ".answers"}), self.processor)
        self.tracing.begin(self.worker)
        self.sink = self.worker.loop.sink = HeaderMemory()

    @property
    def processor(self) -> SimpleSpanProcessor:
        return SimpleSpanProcessor(self.exporter)

    def process(self, batch: RawBatch) -> list[ReadableSpan]:
        self.exporter.clear()
        self.worker.loop.process(batch)
        return self.spans

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def one(self, name: str) -> ReadableSpan:
        (found,) = [span for span in self.spans if span.name == name]
        return found


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.tracing.close(5.0)


def context(number: int, *, sampled: bool = True, state: bytes | None = None) -> list[tuple[str, bytes | None]]:
    found: list[tuple[str, bytes | None]] = [
        ("traceparent", b"00-%032x-%016x-%02x" % (number + 1, number + 1, sampled))
    ]
    return found if state is None else [*found, ("tracestate", state)]


def headed(headers: dict[int, Any], rows: int = 8, values: list[bytes] | None = None) -> RawBatch:
    made = raw(records(rows) if values is None else values, partition="sensors/3")
    made.headers = {("sensors/3", row): given for row, given in headers.items()}
    return made


def test_a_batch_is_one_trace_with_its_steps(world: World) -> None:
    spans = world.process(headed({}))
    assert [span.name for span in spans] == [
        "decode",
        "predict",
        "send sensors.answers",
        "learn",
        "process_batch sensors",
    ]
    batch = spans[-1]
    assert batch.parent is None and batch.kind is SpanKind.CONSUMER and not batch.links
    assert {span.parent.span_id for span in spans[:-1]} == {batch.context.span_id}
    assert {span.context.trace_id for span in spans} == {batch.context.trace_id}
    assert dict(batch.attributes or {}) == {
        "messaging.system": "kafka",
        "messaging.destination.name": "sensors",
        "messaging.consumer.group.name": "homeostat",
        "messaging.operation.type": "process",
        "messaging.operation.name": "process_batch",
        "messaging.batch.message_count": 8,
        "server.address": "127.0.0.1",
        "server.port": 9092,
        "homeostat.version": 0,
        "homeostat.state": "steady",
    }
    send = world.one("send sensors.answers")
    assert send.kind is SpanKind.PRODUCER and (send.attributes or {})["messaging.batch.message_count"] == 8
    assert world.sink.headers == [None] * 8


def test_a_sampled_records_trace_goes_through_to_its_answer(world: World) -> None:
    world.process(headed({2: context(40, state=b"vendor=x")}))
    span, batch = world.one("process sensors"), world.one("process_batch sensors")
    assert span.parent is not None and span.parent.is_remote
    assert (span.context.trace_id, span.parent.span_id) == (41, 41)
    assert [link.context.span_id for link in span.links] == [batch.context.span_id]
    assert [(link.context.trace_id, link.context.span_id) for link in batch.links] == [(41, 41)]
    assert span.kind is SpanKind.CONSUMER and batch.start_time == span.start_time
    assert (span.attributes or {})["messaging.kafka.offset"] == 2
    assert (span.attributes or {})["messaging.destination.partition.id"] == "3"
    (headers,) = [given for given in world.sink.headers if given]
    assert world.sink.headers.index(headers) == 2
    parent = parent_of(context_of(headers))
    assert parent is not None and parent.sampled
    assert (parent.trace_id, parent.span_id, parent.state) == (41, span.context.span_id, "vendor=x")


def test_what_the_sender_did_not_sample_goes_on_unchanged_and_without_a_span(world: World) -> None:
    given = [*context(5, sampled=False, state=b"a=1"), ("baggage", b"user=1"), ("other", b"x")]
    world.process(headed({0: given, 1: [("traceparent", b"00-nonsense")], 2: [("baggage", b"k=v")]}))
    assert "process sensors" not in [span.name for span in world.spans]
    assert not world.one("process_batch sensors").links
    assert [dict(found) if found else found for found in world.sink.headers[:4]] == [
        dict(given[:3]),
        None,
        {"baggage": b"k=v"},
        None,
    ]


def test_spans_of_records_and_links_are_bounded_and_the_rest_goes_on_unchanged(tmp_path: Path) -> None:
    world = World(tmp_path, record_spans=3)
    world.process(headed({row: context(row) for row in range(300)}, rows=300))
    assert [span.name for span in world.spans].count("process sensors") == 3
    assert len(world.one("process_batch sensors").links) == 128
    assert all(
        dict(found)["traceparent"] == context(row)[0][1] for row, found in enumerate(world.sink.headers) if row > 2
    )


def test_many_records_of_one_sending_span_are_one_link(world: World) -> None:
    world.process(headed({row: context(1) for row in range(8)}))
    assert len(world.one("process_batch sensors").links) == 1


def test_a_batch_that_is_not_sampled_tells_only_of_records_whose_senders_did(tmp_path: Path) -> None:
    world = World(tmp_path, sample_ratio=0.0)
    assert world.process(headed({})) == []
    world.process(headed({1: context(7)}))
    assert [span.name for span in world.spans] == ["process sensors"]
    assert not world.one("process sensors").links and world.worker.loop.exemplar is None
    found = parent_of(context_of(world.sink.headers[1 + 8]))
    assert found is not None and found.trace_id == 8


def test_invalid_and_dead_records_are_errors_in_their_senders_traces_without_a_word_of_theirs(world: World) -> None:
    values = [record("sekret", [float("nan"), 0, 0, 0]), b"sekret", *records(2)]
    world.process(headed({0: context(0), 1: context(1), 2: context(2)}, values=values))
    by_trace = {span.context.trace_id: span for span in world.spans if span.name == "process sensors"}
    assert {number: span.status.status_code for number, span in by_trace.items()} == {
        1: StatusCode.ERROR,
        2: StatusCode.ERROR,
        3: StatusCode.UNSET,
    }
    assert [(by_trace[number].attributes or {})["error.type"] for number in (1, 2)] == ["not_finite", "undecodable"]
    batch = world.one("process_batch sensors").attributes or {}
    assert (batch["homeostat.invalid_records"], batch["homeostat.dead_letters"]) == (1, 1)
    assert "sekret" not in "".join(span.to_json() for span in world.spans)


def test_a_sink_that_fails_ends_every_span_as_an_error_without_its_text(world: World) -> None:
    world.sink.failing = True
    with pytest.raises(OSError):
        world.process(headed({0: context(0)}))
    failed = {span.name for span in world.spans if span.status.status_code is StatusCode.ERROR}
    assert failed == {"process sensors", "send sensors.answers", "process_batch sensors"}
    assert "secret" not in "".join(span.to_json() for span in world.spans)
    world.sink.failing = False
    assert world.process(headed({}))[-1].status.status_code is StatusCode.UNSET


def test_what_a_batch_changes_is_an_event_of_its_span(world: World) -> None:
    before = {
        "homeostat.drifts": 0,
        "homeostat.guard_trips": 2,
        "homeostat.version": 1,
        "homeostat.state": "steady",
        "homeostat.shift": "none",
    }
    after = before | {
        "homeostat.drifts": 1,
        "homeostat.version": 2,
        "homeostat.state": "fast",
        "homeostat.shift": "covariate",
    }
    trace = world.worker.loop.spans.batch(headed({}), {})
    trace.end(before, after)
    batch = world.one("process_batch sensors")
    assert [(event.name, dict(event.attributes or {})) for event in batch.events] == [
        ("drift", {"homeostat.shift": "covariate"}),
        ("version changed", {"homeostat.version.before": 1, "homeostat.version": 2}),
        ("state changed", {"homeostat.state.before": "steady", "homeostat.state": "fast"}),
    ]
    assert (batch.attributes or {})["homeostat.version"] == 1, "the one that answered"


def test_a_real_drift_is_an_event(world: World) -> None:
    found: list[str] = []
    for number in range(30):
        shift = 0.0 if number < 6 else 8.0
        values = records(64, seed=number, first=64 * number, shift=shift)
        found += [event.name for event in world.process(raw(values, 64 * number))[-1].events]
    assert world.worker.loop.tally.drifts and {"drift", "state changed"} <= set(found)


def test_a_burst_is_a_span_of_its_own_with_the_seconds_that_it_took(world: World) -> None:
    world.process(headed({}))
    batch = world.one("process_batch sensors")
    keeper = world.worker.loop.actions.keeper
    keeper.decided("promoted", {"seconds": 2.5, "method": "head", "reason": "sekret", "from_version": 0}, version=1)
    keeper.decided("withdrawn", {"reason": "version_harm"}, version=1)
    burst = world.one("slow burst")
    assert burst.start_time is not None and burst.end_time is not None
    assert burst.end_time - burst.start_time == 2_500_000_000
    assert dict(burst.attributes or {}) == {
        "homeostat.result": "promoted",
        "homeostat.method": "head",
        "homeostat.version": 1,
        "homeostat.from_version": 0,
    }
    assert [link.context.span_id for link in burst.links] == [batch.context.span_id]


def test_the_bursts_of_a_new_bundle_are_told_too(world: World) -> None:
    keep_versions(world.worker)
    world.tracing.follow(world.worker)
    world.process(headed({}))
    world.worker.loop.actions.keeper.decided("rejected", {"seconds": 1.0, "method": "head"})
    assert (world.one("slow burst").attributes or {})["homeostat.result"] == "rejected"


def test_records_read_again_after_a_restart_are_not_told_twice(world: World) -> None:
    world.worker.loop.emit_from = {"sensors/3": 4}
    world.process(headed({row: context(row) for row in range(8)}))
    told = [span.context.trace_id for span in world.spans if span.name == "process sensors"]
    assert told == [5, 6, 7, 8] and len(world.sink.headers) == 4


headers = st.lists(
    st.tuples(
        st.sampled_from(["traceparent", "tracestate", "baggage", "x"]),
        st.binary(max_size=70)
        | st.sampled_from(
            [b"00-%032x-%016x-01" % (1, 1), b"a=1", b"a=1,a=2", b"a=1,,b=2", b"cc-%032x-%016x-01-x" % (1, 1)]
        )
        | st.none(),
    ),
    max_size=4,
)


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.dictionaries(st.integers(0, 3), headers))
def test_hostile_headers_never_cost_an_answer_or_make_a_broken_header(world: World, given_headers: Any) -> None:
    before = len(world.sink.values)
    world.process(headed(given_headers, rows=4))
    assert len(world.sink.values) == before + 4
    for found in world.sink.headers[before:]:
        assert not found or context_of(found) == dict(found)


@pytest.mark.parametrize(
    ("url", "name", "more"),
    [
        ("kafka://a:1,b:2/t", "t", {"messaging.system": "kafka", "server.address": "a", "server.port": 1}),
        ("mqtts://h/$share/g/plant/+/x", "plant/+/x", {"messaging.consumer.group.name": "g", "server.port": 8883}),
        ("file:/data/private/in.jsonl?follow=1", "in.jsonl", {"messaging.system": "file"}),
        ("file:///data/in.jsonl", "in.jsonl", {"messaging.system": "file"}),
        ("sim://ageing?rate=10", "ageing", {"messaging.system": "sim"}),
        ("-", "stdio", {"messaging.system": "file"}),
        ("null:", "null", {"messaging.system": "null"}),
    ],
)
def test_a_stream_is_called_by_its_topic_or_file(url: str, name: str, more: dict[str, Any]) -> None:
    place = place_of(url)
    assert place.name == place.attributes["messaging.destination.name"] == name
    assert place.attributes.items() >= more.items()
