"""Tables as streams: CSV with a header, and npz archives. They give columns in place of records to decode."""

from __future__ import annotations

import csv
import math
import zipfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from daemon.records import F32
from daemon.streams.codec_base import MAX_BYTES, Codec
from daemon.streams.fields import RefusedError, label, seconds
from daemon.streams.fileio import FileUrl, LineReader

_NAMED = ("id", "y", "ts")


@dataclass(slots=True)
class Columns:
    """Rows of a table. ``x`` is (B, *input_shape) float32, None where only labels are read.

    ``refused`` says by row why it can't be used; its ``x`` is zero.
    """

    x: F32 | None = None
    ids: list[str | None] = field(default_factory=list)
    y: list[int | float | None] = field(default_factory=list)
    ts: list[float | None] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


class CsvReader:
    """CSV, one row a line, below a header. Columns ``id``, ``y`` and ``ts`` go by name; each may be absent.

    The other columns are x, in order; where they are more than the model takes, those whose cell in the first row is a
    number. An empty cell of x, or text in it, is NaN. Rows count from 0. Without a codec only labels are read.
    """

    def __init__(self, url: FileUrl, codec: Codec | None) -> None:
        self._url = url
        self._codec = codec
        self._lines = LineReader(url, max_bytes=codec.max_bytes if codec else MAX_BYTES)
        self._header: list[str] = []
        self._inputs: list[int] = []

    def open(self, skip: int) -> None:
        """Open at row ``skip``; a pipe has no past.

        Raises:
            StreamError: it can't be opened, has fewer rows, or does not fit the model.
        """
        self._lines.open(0)
        left = skip if self._lines.regular else 0
        while left:
            found = len(self._rows(min(left, 4096), 0))
            if not found:
                problem = f"has {skip - left} rows, and the checkpoint goes on at row {skip}: another file?"
                raise self._url.error(problem)
            left -= found

    def read(self, max_rows: int, timeout_s: float) -> Columns:
        """Up to ``max_rows`` rows; waits up to ``timeout_s`` seconds for the first.

        Raises:
            StreamError: it can't be read, or does not fit the model.
        """
        rows = self._rows(max_rows, timeout_s)
        columns = Columns()
        if self._codec is not None:
            columns.x = self._x(rows, self._codec, columns.refused)
        for row, cells in enumerate(rows):
            named = dict(zip(self._header, cells, strict=False))
            y: int | float | None = None
            ts: float | None = None
            try:
                y, ts = label(_scalar(named.get("y"))), seconds(_scalar(named.get("ts")))
            except RefusedError as refused:
                columns.refused.setdefault(row, refused.reason)
            columns.ids.append(named.get("id") or None)
            columns.y.append(y)
            columns.ts.append(ts)
        return columns

    def _rows(self, max_rows: int, timeout_s: float) -> list[list[str]]:
        if not self._header:
            line = self._lines.read(1, timeout_s)
            if not line:
                return []
            self._header = [name.strip() for name in _cells(line[0].removeprefix(b"\xef\xbb\xbf"))]
            if self._codec is None and not {"id", "y"} <= set(self._header):
                raise self._url.error(f"labels need the columns id and y; the header has {', '.join(self._header)}")
            timeout_s = 0
        rows = [_cells(line) for line in self._lines.read(max_rows, timeout_s)]
        if rows and self._codec is not None and not self._inputs:
            self._choose_inputs(rows[0], self._codec)
        return rows

    def _choose_inputs(self, first: list[str], codec: Codec) -> None:
        inputs = [column for column, name in enumerate(self._header) if name not in _NAMED]
        if len(inputs) > codec.size:
            inputs = [
                column for column in inputs if column < len(first) and not isinstance(_scalar(first[column]), str)
            ]
        if len(inputs) != codec.size:
            names = ", ".join(self._header[column] for column in inputs)
            problem = f"{len(inputs)} columns can be x ({names}), and the model takes {codec.size} numbers"
            raise self._url.error(f"{problem}; leave out what is not x, and name a label y")
        self._inputs = inputs

    def _x(self, rows: list[list[str]], codec: Codec, refused: dict[int, str]) -> F32:
        parts = []
        for row, cells in enumerate(rows):
            part = bytes(4 * codec.size)
            if len(cells) != len(self._header):
                refused[row] = "empty" if cells == [""] else "wrong_shape"
            else:
                try:
                    part = codec.pack(*_numbers([cells[column] for column in self._inputs]))
                except OverflowError:
                    refused[row] = "out_of_range"
            parts.append(part)
        return codec.stack(parts)

    def at_end(self) -> bool:
        """Whether nothing more is to be had right now."""
        return self._lines.at_end()

    @property
    def ended(self) -> bool:
        """Whether every row was given out and none will come."""
        return self._lines.ended

    def remaining(self) -> int | None:
        """Rows not yet given out, as LineReader estimates them."""
        return self._lines.remaining()

    def close(self) -> None:
        """Close; closing twice is allowed."""
        self._lines.close()


