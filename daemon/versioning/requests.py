"""What an operator asks of a daemon: one small file a request, taken up at a batch boundary or at the next start.

The command line writes requests and changes nothing itself: the daemon alone owns its versions. A request's file is
removed once a checkpoint holds its effect, so that one taken up just before a crash is taken up again.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from daemon.versioning import durable
from daemon.versions import VersionError

Action = Literal["rollback", "resume", "pin", "unpin", "import"]
FOLDER = "requests"
EVERY_S = 1.0
"""How often the folder is looked at: one listing, some microseconds."""
MOST = 64
"""Requests waiting at a time; a further one is refused."""
LARGEST = 4 << 10
_NAME = re.compile(r"(\d{20}-[0-9a-f]{8})\.json")


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to do."""

    action: Action
    number: int = 0
    """Which version; not used by ``resume`` and ``import``."""
    hold: bool = False
    """``rollback``: promote nothing afterwards until ``resume``."""
    name: str = ""
    """The request's own name, by the time it was made."""


def payload(folder: Path, request: Request) -> Path:
    """Where the file of an ``import`` lies until it is taken up."""
    return folder / FOLDER / f"{request.name}.safetensors"


def submit(folder: Path, action: Action, *, number: int = 0, hold: bool = False, data: bytes | None = None) -> Request:
    """Leave a request in the versions' ``folder``.

    Args:
        folder: STATE_DIR/versions.
        action: what to do.
        number: with which version.
        hold: see `Request`.
        data: of the file to import.

    Raises:
        VersionError: the folder can't be written, or too many wait already.
    """
    request = Request(action, number, hold, f"{time.time_ns():020d}-{secrets.token_hex(4)}")
    where = folder / FOLDER
    try:
        where.mkdir(parents=True, exist_ok=True)
        waiting = sum(bool(_NAME.fullmatch(path.name)) for path in where.iterdir())
        if waiting >= MOST:
            raise VersionError(f"{where}: {waiting} requests wait already; start the daemon, or remove them")
        if data is not None:
            durable.write(payload(folder, request), data)
        content = {"action": action, "number": number, "hold": hold}
        durable.write(where / f"{request.name}.json", json.dumps(content).encode())
    except OSError as error:
        raise VersionError(f"{where}: {error.strerror or error}: the request could not be left there") from None
    return request


class Inbox:
    """The daemon's side of the requests."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder = folder
        self.refused: list[str] = []
        """Files that were no requests, one line each, since `take` was last called."""
        self._clock = clock
        self._looked: float | None = None
        self._taken: set[str] = set()

    def take(self) -> list[Request]:
        """New requests, oldest first; looks at the folder at most every `EVERY_S`."""
        now = self._clock()
        if self._looked is not None and now - self._looked < EVERY_S:
            return []
        self._looked, self.refused = now, []
        names = self._names()
        # What was removed by hand is forgotten too.
        self._taken &= set(names)
        return [request for name in sorted(names)[:MOST] if name not in self._taken and (request := self._read(name))]

    def _names(self) -> list[str]:
        try:
            with os.scandir(self.folder / FOLDER) as found:
                return [match[1] for entry in found if (match := _NAME.fullmatch(entry.name))]
        except OSError:
            return []

    def settle(self, names: Container[str]) -> None:
        """Remove the requests of these names: a checkpoint holds their effect, the process ended before it said so."""
        for name in self._names():
            if name in names:
                self.done(Request("resume", name=name))

    def _read(self, name: str) -> Request | None:
        path = self.folder / FOLDER / f"{name}.json"
        self._taken.add(name)
        try:
            with open(path, "rb") as file:
                data = file.read(LARGEST + 1)
            if len(data) > LARGEST:
                raise ValueError(f"longer than {LARGEST} bytes")
            content = json.loads(data)
            action, number, hold = content["action"], content.get("number", 0), content.get("hold", False)
            if action not in get_args(Action) or type(number) is not int or number < 0 or type(hold) is not bool:
                raise ValueError(f"{content} is none of this homeostat's requests")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.refused.append(f"{path}: {error}")
            self.done(Request("resume", name=name))
            return None
        return Request(action, number, hold, name)

    def done(self, request: Request) -> None:
        """Remove a request whose effect is safe."""
        for path in (payload(self.folder, request), self.folder / FOLDER / f"{request.name}.json"):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                # It stays noted as taken: this process does it once, whatever the folder says.
                self.refused.append(f"{path}: {error.strerror or error}: the request can't be removed")
