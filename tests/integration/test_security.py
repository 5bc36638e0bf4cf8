"""Logins and certificates against a real broker: let in, refused by name, changed while running, never shown."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from kafka import KafkaAdminClient
from kafka.admin import ScramMechanism, UserScramCredentialUpsertion

from daemon.errors import StreamError
from daemon.stream_settings import KafkaClient
from daemon.streams.kafka import KafkaSource
from daemon.streams.kafka_client import Address, accepts, connect
from daemon.streams.kafka_labels import KafkaLabels
from daemon.streams.kafka_sink import KafkaSink
from tests.daemon_process import DaemonProcess, eventually, records
from tests.kafka import create_topic, produce
from tests.secure_broker import PASSWORD, USER, Pair, SecureBroker, token

SASL = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER")
WAYS = [(listener, way) for listener in ("SASL_PLAINTEXT", "SASL_SSL") for way in SASL] + [("SSL", "")]
SESSION_MS = 3_000


class World(NamedTuple):
    """The broker, and a client's folder of secrets."""

    broker: SecureBroker
    folder: Path

    def settings(self, protocol: str, mechanism: str = "", **more: Any) -> KafkaClient:
        """What lets a client in that way; ``more`` changes it."""
        given: dict[str, Any] = {"security_protocol": protocol, "group": f"g-{uuid.uuid4().hex[:8]}"}
        if mechanism == "OAUTHBEARER":
            given |= {"sasl_mechanism": mechanism, "token_file": self.file("token", token())}
        elif mechanism:
            given |= {"sasl_mechanism": mechanism, "username": USER, "password_file": self.file("word", PASSWORD)}
        if protocol.endswith("SSL"):
            given["ssl_cafile"] = self.broker.authority.cert
        if protocol == "SSL":
            given |= {"ssl_certfile": self.broker.client.cert, "ssl_keyfile": self.broker.client.key}
        return KafkaClient(**(given | more))

    def file(self, name: str, content: str) -> Path:
        path = self.folder / name
        path.write_text(content + "\n")
        return path

    def url(self, listener: str, topic: str) -> str:
        return f"kafka://{self.broker.at(listener)}/{topic}"

    def address(self, listener: str) -> Address:
        return Address.parse(self.url(listener, "t"), "HOMEOSTAT_SOURCE")

    def enter(self, listener: str, settings: KafkaClient) -> None:
        connect(KafkaAdminClient, self.address(listener), settings).close()


@pytest.fixture(scope="module")
def broker(trial_kafka: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureBroker]:
    with SecureBroker(tmp_path_factory.mktemp("secure"), session_ms=SESSION_MS) as node:
        yield node


@pytest.fixture
def world(broker: SecureBroker, tmp_path: Path) -> World:
    return World(broker, tmp_path)


def drawn(source: KafkaSource, count: int) -> list[bytes | None]:
    found: list[bytes | None] = []

    def enough() -> bool:
        found.extend(source.poll(100, 0.1).unpack())
        return len(found) >= count

    eventually(f"{count} records", enough)
    return found


@pytest.mark.parametrize(("listener", "mechanism"), WAYS)
def test_records_go_out_and_come_in_by_every_way_of_logging_in(world: World, listener: str, mechanism: str) -> None:
    topic = f"t-{uuid.uuid4().hex[:8]}"
    settings = world.settings(listener, mechanism)
    values = [json.dumps({"id": str(row), "y": row}).encode() for row in range(3)]
    sink = KafkaSink(world.url(listener, topic), settings)
    source = KafkaSource(world.url(listener, topic), settings)
    labels = KafkaLabels(world.url(listener, topic), settings)
    try:
        sink.open()
        sink.send([None] * 3, values)
        sink.flush(10)
        source.open(None)
        assert drawn(source, 3) == values
        labels.open(None)
        found: list[str] = []
        eventually("three labels", lambda: found.extend(labels.poll(0.1).ids) or len(found) == 3)
    finally:
        for part in (source, labels, sink):
            part.close()


