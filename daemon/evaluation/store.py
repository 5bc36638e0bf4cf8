"""Results on disk: one JSON line for each configuration and seed, so that a second run goes on where one was killed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import adapters
import daemon
import detectors
from daemon.errors import SettingsError
from daemon.evaluation.answers import Replayed

_FLOATS, _BITS = ("prediction", "confidence"), ("adapted", "same", "backward")
_PLAIN = ("states", "warnings", "seconds", "slow_seconds", "peak_bytes", "source_error", "frozen_source_error")


class Store:
    """The results in one folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._found = self._read()
        except OSError as error:
            raise SettingsError([f"--state={folder}: {error.strerror}: give a folder that can be written"]) from None

    def _read(self) -> dict[str, dict[str, Any]]:
        """Lines by key, the later of two; what a kill left of a line is passed over."""
        found: dict[str, dict[str, Any]] = {}
        if not self.path.is_file():
            return found
        with open(self.path, "rb") as file:
            for line in file:
                try:
                    content = json.loads(line)
                    found[content["key"]] = content
                except (ValueError, KeyError, TypeError):
                    continue
        return found

    def get(self, key: str) -> Replayed | str | None:
        """The result under ``key``: the replay, or why it was refused; None where there is none that can be read."""
        content = self._found.get(key)
        if content is None:
            return None
        if "refused" in content:
            return str(content["refused"])
        try:
            return _replayed(content)
        except (KeyError, ValueError, TypeError, zlib.error):
            return None

    def put(self, key: str, name: str, result: Replayed | str) -> None:
        """Write it, whole and at once, on the disk when this returns.

        Raises:
            SettingsError: the folder can't be written.
        """
        content: dict[str, Any] = {"key": key, "name": name}
        content |= {"refused": result} if isinstance(result, str) else _content(result)
        line = json.dumps(content).encode() + b"\n"
        try:
            with open(self.path, "a+b") as file:
                if file.tell() and not _ends_whole(file):
                    line = b"\n" + line
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SettingsError([f"--state={self.path.parent}: {error.strerror}: results can't be kept"]) from None


def key(*parts: Any) -> str:
    """20 hex digits of all that a result depends on, this version's code included."""
    return hashlib.sha256(json.dumps([*parts, code_version()], sort_keys=True, default=str).encode()).hexdigest()[:20]


def code_version() -> str:
    """16 hex digits that change with the code of this installation."""
    global _version
    if not _version:
        found = hashlib.sha256(daemon.__version__.encode())
        for package in (adapters, daemon, detectors):
            root = Path(str(package.__file__)).parent
            for file in sorted(root.rglob("*.py")):
                found.update(str(file.relative_to(root)).encode() + file.read_bytes())
        _version = found.hexdigest()[:16]
    return _version


_version = ""


def _ends_whole(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def _content(result: Replayed) -> dict[str, Any]:
    content = {name: getattr(result, name) for name in _PLAIN}
    content |= {name: _packed(getattr(result, name).astype("<f4")) for name in _FLOATS}
    content |= {name: _packed(np.packbits(getattr(result, name))) for name in _BITS}
    content["rows"] = len(result.prediction)
    content["decisions"] = [[row, text] for row, text in result.decisions]
    content["asked"] = {str(row): _packed(values.astype("<f4")) for row, values in result.asked.items()}
    return content


def _replayed(content: dict[str, Any]) -> Replayed:
    rows = int(content["rows"])
    columns: dict[str, Any] = {name: _floats(content[name]) for name in _FLOATS}
    for name in _BITS:
        columns[name] = np.unpackbits(np.frombuffer(_unpacked(content[name]), np.uint8), count=rows).astype(bool)
    if any(len(column) != rows for column in columns.values()):
        raise ValueError("columns of another length")
    return Replayed(
        **columns,
        **{name: content[name] for name in _PLAIN},
        decisions=[(int(row), str(text)) for row, text in content["decisions"]],
        asked={int(row): _floats(values) for row, values in content["asked"].items()},
    )


def _packed(array: NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), 6)).decode()


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def _floats(text: str) -> NDArray[np.float32]:
    return np.frombuffer(_unpacked(text), "<f4").astype(np.float32)
