"""Chooses how a worker traces, by its settings."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from daemon.errors import SettingsError
from daemon.loop import Loop
from daemon.settings import Settings
from daemon.streams.base import ContextSource
from daemon.tracing.loops import PassingLoop

if TYPE_CHECKING:
    from daemon.worker import Worker

CLOSE_S = 2.0
"""Longest time for the spans of the last seconds to be taken by a collector."""


class Untraced:
    """Traces are off: the plain loop, which looks at no header and has no branch for it."""

    loop_type: type[Loop] = Loop

    def begin(self, worker: Worker) -> None:
        """Make the worker ready; called once it is built."""

    def follow(self, worker: Worker) -> None:
        """The worker's loop has other parts than before, a new bundle's."""

    def close(self, timeout_s: float) -> None:
        """Send what is left, for at most ``timeout_s`` seconds; nothing is traced afterwards."""


class Passing(Untraced):
    """Trace context goes on with the answers, and nothing is told of it."""

    loop_type: type[Loop] = PassingLoop

    def begin(self, worker: Worker) -> None:
        """Have the source keep what its records carry."""
        if isinstance(worker.source, ContextSource):
            worker.source.keeps_context = True


def tracing_of(settings: Settings) -> Untraced:
    """How the settings want it; nothing is opened.

    Raises:
        SettingsError: the extra `otel` is not installed, or its variables are wrong.
    """
    mode = settings.traces.mode
    if mode != "on":
        return Passing() if mode == "pass" else Untraced()
    try:
        made: Untraced = importlib.import_module("daemon.tracing.exporting").Traced(settings)
    except ImportError as error:
        problem = f"HOMEOSTAT_TRACES=on: {error.name or error} can't be imported; run: pip install homeostat[otel]"
        raise SettingsError([problem]) from None
    return made
