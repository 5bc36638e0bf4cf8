"""One version as one small file: what differs from the frozen model, and the record of why it was kept.

``version-000007.safetensors`` holds the encoded delta (`adapters.slow.deltas.encoding`) and in its metadata the schema,
the hash of the bundle it belongs to, its number, its parent and its record as JSON. A pinned version's file is named
``version-000007.pinned.safetensors``: the pin outlives a lost checkpoint. Nothing in a file is code.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemon.versioning import durable
from daemon.versions import VersionError

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = "1"
NAME = re.compile(r"version-(\d{6,9})(\.pinned)?\.safetensors")
LARGEST_HEADER = 16 << 20
"""Bytes of metadata and names that are read from a file."""


@dataclass(frozen=True, slots=True)
class Card:
    """What a file says of itself, without its tensors."""

    path: Path
    number: int
    """0 for one that no daemon has numbered: a merge."""
    parent: int
    bundle: str
    """Hash of the bundle whose frozen model the delta is against."""
    record: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, list[int]] = field(default_factory=dict)
    """Shapes of what is stored."""
    size: int = 0
    """Bytes of the file."""

    @property
    def pinned(self) -> bool:
        """By its name."""
        found = NAME.fullmatch(self.path.name)
        return bool(found and found[2])


def path_of(folder: Path, number: int, *, pinned: bool = False) -> Path:
    """Where a version's file lies."""
    return folder / f"version-{number:06d}{'.pinned' if pinned else ''}.safetensors"


def files(folder: Path) -> dict[int, Path]:
    """Version files by number; the pinned one where there are both."""
    found = {}
    for path in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else ():
        if matched := NAME.fullmatch(path.name):
            number = int(matched[1])
            if number not in found or matched[2]:
                found[number] = path
    return dict(sorted(found.items()))


def write(
    path: Path,
    delta: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    *,
    bundle: str,
    number: int,
    parent: int,
    record: Mapping[str, Any],
) -> int:
    """Encode and write a version; returns the bytes of the file.

    Args:
        path: where to; what is there is replaced in one step.
        delta: new values by parameter name, cumulative over the frozen model.
        base: the frozen model's tensors by name.
        bundle: hash of the frozen model's bundle.
        number: of the version; 0: not numbered yet.
        parent: number it was learnt from.
        record: why it was kept.

    Raises:
        OSError: the folder can't be written.
    """
    from safetensors.torch import save

    from adapters.slow.deltas.encoding import encode

    host = {name: value.detach().cpu() for name, value in delta.items()}
    tensors = {name: value.contiguous().clone() for name, value in encode(host, host_of(base)).items()}
    metadata = {
        "homeostat": SCHEMA,
        "bundle": bundle,
        "number": str(number),
        "parent": str(parent),
        "record": json.dumps(durable.plain(record), sort_keys=True),
    }
    data = save(tensors, metadata)
    durable.write(path, data)
    return len(data)


def host_of(base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base's tensors on the host."""
    return {name: value.detach().cpu() for name, value in base.items()}


def read_card(path: Path) -> Card:
    """A file's metadata and the shapes of its tensors; imports no torch.

    Raises:
        VersionError: naming the file and what is wrong with it.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(LARGEST_HEADER, size):
                raise VersionError(f"{path}: not a safetensors file, or truncated")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        tensors = {name: list(entry["shape"]) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size != 8 + length + end:
            raise VersionError(f"{path}: truncated: {size} of {8 + length + end} bytes")
        if metadata.get("homeostat") != SCHEMA:
            found = metadata.get("homeostat")
            raise VersionError(f"{path}: schema {found} of a version's file; this homeostat reads {SCHEMA}")
        return Card(
            path,
            int(metadata["number"]),
            int(metadata["parent"]),
            str(metadata["bundle"]),
            dict(json.loads(metadata["record"])),
            tensors,
            size,
        )
    except OSError as error:
        raise VersionError(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise VersionError(f"{path}: not a version's file: {error!r}") from None


def read(path: Path, base: Mapping[str, Tensor], *, bundle: str) -> tuple[Card, dict[str, Tensor]]:
    """A version's card and its delta, on the host.

    Raises:
        VersionError: the file is damaged, of another bundle, or does not fit the model; naming it.
    """
    card = read_card(path)
    check_bundle(card, bundle)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from adapters.slow.deltas.encoding import decode

    try:
        delta = decode(load_file(path), host_of(base))
    except (ValueError, KeyError, RuntimeError, SafetensorError, OSError) as error:
        raise VersionError(f"{path}: does not fit the model: {error}") from None
    for name, value in delta.items():
        if not bool(value.isfinite().all()):
            raise VersionError(f"{path}: {name!r} holds values that are not finite")
    return card, delta


def check_bundle(card: Card, bundle: str) -> None:
    """Refuse a version of another bundle.

    Raises:
        VersionError: naming the file and both hashes.
    """
    if card.bundle != bundle:
        raise VersionError(
            f"{card.path}: made for bundle {card.bundle}, this one is {bundle}: "
            "its values mean nothing to another model"
        )
