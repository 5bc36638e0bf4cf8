"""Records in, answers, dead letters and questions out, late labels in: chosen by URL.

What a scheme needs is imported when a URL asks for it, so that a file needs no Kafka client. What these functions give
is made but not opened: a wrong URL is found at once, and nothing is touched before ``open``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from daemon.errors import StreamError
from daemon.streams.base import AskingSink, LabelSource, Sink, Source, SplitSink
from daemon.streams.null import NullSink

if TYPE_CHECKING:
    from daemon.stream_settings import KafkaClient, Mqtt
    from daemon.streams.codec_base import Codec

__all__ = [
    "AskingSink",
    "LabelSource",
    "NullSink",
    "Sink",
    "Source",
    "SplitSink",
    "open_labels",
    "open_sink",
    "open_source",
]

_SOURCES = {
    "file": "daemon.streams.files:FileSource",
    "-": "daemon.streams.files:FileSource",
    "kafka": "daemon.streams.kafka:KafkaSource",
    "mqtt": "daemon.streams.mqtt:MqttSource",
    "mqtts": "daemon.streams.mqtt:MqttSource",
    "sim": "daemon.streams.simsource:SimSource",
}
_SINKS = {
    "file": "daemon.streams.files:FileSink",
    "-": "daemon.streams.files:FileSink",
    "kafka": "daemon.streams.kafka_sink:KafkaSink",
    "mqtt": "daemon.streams.mqtt_sink:MqttSink",
    "mqtts": "daemon.streams.mqtt_sink:MqttSink",
    "null": "daemon.streams.null:NullSink",
}
_LABELS = {
    "file": "daemon.streams.files:FileLabels",
    "-": "daemon.streams.files:FileLabels",
    "kafka": "daemon.streams.kafka_labels:KafkaLabels",
    "mqtt": "daemon.streams.mqtt_labels:MqttLabels",
    "mqtts": "daemon.streams.mqtt_labels:MqttLabels",
    "sim": "daemon.streams.simsource:SimLabels",
}
_BROKERS = ("kafka", "mqtt", "mqtts")
"""What goes to one of these at one address goes through one client."""
_EXAMPLES = {
    "file": "file:rows.jsonl",
    "-": "-",
    "kafka": "kafka://127.0.0.1:9092/topic",
    "mqtt": "mqtt://127.0.0.1/plant/line-1",
    "null": "null:",
    "sim": "sim://ageing?rate=1000&seed=7",
}


def open_source(
    url: str,
    codec: Codec,
    *,
    variable: str = "HOMEOSTAT_SOURCE",
    kafka: KafkaClient | None = None,
    mqtt: Mqtt | None = None,
) -> Source:
    """The source at ``url``: file:, - (standard input), kafka://, mqtt(s):// or sim://.

    Args:
        url: where the records are.
        codec: decodes them, and knows what shape the model takes.
        variable: the setting that holds the URL, for the messages.
        kafka: settings of the Kafka clients; needed for kafka:// alone.
        mqtt: settings of the MQTT clients; needed for mqtt:// and mqtts:// alone.

    Raises:
        StreamError: the URL can't be used.
    """
    scheme = _scheme(url, variable, _SOURCES)
    more = {"kafka": (kafka,), "mqtt": (mqtt,), "mqtts": (mqtt,), "sim": ()}.get(scheme, (codec,))
    source: Source = _load(_SOURCES[scheme])(url, *more, variable=variable)
    return source


def open_sink(
    url: str,
    *,
    dead_letters_url: str,
    queries_url: str = "",
    variable: str = "HOMEOSTAT_SINK",
    dead_letters_variable: str = "HOMEOSTAT_DEAD_LETTERS",
    queries_variable: str = "HOMEOSTAT_LABEL_QUERIES",
    kafka: KafkaClient | None = None,
    mqtt: Mqtt | None = None,
    transactional_id: str = "",
) -> AskingSink:
    """One sink for answers, dead letters, questions: each file:, - (standard output), kafka://, mqtt(s):// or null:.

    What goes to one Kafka goes through one producer, what goes to one MQTT broker through one client.

    Args:
        url: where the answers go.
        dead_letters_url: where records go that can't be answered.
        queries_url: where questions for labels go; empty: nobody is asked.
        variable: the setting that holds ``url``, for the messages.
        dead_letters_variable: the same for ``dead_letters_url``.
        queries_variable: the same for ``queries_url``.
        kafka: settings of the Kafka clients; needed for kafka:// alone.
        mqtt: settings of the MQTT clients; needed for mqtt:// and mqtts:// alone.

    Raises:
        StreamError: a URL can't be used, or two of them name one file or topic.
    """
    given = [(variable, url), (dead_letters_variable, dead_letters_url)]
    given += [(queries_variable, queries_url)] if queries_url else []
    schemes = [_scheme(each, name, _SINKS) for name, each in given]
    brokers = dict.fromkeys(_broker(each) for (_, each), kind in zip(given, schemes, strict=True) if kind in _BROKERS)
    clients = {
        broker: _load(_SINKS[broker[0]])(
            url if _broker(url) == broker else "",
            kafka if broker[0] == "kafka" else mqtt,
            dead_letters_url=dead_letters_url if _broker(dead_letters_url) == broker else "",
            queries_url=queries_url if _broker(queries_url) == broker else "",
            variable=variable,
            **({"transactional_id": transactional_id} if broker[0] == "kafka" else {}),
        )
        for broker in brokers
    }
    sinks = [
        clients[_broker(each)] if scheme in _BROKERS else _sink(scheme, each, name)
        for (name, each), scheme in zip(given, schemes, strict=True)
    ]
    places: dict[str, str] = {}
    for (name, each), scheme, sink in zip(given, schemes, sinks, strict=True):
        place = each.rstrip("/") if scheme in _BROKERS else getattr(sink, "path", "")
        if place in places and (scheme == "file" or name == queries_variable):
            kind = "topic" if scheme in _BROKERS else "file"
            problem = f"{places[place]} names the same {kind}; answers, dead letters and questions each need their own"
            raise StreamError(f"{name}={each}: {problem}")
        if place:
            places[place] = name
    return sinks[0] if len(set(map(id, sinks))) == 1 else SplitSink(*sinks)


def _broker(url: str) -> tuple[str, str]:
    """Scheme and address."""
    return url.partition(":")[0], urlsplit(url).netloc


def open_labels(
    url: str, *, variable: str = "HOMEOSTAT_LABELS", kafka: KafkaClient | None = None, mqtt: Mqtt | None = None
) -> LabelSource:
    """The late labels at ``url``: file:, - (standard input), kafka://, mqtt(s):// or sim://.

    Raises:
        StreamError: the URL can't be used.
    """
    scheme = _scheme(url, variable, _LABELS)
    more = {"kafka": (kafka,), "mqtt": (mqtt,), "mqtts": (mqtt,)}.get(scheme, ())
    labels: LabelSource = _load(_LABELS[scheme])(url, *more, variable=variable)
    return labels


def _sink(scheme: str, url: str, variable: str) -> Any:
    kind = _load(_SINKS[scheme])
    return kind() if scheme == "null" else kind(url, variable=variable)


def _scheme(url: str, variable: str, openers: dict[str, str]) -> str:
    scheme = "-" if url.partition("?")[0] == "-" else url.partition(":")[0]
    if scheme in openers:
        return scheme
    right = ", ".join(_EXAMPLES[known] for known in openers if known in _EXAMPLES)
    if ":" in url:
        raise StreamError(f"{variable}={url}: {scheme}: can't be used here; right would be one like {right}")
    near = f"; for the file of that name, file:{url}" if url else ""
    raise StreamError(f"{variable}={url}: no scheme; right would be one like {right}{near}")


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