class NpzReader:
    """An npz archive with the arrays ``x`` (rows first), ``y``, ``ids`` and ``ts``; the last three may be absent.

    It is read whole, without pickle. Without a codec only labels are read, and ``ids`` and ``y`` are needed.
    """

    def __init__(self, url: FileUrl, codec: Codec | None) -> None:
        self._url = url
        self._codec = codec
        self._arrays: dict[str, Any] = {}
        self._rows = self._next = 0

    def open(self, skip: int) -> None:
        """Read the archive and stand at row ``skip``.

        Raises:
            StreamError: it can't be read, lacks an array, has fewer rows or does not fit the model.
        """
        wanted = {"ids": "Uiu", "y": "iuf", "ts": "iuf"} | ({"x": "fiub"} if self._codec else {})
        needed = ("x",) if self._codec else ("ids", "y")
        try:
            with open(self._url.path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                self._arrays = {name: archive[name] for name in wanted if name in archive.files}
                missing = [name for name in needed if name not in archive.files]
                has = ", ".join(archive.files)
        except OSError as error:
            raise self._url.error(error) from None
        except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise self._url.error(f"not an npz archive of plain arrays: {error}") from None
        if missing:
            raise self._url.error(f"no array {missing[0]} in it; there are: {has}")
        self._rows, self._next = len(self._arrays[needed[0]]), skip
        for name, array in self._arrays.items():
            if array.dtype.kind not in wanted[name] or (name != "x" and array.shape != (self._rows,)):
                raise self._url.error(f"{name} is {array.dtype} of shape {array.shape}; x has {self._rows} rows")
        if self._codec is not None:
            self._fit(self._codec)
        if skip > self._rows:
            raise self._url.error(f"has {self._rows} rows, and the checkpoint goes on at row {skip}: another file?")

    def _fit(self, codec: Codec) -> None:
        x = self._arrays["x"]
        if x.shape[1:] not in (codec.input_shape, (codec.size,)):
            raise self._url.error(f"x has rows of shape {list(x.shape[1:])}, the model takes {list(codec.input_shape)}")

    def read(self, max_rows: int, timeout_s: float) -> Columns:
        """Up to ``max_rows`` rows, at once."""
        part = slice(self._next, min(self._next + max_rows, self._rows))
        count = part.stop - part.start
        self._next = part.stop
        taken = {name: array[part] for name, array in self._arrays.items()}
        columns = Columns(
            ids=[str(name) for name in taken["ids"].tolist()] if "ids" in taken else [None] * count,
            y=[y if math.isfinite(y) else None for y in taken["y"].tolist()] if "y" in taken else [None] * count,
            ts=[ts if math.isfinite(ts) else None for ts in taken["ts"].tolist()] if "ts" in taken else [None] * count,
        )
        if self._codec is not None:
            given = taken["x"].reshape(count, *self._codec.input_shape)
            with np.errstate(over="ignore"):
                columns.x = given.astype(np.float32)
            beyond = np.isinf(columns.x) & np.isfinite(given)
            for row in np.flatnonzero(beyond.reshape(count, -1).any(axis=1)).tolist():
                columns.refused[row] = "out_of_range"
                columns.x[row] = 0.0
        return columns

    def at_end(self) -> bool:
        """Whether nothing more is to be had."""
        return self._next >= self._rows

    @property
    def ended(self) -> bool:
        """Whether every row was given out."""
        return self.at_end()

    def remaining(self) -> int:
        """Rows not yet given out."""
        return self._rows - self._next

    def close(self) -> None:
        """Let the arrays go."""
        self._arrays, self._rows, self._next = {}, 0, 0


def _cells(line: bytes) -> list[str]:
    # One parser per line: with one for all of them an unclosed quote would swallow the rows below it.
    text = line.decode("utf-8", "replace")
    if '"' not in text:
        return text.split(",")
    try:
        return next(csv.reader([text]), [])
    except csv.Error:
        return []


def _scalar(cell: str | None) -> int | float | str | None:
    if not cell:
        return None
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def _numbers(cells: list[str]) -> list[float]:
    try:
        return [float(cell) for cell in cells]
    except ValueError:
        return [value if isinstance(value := _scalar(cell), (int, float)) else math.nan for cell in cells]
