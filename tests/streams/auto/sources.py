"""More source models: which network is trained on which rows, and which rows nobody has been trained on.

Two things differ from `tests.streams.sources`. A quarter of the source rows is held back in place of a tenth, as
`homeostat pack` does it, since detectors are calibrated on these. And for the controls there are ``_wide`` models,
whose source (every subject's phone, every month of the gas sensors, the insects before the temperature changes) is wide
enough to leave another quarter that no model and no calibration has seen: a stream without shift.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from adapters.fast import FastAdapter
from adapters.reference import Reference
from daemon.streams.simulator import DRIFT_FROM, AgeingArray
from tests.models import gas
from tests.streams import data, models, sources
from tests.streams.auto import networks
from tests.streams.data import F32, I64
from tests.streams.sources import Recipe

Part = Literal["train", "held", "control"]
Rows = tuple[F32, I64]

ELEC2_TRAIN = 4_531
"""The first tenth of the rows."""
STILL_INSECTS = 10_500
"""Rows before the first stretch of one class, and long before the temperature changes."""
TRIAL_GAP_MS = 10_000
"""A longer pause between two windows of a subject is one between two trials."""
CONTROL_IMAGES = sources.HELD_FROM
"""Test images before these are in streams; those after are held for calibration."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A trained network: what it is called in tables, how it is made, and the rows it was made from."""

    name: str
    family: str
    """Whose rows it takes: cifar, mnist, har, gas, insects, ageing, elec2."""
    network: str
    """Kind of network, the same word in every family."""
    recipe: Recipe
    rows: Callable[[Part], Rows]
    """All rows of a part in their native order; no part shares a row with another."""
    wide: bool = False
    """Serves the control of its family, and that only."""

    @property
    def factory(self) -> str:
        """How the daemon imports the network: ``module:function``."""
        build = self.recipe.build
        return f"{build.__module__}:{build.__name__}"

    @property
    def stem(self) -> str:
        """Name in the cache; it changes with the recipe, the networks' code or the data."""
        return f"{self.name}-{_key(self.name)}"


def quarters(x: F32, y: I64, part: Part, *, control: bool, unit: I64 | None = None) -> Rows:
    """Every fourth row held back; with ``control`` every fourth row more is in no other part.

    Rows of the same ``unit`` (N,) stay together; by default each row is one.
    """
    place = (np.arange(len(y)) if unit is None else unit) % 4
    chosen = {"held": place == 3, "control": place == 1, "train": place != 3}[part]
    if part == "train" and control:
        chosen = place % 2 == 0
    if part == "control" and not control:
        raise ValueError("these source rows are too few to leave rows for a control: take the wide model's")
    return x[chosen], y[chosen]


def _test_images(read: Callable[[str, int], tuple[data.Images, I64]], recipe: Recipe) -> Callable[[Part], Rows]:
    """Training images of the recipe, held ones as there, and the test images of the streams, clean."""

    def rows(part: Part) -> Rows:
        if part != "control":
            return recipe.rows(part, None)
        images, labels = read("test", CONTROL_IMAGES)
        return data.channels_first(images), labels

    return rows


def _har(part: Part) -> Rows:
    return _trials(part, sources.HAR_SUBJECTS, control=False)


def _har_wide(part: Part) -> Rows:
    return _trials(part, None, control=True)


def _trials(part: Part, subjects: int | None, *, control: bool) -> Rows:
    """Windows of the phones of the first subjects, parted by whole trials: neighbouring windows overlap by half."""
    x, y, found = sources.har_windows()
    mine = found["segment"] == 0
    if subjects is not None:
        mine &= found["subject"] <= subjects
    subject, ms = found["subject"][mine].astype(np.int64), found["t_ms"][mine]
    begins = (np.diff(subject) != 0) | (np.abs(np.diff(ms)) > TRIAL_GAP_MS)
    return quarters(x[mine], y[mine], part, control=control, unit=np.r_[0, np.cumsum(begins)])


def _gas(part: Part) -> Rows:
    x, y, segment = gas.load()
    return quarters(x[segment == 1], y[segment == 1], part, control=False)


def _gas_wide(part: Part) -> Rows:
    x, y, _ = gas.load()
    return quarters(x, y, part, control=True)


def _insects(part: Part) -> Rows:
    if part == "control":
        raise ValueError("these source rows are too few to leave rows for a control: take the wide model's")
    return sources.RECIPES["insects"].rows(part, None)


def _insects_wide(part: Part) -> Rows:
    found = data.arrays("insects_gradual.npz")
    return quarters(found["x"][:STILL_INSECTS], found["y"][:STILL_INSECTS].astype(np.int64), part, control=True)


def _elec2(part: Part) -> Rows:
    found = data.arrays("elec2.npz")
    return quarters(found["x"][:ELEC2_TRAIN], found["y"][:ELEC2_TRAIN].astype(np.int64), part, control=False)


def _ageing(part: Part) -> Rows:
    if part != "control":
        return sources.RECIPES["ageing"].rows(part, None)
    return AgeingArray(sources.SIMULATOR_SEED).rows(0, DRIFT_FROM)


def _made(
    family: str,
    network: str,
    build: Callable[[], nn.Module],
    rows: Callable[[Part], Rows],
    file: str,
    *,
    epochs: int,
    lr: float,
    batch: int = 64,
    images: bool = False,
    wide: bool = False,
) -> Source:
    name = f"{family}_{network}_wide" if wide else f"{family}_{network}"

    def part_of(part: sources.Part, count: int | None) -> Rows:
        x, y = rows(part)
        return x[:count], y[:count]

    recipe = Recipe(build=build, rows=part_of, files=(file,), epochs=epochs, lr=lr, batch=batch, images=images)
    return Source(name=name, family=family, network=network, recipe=recipe, rows=rows, wide=wide)


