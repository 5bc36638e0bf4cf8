"""Who is compared by `make bench-kafka`: each a command that reads one topic and answers on another until SIGTERM."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.kafka_world import Stream

ROOT = Path(__file__).resolve().parents[2]
RIVAL = ROOT / ".venv" / "quix"
"""Quix Streams and all it needs, in a folder apart: it wants an older pydantic than the daemon is run with."""


@dataclass(frozen=True)
class Run:
    """One process of one subject."""

    address: str
    topic: str
    out: str
    stream: Stream
    bundle: Path
    folder: Path

    @property
    def name(self) -> str:
        """The consumer group, and the folder of the state."""
        return self.out


@dataclass(frozen=True)
class Subject:
    """A row of the table."""

    name: str
    kind: str
    """bare, daemon or quix."""
    exactly_once: bool = False
    settings: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The daemon's settings beyond those of all."""
    form: str = ""
    """Of Quix: batches or records."""

    def command(self, run: Run) -> list[str]:
        """What starts it."""
        if self.kind == "daemon":
            return [sys.executable, "-m", "daemon.cli", "run"]
        given = {
            "address": run.address,
            "topic": run.topic,
            "out": run.out,
            "group": run.name,
            "bundle": str(run.bundle),
            "factory": run.stream.factory,
            "codec": run.stream.codec,
            "state": str(run.folder / run.name),
            "form": self.form,
            "exactly_once": self.exactly_once,
        }
        return [sys.executable, "-m", f"tests.benchmarks.kafka_{self.kind}", json.dumps(given)]

    def environment(self, run: Run) -> dict[str, str]:
        """The variables that it starts with."""
        environment = clean_environment(rival=self.kind == "quix")
        if self.kind != "daemon":
            return environment
        return environment | {
            "HOMEOSTAT_SOURCE": f"kafka://{run.address}/{run.topic}",
            "HOMEOSTAT_SINK": f"kafka://{run.address}/{run.out}",
            "HOMEOSTAT_KAFKA__GROUP": run.name,
            "HOMEOSTAT_CODEC": run.stream.codec,
            "HOMEOSTAT_BUNDLE": str(run.bundle),
            "HOMEOSTAT_FACTORY": run.stream.factory,
            "HOMEOSTAT_APP_DIR": str(ROOT),
            "HOMEOSTAT_STATE_DIR": str(run.folder / run.name),
            "HOMEOSTAT_HTTP": "127.0.0.1:0",
            "HOMEOSTAT_LOG_FORMAT": "json",
            "HOMEOSTAT_DELIVERY": "exactly-once" if self.exactly_once else "at-least-once",
            **self.settings,
        }


def clean_environment(*, rival: bool) -> dict[str, str]:
    """This process's variables without the daemon's own; with ``rival``, what it brings is found first."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HOMEOSTAT_")}
    return clean | {"PYTHONPATH": os.pathsep.join([str(RIVAL)] * rival + [str(ROOT)])}


BARE = Subject("bare kafka-python loop", "bare")
PUBLIC = Subject("homeostat, public path", "daemon", settings={"HOMEOSTAT_KAFKA__BULK": "off"})
BULK = Subject("homeostat, bulk path", "daemon", settings={"HOMEOSTAT_KAFKA__BULK": "auto"})
FROZEN = Subject(
    "homeostat, bulk, FAST=none", "daemon", settings={"HOMEOSTAT_KAFKA__BULK": "auto", "HOMEOSTAT_FAST": "none"}
)
BULK_ONCE = Subject(
    "homeostat, bulk, exactly once", "daemon", exactly_once=True, settings={"HOMEOSTAT_KAFKA__BULK": "auto"}
)
QUIX = Subject("Quix Streams, batching sink", "quix", form="batches")
QUIX_RECORDS = Subject("Quix Streams, record by record", "quix", form="records")
QUIX_ONCE = Subject("Quix Streams, exactly once", "quix", exactly_once=True, form="records")
RIVALS = (QUIX, QUIX_RECORDS, QUIX_ONCE)


def subjects() -> list[Subject]:
    """Everybody who can be run here, in the order of the table."""
    found = [BARE, PUBLIC, BULK, FROZEN, BULK_ONCE, *RIVALS]
    return [subject for subject in found if subject.kind != "quix" or rival_installed()]


def rival_installed() -> bool:
    """Whether Quix Streams is in its folder."""
    return importlib.util.find_spec("quixstreams") is not None or (RIVAL / "quixstreams").is_dir()
