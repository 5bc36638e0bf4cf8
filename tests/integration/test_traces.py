"""Traces as their users meet them: a collector that gets spans, one that is away, and a broker in between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from kafka import KafkaProducer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from daemon.tracing.context import context_of, parent_of
from tests.daemon_process import ROOT, DaemonProcess, eventually, free_port, on_kafka, record, records
from tests.kafka import consume_all, wait_for_port
from tests.mosquitto import Mosquitto, Peer, mosquitto

__all__ = ["mosquitto"]

TRACE = "0af7651916cd43dd8448eb211c80319c"
GIVEN = f"00-{TRACE}-b7ad6b7169203331-01".encode()


class Collector:
    """Takes OTLP over HTTP. ``silent``: it takes connections and never answers."""

    def __init__(self, *, silent: bool = False) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.paths: set[str] = set()
        self._let_go = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if silent:
                    collector._let_go.wait()
                    return
                collector.paths.add(self.path)
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in list(self.requests)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def close(self) -> None:
        self._let_go.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def traced(url: str, **more: str) -> dict[str, str]:
    return {"HOMEOSTAT_TRACES": "on", "HOMEOSTAT_TRACES__ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "100", **more}


def exported(collector: Collector, name: str) -> None:
    """Until the span has come, and the one that it is linked with: the daemon's end waits 2 s for them, no longer."""

    def there() -> bool:
        spans = collector.spans
        known = {span.span_id for span in spans}
        return any(span.name == name and known.issuperset(link.span_id for link in span.links) for span in spans)

    eventually(f"the collector has {name!r}", there)


def values(span: Span) -> dict[str, str | int]:
    return {item.key: item.value.string_value or item.value.int_value for item in span.attributes}


def test_a_collector_gets_every_batch_of_a_run_with_the_last_ones_at_its_end(
    collector: Collector, settings: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(records([f"sekret-{number}" for number in range(300)])) + b"\n")
    streams = settings | {
        "HOMEOSTAT_SOURCE": f"file:{tmp_path / 'in.jsonl'}",
        "HOMEOSTAT_SINK": f"file:{tmp_path / 'out.jsonl'}",
        "HOMEOSTAT_BATCH_ROWS": "32",
    }
    # A minute between two exports: what comes, comes at the end.
    late = traced(collector.url, OTEL_BSP_SCHEDULE_DELAY="60000", OTEL_SERVICE_NAME="line-7")
    with DaemonProcess(streams | late, tmp_path) as daemon:
        assert daemon.wait(120) == 0
    assert collector.paths == {"/v1/traces"}
    batches = [span for span in collector.spans if span.name == "process_batch in.jsonl"]
    assert sum(int(values(span)["messaging.batch.message_count"]) for span in batches) == 300
    by_id = {span.span_id for span in batches}
    for name in ("decode", "predict", "send out.jsonl", "learn"):
        steps = [span for span in collector.spans if span.name == name]
        assert {span.parent_span_id for span in steps} == by_id, name
        assert all(span.end_time_unix_nano >= span.start_time_unix_nano for span in steps)
    resource = {
        item.key: item.value.string_value for item in collector.requests[0].resource_spans[0].resource.attributes
    }
    assert resource["service.name"] == "line-7" and resource["homeostat.bundle"]
    assert b"sekret" not in b"".join(request.SerializeToString() for request in collector.requests)


@pytest.mark.slow
@pytest.mark.parametrize("silent", [False, True])
def test_with_the_collector_away_the_daemon_answers_ends_in_order_and_says_little(
    settings: dict[str, str], tmp_path: Path, silent: bool
) -> None:
    hanging = Collector(silent=True) if silent else None
    url = f"http://127.0.0.1:{free_port()}" if hanging is None else hanging.url
    try:
        with DaemonProcess(settings | traced(url), tmp_path, "--max-records", "3000") as daemon:
            assert daemon.wait(120) == 0
        assert "3,000  (0 invalid, 0 dead letters)" in daemon.output
        about_it = [line for line in daemon.log.splitlines() if "opentelemetry" in line or "homeostat.traces" in line]
        assert len(about_it) <= 4, about_it
        assert "Traceback" not in daemon.log
        assert ("the collector did not take the last spans in time" in daemon.log) or not silent
    finally:
        if hanging is not None:
            hanging.close()


