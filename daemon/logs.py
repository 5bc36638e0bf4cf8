"""Structured logs on standard error: text on a terminal, JSON elsewhere; and the one live status line."""

from __future__ import annotations

import logging
import math
import shutil
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog


class StatusLine:
    """One line that is written over; logs push it down. Does nothing where there is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.active = stream.isatty()
        self._text = ""

    def show(self, text: str) -> None:
        """Write over the line."""
        if not self.active:
            return
        self._text = text[: shutil.get_terminal_size().columns - 1]
        self._stream.write(f"\r\x1b[K{self._text}")
        self._stream.flush()

    def clear(self) -> None:
        """Take the line away."""
        if self.active and self._text:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
        self._text = ""

    def write(self, text: str) -> None:
        """A log line above the status line."""
        if self.active and self._text:
            self._stream.write("\r\x1b[K")
        self._stream.write(text)
        if self.active and self._text:
            self._stream.write(self._text)
        self._stream.flush()

    def flush(self) -> None:
        """For loggers that flush."""
        self._stream.flush()


def _finite(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """JSON has neither NaN nor infinities."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in event.items()
    }


class _Level:
    """Lets through what is severe enough. Not structlog's own filter, whose level a cached logger keeps for good."""

    least = logging.INFO

    def __call__(self, _: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if structlog.processors.NAME_TO_LEVEL[method] < self.least:
            raise structlog.DropEvent
        return event


_level = _Level()


def set_level(level: str) -> None:
    """From now on log what is at least as severe as ``level``: debug, info, warning or error."""
    _level.least = logging.getLevelNamesMapping()[level.upper()]
    # kafka-python logs through the standard library, and loudly: only its errors are worth an operator's eye.
    logging.getLogger().setLevel(max(_level.least, logging.WARNING))


class _Forward(logging.Handler):
    """Passes what libraries log on to the one structured log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        structlog.get_logger(record.name).log(record.levelno, record.getMessage(), logger=record.name)


def configure(level: str, form: str, status: StatusLine | None = None) -> None:
    """Set up logging for the process. ``form`` is auto, json or text."""
    out = status if status is not None else StatusLine(sys.stderr)
    text = form == "text" or (form == "auto" and out.active)
    renderer: Any = structlog.dev.ConsoleRenderer(colors=out.active) if text else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            _level,
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.dict_tracebacks if not text else structlog.processors.UnicodeDecoder(),
            _finite,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.WriteLoggerFactory(file=out),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Forward()], force=True)
    set_level(level)
    logging.getLogger("kafka").setLevel(logging.ERROR)
