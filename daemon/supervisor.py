"""Tells systemd, or whoever set NOTIFY_SOCKET, that the worker is ready and alive (sd_notify and its watchdog).

The watchdog is fed by the proof of progress: a process that exists and does nothing is not fed, and is restarted.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping

import structlog

log = structlog.get_logger("homeostat.service")

_EVERY_S = 5.0
"""Longest time between two lines of status."""
_WAIT_S = 1.0
"""How long a supervisor that does not read may hold us up with each line; then the line is dropped."""


class Supervisor:
    """Speaks to NOTIFY_SOCKET; where that is not set, does nothing.

    Args:
        alive: answers (whether there is progress, why), from any thread.
        status: a line for ``systemctl status``, from any thread.
        environment: with NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID, as systemd sets them.
    """

    def __init__(
        self,
        alive: Callable[[], tuple[bool, str]],
        status: Callable[[], str],
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._alive, self._status = alive, status
        self._address = environment.get("NOTIFY_SOCKET", "")
        self._every_s = min(_EVERY_S, _watchdog_s(environment) / 3)
        self._over = threading.Event()
        self._heard = True
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def ready(self) -> None:
        """Say that the start is over, and feed the watchdog from now on."""
        if self._address:
            self._say("READY=1")
            self._thread.start()

    def close(self) -> None:
        """Say that the end has come."""
        if self._thread.is_alive():
            self._over.set()
            self._thread.join(1)
            self._say("STOPPING=1")

    def _run(self) -> None:
        while True:
            fine, why = self._alive()
            self._say(f"STATUS={self._status()}\nWATCHDOG=1" if fine else f"STATUS={why}")
            if self._over.wait(self._every_s):
                return

    def _say(self, text: str) -> None:
        # An address that begins with @ is in the abstract name space.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as pipe:
                pipe.settimeout(_WAIT_S)
                # Connected, as the wait for room in the other end's queue is a busy one without.
                pipe.connect(address)
                pipe.send(text.encode())
            self._heard = True
        except OSError as error:
            # Once a silence: the next line to be dropped says nothing new.
            tell = log.warning if self._heard else log.debug
            self._heard = False
            tell("supervisor not told", said=text, socket=self._address, error=str(error))


def _watchdog_s(environment: Mapping[str, str]) -> float:
    """Time without food after which we are killed; infinite where nobody watches us."""
    asked, whom = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", str(os.getpid()))
    return int(asked) / 1e6 if asked.isdecimal() and int(asked) and whom == str(os.getpid()) else float("inf")