@pytest.mark.parametrize(
    ("codec", "bulk", "mode"), [("json", "off", "on"), ("raw", "auto", "on"), ("json", "auto", "pass")]
)
def test_a_trace_goes_from_the_sensors_record_to_its_answer(
    kafka_broker: str,
    topic: Callable[..., str],
    settings: dict[str, str],
    tmp_path: Path,
    collector: Collector,
    codec: str,
    bulk: str,
    mode: str,
) -> None:
    source = topic()
    unsampled = GIVEN[:-1] + b"0"
    headers = {
        3: [("traceparent", GIVEN), ("tracestate", b"vendor=1"), ("mine", b"x")],
        5: [("traceparent", unsampled), ("baggage", b"k=v")],
        7: [("traceparent", b"00-nonsense"), ("tracestate", b"vendor=1")],
    }
    wait_for_port(kafka_broker)
    names = [str(row) for row in range(10)]
    given = records(names) if codec == "json" else [bytes(4 * 16)] * 10
    with KafkaProducer(bootstrap_servers=kafka_broker) as client:
        for row, value in enumerate(given):
            client.send(source, value=value, key=names[row].encode(), headers=headers.get(row))
        client.flush(timeout=60)
    streams = on_kafka(settings, kafka_broker, source) | traced(collector.url)
    more = {"HOMEOSTAT_TRACES": mode, "HOMEOSTAT_CODEC": codec, "HOMEOSTAT_KAFKA__BULK": bulk}
    with DaemonProcess(streams | more, tmp_path) as daemon:
        daemon.wait_until_ready()  # from then on its topics exist
        found = {answer.key: dict(answer.headers) for answer in consume_all(kafka_broker, f"{source}.answers", 10)}
        if mode != "pass":
            exported(collector, f"process {source}")
        assert daemon.terminate() == 0
    assert {key for key, carried in found.items() if carried} == {b"3", b"5"}
    assert found[b"5"] == {"traceparent": unsampled, "baggage": b"k=v"}
    parent = parent_of(context_of(list(found[b"3"].items())))
    assert parent is not None and found[b"3"]["tracestate"] == b"vendor=1"
    assert f"{parent.trace_id:032x}" == TRACE and parent.sampled
    if mode == "pass":
        assert found[b"3"]["traceparent"] == GIVEN and not collector.spans
        return
    (span,) = [span for span in collector.spans if span.name == f"process {source}"]
    assert (span.trace_id.hex(), span.span_id.hex()) == (TRACE, f"{parent.span_id:016x}")
    assert span.parent_span_id.hex() == GIVEN[36:52].decode() and span.trace_state == "vendor=1"
    assert values(span)["messaging.kafka.offset"] == 3
    (batch,) = [batch for batch in collector.spans if batch.span_id == span.links[0].span_id]
    assert [link.trace_id.hex() for link in batch.links] == [TRACE]
    assert values(batch)["messaging.consumer.group.name"] == f"g-{source}"


def test_a_dead_record_keeps_its_senders_context(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path, collector: Collector
) -> None:
    source = topic()
    wait_for_port(kafka_broker)
    with KafkaProducer(bootstrap_servers=kafka_broker) as client:
        client.send(source, value=b"no json", headers=[("traceparent", GIVEN)])
        client.flush(timeout=60)
    with DaemonProcess(on_kafka(settings, kafka_broker, source) | traced(collector.url), tmp_path) as daemon:
        daemon.wait_until_ready()
        (letter,) = consume_all(kafka_broker, f"{source}.dead-letters", 1)
        exported(collector, f"process {source}")
        assert daemon.terminate() == 0
    assert dict(letter.headers)["traceparent"] == GIVEN
    (span,) = [span for span in collector.spans if span.name == f"process {source}"]
    assert span.status.code == Status.STATUS_CODE_ERROR and values(span)["error.type"] == "undecodable"


def test_a_trace_goes_through_user_properties_of_mqtt(
    mosquitto: Mosquitto, settings: dict[str, str], tmp_path: Path, collector: Collector
) -> None:
    broker = f"mqtt://{mosquitto.address}"
    streams = settings | {"HOMEOSTAT_SOURCE": f"{broker}/traced/%2B", "HOMEOSTAT_SINK": f"{broker}/answers/traced"}
    said = Properties(PacketTypes.PUBLISH)
    said.UserProperty = [("traceparent", GIVEN.decode()), ("unit", "C")]
    daemon = DaemonProcess(streams | traced(collector.url), tmp_path)
    with daemon, Peer(mosquitto, "answers/traced") as reader, Peer(mosquitto) as sensor:
        daemon.wait_until_ready()
        sensor._client.publish("traced/1", record("1"), qos=1, properties=said).wait_for_publish(30)
        sensor.publish("traced/1", record("2"))
        first, second = reader.wait_for(2)
        exported(collector, "process traced/+")
        assert daemon.terminate() == 0
    (span,) = [span for span in collector.spans if span.name == "process traced/+"]
    carried = f"00-{TRACE}-{span.span_id.hex()}-01"
    assert first.properties.UserProperty == [("key", "traced/1"), ("traceparent", carried)]
    assert second.properties.UserProperty == [("key", "traced/1")]
    assert span.trace_id.hex() == TRACE and values(span)["messaging.system"] == "mqtt"


def test_a_scrape_of_the_running_daemon_shows_the_trace_of_a_slow_batch(
    collector: Collector, settings: dict[str, str], tmp_path: Path
) -> None:
    with DaemonProcess(settings | traced(collector.url), tmp_path) as daemon:
        daemon.wait_until_ready().wait_for("homeostat_records_out_total", 1_000)
        request = Request(
            f"http://127.0.0.1:{daemon.port}/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
        )
        with urlopen(request, timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        assert daemon.terminate() == 0
    found = {
        sample.exemplar.labels["trace_id"]
        for family in families
        if family.name in ("homeostat_batch_seconds", "homeostat_end_to_end_seconds")
        for sample in family.samples
        if sample.exemplar is not None
    }
    assert found and found <= {span.trace_id.hex() for span in collector.spans}


def test_check_says_what_is_wrong_with_traces_beside_the_rest(settings: dict[str, str], tmp_path: Path) -> None:
    with DaemonProcess(settings | {"HOMEOSTAT_TRACES": "on"}, tmp_path, command="check") as daemon:
        assert daemon.wait(120) == 0
        assert "HOMEOSTAT_TRACES__MODE=on" in daemon.output
    blocked = tmp_path / "blocked" / "opentelemetry"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ModuleNotFoundError(name='opentelemetry')\n")
    more = {"HOMEOSTAT_TRACES": "on", "PYTHONPATH": f"{blocked.parent}:{ROOT}"}
    with DaemonProcess(settings | more, tmp_path, command="check") as daemon:
        assert daemon.wait(120) == 2
        line = "homeostat: HOMEOSTAT_TRACES=on: opentelemetry can't be imported; run: pip install homeostat[otel]"
        assert daemon.log.splitlines() == [line]
