"""What spans say of a stream, by the messaging conventions of OpenTelemetry (semantic conventions 1.37, messaging)."""

from __future__ import annotations

from pathlib import PurePath
from typing import NamedTuple
from urllib.parse import urlsplit

from daemon.settings import Settings
from daemon.streams.mqtt_address import PORTS, MqttAddress

SCHEMA = "https://opentelemetry.io/schemas/1.37.0"
Value = str | int


class Place(NamedTuple):
    """Where records come from or answers go."""

    name: str
    """Short, for a span's name: a topic, or a file's name without its folder."""
    attributes: dict[str, Value]
    broker: bool
    """Whether a broker stands between us and the other side."""


def source_of(settings: Settings) -> Place:
    """Of the records; with Kafka's consumer group, or the name of a shared MQTT subscription."""
    place = place_of(settings.source)
    if place.attributes["messaging.system"] == "kafka":
        place.attributes["messaging.consumer.group.name"] = settings.kafka.group
    return place


def place_of(url: str) -> Place:
    """Of a stream's URL, which is one that opens. Nothing of it is told that could be a login."""
    if url.partition("?")[0] == "-":
        return Place("stdio", _attributes("file", "stdio"), False)
    scheme, _, rest = url.partition(":")
    if scheme in PORTS:
        address = MqttAddress.parse(url, "URL", wildcards=True)
        group, topic = "", address.topic
        if topic.startswith("$share/"):
            _, group, topic = topic.split("/", 2)
        attributes = _attributes("mqtt", topic, address.host, address.port)
        return Place(topic, attributes | ({"messaging.consumer.group.name": group} if group else {}), True)
    if scheme == "kafka":
        parts = urlsplit(url)
        topic = parts.path.strip("/")
        host, _, port = parts.netloc.rpartition("@")[2].partition(",")[0].rpartition(":")
        return Place(topic, _attributes("kafka", topic, host.strip("[]"), int(port) if port.isdecimal() else 0), True)
    path = rest.partition("?")[0]
    name = PurePath(path).name or scheme
    return Place(name, _attributes(scheme, name), False)


def _attributes(system: str, destination: str, host: str = "", port: int = 0) -> dict[str, Value]:
    found: dict[str, Value] = {"messaging.system": system, "messaging.destination.name": destination}
    if host:
        found["server.address"] = host
    if port:
        found["server.port"] = port
    return found
