"""What stands behind a door that stays shut is told by name, whatever it is, and kafka-python tries on gently."""

from __future__ import annotations

import logging
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka import errors

from daemon.errors import AwayError, StreamError
from daemon.stream_settings import KafkaClient
from daemon.streams import kafka_client
from daemon.streams.kafka_client import Address, accepts, connect
from daemon.streams.kafka_log import EVERY_S, KafkaLog, kafka_log
from daemon.streams.kafka_net import PatientClient, PatientConnection
from daemon.streams.login import LoginFault, try_login
from daemon.streams.security import Secret

WORD = "s3cr3t-of-the-plant"
PLAIN: dict[str, Any] = {
    "security_protocol": "SASL_PLAINTEXT",
    "sasl_mechanism": "PLAIN",
    "sasl_plain_username": "u",
    "sasl_plain_password": Secret(WORD),
}
SCRAM = PLAIN | {"sasl_mechanism": "SCRAM-SHA-256"}
OPEN = {"security_protocol": "PLAINTEXT"}


def framed(body: bytes, number: int = 1) -> bytes:
    return struct.pack(">ii", len(body) + 4, number) + body


def text(word: str) -> bytes:
    return struct.pack(">h", len(word)) + word.encode()


VERSIONS = framed(b"\0\0\0\0\0\0")
TAKES_PLAIN = framed(struct.pack(">hi", 0, 1) + text("PLAIN"))
LET_IN = framed(struct.pack(">hhi", 0, -1, 0))


