"""What the daemon logs while it is replayed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import structlog
from structlog.testing import LogCapture

_LEFT_OUT = ("event", "log_level", "exc_info", "seconds")
"""Of a line's parts: what it is made of, and times, which differ from run to run."""


@contextmanager
def noted() -> Iterator[list[Any]]:
    """Log lines of the daemon's modules, as dicts, instead of being written; every level, whatever is set.

    The modules' own loggers are replaced meanwhile. Another configuration of structlog would not reach them: a logger
    keeps the one it had when it was first used.
    """
    capture = LogCapture()
    recorder = structlog.wrap_logger(None, processors=[capture], wrapper_class=structlog.BoundLogger)
    kind = type(structlog.get_logger())
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("daemon.")]
    logging = [module for module in modules if isinstance(vars(module).get("log"), kind)]
    before = [vars(module)["log"] for module in logging]
    for module in logging:
        vars(module)["log"] = recorder
    try:
        yield capture.entries
    finally:
        for module, log in zip(logging, before, strict=True):
            vars(module)["log"] = log


def line(note: Mapping[str, Any]) -> str:
    """A log line as text: the event, then what was said with it."""
    more = [f"{name} {value}" for name, value in note.items() if name not in _LEFT_OUT]
    return f"{note['event']}: {', '.join(more)}" if more else str(note["event"])
