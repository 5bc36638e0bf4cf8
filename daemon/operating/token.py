"""Who may act: one token, kept in a file, compared in constant time; and how often anybody may try."""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from daemon.errors import SettingsError

LEAST = 20
"""Characters of a token."""
_LONGEST = 4_096


class Token:
    """The token of a file; it is read anew when the file changes."""

    def __init__(self, path: Path) -> None:
        """Read it.

        Raises:
            SettingsError: the file can't be read, or holds no token.
        """
        self._path = path
        self._digest, self._stamp = b"", (0, 0)
        self._read()

    def accepts(self, authorization: str) -> bool:
        """Whether an Authorization header, ``Bearer TOKEN``, has it. A file that became unreadable lets nobody in."""
        try:
            self._read()
        except SettingsError:
            return False
        kind, _, given = authorization.partition(" ")
        # Digests, because the comparison's time tells the length of what it is given.
        same = hmac.compare_digest(_digest(given.strip()), self._digest)
        return same and kind.lower() == "bearer"

    def _read(self) -> None:
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_ino)
            if stamp == self._stamp:
                return
            with open(self._path, encoding="utf-8") as file:
                text = file.read(_LONGEST).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise self._wrong(str(getattr(error, "strerror", None) or error)) from None
        if len(text) < LEAST or any(not one.isprintable() or one.isspace() for one in text):
            raise self._wrong(f"holds no token: {LEAST} printable characters or more, without spaces")
        self._digest, self._stamp = _digest(text), stamp

    def _wrong(self, problem: str) -> SettingsError:
        return SettingsError([f"HOMEOSTAT_OPERATOR__TOKEN_FILE={self._path}: {problem}"])


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


class Pace:
    """At most ``most`` in any 60 seconds; from any thread."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._times: deque[float] = deque()
        self._lock = threading.Lock()

    def take(self) -> float:
        """0 when one more may be, and is counted; else the seconds until one may."""
        with self._lock:
            now = self._clock()
            while self._times and now - self._times[0] >= 60.0:
                self._times.popleft()
            if len(self._times) >= self._most:
                return 60.0 - (now - self._times[0])
            self._times.append(now)
            return 0.0
