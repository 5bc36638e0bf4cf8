"""A worker on a real broker whose records name their schemas at a registry that comes and goes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastavro
import pytest

from tests.daemon_process import DaemonProcess, answers, eventually, free_port, ids, on_kafka, read_all, record
from tests.kafka import produce
from tests.registry_server import RegistryServer, framed

pytestmark = pytest.mark.usefixtures("kafka_broker")

READING: dict[str, Any] = {
    "type": "record",
    "name": "Reading",
    "fields": [
        {"name": "site", "type": ["null", "string"]},
        {"name": "id", "type": "string"},
        {"name": "x", "type": {"type": "array", "items": "float"}},
    ],
}
NEWER = READING | {"fields": [*READING["fields"], {"name": "battery", "type": "double"}]}


def avro(names: list[str], number: int, schema: dict[str, Any] = READING) -> list[bytes]:
    """Records that the model knows, framed with that schema's id."""
    values, parsed = [], fastavro.parse_schema(schema)
    for name in names:
        out = io.BytesIO()
        fastavro.schemaless_writer(out, parsed, json.loads(record(name)) | {"site": "lab", "battery": 0.5})
        values.append(framed(number, out.getvalue()))
    return values


def test_records_wait_for_the_schema_that_a_registry_has_to_give_and_none_is_lost(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path
) -> None:
    source = topic()
    streams = on_kafka(settings, kafka_broker, source) | {"HOMEOSTAT_CODEC": "avro"}
    registry = RegistryServer(port=free_port())
    first = registry.add(READING)
    streams |= {"HOMEOSTAT_REGISTRY__URL": registry.url, "HOMEOSTAT_REGISTRY__TIMEOUT_S": "5"}
    unknown = avro(["unknown"], 99)
    produce(kafka_broker, source, [*avro(["a", "b"], first), *unknown, b"no frame", *avro(["c"], first)])
    with DaemonProcess(streams, tmp_path) as daemon:
        daemon.wait_until_ready().wait_for("homeostat_records_in_total", 5)
        metrics = daemon.metrics()
        assert metrics['homeostat_records_invalid_total{reason="schema"}'] == 1
        assert metrics['homeostat_records_invalid_total{reason="undecodable"}'] == 1

        registry.close()
        produce(kafka_broker, source, [*avro(["d"], 2, NEWER), *avro(["e"], first)])
        eventually("/readyz names the registry", lambda: "the schema registry" in daemon.get("/readyz")[1])
        assert daemon.get("/readyz")[0] == 503
        assert daemon.get("/healthz")[0] == 200
        assert daemon.metrics()["homeostat_records_in_total"] == 5

        with RegistryServer(port=registry.port) as again:
            again.add(READING)
            again.add(NEWER)
            daemon.wait_for("homeostat_records_in_total", 7)
            daemon.wait_until_ready()
            assert daemon.terminate() == 0
    assert ids(answers(kafka_broker, f"{source}.answers")) == ["a", "b", "c", "d", "e"]
    letters = {letter.value: dict(letter.headers) for letter in read_all(kafka_broker, f"{source}.dead-letters")}
    assert {value: headers["homeostat.reason"] for value, headers in letters.items()} == {
        unknown[0]: b"schema",
        b"no frame": b"undecodable",
    }
    assert letters[unknown[0]]["homeostat.detail"] == b"schema 99: the registry has none: Schema 99 not found"


@pytest.mark.slow
def test_a_worker_told_to_stop_while_it_waits_leaves_its_records_to_the_next(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path
) -> None:
    source = topic()
    streams = on_kafka(settings, kafka_broker, source) | {"HOMEOSTAT_CODEC": "json-schema"}
    with RegistryServer() as registry:
        known = registry.add({"required": ["id", "x"]}, "JSON")
        streams |= {"HOMEOSTAT_REGISTRY__URL": registry.url, "HOMEOSTAT_DRAIN_TIMEOUT_S": "1"}
        with DaemonProcess(streams, tmp_path) as daemon:
            daemon.wait_until_ready()
            registry.answers = [(503, b"")] * 10_000
            produce(kafka_broker, source, [framed(known, record("a")), framed(known, b'{"id": "b"}')])
            eventually("/readyz names the registry", lambda: "the schema registry" in daemon.get("/readyz")[1])
            assert daemon.terminate() == 3
        registry.answers = []
        with DaemonProcess(streams, tmp_path) as daemon:
            daemon.wait_until_ready().wait_for("homeostat_records_in_total", 2)
            assert daemon.terminate() == 0
    assert ids(answers(kafka_broker, f"{source}.answers")) == ["a"]
    assert [letter.value for letter in read_all(kafka_broker, f"{source}.dead-letters")] == [
        framed(known, b'{"id": "b"}')
    ]


def test_a_worker_does_not_start_without_its_registry(
    kafka_broker: str, topic: Callable[..., str], settings: dict[str, str], tmp_path: Path
) -> None:
    source, url = topic(), f"http://127.0.0.1:{free_port()}"
    streams = on_kafka(settings, kafka_broker, source) | {"HOMEOSTAT_CODEC": "avro"}
    for command in ("run", "check"):
        given = streams | {"HOMEOSTAT_REGISTRY__URL": url, "HOMEOSTAT_REGISTRY__TIMEOUT_S": "0.3"}
        with DaemonProcess(given, tmp_path, command=command) as daemon:
            assert daemon.wait() == 2
            assert f"HOMEOSTAT_REGISTRY__URL={url}: the schema registry can't be reached: " in daemon.log
