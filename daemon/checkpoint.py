"""Atomic snapshots: state and offsets in one file.

Layout: 8 bytes magic, little-endian uint32 schema version, uint64 length of the body, uint32 CRC-32C of the body, body.
The body is MessagePack with arrays and tensors as extension types: data alone, never code.

A snapshot is written under a temporary name, fsynced, renamed, and the folder is fsynced: a crash leaves either the old
or the new one. A damaged file is refused by name and the one before it is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import crc32c
import msgspec
import numpy as np
import structlog

from daemon.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

log = structlog.get_logger("homeostat.checkpoint")

MAGIC = b"HOMEOST\x00"
SCHEMA = 1
_HEADER = struct.Struct("<8sIQI")
_ARRAY, _TENSOR, _INTEGER = 1, 2, 3
_NAME = re.compile(r"checkpoint-(\d{12})\.bin")


@dataclass(slots=True)
class Snapshot:
    """What one file holds."""

    sequence: int
    checkpoint_id: str
    config_hash: str
    positions: dict[str, int]
    label_positions: dict[str, int]
    state: dict[str, Any]
    topic_id: str = ""
    """Of the topic that the positions belong to: one made anew under its name has another."""
    path: Path | None = None


def _pack_array(array: np.ndarray) -> bytes:
    head = msgspec.msgpack.encode([array.dtype.str, list(array.shape)])
    return struct.pack("<I", len(head)) + head + np.ascontiguousarray(array).tobytes()


def _unpack_array(data: memoryview) -> np.ndarray:
    (length,) = struct.unpack_from("<I", data)
    dtype, shape = msgspec.msgpack.decode(data[4 : 4 + length])
    return np.frombuffer(data, np.dtype(dtype), offset=4 + length).reshape(shape).copy()


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return msgspec.msgpack.Ext(_ARRAY, _pack_array(value))
    import torch

    if isinstance(value, torch.Tensor):
        host = value.detach().cpu().contiguous()
        name = str(host.dtype).removeprefix("torch.").encode()
        # numpy has no bfloat16: a tensor travels as its bytes and the name of its type.
        raw = host.reshape(-1).view(torch.uint8).numpy() if host.numel() else np.empty(0, np.uint8)
        head = msgspec.msgpack.encode([name.decode(), list(host.shape)])
        return msgspec.msgpack.Ext(_TENSOR, struct.pack("<I", len(head)) + head + raw.tobytes())
    raise CheckpointError(f"{type(value).__name__} can't be written to a checkpoint")


def _decode(code: int, data: memoryview) -> Any:
    if code == _ARRAY:
        return _unpack_array(data)
    if code == _TENSOR:
        import torch

        (length,) = struct.unpack_from("<I", data)
        name, shape = msgspec.msgpack.decode(data[4 : 4 + length])
        raw = torch.frombuffer(bytearray(data[4 + length :]), dtype=torch.uint8) if len(data) > 4 + length else None
        dtype = getattr(torch, name)
        tensor: Tensor = torch.empty(shape, dtype=dtype) if raw is None else raw.view(dtype).reshape(shape)
        return tensor
    if code == _INTEGER:
        return int(bytes(data).decode())
    raise CheckpointError(f"unknown extension type {code}")


def _big(value: Any) -> Any:
    """MessagePack's integers end at 64 bits; a random generator's state is wider."""
    if isinstance(value, dict):
        return {key: _big(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_big(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**64:
        return msgspec.msgpack.Ext(_INTEGER, str(value).encode())
    return value


def encode(state: Any) -> bytes:
    """Nested dicts and lists of plain values, arrays and tensors as bytes."""
    return msgspec.msgpack.Encoder(enc_hook=_encode).encode(_big(state))


def decode(body: bytes) -> Any:
    """The inverse of `encode`; arrays and tensors are writable copies."""
    return msgspec.msgpack.Decoder(ext_hook=_decode).decode(body)


class Store:
    """The folder of snapshots; keeps the newest ``keep`` of them."""

    def __init__(self, folder: Path, *, keep: int = 3) -> None:
        self.folder = folder
        self.keep = keep
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".checkpoint-*.tmp"):
                leftover.unlink()
        except OSError as error:
            raise CheckpointError(f"HOMEOSTAT_CHECKPOINT__DIR={folder}: {error.strerror}") from None
        self.refused: list[str] = []
        """Why files were passed over by `newest`, one line each."""
        self._lock: int | None = None

    def lock(self) -> None:
        """Keep the folder to this process, as long as it lives.

        Raises:
            CheckpointError: another process has it.
        """
        try:
            file = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            # A folder that can't be written: `write` says so, again and again, and the stream goes on.
            log.error("folder of checkpoints not locked", folder=str(self.folder), error=str(error))
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 20).decode("ascii", "replace").strip() or "unknown"
            os.close(file)
            raise CheckpointError(
                f"{self.folder} is in use by another homeostat (process {holder}): stop that one, or give this one a "
                "folder of its own by HOMEOSTAT_STATE_DIR"
            ) from None
        # For whoever is refused; on a full disk that one does without.
        with contextlib.suppress(OSError):
            os.truncate(file, 0)
            os.write(file, f"{os.getpid()}\n".encode())
        self._lock = file

    def close(self) -> None:
        """Leave the folder to others."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def files(self) -> list[Path]:
        """Snapshots, newest first."""
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: path.name, reverse=True)

    def write(self, snapshot: Snapshot) -> Path:
        """Write one snapshot durably and remove the ones that are no longer kept.

        Raises:
            OSError: when the folder can't be written (full, read-only); the older snapshots stay as they are.
        """
        body = encode(
            {
                "sequence": snapshot.sequence,
                "checkpoint_id": snapshot.checkpoint_id,
                "config_hash": snapshot.config_hash,
                "positions": snapshot.positions,
                "label_positions": snapshot.label_positions,
                "state": snapshot.state,
                "topic_id": snapshot.topic_id,
            }
        )
        path = self.folder / f"checkpoint-{snapshot.sequence:012d}.bin"
        temporary = self.folder / f".{path.name}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(_HEADER.pack(MAGIC, SCHEMA, len(body), crc32c.crc32c(body)))
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)
        for old in self.files()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def newest(self) -> Snapshot | None:
        """The newest readable snapshot, None in an empty folder. What is damaged is named in ``refused``.

        Raises:
            CheckpointError: when there are snapshots and every one is damaged: starting afresh would be a silent loss.
        """
        self.refused = []
        files = self.files()
        for path in files:
            try:
                return read(path)
            except CheckpointError as error:
                self.refused.append(str(error))
        if files:
            raise CheckpointError(
                "; ".join(self.refused) + f". No snapshot in {self.folder} is readable: restore one from a backup, "
                "or move the folder away to start afresh"
            )
        return None


def read(path: Path) -> Snapshot:
    """Read one file.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if len(data) < _HEADER.size:
        raise CheckpointError(f"{path}: {len(data)} bytes are too few for a checkpoint's header")
    magic, schema, length, crc = _HEADER.unpack_from(data)
    body = data[_HEADER.size :]
    if magic != MAGIC:
        raise CheckpointError(f"{path}: not a homeostat checkpoint")
    if schema != SCHEMA:
        raise CheckpointError(f"{path}: schema version {schema}; this homeostat reads version {SCHEMA}")
    if length != len(body):
        raise CheckpointError(f"{path}: truncated: {len(body)} of {length} bytes")
    if crc32c.crc32c(body) != crc:
        raise CheckpointError(f"{path}: damaged: checksum differs")
    try:
        content = decode(body)
        return Snapshot(**content, path=path)
    except (msgspec.MsgspecError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable content: {error}") from None


def new_id() -> str:
    """A name for a line of descent of checkpoints."""
    return secrets.token_hex(8)