def _known(family: str, network: str, rows: Callable[[Part], Rows]) -> Source:
    """A model of `tests.streams.sources`, under its name there."""
    return Source(name=family, family=family, network=network, recipe=sources.RECIPES[family], rows=rows)


def _all() -> list[Source]:
    har, gas_file, insects = "har_phone_watch.npz", "gas_drift.npz", "insects_gradual.npz"
    cifar = _test_images(data.cifar10, sources.RECIPES["cifar"])
    mnist = _test_images(data.mnist, sources.RECIPES["mnist"])
    images, digits = "cifar10_train.npz", "mnist_train.npz"
    found = [
        _known("cifar", "cnn_bn", cifar),
        _made("cifar", "cnn_gn", networks.cifar_gn, cifar, images, epochs=6, lr=5e-3, batch=128, images=True),
        _made(
            "cifar", "transformer", networks.cifar_transformer, cifar, images, epochs=6, lr=3e-3, batch=128, images=True
        ),
        _known("mnist", "cnn_bn", mnist),
        _made("mnist", "cnn_gn", networks.mnist_gn, mnist, digits, epochs=5, lr=5e-3, batch=128),
        _made("mnist", "mlp_bn", networks.mnist_mlp, mnist, digits, epochs=5, lr=5e-3, batch=128),
        _known("insects", "mlp_ln", _insects),
        _made("insects", "mlp_bn", networks.insects_bn, _insects, insects, epochs=30, lr=2e-3),
        _known("ageing", "mlp_bn", _ageing),
        _made("elec2", "mlp_bn", networks.elec2, _elec2, "elec2.npz", epochs=20, lr=2e-3),
    ]
    for wide, rows in ((False, _har), (True, _har_wide)):
        found += [
            _made("har", "cnn_bn", networks.har_cnn, rows, har, epochs=40, lr=3e-3, wide=wide),
            _made("har", "transformer", networks.har_transformer, rows, har, epochs=60, lr=2e-3, wide=wide),
            _made("har", "mlp_ln", networks.har_mlp, rows, har, epochs=40, lr=2e-3, wide=wide),
        ]
    for wide, rows in ((False, _gas), (True, _gas_wide)):
        found += [
            _made("gas", "mlp_bn", networks.gas_bn, rows, gas_file, epochs=60 if not wide else 20, lr=1e-3, wide=wide),
            _made("gas", "mlp", networks.gas_plain, rows, gas_file, epochs=60 if not wide else 20, lr=1e-3, wide=wide),
        ]
    found += [
        _made("insects", "mlp_ln", networks.insects_ln, _insects_wide, insects, epochs=20, lr=2e-3, wide=True),
        _made("insects", "mlp_bn", networks.insects_bn, _insects_wide, insects, epochs=20, lr=2e-3, wide=True),
    ]
    return found


SOURCES: dict[str, Source] = {source.name: source for source in _all()}
"""By name; those of `tests.streams.sources` are among them."""


def get(name: str) -> Source:
    """The source model of that name; ValueError when there is none."""
    if name not in SOURCES:
        raise ValueError(f"no source model is called {name!r}; there are: {', '.join(SOURCES)}")
    return SOURCES[name]


@lru_cache(maxsize=64)
def _key(name: str) -> str:
    """16 hex digits; of a model of `tests.streams.sources` its own."""
    source = get(name)
    if name in sources.RECIPES:
        return models.key(name)
    recipe = source.recipe
    training = (recipe.epochs, recipe.lr, recipe.batch, recipe.images, source.wide)
    digest = hashlib.sha256(repr(training).encode())
    for code in (source.rows, quarters, sources.train):
        digest.update(_code(inspect.getsource(code)))
    for module in sorted({networks.__file__, inspect.getfile(recipe.build)}):
        digest.update(_code(Path(module).read_text(encoding="utf-8")))
    for file in recipe.files:
        digest.update(data.path(file).read_bytes())
    return digest.hexdigest()[:16]


def _code(text: str) -> bytes:
    """What the text does: without comments, layout and docstrings."""
    tree = ast.parse(textwrap.dedent(text))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # of a lambda it is an expression
            body[:] = [
                part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ]
    return ast.dump(tree).encode()


def _is_text(part: ast.AST) -> bool:
    return isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)


def model(name: str) -> nn.Module:
    """The trained network in eval mode: from the cache, else trained now and put there."""
    source = get(name)
    if name in sources.RECIPES:
        return models.model(name)
    network = source.recipe.build()
    stored = models.cache_folder() / f"{source.stem}.safetensors"
    if not stored.is_file():
        trained = sources.train(source.recipe)
        models.write(stored, {part: tensor.detach().contiguous() for part, tensor in trained.state_dict().items()})
    network.load_state_dict(load_file(stored))
    return network.eval()


def reference_rows(name: str) -> Rows:
    """The training rows of which the reference is made, and from which methods prepare themselves."""
    x, y = get(name).rows("train")
    return x[: models.REFERENCE_ROWS], y[: models.REFERENCE_ROWS]


def reference(name: str, network: nn.Module) -> Reference:
    """What `homeostat pack` would store of the source rows of the model ``name``."""
    return models.reference_of(network, *reference_rows(name))


def prepared(name: str, network: nn.Module, known: Reference, method: type[FastAdapter], version: str) -> Reference:
    """Return ``known`` with what ``method`` computes from the source rows; ``version`` names the method's code."""
    if not models.prepares(method):
        return known
    x, y = map(torch.from_numpy, reference_rows(name))
    return models.prepared_from(x, y, network, known, method, f"{get(name).stem}-{method.name}-{version}")
