"""What the Kafka streams share: a topic's address, the clients' settings, a connection that says why it fails."""

from __future__ import annotations

import contextlib
import difflib
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import structlog
from kafka import TopicPartition
from kafka import errors as kafka_errors

from daemon.errors import AwayError, HomeostatError, SettingsError, StreamError
from daemon.stream_settings import KafkaClient
from daemon.streams.kafka_log import EVERY_S, kafka_log, listen
from daemon.streams.kafka_net import PatientClient
from daemon.streams.login import LoginFault, try_login
from daemon.streams.security import check_security, login_config

log = structlog.get_logger("homeostat.kafka")

_PROBE_S = 4.0
"""Longest wait for one broker's answers to a login."""


@dataclass(frozen=True)
class Address:
    """Where a topic is: ``kafka://host:port[,host:port]/topic``."""

    servers: list[str]
    topic: str
    url: str
    variable: str

    @classmethod
    def parse(cls, url: str, variable: str) -> Address:
        """Raises StreamError when the URL names no broker or no topic."""
        parts = urlsplit(url)
        if "@" in parts.netloc:
            # Not repeated: what stands before it may be a password.
            raise StreamError(
                f"{variable}: a name or password has no place in a topic's address; set HOMEOSTAT_KAFKA__USERNAME and "
                "HOMEOSTAT_KAFKA__PASSWORD_FILE, and write kafka://host:port/topic"
            )
        topic = parts.path.strip("/")
        servers = [server for server in parts.netloc.split(",") if server]
        if not servers or not topic or "/" in topic or any(":" not in server for server in servers):
            raise StreamError(f"{variable}={url}: not a topic's address; right would be kafka://127.0.0.1:9092/topic")
        return cls(servers, topic, url, variable)

    def error(self, text: str, kind: type[StreamError] = StreamError) -> StreamError:
        """An error that names the variable and its value."""
        return kind(f"{self.variable}={self.url}: {text}")


def client_config(settings: KafkaClient, servers: list[str]) -> dict[str, Any]:
    """What every client of this daemon shares.

    Raises:
        SettingsError: with a line for each setting that contradicts another.
        StreamError: a certificate or a secret's file can't be used; it names the variable and the file.
    """
    if problems := check_security(settings):
        raise SettingsError(problems)
    return {
        "bootstrap_servers": servers,
        "client_id": "homeostat",
        "bootstrap_timeout_ms": int(settings.bootstrap_timeout_s * 1000),
        "reconnect_backoff_max_ms": 2_000,
        "metadata_max_age_ms": settings.metadata_max_age_ms,
        "kafka_client": PatientClient,
        **login_config(settings),
    }


def reachable(servers: Iterable[str], timeout_s: float = 1.0) -> bool:
    """Whether any of the brokers accepts a connection."""
    for server in servers:
        host, _, port = server.rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout_s):
            return True
    return False


def accepts(address: Address, settings: KafkaClient) -> bool:
    """Whether a broker can be reached and, where a connection was lost lately, whether one lets us in.

    For a thread beside the loop: it may take seconds. What the brokers say against it is logged once a minute.
    kafka-python itself goes on trying for ever, and to it a refused login is a lost connection like any other.
    """
    if not reachable(address.servers):
        return False
    if not kafka_log.recent_trouble():
        return True
    try:
        server, faults = _visit(address, client_config(settings, address.servers), _PROBE_S)
    except HomeostatError as error:
        server, faults = None, {"none asked": LoginFault(str(error), final=True)}
    if server is not None:
        return True
    _refused.say(address, f"{_told(faults)} ({_as_whom(settings)})")
    return False


