"""Recorded rows for `homeostat detect`: the number columns of a CSV, or the arrays of an npz."""

from __future__ import annotations

import csv
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daemon.errors import StreamError
from daemon.records import F64
from daemon.source_data import NOT_INPUTS

CHUNK = 4096
"""Lines of a CSV that are held as text at once."""
DELIMITERS = ",;\t"
MISSING = frozenset(("", "-", "?", "na", "n/a", "nan", "none", "null", "nil", "missing"))
"""Cells, in small letters, that stand for a value that is not there."""
ELEMENT = re.compile(r"(.+?)(?:\[(\d+)\]|:(\d+))")


@dataclass(slots=True)
class Recording:
    """What a file holds: columns of numbers by name, and why others can't be used."""

    path: Path
    names: list[str]
    """All columns of a CSV, all arrays of an npz, in the file's order."""
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    """(N,), or (N, D) for an array with more than one dimension."""
    problems: dict[str, str] = field(default_factory=dict)
    """What is wrong with a column that is not in ``arrays``, or that has text among its numbers."""
    usual: list[str] = field(default_factory=list)
    """The columns taken when none is named."""

    def choose(self, wanted: Sequence[str] = ()) -> dict[str, F64]:
        """The columns (N,) that ``wanted`` names, in that order; the usual ones if it is empty.

        A name is that of a column or an array, a number counted from 0, or ``x[3]`` (``x:3``) for one column of an
        array (N, D); the name of such an array stands for all its columns.

        Raises:
            StreamError: naming the file, the column and what to do.
        """
        if not wanted and not self.usual:
            if self.problems:
                self._resolve(next(iter(self.problems)))
            raise StreamError(f"{self.path}: no column of numbers to take: choose with --column from {self._listed()}")
        found: dict[str, NDArray[Any]] = {}
        for name in wanted or self.usual:
            found.update(self._resolve(name))
        lengths = {name: len(column) for name, column in found.items()}
        if len(set(lengths.values())) > 1:
            short, long = min(lengths, key=lengths.__getitem__), max(lengths, key=lengths.__getitem__)
            raise StreamError(
                f"{self.path}: {short} has {lengths[short]} rows, {long} has {lengths[long]}: choose columns of the "
                "same length with --column"
            )
        if not all(lengths.values()):
            raise StreamError(f"{self.path}: no rows")
        return {name: column.astype(np.float64, copy=False) for name, column in found.items()}

    def _resolve(self, name: str) -> dict[str, NDArray[Any]]:
        if name in self.problems:
            raise StreamError(f"{self.path}: column {name}: {self.problems[name]}")
        if name in self.arrays:
            array = self.arrays[name]
            return {name: array} if array.ndim == 1 else {f"{name}[{j}]": array[:, j] for j in range(array.shape[1])}
        if (part := ELEMENT.fullmatch(name)) and (array_name := part[1]) in self.arrays:
            array, index = self.arrays[array_name], int(part[2] or part[3])
            if array.ndim == 2 and index < array.shape[1]:
                return {f"{array_name}[{index}]": array[:, index]}
            raise StreamError(f"{self.path}: no column {name}: {array_name} has shape {array.shape}, counted from 0")
        if name.isdecimal() and int(name) < len(self.names):
            return self._resolve(self.names[int(name)])
        raise StreamError(f"{self.path}: no column {name}: choose with --column from {self._listed()}")

    def _listed(self) -> str:
        more = f" and {len(self.names) - 20} more" if len(self.names) > 20 else ""
        return (", ".join(self.names[:20]) or "none") + more


def read_recording(path: Path) -> Recording:
    """Read ``path``, an npz by its ending, else a CSV.

    A CSV has a comma, semicolon or tab between cells, and a header unless its first line is all numbers (columns are
    then named 0, 1, ...). Without a choice all its columns of numbers are taken but ``id``, ``y``, ``ts`` and those
    without a name; of an npz the array ``x``, or all arrays of numbers if there is none.

    Raises:
        StreamError: naming the file, the line where there is one, and what is wrong.
    """
    try:
        return _npz(path) if path.suffix == ".npz" else _csv(path)
    except FileNotFoundError:
        raise StreamError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise StreamError(f"{path}: neither an npz nor text in UTF-8 ({error.reason} at byte {error.start})") from None
    except (OSError, ValueError, EOFError, csv.Error, zipfile.BadZipFile, zlib.error) as error:
        raise StreamError(f"{path}: {error}") from None


