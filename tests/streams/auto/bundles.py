"""Bundles of the source models, as `homeostat pack` makes them, kept in the user's cache for replays."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from daemon import packing
from tests.streams import models
from tests.streams.auto import sources

ROOT = Path(__file__).resolve().parents[3]
WATCH = ("cusum",)
METHODS = "adapters.fast"
"""Their code is part of the key only where they are asked to prepare something."""


def bundle_for(name: str, prepare: Sequence[str] = (), watch: Sequence[str] = WATCH) -> Path:
    """Folder of the bundle of the source model ``name``: from the cache, else packed now and put there.

    The reference is of the rows that the model was trained on, the calibration of those held back; the daemon serves it
    with ``HOMEOSTAT_FACTORY`` set to `sources.get(name).factory` and ``HOMEOSTAT_APP_DIR`` to the repository.

    Args:
        name: one of `sources.SOURCES`.
        prepare: fast methods that are to compute what they need from the source rows.
        watch: detectors to calibrate.

    Raises:
        ValueError: when there is no such model.
        BundleError: when it can't be packed.
    """
    source = sources.get(name)
    asked = hashlib.sha256(repr((code_version(bool(prepare)), tuple(prepare), tuple(watch))).encode()).hexdigest()[:12]
    folder = models.cache_folder() / "bundles" / f"{source.stem}-{asked}"
    if not (folder / "manifest.json").is_file():  # which is written last
        x, y = sources.reference_rows(name)
        packing.pack(
            folder,
            model=sources.model(name),
            factory=source.factory,
            x=x,
            y=y,
            calibration=source.rows("held"),
            watch=watch,
            prepare=prepare,
        )
    return folder


@lru_cache(maxsize=2)
def code_version(with_methods: bool) -> str:
    """Changes with the code that packs: `daemon.packing` and whatever of ours it imports, itself or through others."""
    seen: dict[Path, bytes] = {}
    waiting = [Path(packing.__file__)]
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen[file] = file.read_bytes()
            waiting += _imported(file, with_methods)
    return hashlib.sha256(b"".join(seen[file] for file in sorted(seen))).hexdigest()


def _imported(file: Path, with_methods: bool) -> list[Path]:
    """Files of our packages that a module imports; of ``import detectors`` all, since detectors are found by name."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    found = []
    for name in names:
        if name.partition(".")[0] not in ("daemon", "adapters", "detectors"):
            continue
        if name.startswith(METHODS) and not with_methods:
            continue
        path = ROOT / name.replace(".", "/")
        if path.is_dir() and name != "daemon":
            found += sorted(path.glob("**/*.py"))
        elif path.with_suffix(".py").is_file():
            found.append(path.with_suffix(".py"))
    return found