class _Refused:
    """Says of brokers why they don't let us in: a new reason at once, the same once a minute for all their topics."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, ...], float] = {}

    def say(self, address: Address, why: str) -> None:
        now = time.monotonic()
        key = (*address.servers, why)
        if now - self._said.get(key, float("-inf")) >= EVERY_S:
            self._said[key] = now
            log.error("no broker lets this client in, trying on", topic=address.topic, why=why)


_refused = _Refused()


def _visit(address: Address, config: dict[str, Any], timeout_s: float) -> tuple[str | None, dict[str, LoginFault]]:
    """The first broker that lets us in, and what those before it have against us; None: there is none."""
    faults: dict[str, LoginFault] = {}
    # The one that did last is asked first: of several, one may hang, and costs all of the time that it is given.
    for server in sorted(address.servers, key=lambda server: server != _let_in.get(address.servers[0])):
        try:
            try_login(server, config, timeout_s)
        except LoginFault as fault:
            faults[server] = fault
        else:
            _let_in[address.servers[0]] = server
            return server, faults
    return None, faults


_let_in: dict[str, str] = {}
"""By the first server of a list the one of that list that let us in last."""


def _told(faults: dict[str, LoginFault]) -> str:
    return "; ".join(f"{server}: {fault}" for server, fault in faults.items())


def _as_whom(settings: KafkaClient) -> str:
    """What was tried, without the secrets: protocol, mechanism, name, certificate."""
    tried: str = settings.security_protocol
    if settings.sasl_mechanism:
        name = f"as {settings.username!r}" if settings.username else f"with the token in {settings.token_file}"
        tried += f", {settings.sasl_mechanism} {name}"
    return tried + (f", certificate {settings.ssl_certfile}" if settings.ssl_certfile else "")


def connect(make: Callable[..., Any], address: Address, settings: KafkaClient, **config: Any) -> Any:
    """A client, or an error that says what was tried at which broker and what came of it.

    A broker that is not there yet, or hangs up, is tried until ``bootstrap_timeout_s``; one that says no is believed:
    trying on would only lock the account.

    Raises:
        SettingsError: settings contradict each other.
        StreamError: no broker lets us in.
        AwayError: none can be reached.
    """
    listen()
    shared = client_config(settings, address.servers)
    deadline = time.monotonic() + settings.bootstrap_timeout_s
    pause_s = 0.1
    while True:
        server, faults = _visit(address, shared, _share(deadline, address))
        if server is not None:
            break
        final = any(fault.final for fault in faults.values())
        if final or time.monotonic() + pause_s > deadline:
            within = "" if final else f" within {settings.bootstrap_timeout_s:g} s"
            if all(fault.absent for fault in faults.values()):
                raise address.error(
                    f"no broker answers at {', '.join(address.servers)}{within}; check host and port, and that the "
                    f"broker runs: {_told(faults)}",
                    AwayError,
                )
            text = f"no broker lets this client in{within} ({_as_whom(settings)}): {_told(faults)}"
            raise address.error(text, StreamError if final else AwayError)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1.0)
    with asking(address, f"{server} let this client in ({_as_whom(settings)}), and then it failed: "):
        # The client draws one by lot and stays with it, also with one that hangs.
        return make(**{**shared, "bootstrap_servers": [server], **config})


@contextlib.contextmanager
def asking(address: Address, what: str = "") -> Iterator[None]:
    """Let the client's errors be ours: `AwayError` where asking again may help, else `StreamError`."""
    try:
        yield
    except kafka_errors.KafkaError as error:
        kind = AwayError if error.retriable else StreamError
        raise address.error(f"{what}{type(error).__name__}: {error}", kind) from None


def _share(deadline: float, address: Address) -> float:
    """Time for one broker, so that all of them are asked before the deadline."""
    return min(_PROBE_S, max(0.5, (deadline - time.monotonic()) / len(address.servers)))


def existing_partitions(consumer: Any, address: Address) -> list[TopicPartition]:
    """The topic's partitions; raises StreamError, with the nearest name, when there is no such topic."""
    with asking(address):
        partitions = consumer.partitions_for_topic(address.topic)
        known = () if partitions else consumer.topics()
    if not partitions:
        near = difflib.get_close_matches(address.topic, known, n=1)
        advice = f"did you mean {near[0]!r}?" if near else "create it, or correct the name"
        raise address.error(f"topic {address.topic!r} does not exist on {', '.join(address.servers)}; {advice}")
    return [TopicPartition(address.topic, number) for number in sorted(partitions)]


def name_of(partition: TopicPartition) -> str:
    """``topic/number``: how a partition is called everywhere outside the client."""
    return f"{partition.topic}/{partition.partition}"
