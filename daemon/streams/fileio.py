"""Files as streams: what a file's URL says, and whole lines from a file, a pipe or standard input."""

from __future__ import annotations

import os
import select
import stat
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, unquote

from daemon.errors import StreamError
from daemon.streams.codec_base import MAX_BYTES

Format = Literal["jsonl", "csv", "npz"]

_SUFFIXES: dict[str, Format] = {
    "": "jsonl",  # pipes: /dev/fd/63
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".npz": "npz",
}
_FORMATS: dict[str, Format] = {"jsonl": "jsonl", "csv": "csv", "npz": "npz"}
_SWITCH = {"true": True, "false": False}
_CHUNK_BYTES = 1 << 18
_PAUSE_S = 0.02  # between looks at a file that may have grown: there is no portable way to be told


@dataclass(frozen=True)
class FileUrl:
    """``file:path``, ``file://path`` or ``-``, with ``?format=jsonl|csv|npz`` and ``&follow=true``."""

    url: str
    variable: str
    path: str
    """Absolute, or ``-`` for standard input or output."""
    format: Format
    follow: bool

    @classmethod
    def parse(cls, url: str, variable: str, *, may_follow: bool = True) -> FileUrl:
        """Read a URL; ``variable`` is the setting it came from, for the messages.

        Raises:
            StreamError: no path, or a parameter that is unknown or has a wrong value.
        """
        place, _, query = url.partition("?")
        given = place.removeprefix("file:").removeprefix("//") if place != "-" else "-"
        path = "-" if given == "-" else os.path.abspath(unquote(given))
        if not given:
            raise StreamError(f"{variable}={url}: no path; right would be file:rows.jsonl or file:///data/rows.jsonl")
        known = ("format", "follow") if may_follow else ("format",)
        parameters = dict(parse_qsl(query, keep_blank_values=True))
        for name, value in parameters.items():
            if name not in known:
                raise StreamError(f"{variable}={url}: no parameter {name!r} here; there are: {', '.join(known)}")
            allowed = _FORMATS if name == "format" else _SWITCH
            if value not in allowed:
                raise StreamError(f"{variable}={url}: {name}={value}; right would be one of {', '.join(allowed)}")
        suffix = os.path.splitext(path)[1].lower()
        if "format" not in parameters and suffix not in _SUFFIXES:
            right = "name it .jsonl, .csv or .npz, or add ?format=jsonl"
            raise StreamError(f"{variable}={url}: the suffix {suffix} says nothing of the format; {right}")
        kind = _FORMATS[parameters["format"]] if "format" in parameters else _SUFFIXES[suffix]
        follow = _SWITCH[parameters.get("follow", "false")]
        if kind == "npz" and (follow or path == "-"):
            raise StreamError(f"{variable}={url}: an npz archive is read whole, from a file; use jsonl or csv")
        return cls(url, variable, path, kind, follow)

    @property
    def partition(self) -> str:
        """Name of its only partition."""
        return f"file:{self.path}"

    def says(self, problem: object) -> str:
        """The problem, with the variable and its value before it."""
        text = (problem.strerror or str(problem)) if isinstance(problem, OSError) else problem
        return f"{self.variable}={self.url}: {text}"

    def error(self, problem: object) -> StreamError:
        """An error that names the variable and its value."""
        return StreamError(self.says(problem))


