"""What is deployed: a folder with weights, reference statistics, calibration and a manifest that vouches for them.

    manifest.json           schema version, task, input shape, classes, factory's name, SHA-256 of the other files
    model.safetensors       the trained weights
    reference.safetensors   moments of inputs and features, class prior, exemplars; what fast methods prepared
    calibration.json        per signal: reference level, band, detector thresholds and the ARL0 that was reached

No file holds code, and nothing in a bundle can make the daemon import anything: the factory that builds the module is
named by the operator (``HOMEOSTAT_FACTORY``); the manifest's name of it is for the error message.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemon.errors import BundleError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from adapters.reference import Reference

SCHEMA = 2
FILES = ("model.safetensors", "reference.safetensors", "calibration.json")
BUILT_IN = frozenset({"daemon.streams.simmodel:build"})
"""Factories that are part of homeostat and need no permission."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle says of itself."""

    task: str
    input_shape: list[int]
    outputs: int
    """Classes, or values of a regression."""
    factory: str
    head: str | None
    reference_rows: int
    calibration_rows: int
    classes: list[str] | None = None
    prepared: list[str] = field(default_factory=list)
    """Fast methods that have computed what they need from source rows."""
    false_alarms: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By detector and signal, in rows: the ARL0 asked for, the one reached in simulation, and its 95% interval."""
    schema: int = SCHEMA
    files: dict[str, str] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Short digest of everything in the bundle."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(slots=True)
class Bundle:
    """An opened bundle: the module with its weights, in eval mode on the CPU."""

    path: Path
    manifest: Manifest
    model: nn.Module
    reference: Reference
    calibration: dict[str, Any]

    @property
    def hash(self) -> str:
        """Short digest of everything in it."""
        return self.manifest.hash


def build_model(factory: str, app_dir: Path = Path("."), *, variable: str = "HOMEOSTAT_FACTORY") -> nn.Module:
    """Import ``module:function`` and call it without arguments.

    ``app_dir`` is searched last, so that a file there can't stand in for an installed module.

    Raises:
        BundleError: naming the variable and what is wrong.
    """
    from torch import nn

    module_name, _, function = factory.partition(":")
    if not module_name or not function:
        raise BundleError(f"{variable}={factory}: right would be module:function, for example my_models:build")
    folder = str(app_dir.resolve())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        target = getattr(importlib.import_module(module_name), function)
    except ImportError as error:
        raise BundleError(
            f"{variable}={factory}: can't import {module_name!r} ({error}); searched {folder} too"
        ) from None
    except AttributeError:
        raise BundleError(f"{variable}={factory}: {module_name!r} has no {function!r}") from None
    try:
        model = target()
    except Exception as error:
        raise BundleError(f"{variable}={factory}: failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise BundleError(f"{variable}={factory}: returned {type(model).__name__}, not a torch.nn.Module")
    return model.eval()


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Put ``tensors`` into ``model``; every name and shape has to fit.

    Raises:
        BundleError: naming the file and the first names that don't fit.
    """
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise BundleError(f"{source}: the weights don't fit the factory's module: {' '.join(lines)}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; raises BundleError naming it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise BundleError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path}: not a readable safetensors file: {error}") from None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(path: Path) -> Manifest:
    """The manifest alone, without touching weights (and without importing torch).

    Raises:
        BundleError: naming the file and what is wrong.
    """
    file = path / "manifest.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"HOMEOSTAT_BUNDLE={path}: no manifest.json there; `homeostat pack` makes a bundle") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{file}: unreadable: {error}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else None
        raise BundleError(f"{file}: schema version {found}; this homeostat reads version {SCHEMA}: pack it again")
    try:
        manifest = Manifest(**content)
    except TypeError as error:
        raise BundleError(f"{file}: {error}") from None
    shape = manifest.input_shape
    if not shape or not all(isinstance(size, int) and size > 0 for size in shape):
        raise BundleError(f"{file}: input_shape {shape} is not a list of positive numbers")
    if manifest.task not in ("classification", "regression"):
        raise BundleError(f"{file}: task {manifest.task!r} is neither classification nor regression")
    return manifest


def open_bundle(path: Path, factory: str = "", app_dir: Path = Path(".")) -> Bundle:
    """Check every hash, build the module, load the weights.

    Raises:
        BundleError: naming the file or variable and what is wrong.
    """
    from adapters.reference import Reference

    manifest = read_manifest(path)
    for name in FILES:
        if not (path / name).is_file():
            raise BundleError(f"{path / name}: missing; the bundle is incomplete")
        if _digest(path / name) != manifest.files.get(name):
            raise BundleError(f"{path / name}: does not match the manifest's hash; the bundle is damaged or was edited")
    if not factory:
        if manifest.factory not in BUILT_IN:
            raise BundleError(
                f"HOMEOSTAT_FACTORY is empty: the bundle {path} was packed with {manifest.factory!r}; "
                f"set HOMEOSTAT_FACTORY={manifest.factory} to let it be imported"
            )
        factory = manifest.factory
    model = build_model(factory, app_dir)
    load_weights(model, read_tensors(path / "model.safetensors"), path / "model.safetensors")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    reference = Reference.from_tensors(read_tensors(path / "reference.safetensors"))
    calibration = json.loads((path / "calibration.json").read_text(encoding="utf-8"))
    return Bundle(path, manifest, model, reference, calibration)


def save_bundle(
    path: Path,
    manifest: dict[str, Any],
    model: nn.Module,
    reference: Reference,
    calibration: dict[str, Any],
) -> Manifest:
    """Write a bundle under a temporary name and move it into place.

    Raises:
        BundleError: when ``path`` exists and is not a bundle, or can't be written.
    """
    if path.exists() and not (path / "manifest.json").is_file() and (not path.is_dir() or any(path.iterdir())):
        raise BundleError(f"{path}: exists and is not a bundle; name another folder")
    try:
        return _write(path, manifest, model, reference, calibration)
    except OSError as error:
        raise BundleError(f"{path}: can't be written: {error.strerror or error}") from None


def _write(
    path: Path, manifest: dict[str, Any], model: nn.Module, reference: Reference, calibration: dict[str, Any]
) -> Manifest:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".bundle-") as temporary:
        folder = Path(temporary)
        weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        save_file(reference.to_tensors(), folder / "reference.safetensors")
        (folder / "calibration.json").write_text(json.dumps(calibration, indent=1), encoding="utf-8")
        content = Manifest(**manifest, files={name: _digest(folder / name) for name in FILES})
        (folder / "manifest.json").write_text(json.dumps(asdict(content), indent=1), encoding="utf-8")
        path.mkdir(exist_ok=True)
        # The manifest goes last: a bundle without it, or with old hashes, is refused instead of half used.
        for name in (*FILES, "manifest.json"):
            os.replace(folder / name, path / name)
    return content
