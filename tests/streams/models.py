"""Trained source models, kept in the user's cache, and what a bundle would know of their source rows.

The cache's names are made of the recipes' text and the data's content; the reference is cheap and made anew.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapters.fast import FastAdapter
from adapters.features import FeatureTap, find_head
from adapters.reference import Reference
from daemon import packing
from daemon.source_reference import make_reference
from tests.streams import data, sources
from tests.streams.data import F32, I64
from tests.streams.sources import RECIPES

REFERENCE_ROWS = 4_096
"""Source rows of which the reference is made, and from which methods prepare themselves."""


def cache_folder() -> Path:
    """Where trained models are kept: in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "homeostat" / "models"


@lru_cache(maxsize=8)
def key(name: str) -> str:
    """16 hex digits that change with the recipes, the network's code or the data."""
    recipe = RECIPES[name]
    files: list[str | Path] = [sources.__file__, inspect.getfile(recipe.build), *map(data.path, recipe.files)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:16]


def model(name: str) -> nn.Module:
    """The trained network in eval mode: from the cache, else trained now and put there."""
    network = RECIPES[name].build()
    stored = cache_folder() / f"{name}-{key(name)}.safetensors"
    if not stored.is_file():
        trained = sources.train(RECIPES[name])
        write(stored, {part: tensor.detach().contiguous() for part, tensor in trained.state_dict().items()})
    network.load_state_dict(load_file(stored))
    return network.eval()


def write(target: Path, tensors: dict[str, Tensor]) -> None:
    """Store tensors so that no reader ever sees half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}")
    save_file(tensors, part)
    os.replace(part, target)


def outputs(network: nn.Module, x: F32) -> tuple[Tensor, Tensor | None]:
    """Outputs (N, K) and penultimate features (N, D) of the frozen network."""
    head = find_head(network)
    logits, features = [], []
    tap = FeatureTap(network, head) if head else None
    with torch.inference_mode():
        for part in torch.from_numpy(x).split(512):
            logits.append(network(part))
            if tap is not None and tap.features is not None:
                features.append(tap.features)
    if tap is not None:
        tap.close()
    return torch.cat(logits), torch.cat(features) if features else None


def reference(name: str, network: nn.Module) -> Reference:
    """What `homeostat pack` would store of the source rows of the model ``name``."""
    return reference_of(network, *RECIPES[name].rows("train", REFERENCE_ROWS))


def reference_of(network: nn.Module, x: F32, y: I64) -> Reference:
    """Moments, prior and class-balanced exemplars of source rows."""
    logits, features = outputs(network, x)
    rng, classes = np.random.default_rng(0), np.unique(y)
    each = packing.EXEMPLARS // len(classes)
    exemplars = np.sort(np.concatenate([rng.permutation(np.flatnonzero(y == label))[:each] for label in classes]))
    return make_reference(x, y, logits, features, exemplars, "classification", logits.shape[1])


def prepared(name: str, network: nn.Module, known: Reference, method: type[FastAdapter], version: str) -> Reference:
    """Return ``known`` with what ``method`` computes from the source rows of the model ``name``."""
    if not prepares(method):
        return known
    x, y = map(torch.from_numpy, RECIPES[name].rows("train", REFERENCE_ROWS))
    return prepared_from(x, y, network, known, method, f"{name}-{key(name)}-{method.name}-{version}")


def prepared_from(
    x: Tensor, y: Tensor, network: nn.Module, known: Reference, method: type[FastAdapter], stem: str
) -> Reference:
    """Return ``known`` with what ``method`` computes from source rows when a bundle is packed.

    ``stem`` names data, model and code in the cache.
    """
    stored = cache_folder() / f"{stem}.safetensors"
    if not stored.is_file():
        tensors = method.prepare(network, known, x, y)
        write(stored, {part: tensor.detach().cpu().clone() for part, tensor in tensors.items()})
    return replace(known, prepared={**known.prepared, method.name: load_file(stored)})


def prepares(method: type[FastAdapter]) -> bool:
    """Whether the method has a step at pack time."""
    return method.prepare.__func__ is not FastAdapter.prepare.__func__  # type: ignore[attr-defined]