class LineReader:
    """Whole lines, without their ends, in order. Of a line longer than ``max_bytes`` only the beginning is kept.

    A file's last line counts even without an end, unless the file is followed: then it waits for its end. Opening a
    named pipe waits for its writer.
    """

    def __init__(self, url: FileUrl, *, max_bytes: int = MAX_BYTES) -> None:
        self._url = url
        self._max_bytes = max_bytes
        self._fd = -1
        self.regular = False
        """Whether it is a file, which can be read again, and no pipe."""
        self._lines: deque[bytes] = deque()
        self._tail = b""
        self._finished = False
        self._offset = 0
        self._taken_lines = self._taken_bytes = 0

    def open(self, skip: int) -> None:
        """Open at line ``skip``. A pipe has no past: what comes is taken to begin there.

        Raises:
            StreamError: it can't be opened, or has fewer lines.
        """
        try:
            self._fd = os.dup(0) if self._url.path == "-" else os.open(self._url.path, os.O_RDONLY | os.O_CLOEXEC)
            mode = os.fstat(self._fd).st_mode
            self.regular = stat.S_ISREG(mode)
            if stat.S_ISDIR(mode):
                raise self._url.error("this is a folder; give a file")
            if self.regular:
                self._offset = os.lseek(self._fd, 0, os.SEEK_CUR)
                self._skip(skip)
        except StreamError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise self._url.error(error) from None

    def _skip(self, lines: int) -> None:
        left, unended = lines, False
        while left:
            chunk = os.read(self._fd, _CHUNK_BYTES)
            if not chunk and left == 1 and unended:
                return  # the last line counted without its end
            if not chunk:
                has = lines - left + unended
                raise self._url.error(f"has {has} lines, and the checkpoint goes on at line {lines}: another file?")
            found = chunk.count(b"\n")
            unended = not chunk.endswith(b"\n")
            end = len(chunk)
            if found >= left:
                end = 0
                for _ in range(left):
                    end = chunk.index(b"\n", end) + 1
            left -= min(found, left)
            self._offset += end
        os.lseek(self._fd, self._offset, os.SEEK_SET)

    def read(self, max_lines: int, timeout_s: float) -> list[bytes]:
        """Up to ``max_lines`` lines; waits up to ``timeout_s`` seconds for the first.

        Raises:
            StreamError: reading failed, or a followed file was replaced or got shorter.
        """
        deadline = time.monotonic() + timeout_s
        while len(self._lines) < max_lines and not self._finished:
            wait_s = 0.0 if self._lines else max(deadline - time.monotonic(), 0.0)
            try:
                more = self._fill(wait_s)
            except OSError as error:
                raise self._url.error(error) from None
            if more or self._finished:
                continue
            wait_s = min(wait_s, deadline - time.monotonic())
            if wait_s <= 0:
                break
            time.sleep(min(wait_s, _PAUSE_S))
        taken = [self._lines.popleft() for _ in range(min(max_lines, len(self._lines)))]
        self._taken_lines += len(taken)
        self._taken_bytes += sum(map(len, taken)) + len(taken)
        return taken

    def _fill(self, wait_s: float) -> bool:
        if not self.regular and not select.select([self._fd], [], [], wait_s)[0]:
            return False
        chunk = os.read(self._fd, _CHUNK_BYTES)
        self._offset += len(chunk)
        if chunk:
            *whole, tail = (self._tail + chunk).split(b"\n")
            self._lines.extend(line[:-1] if line.endswith(b"\r") else line for line in whole)
            # One byte more than the limit is enough for the codec to see that the line is too long.
            self._tail = tail[: self._max_bytes + 1]
        elif self._url.follow:
            self._check_same_file()
        else:
            self._finished = True
            self._lines.extend([self._tail] if self._tail else [])
            self._tail = b""
        return bool(chunk)

    def _check_same_file(self) -> None:
        if not self.regular or self._url.path == "-":
            return
        opened, there = os.fstat(self._fd), os.stat(self._url.path)
        if (opened.st_dev, opened.st_ino) != (there.st_dev, there.st_ino) or opened.st_size < self._offset:
            problem = "the file was replaced or cut while it was followed, so that line numbers mean nothing any more"
            raise self._url.error(f"{problem}; write on to the same file, or give each file a stream of its own")

    def at_end(self) -> bool:
        """Whether nothing more is to be had right now."""
        if self._lines:
            return False
        if self._finished or self._fd < 0:
            return True
        if self.regular:
            return os.fstat(self._fd).st_size <= self._offset and (self._url.follow or not self._tail)
        return not select.select([self._fd], [], [], 0)[0]

    @property
    def ended(self) -> bool:
        """Whether every line was given out and none will come."""
        return self._finished and not self._lines

    def remaining(self) -> int | None:
        """Lines not yet given out, estimated from the mean length of those that were; None for a pipe, or too early."""
        if not self.regular or self._fd < 0 or (not self._taken_lines and not self._finished):
            return None
        if self._finished:
            return len(self._lines)
        unread = os.fstat(self._fd).st_size - self._offset
        return len(self._lines) + round(unread * self._taken_lines / self._taken_bytes)

    def close(self) -> None:
        """Close; closing twice is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def sync_folder(path: str) -> None:
    """Make a new file's name durable: fsync of the folder that holds it."""
    fd = os.open(Path(path).parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
