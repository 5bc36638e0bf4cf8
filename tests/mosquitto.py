"""An MQTT broker for the tests: Debian's mosquitto as a process, on a free port, with its data in a folder."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.daemon_process import eventually, free_port
from tests.kafka import wait_for_port


def binary() -> str:
    """Path of mosquitto; skips, with the reason, where there is none."""
    found = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if found is None:
        pytest.skip("no MQTT broker: mosquitto is not installed (apt-get install mosquitto)")
    return found


class Mosquitto:
    """One broker. ``lines`` are added to its configuration; started again, it goes on with what it stored."""

    def __init__(self, folder: Path, *lines: str, anonymous: bool = True) -> None:
        self.folder = folder
        self.port = free_port()
        self._binary = binary()
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        config = [
            f"listener {self.port} 127.0.0.1",
            f"allow_anonymous {str(anonymous).lower()}",
            "persistence true",
            f"persistence_location {folder}/",
            "user root",  # no change of user where the tests run as root; without meaning elsewhere
            "max_queued_messages 0",
            *lines,
        ]
        (folder / "mosquitto.conf").write_text("\n".join(config) + "\n")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> Self:
        with open(self.folder / "mosquitto.log", "ab") as log:
            self._process = subprocess.Popen(
                [self._binary, "-c", str(self.folder / "mosquitto.conf")], stdout=log, stderr=log
            )
        wait_for_port(self.address)
        return self

    def stop(self) -> None:
        """SIGTERM: it stores its sessions."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()


class Peer:
    """A sensor, and a reader of answers: an MQTT client beside the one that is tested.

    ``messages`` are those that came, as paho gives them. Arguments of ``more`` set paho's client up.
    """

    def __init__(self, broker: Mosquitto, *filters: str, name: str = "", user: tuple[str, str] | None = None) -> None:
        self.messages: list[Any] = []
        self._granted = 0
        self._filters = filters
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=MQTTv5)
        self._client.max_inflight_messages_set(20)  # mosquitto's own limit
        self._client.on_connect = self._on_connect
        self._client.on_message = lambda c, u, message: self.messages.append(message)
        self._client.on_subscribe = self._on_subscribe
        if user is not None:
            self._client.username_pw_set(*user)
        self._client.reconnect_delay_set(1, 1)
        session = Properties(PacketTypes.CONNECT)
        session.SessionExpiryInterval = 600
        self._up = threading.Event()
        self._client.connect_async("127.0.0.1", broker.port, clean_start=not name, properties=session)
        self._client.loop_start()
        eventually("the peer is connected", self._up.is_set)
        eventually("the peer is subscribed", lambda: self._granted == len(filters))

    def _on_connect(self, client: Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if self._filters and not self._granted:
            client.subscribe([(each, 1) for each in self._filters])
        self._up.set()

    def _on_subscribe(self, client: Client, userdata: Any, mid: int, codes: Any, properties: Any) -> None:
        self._granted += len(codes)

    def publish(self, topic: str, *payloads: bytes, qos: int = 1, retain: bool = False, timeout_s: float = 30) -> None:
        """Publish, and see every acknowledgement."""
        eventually("the peer is connected", self._client.is_connected)
        sent = [self._client.publish(topic, payload, qos=qos, retain=retain) for payload in payloads]
        deadline = time.monotonic() + timeout_s
        for info in sent:
            info.wait_for_publish(max(0.0, deadline - time.monotonic()))
            assert info.is_published(), f"{topic}: not acknowledged within {timeout_s:g} s"

    def payloads(self) -> list[bytes]:
        return [message.payload for message in list(self.messages)]

    def wait_for(self, count: int) -> Sequence[Any]:
        eventually(f"{count} messages", lambda: len(self.messages) >= count)
        return list(self.messages)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture(scope="module")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """A broker that lives as long as the module's tests; topics tell them apart."""
    with Mosquitto(tmp_path_factory.mktemp("mosquitto")) as broker:
        yield broker
