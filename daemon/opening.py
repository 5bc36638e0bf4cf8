"""Opens what the settings name: the bundle, records, answers and labels; nothing here knows the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import structlog

from daemon.bundle import Bundle, open_bundle
from daemon.errors import SettingsError
from daemon.identity import worker_name
from daemon.places import checkpoint_folder, dead_letters_url, is_simulated
from daemon.queries import Ask
from daemon.settings import ARL0, Settings
from daemon.stream_settings import Mqtt
from daemon.streams import open_labels, open_sink, open_source
from daemon.streams.base import LabelSource, Sink, Source
from daemon.streams.codecs import Codec
from daemon.streams.mqtt_address import check_no_circle

log = structlog.get_logger("homeostat")


@dataclass(frozen=True)
class Streams:
    """What a worker reads and writes."""

    source: Source
    sink: Sink
    labels: LabelSource | None
    dead_letters: str = "null:"
    """Where unanswerable records go, for the log."""
    ask: Ask | None = None
    """Takes the questions for labels; None: nobody is asked."""


def load_bundle(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> Bundle:
    """The bundle that the settings name; the simulator's own is packed when it is first needed.

    Raises:
        BundleError, SettingsError: naming the variable and what is wrong.
    """
    if settings.bundle is not None:
        return open_bundle(settings.bundle, settings.factory, settings.app_dir)
    if not is_simulated(settings):
        raise SettingsError(
            [f"HOMEOSTAT_BUNDLE is empty: HOMEOSTAT_SOURCE={settings.source} needs a folder made by `homeostat pack`"]
        )
    from daemon.streams.simbundle import ensure_bundle

    return open_bundle(
        ensure_bundle(
            settings.state_dir,
            settings.source,
            settings.detect.name,
            settings.detect.arl0 or ARL0,
            progress,
            fast_name=settings.fast.name,
            features=settings.detect.features,
        )
    )


def open_label_stream(settings: Settings) -> LabelSource | None:
    """The label stream that the settings name; the simulator's own when they name none."""
    if settings.labels:
        return open_labels(settings.labels, kafka=settings.kafka, mqtt=_mqtt(settings))
    return open_labels(settings.source, variable="HOMEOSTAT_SOURCE") if is_simulated(settings) else None


def _mqtt(settings: Settings) -> Mqtt:
    """MQTT's settings, with the worker's own name where none is given."""
    if settings.mqtt.client_id != "auto":
        return settings.mqtt
    return settings.mqtt.model_copy(update={"client_id": f"homeostat-{worker_name(settings.state_dir)}"})


def open_streams(settings: Settings, decoder: Codec) -> Streams:
    """Make the streams that the settings name.

    Raises:
        HomeostatError: naming the variable that is wrong.
    """
    urls = (settings.source, settings.sink, settings.labels, settings.dead_letters, settings.label_queries)
    if any(url.startswith("kafka:") for url in urls):
        from daemon.streams.security import check_security

        if problems := check_security(settings.kafka):
            raise SettingsError(problems)
    labels, dead, queries = open_label_stream(settings), dead_letters_url(settings), settings.label_queries
    if queries:
        _check_queries(settings)
    outputs = {"SINK": settings.sink, "DEAD_LETTERS": dead, "LABEL_QUERIES": queries}
    check_no_circle(settings.source, {f"HOMEOSTAT_{name}": url for name, url in outputs.items()})
    kafka, name = settings.kafka, worker_name(settings.state_dir)
    if kafka.instance_id == "auto":
        kafka = kafka.model_copy(update={"instance_id": name})
    transactional_id = ""
    if settings.delivery == "exactly-once":
        _check_exactly_once(settings, dead)
        transactional_id = f"homeostat-{kafka.group}-{kafka.instance_id or name}"
    sink = open_sink(
        settings.sink,
        dead_letters_url=dead,
        queries_url=queries,
        kafka=kafka,
        mqtt=_mqtt(settings),
        transactional_id=transactional_id,
    )
    source = open_source(settings.source, decoder, kafka=kafka, mqtt=_mqtt(settings))
    return Streams(source, sink, labels, dead, sink.send_queries if queries else None)


def _check_exactly_once(settings: Settings, dead: str) -> None:
    """Refuse what one transaction can't hold together.

    Raises:
        SettingsError: answers, dead letters or questions go elsewhere than to the source's Kafka, or nothing is kept.
    """
    problems = []
    given = [("SOURCE", settings.source), ("SINK", settings.sink), ("DEAD_LETTERS", dead)]
    given += [("LABEL_QUERIES", settings.label_queries)] if settings.label_queries else []
    broker = urlsplit(settings.source).netloc
    for name, url in given:
        if name == "DEAD_LETTERS" and url == "null:":
            continue
        if not url.startswith("kafka:") or urlsplit(url).netloc != broker:
            problems.append(
                f"HOMEOSTAT_{name}={url}: with HOMEOSTAT_DELIVERY=exactly-once it has to be on the source's Kafka"
            )
    if checkpoint_folder(settings) is None:
        problems.append(
            f"HOMEOSTAT_CHECKPOINT={settings.checkpoint.dir}: with HOMEOSTAT_DELIVERY=exactly-once state has to be "
            "kept, or records whose answers were void would be learnt from twice"
        )
    if problems:
        raise SettingsError(problems)


def _check_queries(settings: Settings) -> None:
    """Refuse questions that would be read as records or labels, or whose labels would always be late."""
    for name, url in (("SOURCE", settings.source), ("LABELS", settings.labels)):
        if url.rstrip("/") == settings.label_queries.rstrip("/"):
            problem = f"HOMEOSTAT_{name} is the same; give the questions a place of their own"
            raise SettingsError([f"HOMEOSTAT_LABEL_QUERIES={url}: {problem}"])
    window = settings.label_budget.window_rows
    if window >= settings.label_window:
        problem = (
            f"labels may come for the newest {settings.label_window} records only (HOMEOSTAT_LABEL_WINDOW), so that "
            "the label asked for would be late; choose among fewer records, or keep more"
        )
        raise SettingsError([f"HOMEOSTAT_LABEL_BUDGET__WINDOW_ROWS={window}: {problem}"])
    if not settings.labels and not is_simulated(settings):
        log.warning(
            "labels are asked for, and there is no stream on which they could come: set HOMEOSTAT_LABELS",
            label_queries=settings.label_queries,
        )
