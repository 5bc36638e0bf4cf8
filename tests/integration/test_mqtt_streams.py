"""MQTT's source, sink and labels against a real mosquitto, without the daemon around them."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from daemon.errors import DeliveryError, StreamError
from daemon.records import DeadLetter, RawBatch
from daemon.stream_settings import Mqtt
from daemon.streams.mqtt import MqttSource
from daemon.streams.mqtt_labels import MqttLabels
from daemon.streams.mqtt_sink import MqttSink
from tests.daemon_process import eventually, free_port
from tests.mosquitto import Mosquitto, Peer, mosquitto

__all__ = ["mosquitto"]

Made = Callable[..., MqttSource]


@pytest.fixture
def source(request: pytest.FixtureRequest) -> Iterator[Made]:
    """``source(broker, filter, positions=None, **settings)``: open, and closed at the end; one session a test."""
    with ExitStack() as opened:

        def make(broker: Mosquitto, topic: str, positions: dict[str, int] | None = None, **more: object) -> MqttSource:
            settings = Mqtt.model_validate({"client_id": request.node.name, "connect_timeout_s": 5} | more)
            made = MqttSource(f"mqtt://{broker.address}/{topic}", settings)
            opened.callback(made.close)
            made.open(positions)
            return made

        yield make


def read(source: MqttSource, count: int) -> list[RawBatch]:
    batches: list[RawBatch] = []

    def enough() -> bool:
        batches.append(source.poll(512, 0.2))
        return sum(map(len, batches)) >= count

    eventually(f"{count} records", enough)
    return batches


def values(batches: list[RawBatch]) -> list[bytes | None]:
    return [value for batch in batches for value in batch.values]


def test_a_record_has_its_topic_as_key_and_a_running_number_and_nothing_is_lost_over_a_restart(
    mosquitto: Mosquitto, source: Made
) -> None:
    first = source(mosquitto, "a/+/b")
    with Peer(mosquitto) as sensor:
        sensor.publish("a/1/b", b"one", b"")
        sensor.publish("a/2/b", b"two", b"three")
        sensor.publish("a/2/c", b"not ours")
        [*batches] = read(first, 4)
        assert values(batches) == [b"one", None, b"two", b"three"]
        assert [key for batch in batches for key in batch.keys] == [b"a/1/b"] * 2 + [b"a/2/b"] * 2
        assert [offset for batch in batches for offset in batch.offsets] == [0, 1, 2, 3]
        assert {name for batch in batches for name in batch.partitions} == {"mqtt:a/+/b"}
        first.commit({"mqtt:a/+/b": 2}, "note")
        first.close()
        sensor.publish("a/1/b", b"four")
    again = source(mosquitto, "a/+/b", {"mqtt:a/+/b": 2})
    batches = read(again, 3)
    assert values(batches) == [b"two", b"three", b"four"]
    assert batches[0].offsets[0] == 2
    again.commit({"mqtt:a/+/b": 5}, "note")
    again.close()
    last = source(mosquitto, "a/+/b", {"mqtt:a/+/b": 5})
    assert not len(last.poll(10, 0.5))


def test_the_broker_sends_no_more_than_may_be_in_flight_and_a_commit_lets_it_go_on(
    mosquitto: Mosquitto, source: Made
) -> None:
    reader = source(mosquitto, "window", in_flight=8)
    with Peer(mosquitto) as sensor:
        sensor.publish("window", *[b"%d" % number for number in range(20)])
    assert len(values(read(reader, 8))) == 8
    assert reader.wants_commit
    assert not len(reader.poll(100, 0.3))
    reader.commit({"mqtt:window": 8}, "")
    assert not reader.wants_commit
    # At least: mosquitto 2.0.11 sends more than it was allowed to, after the first acknowledgements.
    assert values(read(reader, 8))[:8] == [b"%d" % number for number in range(8, 16)]


def test_a_retained_message_counts_once(mosquitto: Mosquitto, source: Made) -> None:
    with Peer(mosquitto) as sensor:
        sensor.publish("kept", b"last known", retain=True)
        for found in ([b"last known"], []):
            reader = source(mosquitto, "kept", {"mqtt:kept": 0})
            assert values(read(reader, 1) if found else [reader.poll(10, 0.5)]) == found
            reader.commit({"mqtt:kept": 1}, "")
            reader.close()


def test_a_broken_connection_costs_no_record_and_repeats_none_that_is_in_hand(tmp_path: Path, source: Made) -> None:
    with Mosquitto(tmp_path / "broker", "log_type all") as broker:
        reader = source(broker, "t")
        with Peer(broker, name="sensor") as sensor:
            sensor.publish("t", b"answered", b"in hand")
            read(reader, 2)
            reader.commit({"mqtt:t": 1}, "")
            said = broker.folder / "mosquitto.log"
            eventually("the acknowledgement is in", lambda: "Received PUBACK from" in said.read_text())
            broker.stop()
            eventually("it is seen", lambda: not reader.ready())
            assert not len(reader.poll(10, 0.0))
            broker.start()
            eventually("it is back", reader.ready)
            sensor.publish("t", b"new")
            assert values(read(reader, 1)) == [b"new"]
            reader.commit({"mqtt:t": 3}, "")
            reader.close()
        last = source(broker, "t", {"mqtt:t": 3})
        assert not len(last.poll(10, 0.5))


def test_a_session_with_another_subscription_is_said_and_does_not_block(mosquitto: Mosquitto, source: Made) -> None:
    source(mosquitto, "old", in_flight=1).close()
    reader = source(mosquitto, "new", in_flight=1)
    with Peer(mosquitto) as sensor:
        sensor.publish("old", b"1", b"2")
        sensor.publish("new", b"3")
    assert values(read(reader, 1)) == [b"3"]


def test_two_workers_of_one_name_are_told(mosquitto: Mosquitto, source: Made) -> None:
    with capture_logs() as said:
        workers = [source(mosquitto, "one"), source(mosquitto, "one")]
        name = "another client go by the name 'test_two_workers_of_one_name_are_told'"
        eventually("one says so", lambda: any(name in line.get("reason", "") for line in list(said)))
        for worker in workers:
            worker.close()


def test_labels_are_acknowledged_by_the_checkpoint_that_holds_them(mosquitto: Mosquitto) -> None:
    settings = Mqtt(client_id="labels-reader")
    labels = MqttLabels(f"mqtt://{mosquitto.address}/labels", settings)
    labels.open(None)
    with Peer(mosquitto) as person:
        person.publish("labels", b'{"id": "1", "y": 2, "ts": 5}', b"garbage", b'{"id": "2", "y": 0}')
    found = []
    eventually("two labels", lambda: found.extend(labels.poll(0.2).ids) or len(found) == 2)
    assert labels.rejected == {"undecodable": 1}
    assert labels.positions() == {"mqtt:labels": 3}
    labels.commit({"mqtt:labels": 2})
    labels.close()
    again = MqttLabels(f"mqtt://{mosquitto.address}/labels", settings)
    again.open({"mqtt:labels": 2})
    eventually("one label again", lambda: again.poll(0.2).ids == ["2"])
    again.close()


def test_answers_are_through_when_flush_returns_and_dead_letters_say_where_from_and_why(mosquitto: Mosquitto) -> None:
    broker = f"mqtt://{mosquitto.address}"
    sink = MqttSink(f"{broker}/answers", Mqtt(), dead_letters_url=f"{broker}/dead", queries_url=f"{broker}/questions")
    with Peer(mosquitto, "answers", "dead", "questions") as reader:
        sink.open()
        sink.send([b"a/1", None, b"\xff\x00"] * 40, [b"%d" % number for number in range(120)])
        sink.send_dead(DeadLetter("mqtt:a/+", 7, b"a/1", b"{", "undecodable", "no JSON\n\x00"))
        sink.send_queries([b"a/1"], [b"?"])
        sink.flush(30)
        found = {
            name: [m for m in reader.wait_for(122) if m.topic == name] for name in ("answers", "dead", "questions")
        }
        sink.close()
    assert [m.payload for m in found["answers"]] == [b"%d" % number for number in range(120)]
    assert found["answers"][0].properties.UserProperty == [("key", "a/1")]
    assert found["answers"][2].properties.UserProperty == [("key", "\\xff\\x00")]
    [letter], [question] = found["dead"], found["questions"]
    said = dict(letter.properties.UserProperty)
    assert letter.payload == b"{"
    assert (said["homeostat.partition"], said["homeostat.offset"]) == ("mqtt:a/+", "7")
    assert (said["homeostat.reason"], said["key"], question.payload) == ("undecodable", "a/1", b"?")


def test_a_sink_waits_for_its_broker_within_its_bounds_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.streams.mqtt_sink._MAX_ROWS", 5)
    monkeypatch.setattr("daemon.streams.mqtt_sink._WAIT_S", 0.05)
    with Mosquitto(tmp_path / "broker") as broker:
        sink = MqttSink(f"mqtt://{broker.address}/answers", Mqtt())
        sink.open()
        with Peer(broker, "answers", name="reader") as reader:
            broker.stop()
            sink.send([None] * 5, [b"%d" % number for number in range(5)])
            with pytest.raises(TimeoutError, match="5 messages not acknowledged"):
                sink.flush(0.1)
            reasons: list[str] = []
            waits = threading.Event()
            sink.waiting = lambda reason: (reasons.append(reason), waits.set())[0]
            more = threading.Thread(target=sink.send, args=([None], [b"5"]))
            more.start()
            assert waits.wait(10) and broker.address in reasons[0]
            broker.start()
            more.join(20)
            sink.flush(20)
            reader.wait_for(6)
            assert set(reader.payloads()) == {b"%d" % number for number in range(6)}
        sink.close()


def certificates(folder: Path) -> tuple[Path, Path, Path]:
    """Authority, certificate for 127.0.0.1 signed by it, and its key."""
    tool = shutil.which("openssl")
    if tool is None:
        pytest.skip("openssl is not installed: no certificates can be made")
    ca, ca_key, cert, key, request = (folder / f"{name}.pem" for name in ("ca", "ca-key", "cert", "key", "request"))
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    signing = ["-CA", ca, "-CAkey", ca_key, "-CAcreateserial"]
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for line in (
        ["req", "-x509", *curve, "-keyout", ca_key, "-out", ca, "-subj", "/CN=test authority", "-days", "2"],
        ["req", *curve, "-keyout", key, "-out", request, "-subj", "/CN=worker"],
        ["x509", "-req", "-in", request, "-out", cert, "-days", "2", "-extfile", folder / "names", *signing],
    ):
        subprocess.run([tool, *map(str, line)], check=True, capture_output=True)
    return ca, cert, key


# paho leaves the socket of a handshake that failed to the garbage collector, which closes it at once.
@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")
def test_tls_with_certificates_and_a_login_and_each_refusal_says_what_was_tried(tmp_path: Path) -> None:
    ca, cert, key = certificates(tmp_path)
    folder = tmp_path / "broker"
    folder.mkdir()
    maker = shutil.which("mosquitto_passwd")
    if maker is None:
        pytest.skip("mosquitto_passwd is not installed: no login can be made")
    subprocess.run([maker, "-b", "-c", str(folder / "users"), "plant", "right"], check=True)
    (folder / "rights").write_text("user plant\ntopic readwrite allowed/#\n")
    for name in ("users", "rights"):
        (folder / name).chmod(0o644)
    lines = [f"cafile {ca}", f"certfile {cert}", f"keyfile {key}", "require_certificate true"]
    lines += [f"password_file {folder}/users", f"acl_file {folder}/rights"]
    (tmp_path / "password").write_text("right\n")
    (tmp_path / "wrong").write_text("not this\n")
    good = {"ssl_cafile": ca, "ssl_certfile": cert, "ssl_keyfile": key, "username": "plant"}
    good |= {"password_file": tmp_path / "password", "connect_timeout_s": 5, "client_id": "tls"}
    with Mosquitto(folder, *lines, anonymous=False) as broker:
        url = f"mqtts://{broker.address}/allowed/in"
        source, sink = MqttSource(url, Mqtt.model_validate(good)), MqttSink(url, Mqtt.model_validate(good))
        source.open(None)
        sink.open()
        sink.send([None] * 300, [bytes(1000)] * 300)
        assert len(values(read(source, 300))) == 300
        source.close()
        refused = MqttSink(f"mqtts://{broker.address}/elsewhere", Mqtt.model_validate(good | {"client_id": "tls-2"}))
        refused.open()
        refused.send([None], [b"x"])
        with pytest.raises(DeliveryError, match="refuses a message on 'elsewhere': reason 135"):
            refused.flush(10)
        for stream in (sink, refused):
            stream.close()

        short = {"connect_timeout_s": 1.0}
        for wrong, said in (
            ({"password_file": tmp_path / "wrong"}, "TLS to .* as 'plant', client id .*: refused: "),
            ({"ssl_cafile": None}, "TLS to .*: .*certificate"),
            ({"ssl_certfile": None, "ssl_keyfile": None} | short, r"TLS to .* \(tried for 1 s\)"),
            ({"password_file": tmp_path / "absent"}, "HOMEOSTAT_MQTT__PASSWORD_FILE=.*absent: No such file"),
            ({"ssl_cafile": tmp_path / "absent"}, "HOMEOSTAT_MQTT__SSL_CAFILE=.*absent: No such file"),
        ):
            with pytest.raises(StreamError, match=said) as error:
                MqttSource(url, Mqtt.model_validate(good | wrong)).check()
            assert "not this" not in str(error.value)


def test_a_broker_that_is_not_there_or_is_none_is_named() -> None:
    settings = Mqtt(connect_timeout_s=3)
    with pytest.raises(StreamError, match=r"HOMEOSTAT_SOURCE=mqtt://127.0.0.1:\d+/t: plain TCP to .*refused"):
        MqttSource(f"mqtt://127.0.0.1:{free_port()}/t", settings).open(None)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(StreamError, match=rf"plain TCP to 127.0.0.1:{port} without a login.*tried for 0.5 s"):
            MqttSource(f"mqtt://127.0.0.1:{port}/t", Mqtt(connect_timeout_s=0.5)).open(None)
