"""Dead letters in a file of lines, and a file to which records are appended again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec

from daemon.dead_letters.progress import Progress
from daemon.dead_letters.replaying import Found
from daemon.errors import DeliveryError, StreamError
from daemon.streams.dead_letters import StoredLetter, from_line
from daemon.streams.fileio import FileUrl, LineReader
from daemon.streams.files import FileSink
from daemon.versioning import durable

_LETTERS = 200
_LINE_BYTES = 64 << 20
_ALL = 1 << 40
_NOT_OURS = "not a dead letter of homeostat"


class _Noted(msgspec.Struct):
    first_line: str
    first: int
    note: str


class FileLetters:
    """A file of dead letters. The progress lies beside it, in ``<file>.replayed``.

    A line that has no end yet is being written, and is for the next call. A file that does not begin with the line that
    was noted is another one: logs are rotated.
    """

    def __init__(self, url: str, *, variable: str) -> None:
        self.url = url
        self.progress: dict[str, Progress] = {}
        # Followed, so that a last line without an end waits for it.
        self._url = replace(FileUrl.parse(url, variable, may_follow=False), follow=True)
        if self._url.path == "-":
            raise self._url.error("what went to standard output can't be read again; name the file that it went to")
        self._lines = LineReader(self._url, max_bytes=_LINE_BYTES)
        self._noted = Path(f"{self._url.path}.replayed")
        self._first_line = ""

    def open(self, *, again: bool) -> None:
        """Stand where the last call ended.

        Raises:
            StreamError: it, or the note of its progress, can't be read.
        """
        try:
            with open(self._url.path, "rb") as file:
                self._first_line = hashlib.sha256(file.readline(_LINE_BYTES)).hexdigest()
            noted = self._noted.read_bytes() if self._noted.exists() else None
        except OSError as error:
            raise self._url.error(error) from None
        progress = Progress()
        if noted is not None and not again:
            try:
                found = msgspec.json.decode(noted, type=_Noted)
            except ValueError as error:
                raise self._url.error(f"{self._noted} is damaged ({error}); remove it, or begin with --again") from None
            if found.first_line == self._first_line:
                progress = Progress.read(found.first, found.note)
        self._lines.open(progress.first)
        self.progress = {self._url.partition: progress}

    def read(self) -> Iterator[list[Found]]:
        """Lines up to the end of the file as it is when it is reached.

        Raises:
            StreamError: it can't be read any further.
        """
        place, at = self._url.partition, self.progress[self._url.partition].first
        while lines := self._lines.read(_LETTERS, 0.0):
            found = [Found(place, at + index, _letter(line)) for index, line in enumerate(lines)]
            at += len(lines)
            wants = self.progress[place].wants
            if found := [item for item in found if wants(item.offset)]:
                yield found

    def save(self) -> None:
        """Write the progress beside the file.

        Raises:
            StreamError: it can't be written.
        """
        progress = self.progress[self._url.partition]
        noted = _Noted(self._first_line, progress.first, progress.note())
        try:
            durable.write(self._noted, msgspec.json.encode(noted))
        except OSError as error:
            raise self._url.error(
                f"progress not noted in {self._noted}: {error.strerror}; the letters that were sent last are "
                "sent again by the next call"
            ) from None

    def close(self) -> None:
        """Close."""
        self._lines.close()


def _letter(line: bytes) -> StoredLetter | str:
    try:
        return from_line(line)
    except ValueError:
        return _NOT_OURS


class FileTarget:
    """A file to which the values are appended as lines. A line has no key, no headers, and no count of replays."""

    def __init__(self, url: str, *, variable: str) -> None:
        self.url = url
        self._sink = FileSink(url, variable=variable)
        if self._sink.path == "-":
            raise StreamError(f"{variable}={url}: the summary goes to standard output; name a file")

    def open(self) -> None:
        """Open for appending.

        Raises:
            StreamError: it can't be written to.
        """
        self._sink.open()

    def refuses(self, letter: StoredLetter) -> str | None:
        """What is not one line can't be a line."""
        if not letter.value:
            return "a record without a value can't be a line of a file"
        return "a value that holds line ends can't be a line of a file" if b"\n" in letter.value else None

    def send(self, letters: list[StoredLetter]) -> dict[int, str]:
        """Append them, and see them on the disk.

        Raises:
            DeliveryError: writing failed.
        """
        values = [letter.value for letter in letters if letter.value is not None]
        if len(values) < len(letters):
            raise DeliveryError(f"{self.url}: a tombstone can't be a line")
        self._sink.send([None] * len(values), values)
        self._sink.flush(0.0)
        return {}

    def close(self) -> None:
        """Close."""
        self._sink.close()
