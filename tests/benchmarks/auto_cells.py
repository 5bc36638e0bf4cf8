"""The cells of `make bench-auto`: which stream, with which model, in which order, batches, labels and seed.

    for cell in short_cells(1_500):
        loaded = load_cell(cell)

`long_cells` is the full product of what goes together. `short_cells` is a part of it, chosen so that every two levels
that go together at all (a stream and a batch size, an order and a label level, ...) meet about equally often; it does
not depend on any result. `ROLES`, a factor of that design, was the plan on which streams to fix the constants of
``auto``; which streams were looked at is said by `tests.benchmarks.auto_tables.SEEN`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from adapters.reference import Reference
from tests.streams import models
from tests.streams.auto import sources
from tests.streams.auto.attacks import ATTACKS, attack, begins
from tests.streams.auto.bundles import bundle_for
from tests.streams.auto.streams import Drawn, arrange, draw
from tests.streams.data import F32, I64

__all__ = [
    "BATCHES",
    "KINDS",
    "LABELS",
    "ROLES",
    "SEEDS",
    "Cell",
    "LoadedCell",
    "bundle_for",
    "load_cell",
    "long_cells",
    "seconds",
    "short_cells",
]

Labels = Literal["none", "10%", "100%"]
Kind = Literal["control", "label", "sudden", "gradual", "recurring", "concept", "prior", "attack"]
Role = Literal["fixed", "reported"]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

BATCHES = (1, 8, 64, 256)
LABELS: tuple[Labels, ...] = ("none", "10%", "100%")
SEEDS = (0, 1, 2)
ROWS = {1: 400, 8: 1_000, 64: 1_500, 256: 2_000}
"""Rows of a cell by its batch size; fewer where the stream has no more."""
LONG = 2
"""Times as many rows in the long form."""
FEWEST_BATCHES = 5
DELAY, ELEC2_DELAY = 200, 48
"""Rows after which a label is known; of the electricity prices a day."""
FEWEST, MOST = 150, 220
"""Cells of the short form."""

_SHIFT = ("iid", "sorted", "bursts", "mixed", "recurring")
_WITHIN = ("iid", "sorted", "bursts")
STREAMS: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "cifar": ("sudden", _SHIFT),
    "cifar3": ("sudden", _SHIFT),
    "cifar_gradual": ("gradual", _WITHIN),
    "cifar_recurring": ("recurring", _WITHIN),
    "cifar_prior": ("prior", ("iid", "bursts", "recurring")),
    "cifar_control": ("control", _WITHIN),
    "mnist": ("sudden", _SHIFT),
    "mnist_recurring": ("recurring", _WITHIN),
    "mnist_swap": ("concept", (*_WITHIN, "recurring")),
    "mnist_control": ("control", _WITHIN),
    "har": ("sudden", ("native", *_SHIFT)),
    "har_control": ("control", _WITHIN),
    "gas": ("gradual", ("native", *_SHIFT)),
    "gas_control": ("control", _WITHIN),
    "insects": ("gradual", ("native", *_SHIFT)),
    "insects_stress": ("prior", ("native", "iid")),
    "insects_control": ("control", _WITHIN),
    "ageing": ("gradual", ("native", *_SHIFT)),
    "ageing_swap": ("concept", ("native", *_WITHIN, "recurring")),
    "ageing_control": ("control", ("native", *_WITHIN)),
    "elec2": ("gradual", ("native",)),
}
"""By name: what happens in the stream, and the orders that its rows may come in."""
ATTACKED = {"mnist_control": ("iid", "bursts"), "har_control": ("iid", "bursts"), "ageing_control": ("native", "iid")}
"""Controls that are attacked, in these orders."""
_FIXED = ("mnist", "ageing", "insects")

KINDS: tuple[Kind, ...] = ("control", "label", "sudden", "gradual", "recurring", "concept", "prior", "attack")


def _attack_streams() -> dict[str, tuple[str, str]]:
    """By name, as ``mnist_dead_sensor``: the control and the attack."""
    return {f"{control.removesuffix('_control')}_{kind}": (control, kind) for control in ATTACKED for kind in ATTACKS}


ATTACK_STREAMS = _attack_streams()
ROLES: dict[str, Role] = {
    stream: "fixed" if stream == "cifar3" or stream.partition("_")[0] in _FIXED else "reported"
    for stream in (*STREAMS, *ATTACK_STREAMS)
}
"""By stream: whether the constants of ``auto`` were to be fixed on it, or it was only to be reported."""


@dataclass(frozen=True, kw_only=True, order=True)
class Cell:
    """One row of the table: everything that the rows and the model of a run depend on."""

    stream: str
    model: str
    """Name of the source model."""
    order: str
    batch: int
    labels: Labels
    seed: int
    kind: Kind
    role: Role
    rows: int
    """Rows asked for; a stream may have fewer."""

    @property
    def name(self) -> str:
        """What no other cell is called."""
        return f"{self.stream}/{self.model}/{self.order}/{self.batch}/{self.labels}/{self.seed}/{self.rows}"

    @property
    def network(self) -> str:
        """Kind of network."""
        return sources.get(self.model).network

    @property
    def delay(self) -> int:
        """Rows after which a label is known."""
        return ELEC2_DELAY if self.stream == "elec2" else DELAY


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedCell:
    """The rows of a cell as they are served, and what serves them; the caller may change all of it."""

    cell: Cell
    x: F32
    """(N, *shape) rows."""
    y: I64
    """(N,) true classes."""
    regime: I64
    """(N,) number of the regime that a row belongs to; one that comes back has its old number."""
    changes: list[int]
    """Rows with which another regime begins; none in a mixed order."""
    labelled: Mask
    """(N,) rows whose label comes, ``cell.delay`` rows late."""
    touched: I64
    """Rows that an attack has touched."""
    model: nn.Module
    """The trained network, in eval mode, of this call alone."""
    reference: Reference
    source_x: F32
    """(M, *shape) source rows that the model was not trained on."""
    source_y: I64
    classes: int


def long_cells() -> list[Cell]:
    """Every combination that makes sense, with ``LONG`` times the rows of the short form."""
    return [_cell(*levels, rows=LONG * ROWS[levels[3]]) for levels in _product()]


@lru_cache(maxsize=1)
def _product() -> list[tuple[str, str, str, int, Labels, int]]:
    """All (stream, model, order, batch, labels, seed)."""
    found = []
    for stream in ROLES:
        for model in models_of(stream):
            for order in orders_of(stream):
                for batch in BATCHES:
                    if stream.startswith("har_") and batch * FEWEST_BATCHES > 481:
                        continue  # the control's rows would be two batches
                    found += [(stream, model, order, batch, labels, seed) for labels in LABELS for seed in SEEDS]
    return found


def _cell(stream: str, model: str, order: str, batch: int, labels: Labels, seed: int, *, rows: int) -> Cell:
    return Cell(
        stream=stream, model=model, order=order, batch=batch, labels=labels, seed=seed, kind=kind_of(stream, order),
        role=ROLES[stream], rows=rows,
    )  # fmt: skip


def models_of(stream: str) -> list[str]:
    """Names of the source models that serve the stream."""
    control = ATTACK_STREAMS[stream][0] if stream in ATTACK_STREAMS else stream
    family = control.partition("_")[0].removesuffix("3")
    mine = [source for source in sources.SOURCES.values() if source.family == family]
    wide = control.endswith("_control") and any(source.wide for source in mine)
    return [source.name for source in mine if source.wide == wide]


def orders_of(stream: str) -> tuple[str, ...]:
    """Orders that the stream comes in."""
    return ATTACKED[ATTACK_STREAMS[stream][0]] if stream in ATTACK_STREAMS else STREAMS[stream][1]


def kind_of(stream: str, order: str) -> Kind:
    """What happens there: a control whose classes come sorted is a pure label shift; an order makes regimes recur."""
    if stream in ATTACK_STREAMS:
        return "attack"
    kind = STREAMS[stream][0]
    if kind == "control" and order in ("sorted", "bursts"):
        return "label"
    if order == "recurring" and kind in ("sudden", "gradual"):
        return "recurring"
    return kind


COSTS = {"cifar": (0.5, 0.4), "mnist": (0.15, 0.03), "har": (0.3, 0.03)}
"""Milliseconds of a call and of a row in one forward of the family's dearest network on one core."""
LIGHT = (0.06, 0.001)
"""The same of a small perceptron."""


