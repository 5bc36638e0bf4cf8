"""Labelled source rows for `homeostat pack`: from npz or CSV."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

import numpy as np

from daemon.errors import BundleError
from daemon.records import F32, F64

NOT_INPUTS = ("id", "y", "ts")


def read_rows(path: Path) -> tuple[F32, F64]:
    """``x`` (N, *shape) and ``y`` (N,) of the rows that are finite.

    An npz has the arrays ``x`` and ``y``. A CSV has a header; ``y`` is a column, ``id`` and ``ts`` are left out, all
    others in their order are ``x``; an empty cell or a text in it makes the row not finite.

    Raises:
        BundleError: naming the file and what is wrong with it.
    """
    try:
        x, y = _npz(path) if path.suffix == ".npz" else _csv(path)
    except FileNotFoundError:
        raise BundleError(f"{path}: no such file") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path}: {error}") from None
    if len(x) != len(y) or y.ndim != 1 or x.ndim < 2:
        raise BundleError(f"{path}: x {x.shape} and y {y.shape} don't fit; x is (N, *shape), y (N,)")
    finite = np.isfinite(x.reshape(len(x), -1)).all(axis=1) & np.isfinite(y)
    if not finite.any():
        raise BundleError(f"{path}: no row is finite")
    return x[finite], y[finite]


def _npz(path: Path) -> tuple[F32, F64]:
    # Opened here: of a damaged archive numpy leaves its own file open.
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
        if missing := {"x", "y"} - set(data.files):
            raise ValueError(f"has no array {' and '.join(sorted(missing))}; it holds {', '.join(data.files)}")
        with np.errstate(over="ignore"):  # beyond float32 becomes infinite, and the row is left out
            return data["x"].astype(np.float32), data["y"].astype(np.float64)


def _csv(path: Path) -> tuple[F32, F64]:
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if "y" not in header:
            raise ValueError(f"has no column y; its columns are {', '.join(header) or 'none'}")
        inputs = [index for index, name in enumerate(header) if name not in NOT_INPUTS]
        label = header.index("y")
        rows = [[_number(row, index) for index in (*inputs, label)] for row in reader if row]
    table = np.asarray(rows, dtype=np.float64).reshape(len(rows), len(inputs) + 1)
    with np.errstate(over="ignore"):
        return table[:, :-1].astype(np.float32), table[:, -1]


def _number(row: list[str], index: int) -> float:
    try:
        return float(row[index])
    except (ValueError, IndexError):
        return float("nan")
