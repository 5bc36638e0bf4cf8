"""What the system tells a running daemon by signals."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

FORCED_EXIT = 130


class Signals:
    """While it is entered: SIGTERM and Ctrl-C ask for a drain, the second one ends the process at once; SIGHUP asks to
    read the settings again, but on a terminal, where it says that the terminal is closed.
    """

    def __init__(self, stop: Callable[[], None], stopping: Callable[[], bool], hang_up: Callable[[], None]) -> None:
        self._stop, self._stopping, self._hang_up = stop, stopping, hang_up
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        handlers: dict[int, Any] = {signal.SIGTERM: self._end, signal.SIGINT: self._end}
        if not sys.stderr.isatty():
            handlers[signal.SIGHUP] = lambda number, frame: self._hang_up()
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self._stopping():
            raise SystemExit(FORCED_EXIT)
        self._stop()