def seconds(cell: Cell, passes: float = 40.0) -> float:
    """About how long a cell takes on one core, when each row goes ``passes`` times through a network."""
    call, row = COSTS.get(sources.get(cell.model).family, LIGHT)
    return passes * (call * cell.rows / cell.batch + row * cell.rows) / 1_000


def short_cells(limit: float, cores: int = 2, passes: float = 40.0) -> list[Cell]:
    """Cells that take about ``limit`` seconds on so many cores: at least ``FEWEST``, at most ``MOST``.

    The cells for a shorter time are the first of those for a longer one.
    """
    chosen: list[Cell] = []
    spent = 0.0
    for cell in _design():
        spent += seconds(cell, passes)
        if len(chosen) >= FEWEST and spent > limit * cores:
            break
        chosen.append(cell)
    return chosen


@lru_cache(maxsize=1)
def _design() -> tuple[Cell, ...]:
    """``MOST`` cells of the product, each chosen for the pairs of levels that have met least so far.

    A pair that has met n times counts 1/(1 + n)²; among equals the draw decides.
    """
    cells = [_cell(*levels, rows=ROWS[levels[3]]) for levels in _product()]
    cells = [cells[number] for number in np.random.default_rng(0).permutation(len(cells))]
    pairs = _pairs(cells)
    met = np.zeros(pairs.max() + 1)
    free = np.ones(len(cells), bool)
    chosen: list[Cell] = []
    for _ in range(MOST):
        worth = (1.0 / (1.0 + met[pairs]) ** 2).sum(1)
        best = int(np.where(free, worth, -1.0).argmax())
        free[best] = False
        met[pairs[best]] += 1
        chosen.append(cells[best])
    return tuple(chosen)


