"""What a connection does with a broker that says anything at all. The broker is a socket and a list of bytes."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from daemon.errors import StreamError
from daemon.stream_settings import Mqtt
from daemon.streams.mqtt import MqttSource
from daemon.streams.mqtt_sink import MqttSink
from tests.daemon_process import eventually

CONNACK = b"\x20\x03\x00\x00\x00"
CONNACK_SESSION = b"\x20\x03\x01\x00\x00"
SUBACK = b"\x90\x04\x00\x01\x00\x01"
REFUSED = b"\x20\x03\x00\x87\x00"
TAKEN_OVER = b"\xe0\x01\x8e"


def publish(mid: int, topic: bytes, payload: bytes, *, again: bool = False) -> bytes:
    body = len(topic).to_bytes(2) + topic + mid.to_bytes(2) + b"\x00" + payload
    return bytes([0x3A if again else 0x32, len(body)]) + body


class Script:
    """Says ``lines[n]`` to connection ``n`` (the last one for ever), and hangs up if it ends with None."""

    def __init__(self, *lines: list[bytes | None]) -> None:
        self._lines = lines
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.server.getsockname()[1]
        self.heard: list[bytes] = []
        self.connections = 0
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                made, _ = self.server.accept()
                said = self._lines[min(self.connections, len(self._lines) - 1)]
                self.connections += 1
                self.heard.append(b"")
                self._open.append(made)
                threading.Thread(target=self._listen, args=(made, len(self.heard) - 1), daemon=True).start()
                with suppress(OSError):  # the client may be the first to hang up; the next one is served all the same
                    for line in said:
                        made.sendall(line) if line is not None else made.shutdown(socket.SHUT_RDWR)

    def _listen(self, made: socket.socket, number: int) -> None:
        with suppress(OSError):
            while data := made.recv(4096):
                self.heard[number] += data

    def close(self) -> None:
        for each in (self.server, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture
def scripts() -> Iterator[list[Any]]:
    """Closed at the end, the newest first."""
    made: list[Any] = []
    yield made
    for each in reversed(made):
        each.close()


def source(scripts: list[Any], script: Script, **settings: Any) -> MqttSource:
    given = Mqtt.model_validate({"client_id": "worker", "connect_timeout_s": 30} | settings)
    made = MqttSource(f"mqtt://127.0.0.1:{script.port}/t/+", given)
    scripts.extend((script, made))
    return made


def test_a_session_that_is_taken_over_ends_the_reading_and_names_the_setting(scripts: list[Any]) -> None:
    reader = source(scripts, Script([CONNACK, SUBACK, TAKEN_OVER]))
    with suppress(StreamError):  # it may be told before it was ready
        reader.open(None)

    def told() -> bool:
        try:
            reader.poll(1, 0.05)
        except StreamError as error:
            return "HOMEOSTAT_MQTT__CLIENT_ID" in str(error)
        return False

    eventually("poll says so", told)
    assert not reader.ready()


def test_a_refused_login_is_not_tried_again_at_the_start(scripts: list[Any]) -> None:
    script = Script([REFUSED])
    reader = source(scripts, script, username="plant")
    with pytest.raises(StreamError, match=r"plain TCP to .* as 'plant', client id 'worker': refused: Not authorized"):
        reader.open(None)
    assert script.connections == 1


def test_a_subscription_that_is_granted_without_acknowledgements_is_refused(scripts: list[Any]) -> None:
    reader = source(scripts, Script([CONNACK, b"\x90\x04\x00\x01\x00\x00"]))
    with pytest.raises(StreamError, match="grants QoS 0 only for 't/\\+'"):
        reader.open(None)


def test_an_acknowledgement_never_goes_to_another_connection_than_its_message_came_by(scripts: list[Any]) -> None:
    script = Script(
        [CONNACK, SUBACK, publish(5, b"t/a", b"one"), publish(6, b"t/a", b"two"), None],
        # The session lives, "one" comes again under its number, and 6 is another message now.
        [CONNACK_SESSION, SUBACK, publish(5, b"t/a", b"one", again=True), publish(6, b"t/a", b"three")],
    )
    reader = source(scripts, script)
    reader.open(None)
    rows: list[tuple[int, bytes | None]] = []

    def three() -> bool:
        raw = reader.poll(9, 0.05)
        rows.extend(zip(raw.offsets, raw.values, strict=True))
        return script.connections == 2 and bool(rows) and rows[-1][1] == b"three"

    eventually("the last one came", three)
    reader.commit({"mqtt:t/+": rows[-1][0] + 1}, "")
    eventually("both are acknowledged", lambda: script.heard[1].count(b"\x40\x02\x00") == 2)
    tail = script.heard[1][script.heard[1].index(b"\x40\x02\x00") :]
    assert tail == b"\x40\x02\x00\x05\x40\x02\x00\x06"
    assert b"\x40\x02\x00" not in script.heard[0]
    # The first connection may be gone before its rows are handed out: the broker gives those again, here but one.
    assert [value for _, value in rows] in ([b"one", b"two", b"three"], [b"one", b"three"])
    assert [offset for offset, _ in rows] == list(range(len(rows)))


def test_a_broker_that_talks_nonsense_is_left_and_tried_again(scripts: list[Any]) -> None:
    rng = random.Random(3)
    nonsense: list[list[bytes | None]] = [
        [CONNACK, SUBACK, start, rng.randbytes(rng.randint(1, 200)), None]
        for start in (b"\x32\x7f", b"\x32\x02\x00\x09", b"\xe0\x05", b"\x90\x01", b"\x40\x00")
    ]
    fine: list[bytes | None] = [CONNACK, SUBACK, publish(1, b"t/\xff", b"odd topic"), publish(2, b"t/a", b"fine")]
    reader = source(scripts, Script([CONNACK, SUBACK, None], *nonsense, fine))
    with suppress(StreamError):
        reader.open(None)
    values: list[bytes | None] = []
    eventually("it reads on", lambda: values.extend(reader.poll(9, 0.05).values) or b"fine" in values)


def test_a_packet_larger_than_the_broker_takes_is_refused_by_topic_and_size(scripts: list[Any]) -> None:
    limit = b"\x20\x08\x00\x00\x05\x27\x00\x00\x01\x00"  # Maximum Packet Size: 256
    script = Script([limit])
    sink = MqttSink(f"mqtt://127.0.0.1:{script.port}/answers", Mqtt(connect_timeout_s=30))
    scripts.extend((script, sink))
    sink.open()
    sink.send([None], [bytes(1000)])
    with pytest.raises(Exception, match=r"refuses a message on 'answers': 10\d\d bytes; the broker takes 256; nothing"):
        sink.flush(10)