@contextmanager
def broker(*answers: bytes) -> Iterator[str]:
    """Listens, and gives the next answer to each thing that it is sent; then it hangs up. Its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    peer.settimeout(10)
                    try:
                        for answer in answers:
                            if not peer.recv(65_536):
                                break
                            peer.sendall(answer)
                        else:
                            peer.recv(65_536)
                    except OSError:
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def fault(config: dict[str, Any], *answers: bytes) -> LoginFault:
    with broker(*answers) as address, pytest.raises(LoginFault) as raised:
        try_login(address, config, 10)
    return raised.value


def test_a_broker_that_lets_us_in_brings_no_fault() -> None:
    with broker(VERSIONS, VERSIONS) as address:
        try_login(address, OPEN, 10)
    with broker(VERSIONS, TAKES_PLAIN, LET_IN) as address:
        try_login(address, PLAIN, 10)


@pytest.mark.parametrize(
    ("config", "answers", "said", "final"),
    [
        (OPEN, [VERSIONS], "hung up .*a login or TLS.*SECURITY_PROTOCOL", False),
        (OPEN, [b"\x15\x03\x03\0\2\2\x28"], "the port speaks TLS", True),
        (OPEN, [b"HTTP/1.1 400 Bad Request\r\n"], "does not speak Kafka's protocol", True),
        (PLAIN, [VERSIONS, framed(struct.pack(">hi", 34, 0))], "takes no login", True),
        (
            PLAIN,
            [VERSIONS, framed(struct.pack(">hi", 33, 1) + text("GSSAPI"))],
            "does not take PLAIN; .*SASL_MECHANISM can be: GSSAPI",
            True,
        ),
        (PLAIN, [VERSIONS, framed(struct.pack(">hi", 7, 0))], "RequestTimedOutError", False),
        (
            PLAIN,
            [VERSIONS, TAKES_PLAIN, framed(struct.pack(">h", 58) + text("go\naway"))],
            "login refused: go away; .*USERNAME.*PASSWORD_FILE",
            True,
        ),
        (PLAIN, [VERSIONS, TAKES_PLAIN, framed(struct.pack(">hh", 58, -1))], "SaslAuthenticationFailedError", True),
        (SCRAM, [VERSIONS, TAKES_PLAIN, LET_IN], "can't be understood", True),
    ],
)
def test_every_refusal_is_told_by_its_name(
    config: dict[str, Any], answers: list[bytes], said: str, final: bool
) -> None:
    found = fault(config, *answers)
    assert pytest.approx(found.final) == final
    with pytest.raises(LoginFault, match=said):
        raise found


def test_a_broker_that_repeats_the_password_does_not_get_it_into_the_message() -> None:
    refusal = framed(struct.pack(">h", 58) + text(f"user u with {WORD} unknown"))
    found = fault(PLAIN, VERSIONS, TAKES_PLAIN, refusal)
    assert "user u with *** unknown" in str(found)
    assert WORD not in str(found)


@settings(deadline=None, max_examples=40)
@given(
    config=st.sampled_from([OPEN, PLAIN, SCRAM]),
    answers=st.lists(st.one_of(st.binary(min_size=1, max_size=40), st.binary(max_size=40).map(framed)), max_size=3),
)
def test_whatever_answers_at_the_port_there_is_a_fault_or_none_and_nothing_else(
    config: dict[str, Any], answers: list[bytes]
) -> None:
    with broker(*answers) as address:
        try:
            # An answer that promises more than it brings is waited for.
            try_login(address, config, 0.1)
        except LoginFault as found:
            assert "\n" not in str(found)


def test_one_that_never_answers_is_given_up_in_time() -> None:
    late = pytest.raises(LoginFault, match=r"did not answer within 0\.2 s")
    with socket.create_server(("127.0.0.1", 0)) as deaf, late as raised:
        try_login(f"127.0.0.1:{deaf.getsockname()[1]}", OPEN, 0.2)
    assert not raised.value.final


@pytest.mark.parametrize("server", ["127.0.0.1:1", "127.0.0.1:99999999", "127.0.0.1:port", "no.such.host.invalid:1"])
def test_an_address_where_nobody_is_says_so(server: str) -> None:
    with pytest.raises(LoginFault, match="no connection") as raised:
        try_login(server, OPEN, 5)
    assert raised.value.absent


def settings_of(tmp_path: Path, **more: Any) -> KafkaClient:
    file = tmp_path / "password"
    file.write_text(WORD + "\n")
    login = {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "PLAIN", "username": "u", "password_file": file}
    return KafkaClient(**(login | more))


def at(*servers: str) -> Address:
    return Address.parse(f"kafka://{','.join(servers)}/t", "HOMEOSTAT_SOURCE")


def test_a_refused_client_is_told_what_was_tried_at_each_broker_and_as_whom(tmp_path: Path) -> None:
    refusal = framed(struct.pack(">h", 58) + text("unknown user"))
    with broker(VERSIONS, TAKES_PLAIN, refusal) as first, pytest.raises(StreamError) as raised:
        connect(lambda **config: None, at("127.0.0.1:1", first), settings_of(tmp_path))
    said = str(raised.value)
    for part in ("HOMEOSTAT_SOURCE=kafka://", "SASL_PLAINTEXT, PLAIN as 'u'", "127.0.0.1:1: no connection", first):
        assert part in said
    assert f"{first}: login refused: unknown user" in said
    assert "\n" not in said
    assert WORD not in said


def test_a_refused_login_is_not_tried_until_the_account_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def refuse(server: str, config: dict[str, Any], timeout_s: float) -> None:
        tried.append(server)
        raise LoginFault("no", final=True)

    monkeypatch.setattr(kafka_client, "try_login", refuse)
    with pytest.raises(StreamError):
        connect(lambda **config: None, at("a:1", "b:2"), settings_of(tmp_path))
    assert tried == ["a:1", "b:2"]


def test_a_broker_that_is_still_starting_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [LoginFault("hung up", final=False), LoginFault("gone", final=False, absent=True)]

    def start(server: str, config: dict[str, Any], timeout_s: float) -> None:
        if faults:
            raise faults.pop()

    monkeypatch.setattr(kafka_client, "try_login", start)
    made = connect(lambda **config: config, at("a:1"), settings_of(tmp_path), client_id="mine")
    assert made["client_id"] == "mine"
    assert not faults


def test_where_no_broker_is_the_error_says_that_none_answers() -> None:
    with pytest.raises(StreamError, match=r"no broker answers at 127\.0\.0\.1:1 within 0\.3 s; check host and port"):
        connect(lambda **config: None, at("127.0.0.1:1"), KafkaClient(bootstrap_timeout_s=0.3))


def test_lost_connections_are_looked_into_and_the_refusal_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = framed(struct.pack(">h", 58) + text("password changed"))
    with broker(VERSIONS, TAKES_PLAIN, refusal) as address:
        monkeypatch.setattr(kafka_log, "trouble_at", float("-inf"))
        assert accepts(at(address), settings_of(tmp_path)), "no connection was lost: the port is enough"
        monkeypatch.setattr(kafka_log, "trouble_at", kafka_log._now())
        assert not accepts(at(address), settings_of(tmp_path))
        assert not accepts(at(address), settings_of(tmp_path))
    said = "".join(capsys.readouterr())
    assert said.count("password changed") == 1
    assert "PLAIN as 'u'" in said
    assert WORD not in said
    with broker(VERSIONS, TAKES_PLAIN, LET_IN) as address:
        assert accepts(at(address), settings_of(tmp_path))


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(logging.getLogger(), "handle", lambda record: found.append(record.getMessage()))
    return found


def record(message: str, *args: Any, level: int = logging.ERROR, name: str = "kafka.net.transport") -> Any:
    return logging.LogRecord(name, level, "file", 7, message, args, None)


def test_the_same_complaint_passes_once_a_minute_with_the_number_of_those_held_back(passed: list[str]) -> None:
    clock = [1000.0]
    log = KafkaLog(lambda: clock[0])
    for port in range(5):
        log.handle(record("<host:%d>: %s", port, OSError("disconnected")))
    log.handle(record("<host:%d>: %s", 9, OSError("refused")))
    assert passed == ["<host:0>: disconnected", "<host:9>: refused"]
    clock[0] += EVERY_S
    log.handle(record("<host:%d>: %s", 6, OSError("disconnected")))
    assert passed[2:] == ["<host:6>: disconnected (4 more like this since the last one)"]


def test_at_debug_kafka_python_prints_logins_and_none_of_it_passes(passed: list[str]) -> None:
    log = KafkaLog()
    for level in (logging.DEBUG, logging.INFO):
        if level >= log.level:
            log.handle(record("Send: %r", WORD.encode(), level=level))
    logger = logging.getLogger("kafka.net.of_this_test")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(log)
    logger.debug("Send: %r", WORD)
    logger.error("lost")
    assert passed == ["lost"]


def test_trouble_is_recent_for_a_minute_and_only_the_networks_counts(passed: list[str]) -> None:
    clock = [1000.0]
    log = KafkaLog(lambda: clock[0])
    log.handle(record("a", name="kafka.coordinator"))
    log.handle(record("a", level=logging.WARNING))
    assert not log.recent_trouble()
    log.handle(record("a"))
    assert log.recent_trouble()
    clock[0] += EVERY_S
    assert not log.recent_trouble()


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 100)), max_size=30))
def test_no_complaint_is_lost_without_being_counted(events: list[tuple[str, int]]) -> None:
    clock, said = [0.0], []
    log = KafkaLog(lambda: clock[0])
    root = logging.getLogger()
    handle, root.handle = root.handle, lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    try:
        for word, later in events:
            clock[0] += later
            log.handle(record(word))
        clock[0] += EVERY_S
        for word in ("a", "b"):
            log.handle(record(word))
    finally:
        root.handle = handle  # type: ignore[method-assign]
    for word in ("a", "b"):
        counted = sum(
            1 + (int(line.split("(")[1].split()[0]) if "(" in line else 0) for line in said if line[0] == word
        )
        assert counted == sum(1 for each, _ in events if each == word) + 1


def logged_in(client: Any, until: Callable[[Any], bool]) -> Any:
    """The manager of a client that tries a broker for as long as ``until`` is not so."""
    manager = client._manager
    node = manager.cluster.bootstrap_brokers()[0].node_id
    for _ in range(200):
        if until(manager):
            break
        try:
            connection = manager.get_connection(node, timeout_ms=2_000)
            assert isinstance(connection, PatientConnection)
            client._net.run(lambda future=connection.init_future: future)
        except (errors.NodeNotReadyError, errors.KafkaConnectionError) as error:
            assert error.retriable
            client._net.poll(timeout_ms=5)
    return manager, node


@pytest.mark.parametrize("code", [58, 33])
def test_a_refused_login_is_a_lost_connection_to_kafka_python_and_backed_off_from(code: int) -> None:
    api = struct.pack(">i", 3) + b"".join(struct.pack(">hhh", key, 0, 1) for key in (17, 18, 36))
    versions = framed(struct.pack(">h", 0) + api + struct.pack(">i", 0))
    handshake = framed(TAKES_PLAIN[8:] if code == 58 else struct.pack(">hi", 33, 0), 2)
    refusal = framed(struct.pack(">h", code) + text("no") + struct.pack(">i", 0), 3)
    with broker(versions, handshake, refusal) as address:
        client = PatientClient(bootstrap_servers=[address], api_version=(1, 0), **PLAIN)
        try:
            manager, node = logged_in(client, lambda manager: any(count > 2 for count, *_ in manager._backoff.values()))
            assert manager._backoff[node][0] > 2, "kafka-python alone begins again at nothing"
            manager.update_backoff(node)
            manager.reset_backoff(node)
            assert node in manager._backoff, "there is no connection"
        finally:
            client.close()


def test_of_several_brokers_the_client_is_given_one_that_answers_and_that_one_is_asked_first_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def hangs(server: str, config: dict[str, Any], timeout_s: float) -> None:
        asked.append(server)
        if server == "x:1":
            raise LoginFault("it accepts connections and did not answer", final=False)

    monkeypatch.setattr(kafka_client, "try_login", hangs)
    address = Address.parse("kafka://x:1,y:2,z:3/topic", "HOMEOSTAT_SOURCE")
    for _ in range(2):
        made = connect(lambda **config: config, address, KafkaClient())
        assert made["bootstrap_servers"] == ["y:2"]
    assert asked == ["x:1", "y:2", "y:2"]


def test_a_broker_that_is_away_is_told_apart_from_one_that_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(**fault: bool) -> None:
        def refuse(server: str, config: dict[str, Any], timeout_s: float) -> None:
            raise LoginFault("no", **{"final": False} | fault)

        monkeypatch.setattr(kafka_client, "try_login", refuse)

    address = Address.parse("kafka://w:1/topic", "HOMEOSTAT_SOURCE")
    settings = KafkaClient(bootstrap_timeout_s=0.05)
    for fault, away in (({"absent": True}, True), ({}, True), ({"final": True}, False)):
        answer(**fault)
        with pytest.raises(StreamError) as caught:
            connect(dict, address, settings)
        assert isinstance(caught.value, AwayError) == away
