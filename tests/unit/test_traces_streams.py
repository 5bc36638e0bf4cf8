"""Headers on their way through the brokers' clients, and exemplars on theirs to a scrape."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kafka import errors as kafka_errors
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from daemon.front.web import Web
from daemon.stream_settings import KafkaClient, Mqtt
from daemon.streams.kafka_sink import KafkaSink
from daemon.streams.mqtt_outbox import Letter
from daemon.streams.mqtt_sink import MqttSink
from daemon.streams.mqtt_window import Row, Window
from daemon.telemetry import ArrayHistogram
from tests.daemon_process import eventually
from tests.unit.test_mqtt_client import CONNACK, SUBACK, Script, scripts, source
from tests.unit.test_traces import World, headed

__all__ = ["scripts"]

GIVEN = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Partly:
    """A bulk producer that has no room after three rows."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, ...]] = []

    def send_many(self, topic: str, keys: list[Any], values: list[bytes], headers: Any = None) -> list[Any]:
        self.sent += list(zip(keys[:3], values[:3], (headers or [None] * len(keys))[:3], strict=True))
        if len(values) > 3:
            error = kafka_errors.KafkaTimeoutError("no room")
            error.accepted, error.futures = 3, []
            raise error
        return []


def test_a_sink_that_takes_rows_bit_by_bit_keeps_headers_with_their_rows() -> None:
    sink = KafkaSink("kafka://127.0.0.1:1/t", KafkaClient())
    sink._bulk = Partly()
    headers = [[("traceparent", b"%d" % row)] if row % 2 else None for row in range(8)]
    sink.send([None] * 8, [b"%d" % row for row in range(8)], headers)
    assert [(value, found) for _, value, found in sink._bulk.sent] == [(b"%d" % row, headers[row]) for row in range(8)]
    sink.send([None], [b"plain"])
    assert sink._bulk.sent[-1] == (None, b"plain", None)


def publish(mid: int, topic: bytes, payload: bytes, **said: bytes) -> bytes:
    """A PUBLISH of QoS 1 with user properties."""
    pairs = ((name.encode(), text) for name, text in said.items())
    properties = b"".join(b"\x26" + len(name).to_bytes(2) + name + len(text).to_bytes(2) + text for name, text in pairs)
    assert len(properties) < 128
    body = len(topic).to_bytes(2) + topic + mid.to_bytes(2) + bytes([len(properties)]) + properties + payload
    return bytes([0x32, len(body) % 128 | (128 if len(body) > 127 else 0), *([1] if len(body) > 127 else [])]) + body


@pytest.mark.parametrize("keeps", [True, False])
def test_an_mqtt_messages_user_properties_are_headers_where_they_are_wanted(scripts: list[Any], keeps: bool) -> None:
    script = Script(
        [CONNACK, SUBACK, publish(5, b"t/a", b"one", traceparent=GIVEN, unit=b"C"), publish(6, b"t/a", b"two")]
    )
    reader = source(scripts, script)
    reader.keeps_context = keeps
    reader.open(None)
    values: list[bytes | None] = []
    headers: dict[Any, Any] = {}

    def both() -> bool:
        raw = reader.poll(9, 0.05)
        values.extend(raw.values)
        headers.update(raw.headers)
        return len(values) == 2

    eventually("both came", both)
    assert headers == ({("mqtt:t/+", 0): (("traceparent", GIVEN),)} if keeps else {})


def test_a_rows_headers_count_as_memory_until_it_is_handed_out() -> None:
    window = Window(0, max_rows=10, max_bytes=1_000)
    window.connected(False)
    window.arrived(Row(1, 1, b"t", b"x", 0.0, headers=(("traceparent", GIVEN),)), again=False)
    assert window.bytes == 2 + len(GIVEN)
    assert window.take(1)[0].headers == (("traceparent", GIVEN),)
    assert window.bytes == 0


@pytest.fixture
def sink(scripts: list[Any]) -> Iterator[MqttSink]:
    limit = b"\x20\x08\x00\x00\x05\x27\x00\x00\x01\x00"  # Maximum Packet Size: 256
    script = Script([limit])
    made = MqttSink(f"mqtt://127.0.0.1:{script.port}/answers", Mqtt(connect_timeout_s=30))
    scripts.extend((script, made))
    made.open()
    yield made


def test_an_answer_with_its_trace_is_a_message_with_user_properties(scripts: list[Any], sink: MqttSink) -> None:
    sink.send([b"a/1", None], [b"one", b"two"], [[("traceparent", GIVEN)], None])
    heard = scripts[0].heard
    eventually("both are published", lambda: b"two" in heard[0])
    assert b"\x26\x00\x0btraceparent\x00\x37" + GIVEN + b"one" in heard[0]
    assert heard[0].count(b"\x26\x00\x03key\x00\x03a/1") == 1


def test_an_answer_that_is_too_long_only_with_its_trace_goes_without(scripts: list[Any], sink: MqttSink) -> None:
    sink.send([b"a/1"], [b"v" * 180], [[("traceparent", GIVEN), ("baggage", b"k=v")]])
    heard = scripts[0].heard
    eventually("it is published", lambda: b"v" * 180 in heard[0])
    assert GIVEN not in heard[0] and b"\x26\x00\x03key\x00\x03a/1" in heard[0]
    assert Letter("t", b"", (), (("a", "b"),)).size > Letter("t", b"").size


def test_the_largest_of_an_array_carries_the_exemplar_and_each_bucket_keeps_its_newest() -> None:
    registry = CollectorRegistry()
    histogram = ArrayHistogram("latency_seconds", "Seconds.", (0.1, 1.0), registry)
    for number, values in enumerate(([0.01, 0.5], 0.6, [0.05], [], [7.0])):
        histogram.observe(np.asarray(values), {"trace_id": f"{number:032x}", "span_id": f"{number:016x}"})
    histogram.observe(0.7)
    (family,) = histogram.collect()
    found = {
        sample.labels["le"]: (int(sample.exemplar.labels["trace_id"], 16), sample.exemplar.value)
        for sample in family.samples
        if sample.exemplar is not None
    }
    assert found == {"0.1": (2, 0.05), "1.0": (1, 0.6), "+Inf": (4, 7.0)}
    assert b"trace_id" not in generate_latest(registry), "the plain text format has none"


def test_a_scrape_that_takes_openmetrics_sees_the_batchs_trace(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.process(headed({}))
    trace = world.one("process_batch sensors").context
    web = Web("127.0.0.1:0", world.worker.telemetry.registry, lambda: (True, ""), lambda: (True, ""))
    web.start()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", web.port, timeout=10)
        connection.request("GET", "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        text = connection.getresponse().read().decode()
        connection.close()
    finally:
        web.stop()
    found = {
        family.name: [sample.exemplar for sample in family.samples if sample.exemplar is not None]
        for family in text_string_to_metric_families(text)
    }
    for name in ("homeostat_batch_seconds", "homeostat_end_to_end_seconds"):
        (exemplar,) = found[name]
        assert exemplar.labels == {"trace_id": f"{trace.trace_id:032x}", "span_id": f"{trace.span_id:016x}"}
        assert exemplar.value >= 0 and exemplar.timestamp
