"""Files, standard input and output as source, sink and labels: JSON lines, CSV, npz."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from typing import BinaryIO, Protocol

from daemon.errors import DeliveryError
from daemon.records import DeadLetter, Labels, Positions, RawBatch
from daemon.streams.answers import decode_label
from daemon.streams.codec_base import Codec, assemble
from daemon.streams.dead_letters import to_line
from daemon.streams.fileio import FileUrl, LineReader, sync_folder
from daemon.streams.tables import Columns, CsvReader, NpzReader

_LABELS_A_POLL = 4096
_CHUNK_BYTES = 1 << 16


class _Reader(Protocol):
    """Rows of one file, in order: undecoded lines, or columns."""

    def open(self, skip: int) -> None: ...
    def read(self, max_rows: int, timeout_s: float, /) -> list[bytes] | Columns: ...
    def at_end(self) -> bool: ...
    @property
    def ended(self) -> bool: ...
    def remaining(self) -> int | None: ...
    def close(self) -> None: ...


def _reader(url: FileUrl, codec: Codec | None) -> _Reader:
    if url.format == "csv":
        return CsvReader(url, codec)
    if url.format == "npz":
        return NpzReader(url, codec)
    return LineReader(url) if codec is None else LineReader(url, max_bytes=codec.max_bytes)


class FileSource:
    """Records from a file or standard input. The partition is ``file:<path>``, the offset the row, from 0.

    JSON lines are the codec's records, one a line; CSV and npz come decoded (see daemon.streams.tables). A row without
    an id is named ``partition:offset``, one without a time has that of its reading. Standard input, where it is a pipe,
    has no past: after a restart its rows are numbered on from the checkpoint.
    """

    def __init__(self, url: str, codec: Codec, *, variable: str = "HOMEOSTAT_SOURCE") -> None:
        self._url = FileUrl.parse(url, variable)
        if self._url.format == "jsonl" and codec.name != "json":
            problem = f"lines of a file are JSON, and the codec is {codec.name}"
            raise self._url.error(f"{problem}; right would be HOMEOSTAT_CODEC=json, or a .csv or .npz file")
        self._reader = _reader(self._url, codec)
        self._next = 0
        self._is_open = False

    def open(self, positions: Positions | None) -> None:
        """Open at ``positions``, else at the first row.

        Raises:
            StreamError: it can't be opened, or has fewer rows than that.
        """
        self._next = (positions or {}).get(self._url.partition, 0)
        self._reader.open(self._next)
        self._is_open = True

    def poll(self, max_rows: int, timeout_s: float) -> RawBatch:
        """At most ``max_rows`` rows; waits up to ``timeout_s`` seconds for the first.

        Raises:
            StreamError: it can't be read any further.
        """
        rows = self._reader.read(max_rows, timeout_s)
        now, count = time.time(), len(rows)
        raw = RawBatch(
            keys=[None] * count,
            times_s=[now] * count,
            partitions=[self._url.partition] * count,
            offsets=list(range(self._next, self._next + count)),
            arrived=time.monotonic(),
        )
        self._next += count
        if not isinstance(rows, Columns):
            raw.values = list(rows)
        elif rows.x is not None and count:
            ids = [
                f"{self._url.partition}:{offset}" if name is None else name
                for name, offset in zip(rows.ids, raw.offsets, strict=True)
            ]
            times = [now if ts is None else ts for ts in rows.ts]
            raw.batch = assemble(rows.x, ids, rows.y, times, invalid=rows.refused)
        return raw

    def can_fill(self, rows: int) -> bool:
        """Whether a batch should wait: how many rows are left in a file is not known before they are read."""
        return not self._reader.at_end()

    @property
    def ended(self) -> bool:
        """Whether the file was read to its end, and isn't followed."""
        return self._reader.ended

    def lag(self) -> int | None:
        """Rows not yet read: exact for npz, estimated from the lines' mean length for text, None for a pipe."""
        return self._reader.remaining()

    def commit(self, positions: Positions, note: str) -> None:
        """A file has no place for this; positions live in the checkpoint."""

    def ready(self) -> bool:
        """Whether it is open."""
        return self._is_open

    def close(self) -> None:
        """Close; closing twice is allowed."""
        self._reader.close()
        self._is_open = False


