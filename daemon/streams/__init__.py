"""Records in, answers and dead letters out, late labels in: chosen by URL.

What a scheme needs is imported when a URL asks for it, so that a file needs no Kafka client. What these functions give
is made but not opened: a wrong URL is found at once, and nothing is touched before ``open``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from daemon.errors import StreamError
from daemon.streams.base import LabelSource, NullSink, Sink, Source, SplitSink

if TYPE_CHECKING:
    from daemon.settings import KafkaClient
    from daemon.streams.codec_base import Codec

__all__ = ["LabelSource", "NullSink", "Sink", "Source", "SplitSink", "open_labels", "open_sink", "open_source"]

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
    variable: str = "HOMEOSTAT_SINK",
    dead_letters_variable: str = "HOMEOSTAT_DEAD_LETTERS",
    kafka: KafkaClient | None = None,
) -> Sink:
    """One sink for answers, at ``url``, and for dead letters: each file:, - (standard output), kafka:// or null:.

    Raises:
        StreamError: a URL can't be used, or both name one file.
    """
    answers = _scheme(url, variable, _SINKS)
    dead = _scheme(dead_letters_url, dead_letters_variable, _SINKS)
    if answers == dead == "kafka":
        # One producer for both.
        both: Sink = _load(_SINKS["kafka"])(url, kafka, dead_letters_url=dead_letters_url, variable=variable)
        return both
    first = _sink(answers, url, kafka, variable=variable)
    if dead == "kafka":
        return SplitSink(first, _sink(dead, "", kafka, dead_letters_url=dead_letters_url))
    second = _sink(dead, dead_letters_url, kafka, variable=dead_letters_variable)
    if answers == dead == "file" and first.path == second.path:
        problem = f"{variable} names the same file; answers and dead letters each need their own"
        raise StreamError(f"{dead_letters_variable}={dead_letters_url}: {problem}")
    return SplitSink(first, second)


def open_labels(url: str, *, variable: str = "HOMEOSTAT_LABELS", kafka: KafkaClient | None = None) -> LabelSource:
    """The late labels at ``url``: file:, - (standard input), kafka:// or sim://.

    Raises:
        StreamError: the URL can't be used.
    """
    scheme = _scheme(url, variable, _LABELS)
    more = (kafka,) if scheme == "kafka" else ()
    labels: LabelSource = _load(_LABELS[scheme])(url, *more, variable=variable)
    return labels


def _sink(scheme: str, url: str, kafka: KafkaClient | None, **options: str) -> Any:
    kind = _load(_SINKS[scheme])
    if scheme == "null":
        return kind()
    return kind(url, kafka, **options) if scheme == "kafka" else kind(url, **options)


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