def levels(cell: Cell) -> dict[str, object]:
    """The levels of a cell by which the short form is balanced."""
    return {
        "stream": cell.stream, "model": cell.model, "network": cell.network, "order": cell.order, "batch": cell.batch,
        "labels": cell.labels, "kind": cell.kind, "seed": cell.seed, "role": cell.role,
    }  # fmt: skip


def _pairs(cells: list[Cell]) -> I64:
    """(N, P) number of each pair of levels of each cell."""
    numbers: dict[object, int] = {}
    rows = []
    for cell in cells:
        rows.append([numbers.setdefault(pair, len(numbers)) for pair in combinations(levels(cell).items(), 2)])
    return np.array(rows)


@lru_cache(maxsize=32)
def _served_by(name: str) -> tuple[nn.Module, Reference]:
    network = sources.model(name)
    return network, sources.reference(name, network)


@lru_cache(maxsize=32)
def _held(name: str) -> sources.Rows:
    return sources.get(name).rows("held")


@lru_cache(maxsize=2)
def _drawn(stream: str, rows: int, seed: int) -> Drawn:
    return draw(stream, rows, seed)


def load_cell(cell: Cell) -> LoadedCell:
    """Rows, model and what is known of its source; the same in every call. MissingData where the data is not here."""
    network, known = _served_by(cell.model)
    control, kind = ATTACK_STREAMS.get(cell.stream, (cell.stream, ""))
    drawn = _drawn(control, cell.rows, cell.seed)
    rows = arrange(cell.order, drawn, cell.seed)
    x, y, regime, touched = drawn.x[rows], drawn.y[rows], drawn.regime[rows], np.zeros(0, np.int64)
    if kind:
        confidence = torch.softmax(models.outputs(network, x)[0].double(), 1).numpy()
        done = attack(kind, x, y, confidence, np.random.default_rng([cell.seed, *kind.encode()]))
        x, y, touched = done.x, done.y, done.touched
        regime = (np.arange(len(y)) >= begins(len(y))).astype(np.int64)
    mark = drawn.visit[rows] if not kind and cell.order != "recurring" else regime
    changes = [] if cell.order == "mixed" else (np.flatnonzero(np.diff(mark)) + 1).tolist()
    share = {"none": 0.0, "10%": 0.1, "100%": 1.0}[cell.labels]
    source_x, source_y = _held(cell.model)
    return LoadedCell(
        cell=cell, x=x, y=y, regime=regime, changes=changes,
        labelled=np.random.default_rng([cell.seed, 77]).random(len(y)) < share, touched=touched,
        model=copy.deepcopy(network), reference=known, source_x=source_x.copy(), source_y=source_y.copy(),
        classes=_classes(network, source_x),
    )  # fmt: skip


def _classes(network: nn.Module, x: F32) -> int:
    with torch.inference_mode():
        return int(network(torch.from_numpy(x[:2])).shape[1])
