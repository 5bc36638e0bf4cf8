"""`homeostat inspect`: what a bundle, a checkpoint or a folder of versions holds, in words or as JSON with digests."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from daemon import checkpoint
from daemon.bundle import read_manifest
from daemon.errors import BundleError, CheckpointError
from daemon.versioning import files, journal
from daemon.versioning.overview import in_words, overview

LONGEST_SHOWN = 2_000
"""Characters of one value: what a detector learnt of features is longer, and no reading for people."""
CLOCKED = {"seconds", "made_at"}
"""Entries that no two runs share: what the wall clock measured."""


def inspect(path: Path, *, as_json: bool = False) -> int:
    """Print it; returns 0.

    Raises:
        HomeostatError: when ``path`` is none of them, or damaged.
    """
    if path.is_dir() and (journal.is_journal(path) or files.files(path)):
        found = overview(path)
        print(json.dumps(found, indent=1) if as_json else in_words(found, everything=True))
        return 0
    if (path / "manifest.json").is_file():
        content: dict[str, Any] = {"bundle": str(path), **asdict(read_manifest(path))}
        try:
            content["calibration"] = json.loads((path / "calibration.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BundleError(f"{path / 'calibration.json'}: unreadable: {error}") from None
    else:
        content = describe(_snapshot(path))
    if as_json:
        print(json.dumps(content, indent=1, default=str))
    else:
        print_tree(content)
    return 0


def _snapshot(path: Path) -> checkpoint.Snapshot:
    if path.is_dir():
        files = sorted(path.glob("checkpoint-*.bin"))
        if not files:
            raise CheckpointError(f"{path}: neither a bundle nor a folder of checkpoints or versions")
        path = files[-1]
    return checkpoint.read(path)


def describe(snapshot: checkpoint.Snapshot) -> dict[str, Any]:
    """A checkpoint in plain values: offsets, counts, versions with their records, and digests of the parts."""
    state = snapshot.state
    resident = state["resident"]
    return {
        "checkpoint": str(snapshot.path),
        "sequence": snapshot.sequence,
        "checkpoint_id": snapshot.checkpoint_id,
        "positions": snapshot.positions,
        "label_positions": snapshot.label_positions,
        "state": state["regulator"]["state"],
        "gain": resident["gain"],
        "version": resident["current"]["number"],
        "held": resident.get("held", False),
        "versions": [
            {"number": item["number"], "pinned": item["number"] in resident.get("pinned", ()), **item["record"]}
            for item in [*resident["ring"], resident["current"]]
        ],
        "tally": state["tally"],
        "digests": {name: digest(part) for name, part in state.items()},
    }


def digest(value: Any) -> str:
    """SHA-256 over a state tree, arrays and tensors by their bytes: equal digests are equal states, to the bit.

    What the wall clock measured (`CLOCKED`) is left out: it is equal in no two runs.
    """
    result = hashlib.sha256()
    _feed(value, result)
    return result.hexdigest()[:16]


def _feed(value: Any, result: Any) -> None:
    if isinstance(value, dict):
        for name in sorted(value.keys() - CLOCKED):
            result.update(name.encode() + b"\0")
            _feed(value[name], result)
    elif isinstance(value, (list, tuple)):
        result.update(f"[{len(value)}".encode())
        for item in value:
            _feed(item, result)
    elif isinstance(value, np.ndarray):
        result.update(f"{value.dtype.str}{value.shape}".encode() + value.tobytes())
    elif hasattr(value, "detach"):
        from torch import uint8

        plain = value.detach().cpu().contiguous()
        result.update(f"{plain.dtype}{tuple(plain.shape)}".encode() + plain.reshape(-1).view(uint8).numpy().tobytes())
    else:
        result.update(repr(value).encode() + b"\1")


def print_tree(value: Any, depth: int = 0) -> None:
    """Print nested plain values, one a line."""
    indent = "  " * depth
    for name, item in value.items():
        if isinstance(item, dict) and item:
            print(f"{indent}{name}:")
            print_tree(item, depth + 1)
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            print(f"{indent}{name}:")
            for entry in item:
                print(f"{indent}  - " + ", ".join(f"{key}={shown}" for key, shown in entry.items()))
        elif len(text := str(item)) > LONGEST_SHOWN:
            print(f"{indent}{name}: {text[:40]}… ({len(text):,} characters, all of them with --json)")
        else:
            print(f"{indent}{name}: {item}")