def _npz(path: Path) -> Recording:
    # Opened here: of a damaged archive numpy leaves its own file open.
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("not an npz: write it with numpy.savez")
        file.seek(0)
        with np.load(file, allow_pickle=False) as data:
            made = Recording(path, list(data.files))
            for name in data.files:
                try:
                    array = data[name]
                except ValueError as error:
                    made.problems[name] = str(error)
                    continue
                if array.dtype.kind not in "biuf" or not array.ndim or not array.size:
                    made.problems[name] = f"no rows of numbers (shape {array.shape}, {array.dtype})"
                else:
                    made.arrays[name] = array if array.ndim == 1 else array.reshape(len(array), -1)
    made.usual = ["x"] if "x" in made.names else list(made.arrays)
    return made


class _Column:
    """One column of a CSV while it is read."""

    def __init__(self) -> None:
        self.parts: list[F64] = []
        self.numbers = 0
        self.text = ""

    def take(self, cells: Sequence[str], lines: Sequence[int]) -> None:
        """Read ``cells`` (B,), which stand on ``lines`` (B,) of the file."""
        try:
            part = np.array(cells, dtype=np.float64)
        except ValueError:
            part = np.array([self._number(cell, line) for cell, line in zip(cells, lines, strict=True)])
        self.numbers += int(np.isfinite(part).sum())
        self.parts.append(part)

    def _number(self, cell: str, line: int) -> float:
        try:
            return float(cell)
        except ValueError:
            if not self.text and cell.strip().lower() not in MISSING:
                self.text = f"line {line}: {cell[:40]!r} is not a number: correct it, or choose others with --column"
            return float("nan")


def _csv(path: Path) -> Recording:
    with open(path, newline="", encoding="utf-8-sig") as file:
        first = file.readline()
        if not first.strip():
            raise ValueError("empty: a header and rows of numbers are needed")
        file.seek(0)
        reader = csv.reader(file, delimiter=max(DELIMITERS, key=first.count))
        header = next(reader)
        if all(_is_number(cell) for cell in header):
            file.seek(0)
            reader = csv.reader(file, delimiter=reader.dialect.delimiter)
            names = [str(index) for index in range(len(header))]
        else:
            names = _names(header)
        columns = [_Column() for _ in names]
        rows = ((reader.line_num, row) for row in reader if row)
        while chunk := list(islice(rows, CHUNK)):
            for line, row in chunk:
                if len(row) != len(names):
                    raise ValueError(f"line {line} has {len(row)} cells, the first line {len(names)}: correct it")
            lines = [line for line, _ in chunk]
            for column, cells in zip(columns, zip(*(row for _, row in chunk), strict=True), strict=True):
                column.take(cells, lines)
    return _of_columns(path, names, columns)


def _of_columns(path: Path, names: list[str], columns: list[_Column]) -> Recording:
    if not columns[0].parts:
        raise ValueError("no rows below the header")
    made = Recording(path, names)
    for name, column in zip(names, columns, strict=True):
        if column.text:
            made.problems[name] = column.text
        elif not column.numbers:
            made.problems[name] = "no finite number in it: choose others with --column"
        else:
            made.arrays[name] = np.concatenate(column.parts)
        # A column of nothing but text is none of numbers; one bad cell among numbers is a fault to be told.
        if column.numbers and name not in NOT_INPUTS and not name.startswith("unnamed "):
            made.usual.append(name)
    return made


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _names(header: list[str]) -> list[str]:
    """Column names; one without gets "unnamed" and its place, and so does the second of two equal ones."""
    names: list[str] = []
    for index, cell in enumerate(header):
        name = cell.strip() or f"unnamed {index}"
        names.append(f"{name} (column {index})" if name in names else name)
    return names
