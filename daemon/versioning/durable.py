"""Writing files so that a crash leaves the old or the new content, never half of one; values as strict JSON."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

DEEPEST = 8
"""Nesting up to which values are written; what lies deeper is written as text."""


def write(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``: temporary name, fsync, rename, fsync of the folder.

    Raises:
        OSError: the folder can't be written; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names in ``folder`` durable: a rename is lost with the power otherwise."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove temporary files that a crash left behind."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def now() -> str:
    """The time as it is written into records: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def plain(value: Any, depth: int = 0) -> Any:
    """``value`` in what strict JSON can say: numbers that are not finite become null, anything unknown its text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth < DEEPEST:
        if isinstance(value, Mapping):
            return {str(name): plain(item, depth + 1) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item, depth + 1) for item in value]
        if hasattr(value, "tolist") and not isinstance(value, str):
            return plain(value.tolist(), depth + 1)
    return str(value)
