"""What the Kafka streams share: a topic's address, the clients' settings, a connection that says why it fails."""

from __future__ import annotations

import contextlib
import difflib
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from kafka import TopicPartition
from kafka import errors as kafka_errors

from daemon.errors import StreamError
from daemon.settings import KafkaClient


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
        topic = parts.path.strip("/")
        servers = [server for server in parts.netloc.split(",") if server]
        if not servers or not topic or "/" in topic or any(":" not in server for server in servers):
            raise StreamError(f"{variable}={url}: not a topic's address; right would be kafka://127.0.0.1:9092/topic")
        return cls(servers, topic, url, variable)

    def error(self, text: str) -> StreamError:
        """An error that names the variable and its value."""
        return StreamError(f"{self.variable}={self.url}: {text}")


def client_config(settings: KafkaClient, servers: list[str]) -> dict[str, Any]:
    """What every client of this daemon shares."""
    password = settings.password.get_secret_value()
    if settings.password_file is not None:
        try:
            password = settings.password_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise StreamError(f"HOMEOSTAT_KAFKA__PASSWORD_FILE={settings.password_file}: {error.strerror}") from None
    config: dict[str, Any] = {
        "bootstrap_servers": servers,
        "client_id": "homeostat",
        "bootstrap_timeout_ms": int(settings.bootstrap_timeout_s * 1000),
        "security_protocol": settings.security_protocol,
        "reconnect_backoff_max_ms": 2_000,
    }
    if settings.sasl_mechanism:
        config |= {
            "sasl_mechanism": settings.sasl_mechanism,
            "sasl_plain_username": settings.username,
            "sasl_plain_password": password,
        }
    for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
        if path := getattr(settings, name):
            config[name] = str(path)
    return config


def reachable(servers: Iterable[str], timeout_s: float = 1.0) -> bool:
    """Whether any of the brokers accepts a connection."""
    for server in servers:
        host, _, port = server.rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout_s):
            return True
    return False


def connect(make: Callable[..., Any], address: Address, settings: KafkaClient, **config: Any) -> Any:
    """A client, or an error that says what was tried.

    A refused login shows in kafka-python only as a bootstrap that times out, so the port is tried first: whatever
    fails after that is not the address.
    """
    deadline = time.monotonic() + settings.bootstrap_timeout_s
    while not reachable(address.servers):
        if time.monotonic() > deadline:
            raise address.error(
                f"no broker answers at {', '.join(address.servers)} within {settings.bootstrap_timeout_s:g} s; "
                "check host and port, and that the broker runs"
            )
        time.sleep(0.1)
    try:
        return make(**client_config(settings, address.servers), **config)
    except kafka_errors.KafkaError as error:
        login = f" with {settings.sasl_mechanism} as {settings.username!r}" if settings.sasl_mechanism else ""
        raise address.error(
            f"{', '.join(address.servers)} accepts connections but not this client "
            f"({settings.security_protocol}{login}): {error}"
        ) from None


def existing_partitions(consumer: Any, address: Address) -> list[TopicPartition]:
    """The topic's partitions; raises StreamError, with the nearest name, when there is no such topic."""
    partitions = consumer.partitions_for_topic(address.topic)
    if not partitions:
        near = difflib.get_close_matches(address.topic, consumer.topics(), n=1)
        advice = f"did you mean {near[0]!r}?" if near else "create it, or correct the name"
        raise address.error(f"topic {address.topic!r} does not exist on {', '.join(address.servers)}; {advice}")
    return [TopicPartition(address.topic, number) for number in sorted(partitions)]


def name_of(partition: TopicPartition) -> str:
    """``topic/number``: how a partition is called everywhere outside the client."""
    return f"{partition.topic}/{partition.partition}"
