"""Records in, answers, dead letters and questions out, late labels in: chosen by URL.

What a scheme needs is imported when a URL asks for it, so that a file needs no Kafka client. What these functions give
is made but not opened: a wrong URL is found at once, and nothing is touched before ``open``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from daemon.errors import StreamError
from daemon.streams.base import AskingSink, LabelSource, NullSink, Sink, Source, SplitSink

if TYPE_CHECKING:
    from daemon.settings import KafkaClient
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
    "sim": "daemon.streams.simsource:SimSource",
}
_SINKS = {
    "file": "daemon.streams.files:FileSink",
    "-": "daemon.streams.files:FileSink",
    "kafka": "daemon.streams.kafka_sink:KafkaSink",
    "null": "daemon.streams.base:NullSink",
}
_LABELS = {
    "file": "daemon.streams.files:FileLabels",
    "-": "daemon.streams.files:FileLabels",
    "kafka": "daemon.streams.kafka_labels:KafkaLabels",
    "sim": "daemon.streams.simsource:SimLabels",
}
_EXAMPLES = {
    "file": "file:rows.jsonl",
    "-": "-",
    "kafka": "kafka://127.0.0.1:9092/topic",
    "null": "null:",
    "sim": "sim://ageing?rate=1000&seed=7",
}


def open_source(
    url: str, codec: Codec, *, variable: str = "HOMEOSTAT_SOURCE", kafka: KafkaClient | None = None
) -> Source:
    """The source at ``url``: file:, - (standard input), kafka:// or sim://.

    Args:
        url: where the records are.
        codec: decodes them, and knows what shape the model takes.
        variable: the setting that holds the URL, for the messages.
        kafka: settings of the Kafka clients; needed for kafka:// alone.

    Raises:
        StreamError: the URL can't be used.
    """
    scheme = _scheme(url, variable, _SOURCES)
    more = {"kafka": (kafka,), "sim": ()}.get(scheme, (codec,))
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
) -> AskingSink:
    """One sink for answers, dead letters and questions: each file:, - (standard output), kafka:// or null:.

    What goes to one Kafka goes through one producer.

    Args:
        url: where the answers go.
        dead_letters_url: where records go that can't be answered.
        queries_url: where questions for labels go; empty: nobody is asked.
        variable: the setting that holds ``url``, for the messages.
        dead_letters_variable: the same for ``dead_letters_url``.
        queries_variable: the same for ``queries_url``.
        kafka: settings of the Kafka clients; needed for kafka:// alone.

    Raises:
        StreamError: a URL can't be used, or two of them name one file or topic.
    """
    given = [(variable, url), (dead_letters_variable, dead_letters_url)]
    given += [(queries_variable, queries_url)] if queries_url else []
    schemes = [_scheme(each, name, _SINKS) for name, each in given]
    brokers = {urlsplit(each).netloc for (_, each), scheme in zip(given, schemes, strict=True) if scheme == "kafka"}
    producers = {
        broker: _load(_SINKS["kafka"])(
            url if _is_at(broker, url) else "",
            kafka,
            dead_letters_url=dead_letters_url if _is_at(broker, dead_letters_url) else "",
            queries_url=queries_url if _is_at(broker, queries_url) else "",
            variable=variable,
        )
        for broker in brokers
    }
    sinks = [
        producers[urlsplit(each).netloc] if scheme == "kafka" else _sink(scheme, each, name)
        for (name, each), scheme in zip(given, schemes, strict=True)
    ]
    places: dict[str, str] = {}
    for (name, each), scheme, sink in zip(given, schemes, sinks, strict=True):
        place = each.rstrip("/") if scheme == "kafka" else getattr(sink, "path", "")
        if place in places and (scheme == "file" or name == queries_variable):
            kind = "topic" if scheme == "kafka" else "file"
            problem = f"{places[place]} names the same {kind}; answers, dead letters and questions each need their own"
            raise StreamError(f"{name}={each}: {problem}")
        if place:
            places[place] = name
    return sinks[0] if len(set(map(id, sinks))) == 1 else SplitSink(*sinks)


def _is_at(broker: str, url: str) -> bool:
    return url.startswith("kafka:") and urlsplit(url).netloc == broker


def open_labels(url: str, *, variable: str = "HOMEOSTAT_LABELS", kafka: KafkaClient | None = None) -> LabelSource:
    """The late labels at ``url``: file:, - (standard input), kafka:// or sim://.

    Raises:
        StreamError: the URL can't be used.
    """
    scheme = _scheme(url, variable, _LABELS)
    more = (kafka,) if scheme == "kafka" else ()
    labels: LabelSource = _load(_LABELS[scheme])(url, *more, variable=variable)
    return labels


def _sink(scheme: str, url: str, variable: str) -> Any:
    kind = _load(_SINKS[scheme])
    return kind() if scheme == "null" else kind(url, variable=variable)


def _scheme(url: str, variable: str, openers: dict[str, str]) -> str:
    scheme = "-" if url.partition("?")[0] == "-" else url.partition(":")[0]
    if scheme in openers:
        return scheme
    right = ", ".join(_EXAMPLES[known] for known in openers)
    if ":" in url:
        raise StreamError(f"{variable}={url}: {scheme}: can't be used here; right would be one like {right}")
    near = f"; for the file of that name, file:{url}" if url else ""
    raise StreamError(f"{variable}={url}: no scheme; right would be one like {right}{near}")


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
