"""The daemon on MQTT: sensors publish, answers are published, and no moment of a death loses a record."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from tests.daemon_process import DaemonProcess, eventually, record
from tests.mosquitto import Mosquitto, Peer, mosquitto

__all__ = ["mosquitto"]

LONG = os.environ.get("HOMEOSTAT_LONG") == "1"


def on_mqtt(settings: dict[str, str], broker: Mosquitto, source: str, answers: str, **more: str) -> dict[str, str]:
    """``settings`` for a worker that reads the filter ``source`` and publishes on ``answers``."""
    own = {
        "HOMEOSTAT_SOURCE": f"mqtt://{broker.address}/{source}",
        "HOMEOSTAT_SINK": f"mqtt://{broker.address}/{answers}",
    }
    return settings | own | {f"HOMEOSTAT_{name}": value for name, value in more.items()}


def answered(peer: Peer) -> list[dict[str, object]]:
    return [json.loads(payload) for payload in peer.payloads()]


def test_each_sensors_topic_is_its_own_slot_and_a_restart_answers_nothing_again(
    mosquitto: Mosquitto, settings: dict[str, str], tmp_path: Path
) -> None:
    streams = on_mqtt(
        settings,
        mosquitto,
        "plant/%2B/readings",
        "plant/answers",
        SLOTS="key",
        FAST="ema_norm",
        DEAD_LETTERS=f"mqtt://{mosquitto.address}/plant/dead",
    )
    with Peer(mosquitto, "plant/answers") as reader, Peer(mosquitto, "plant/dead") as dead, Peer(mosquitto) as sensor:
        with DaemonProcess(streams, tmp_path) as daemon:
            daemon.wait_until_ready()
            for number in range(3):
                names = [f"{number}-{row}" for row in range(20)]
                sensor.publish(f"plant/{number}/readings", *[record(name) for name in names])
            sensor.publish("plant/9/readings", b"", b"not JSON")
            reader.wait_for(60)
            [tombstone, *_] = dead.wait_for(1)
            assert daemon.terminate() == 0
        with DaemonProcess(streams, tmp_path) as daemon:
            daemon.wait_until_ready()
            sensor.publish("plant/0/readings", record("after"))
            eventually("the new record is answered", lambda: "after" in [one["id"] for one in answered(reader)])
            assert daemon.terminate() == 0
        names = [f"{number}-{row}" for number in range(3) for row in range(20)]
        assert sorted(str(one["id"]) for one in answered(reader) if one["status"] == "ok") == sorted([*names, "after"])
        topics = {m.properties.UserProperty[0][1] for m in reader.messages}
        assert {f"plant/{number}/readings" for number in range(3)} <= topics
    said = dict(tombstone.properties.UserProperty)
    assert said["homeostat.reason"] == "tombstone"
    assert said["homeostat.partition"] == "mqtt:plant/+/readings"


@pytest.mark.slow
def test_killed_at_any_moment_every_record_is_answered_at_least_once(
    mosquitto: Mosquitto, settings: dict[str, str], tmp_path: Path
) -> None:
    streams = on_mqtt(settings, mosquitto, "kills/#", "killed/answers", MQTT__IN_FLIGHT="50")
    kills, rows, moments = (30 if LONG else 2), 100, random.Random(7)
    with Peer(mosquitto, "killed/answers") as reader, Peer(mosquitto) as sensor:
        for kill in range(kills):
            with DaemonProcess(streams, tmp_path) as daemon:
                daemon.wait_until_ready()
                names = [f"{kill}-{row}" for row in range(rows)]
                sensor.publish("kills/1", *[record(name) for name in names])
                # Killed as the block ends: after so many answers of this life, in the middle of the others.
                daemon.wait_for("homeostat_records_out_total", moments.randint(1, rows - 1))
        with DaemonProcess(streams, tmp_path) as daemon:
            wanted = {f"{kill}-{row}" for kill in range(kills) for row in range(rows)}
            eventually("all are answered", lambda: {one["id"] for one in answered(reader)} == wanted)
            assert daemon.terminate() == 0


def test_a_broker_that_restarts_is_waited_for_and_costs_no_record(settings: dict[str, str], tmp_path: Path) -> None:
    with (
        Mosquitto(tmp_path / "broker") as broker,
        Peer(broker, "out", name="reader") as reader,
        Peer(broker, name="sensor") as sensor,
        DaemonProcess(on_mqtt(settings, broker, "in", "out"), tmp_path) as daemon,
    ):
        daemon.wait_until_ready()
        sensor.publish("in", *[record(f"before-{row}") for row in range(100)])
        daemon.wait_for("homeostat_records_out_total", 1)
        broker.stop()
        eventually("/readyz says 503", lambda: daemon.get("/readyz")[0] == 503)
        assert daemon.get("/healthz")[0] == 200
        broker.start()
        daemon.wait_until_ready()
        sensor.publish("in", *[record(f"after-{row}") for row in range(100)])
        wanted = {f"{when}-{row}" for when in ("before", "after") for row in range(100)}
        eventually("all are answered", lambda: {one["id"] for one in answered(reader)} == wanted)
        assert daemon.terminate() == 0


def test_exactly_once_and_a_circle_are_refused_by_name(
    mosquitto: Mosquitto, settings: dict[str, str], tmp_path: Path
) -> None:
    for more, said in (
        ({"HOMEOSTAT_DELIVERY": "exactly-once"}, "HOMEOSTAT_DELIVERY=exactly-once"),
        ({"HOMEOSTAT_SINK": f"mqtt://{mosquitto.address}/in/answers"}, "would read it again"),
    ):
        with DaemonProcess(on_mqtt(settings, mosquitto, "in/%23", "out") | more, tmp_path) as daemon:
            assert daemon.wait() == 2
            assert said in daemon.log
            assert f"mqtt://{mosquitto.address}/" in daemon.log