WRONG: dict[str, tuple[str, str, str, dict[str, Any], str]] = {
    "password": (
        "SASL_PLAINTEXT",
        "SASL_PLAINTEXT",
        "PLAIN",
        {"username": "mallory"},
        "PLAIN as 'mallory'.*login refused",
    ),
    "scram": ("SASL_SSL", "SASL_SSL", "SCRAM-SHA-512", {"username": "mallory"}, "login refused: .*invalid credentials"),
    "authority": ("SSL", "SSL", "", {"ssl_cafile": "stranger"}, "certificate is not accepted: .*SSL_CAFILE"),
    "no certificate": (
        "SSL",
        "SSL",
        "",
        {"ssl_certfile": None, "ssl_keyfile": None},
        "asks for a certificate: set .*SSL_CERTFILE",
    ),
    "plain on tls": ("SSL", "PLAINTEXT", "", {}, "the port speaks TLS; check .*SECURITY_PROTOCOL"),
    "tls on plain": ("PLAINTEXT", "SSL", "", {}, "no TLS is spoken there .*SECURITY_PROTOCOL"),
    "login on plain": ("PLAINTEXT", "SASL_PLAINTEXT", "PLAIN", {}, "the port takes no login"),
    "no login": ("SASL_PLAINTEXT", "PLAINTEXT", "", {}, "hung up .*a login or TLS"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_shut_door_says_what_was_tried_where_and_why_it_stays_shut(world: World, name: str) -> None:
    listener, protocol, mechanism, change, said = WRONG[name]
    change = {key: world.broker.stranger.cert if value == "stranger" else value for key, value in change.items()}
    settings = world.settings(protocol, mechanism, bootstrap_timeout_s=5.0, **change)
    with pytest.raises(StreamError, match=said) as raised:
        world.enter(listener, settings)
    text = str(raised.value)
    assert f"HOMEOSTAT_SOURCE={world.url(listener, 't')}: no broker lets this client in" in text
    assert f"({protocol}" in text
    assert f"{world.broker.at(listener)}: " in text
    assert PASSWORD not in text
    assert "\n" not in text


def test_a_token_that_expired_is_told_of(world: World) -> None:
    settings = world.settings("SASL_PLAINTEXT", "OAUTHBEARER")
    assert settings.token_file is not None
    settings.token_file.write_text(token(lifetime_s=-60))
    with pytest.raises(StreamError, match="login refused: .*the token in HOMEOSTAT_KAFKA__TOKEN_FILE=.*expired"):
        world.enter("SASL_PLAINTEXT", settings)


def test_a_certificate_that_is_replaced_holds_for_the_next_connection(world: World) -> None:
    broker = world.broker
    cert, key = world.folder / "cert.pem", world.folder / "key.pem"

    def install(pair: Pair) -> None:
        shutil.copy(pair.cert, cert)
        shutil.copy(pair.key, key)

    install(broker.client)
    settings = world.settings("SSL", ssl_certfile=cert, ssl_keyfile=key, ssl_reload_s=0.05)
    client = connect(KafkaAdminClient, world.address("SSL"), settings)
    try:
        client.list_topics()

        def outcome() -> str:
            try:
                world.enter("SSL", settings)
            except StreamError as error:
                return str(error)
            return "in"

        install(broker.stranger.issue("worker"))
        eventually("the broker sees the stranger's", lambda: "does not accept the certificate" in outcome())
        assert client.list_topics() is not None, "the connection that was there goes on"
        install(broker.second.issue("worker"))
        eventually("the broker sees one of the other authority", lambda: outcome() == "in")
    finally:
        client.close()


def change_password(broker: SecureBroker, user: str, password: str) -> None:
    with KafkaAdminClient(bootstrap_servers=broker.address) as admin:
        change = UserScramCredentialUpsertion(user, ScramMechanism.SCRAM_SHA_256, password=password, iterations=4096)
        assert admin.alter_user_scram_credentials([change]) == {user: None}


def test_a_password_changed_while_running_is_waited_for_and_the_new_one_taken_from_the_file(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    change_password(world.broker, "rotating", PASSWORD)
    topic = f"t-{uuid.uuid4().hex[:8]}"
    create_topic(world.broker.address, topic)
    settings = world.settings("SASL_PLAINTEXT", "SCRAM-SHA-256", username="rotating")
    source, sink = (kind(world.url("SASL_PLAINTEXT", topic), settings) for kind in (KafkaSource, KafkaSink))
    try:
        sink.open()
        source.open(None)
        sink.send([None], [b"before"])
        sink.flush(10)
        assert drawn(source, 1) == [b"before"]
        change_password(world.broker, "rotating", "another-" + PASSWORD)
        sent: list[bytes] = []
        got: list[bytes | None] = []

        def refused() -> bool:
            # The broker asks for a new login after SESSION_MS, as it does when it was started anew.
            sent.append(f"during {len(sent)}".encode())
            sink.send([None], sent[-1:])
            got.extend(source.poll(10, 0.05).unpack())
            try:
                sink.flush(0.5)
            except TimeoutError:
                return True
            return False

        eventually("the login is refused", refused)
        eventually("that is said", lambda: not accepts(world.address("SASL_PLAINTEXT"), settings))
        for _ in range(40):
            got.extend(source.poll(10, 0.05).unpack())
        world.file("word", "another-" + PASSWORD)
        eventually(
            "all of it comes in", lambda: got.extend(source.poll(10, 0.1).unpack()) or sorted(got) == sorted(sent)
        )
        sink.flush(20)
        assert accepts(world.address("SASL_PLAINTEXT"), settings)
    finally:
        source.close()
        sink.close()
    said = "".join(capsys.readouterr())
    assert said.count("no broker lets this client in") == 1
    assert "SCRAM-SHA-256 as 'rotating'" in said
    assert PASSWORD not in said


def daemon_settings(world: World, settings: dict[str, str], topic: str, **more: str) -> dict[str, str]:
    kafka = {
        "GROUP": f"g-{topic}",
        "SECURITY_PROTOCOL": "SASL_SSL",
        "SASL_MECHANISM": "PLAIN",
        "USERNAME": USER,
        "PASSWORD": PASSWORD,
        "SSL_CAFILE": str(world.broker.authority.cert),
    } | more
    return (
        settings
        | {f"HOMEOSTAT_KAFKA__{name}": value for name, value in kafka.items()}
        | {
            "HOMEOSTAT_SOURCE": world.url("SASL_SSL", topic),
            "HOMEOSTAT_SINK": world.url("SASL_SSL", f"{topic}.answers"),
            "HOMEOSTAT_LOG_LEVEL": "debug",
        }
    )


def test_the_daemon_shows_its_secrets_nowhere(world: World, settings: dict[str, str]) -> None:
    topic = f"t-{uuid.uuid4().hex[:8]}"
    create_topic(world.broker.address, topic)
    produce(world.broker.address, topic, records(["a", "b"]))
    given = daemon_settings(world, settings, topic)
    shown = []
    with DaemonProcess(given, world.folder) as worker:
        worker.wait_until_ready().wait_for("homeostat_records_in_total", 2)
        shown += [worker.get(path)[1] for path in ("/metrics", "/readyz", "/healthz")]
        shown.append(Path(f"/proc/{worker.process.pid}/cmdline").read_bytes().decode())
        children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text()
        assert children == "", "a child would have the secrets in its environment"
        assert worker.terminate() == 0
        shown += [worker.log, worker.output]
    wrong = daemon_settings(world, settings, topic, PASSWORD="not-" + PASSWORD)
    with DaemonProcess(wrong, world.folder, command="check") as check:
        assert check.wait() == 2
        shown += [check.log, check.output]
        assert "login refused" in check.log
    assert "HOMEOSTAT_KAFKA__PASSWORD=***" in "".join(shown)
    assert not [text for text in shown if PASSWORD in text]