class FileLabels:
    """Labels from a file: JSON lines ``{"id", "y", "ts"?}``, CSV with these columns, npz with ids, y and ts."""

    def __init__(self, url: str, *, variable: str = "HOMEOSTAT_LABELS") -> None:
        self.rejected: dict[str, int] = {}
        self._url = FileUrl.parse(url, variable)
        self._reader = _reader(self._url, None)
        self._next = 0

    def open(self, positions: Positions | None) -> None:
        """Open at ``positions``, else at the first label.

        Raises:
            StreamError: it can't be opened, or has fewer rows than that.
        """
        self._next = (positions or {}).get(self._url.partition, 0)
        self._reader.open(self._next)

    def poll(self, timeout_s: float = 0) -> Labels:
        """Up to 4096 labels; waits up to ``timeout_s`` seconds for the first.

        Raises:
            StreamError: it can't be read any further.
        """
        rows = self._reader.read(_LABELS_A_POLL, timeout_s)
        now, labels = time.time(), Labels()
        self._next += len(rows)
        for row in range(len(rows)):
            try:
                name, y, ts = _label_of(rows, row) if isinstance(rows, Columns) else decode_label(rows[row])
            except ValueError as error:
                self.rejected[str(error)] = self.rejected.get(str(error), 0) + 1
                continue
            labels.ids.append(name)
            labels.y.append(y)
            labels.times_s.append(now if ts is None else ts)
        return labels

    def at_end(self) -> bool:
        """Whether nothing more is to be had right now."""
        return self._reader.at_end()

    def positions(self) -> Positions:
        """The next row, after everything that ``poll`` returned or rejected."""
        return {self._url.partition: self._next}

    def close(self) -> None:
        """Close; closing twice is allowed."""
        self._reader.close()


def _label_of(columns: Columns, row: int) -> tuple[str, int | float, float | None]:
    name, y = columns.ids[row], columns.y[row]
    if row in columns.refused:
        raise ValueError(columns.refused[row])
    if name is None or y is None:
        raise ValueError("missing_field")
    return name, y, columns.ts[row]


class FileSink:
    """Answers, or dead letters, as lines at the end of a file, or on standard output; the keys are not written.

    ``flush`` returns when the file is on the disk. What a kill left of a last line is cut off when it is opened again,
    so that the file always is whole lines.
    """

    def __init__(self, url: str, *, variable: str = "HOMEOSTAT_SINK") -> None:
        self._url = FileUrl.parse(url, variable, may_follow=False)
        if self._url.format != "jsonl":
            raise self._url.error("what is written is JSON lines; name the file .jsonl")
        self.path = self._url.path
        """Absolute, or ``-``."""
        self._file: BinaryIO | None = None
        self._durable = False

    def open(self) -> None:
        """Open for appending; a file that is missing is made, its folder is not.

        Raises:
            StreamError: it can't be written to.
        """
        try:
            if self._url.path == "-":
                self._file = sys.stdout.buffer
                return
            is_new = not os.path.exists(self._url.path)
            self._file = open(self._url.path, "ab")  # noqa: SIM115 - stays open for the life of the process
            self._durable = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
            if is_new:
                sync_folder(self._url.path)
            elif self._durable:
                _cut_partial_line(self._url.path)
        except OSError as error:
            raise self._url.error(error) from None

    def send(self, keys: list[bytes | None], values: list[bytes]) -> None:
        """Append one line per value; on standard output they are seen at once.

        Raises:
            DeliveryError: writing failed.
        """
        if values:
            self._write(b"\n".join(values) + b"\n")

    send_queries = send
    """Questions are lines as answers are."""

    def send_dead(self, letter: DeadLetter) -> None:
        """Append a dead letter as a line (see daemon.streams.dead_letters).

        Raises:
            DeliveryError: writing failed.
        """
        self._write(to_line(letter) + b"\n")

    def _write(self, lines: bytes) -> None:
        if self._file is None:
            raise DeliveryError(self._url.says("not open"))
        try:
            self._file.write(lines)
            if self._url.path == "-":
                self._file.flush()
        except OSError as error:
            raise DeliveryError(self._url.says(error)) from None

    def flush(self, timeout_s: float) -> None:
        """Return when every line is on the disk; the disk can't be given a time limit.

        Raises:
            DeliveryError: writing failed.
        """
        if self._file is None:
            return
        try:
            self._file.flush()
            if self._durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise DeliveryError(self._url.says(error)) from None

    def close(self) -> None:
        """Close; closing twice is allowed. What was not flushed was not promised, so it may get lost."""
        if self._file is not None and self._url.path != "-":
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None


def _cut_partial_line(path: str) -> None:
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        at = end
        while at:
            start = max(at - _CHUNK_BYTES, 0)
            file.seek(start)
            newline = file.read(at - start).rfind(b"\n")
            if newline >= 0:
                at = start + newline + 1
                break
            at = start
        if at < end:
            file.truncate(at)
            os.fsync(file.fileno())
