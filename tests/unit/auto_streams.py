"""`auto` around small trained classifiers, in every phase of its life, and streams for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import adapters.fast as fast
from adapters.fast.auto import ALIGNED, MEMORY, RUNS, Auto
from adapters.fast.core.class_distance import ClassDistance
from adapters.fast.core.source import source_outputs
from adapters.features import FeatureTap
from adapters.reference import Reference
from daemon.checkpoint import decode, encode
from tests.unit import blobs
from tests.unit.blobs import CLASSES, SIZE

Batches = Iterator[tuple[Tensor, Tensor]]
NORMS = ("batch", "layer", "group", "plain")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads on a model this small only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def trained(norm: str) -> nn.Module:
    """An MLP trained on 2,000 source rows."""
    if norm in ("batch", "layer"):
        return blobs.trained(norm)
    torch.manual_seed(0)
    layer = nn.GroupNorm(4, 32) if norm == "group" else nn.Identity()
    model = nn.Sequential(nn.Linear(SIZE, 32), layer, nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    x, y = blobs.rows(2000, seed=1)
    weights = list(model.parameters())
    for step in range(200):
        part = slice(step % 10 * 200, step % 10 * 200 + 200)
        slopes = torch.autograd.grad(nn.functional.cross_entropy(model(x[part]), y[part]), weights)
        with torch.no_grad():
            for weight, slope in zip(weights, slopes, strict=True):
                weight -= 0.3 * slope
    return model.eval()


@cache
def reference(norm: str) -> Reference:
    """What packing stores: class moments of 2,000 rows, and the class distance of 2,000 others."""
    model, plain = trained(norm), blobs.reference("layer")
    x, _ = blobs.rows(2000, seed=11)
    with torch.inference_mode(), FeatureTap(model) as tap:
        predicted = model(x).argmax(1)
        assert tap.features is not None
        features = tap.features.clone()
    classes = [features[predicted == kind] for kind in range(CLASSES)]
    made = replace(
        plain,
        feature_mean=features.mean(0),
        feature_var=features.var(0, correction=0),
        class_feature_mean=torch.stack([rows.mean(0) for rows in classes]),
        class_feature_var=torch.stack([rows.var(0, correction=0) for rows in classes]),
    )
    measure = ClassDistance(made, source_outputs(model, made))
    x, _ = blobs.rows(2000, seed=12)
    with torch.inference_mode(), FeatureTap(model) as tap:
        predicted = model(x).argmax(1)
        assert tap.features is not None
        rows = measure(tap.features, predicted)
    return replace(made, class_distance=torch.stack([rows.mean(), rows.std()]))


def build(
    norm: str = "batch", changed: Reference | None = None, model: nn.Module | None = None, **options: Any
) -> Auto:
    made = fast.build("auto", model or trained(norm), changed or reference(norm), **options)
    assert isinstance(made, Auto)
    return made


class Passes:
    """Counts the forward passes of the frozen model and of its aligned copy."""

    def __init__(self, auto: Auto) -> None:
        self.frozen = self.aligned = 0
        auto.model.register_forward_hook(lambda *_: setattr(self, "frozen", self.frozen + 1))
        if auto._aligned is not None:
            auto._aligned.model.model.register_forward_hook(lambda *_: setattr(self, "aligned", self.aligned + 1))


def iid(change: Callable[[Tensor], Tensor] = lambda x: x, rows: int = 64, seed: int = 1000) -> Batches:
    while True:
        x, y = blobs.rows(rows, seed)
        yield change(x), y
        seed += 1


def in_runs(change: Callable[[Tensor], Tensor] = lambda x: x, rows: int = 64, seed: int = 5000) -> Batches:
    """Classes in runs of 100 rows."""
    x, y = blobs.rows(rows * 200, seed)
    order = torch.argsort(y, stable=True)
    kinds = [order[y[order] == kind].split(100) for kind in range(CLASSES)]
    mixed = torch.cat([part for turn in zip(*kinds, strict=False) for part in turn])
    for at in mixed.split(rows):
        yield change(x[at]), y[at]


def of_one_class(rows: int = 64, seed: int = 7000) -> Batches:
    for x, y in iid(rows=8 * rows, seed=seed):
        yield x[y == 1][:rows], y[y == 1][:rows]


def concept(rows: int = 64) -> Batches:
    """What were classes 0 and 1 has changed places: only labels can tell."""
    for x, y in iid(rows=rows):
        yield x, torch.tensor([1, 0, 2, 3])[y]


def frozen_of(auto: Auto, x: Tensor) -> Tensor:
    with torch.inference_mode():
        outputs: Tensor = auto.model(x)
    return outputs


def serve(auto: Auto, stream: Batches, count: int, *, labels: bool = False) -> tuple[float, float, list[int]]:
    """Error of the answers, that of the given model, and every row's way."""
    wrong, plainly, rows, ways = 0, 0, 0, []
    for x, y in islice(stream, count):
        first = auto.numbered
        plain = frozen_of(auto, x)
        wrong += int((auto(x).argmax(1) != y).sum())
        plainly += int((plain.argmax(1) != y).sum())
        rows += len(y)
        ways += auto.changed_by.tolist()
        if labels:
            auto.learn(x, y, torch.arange(first, first + len(x)))
    return wrong / rows, plainly / rows, ways


def in_watch() -> tuple[Auto, Batches]:
    auto, stream = build(), iid()
    serve(auto, stream, 6)
    assert auto._aligned is not None and not auto._aligned.open
    return auto, stream


def in_shadow() -> tuple[Auto, Batches]:
    auto, stream = build(), iid(blobs.pale, rows=16)
    auto.alert = True
    serve(auto, stream, 2)
    assert auto._aligned is not None and auto._aligned.open and not auto.changed_by.any()
    return auto, stream


def in_sampled_shadow() -> tuple[Auto, Batches]:
    auto, stream = build(), iid(rows=48)
    auto.alert = True
    serve(auto, stream, 15)
    assert auto._aligned is not None and auto._aligned.settled and not auto.changed_by.any()
    return auto, stream


def in_service() -> tuple[Auto, Batches]:
    auto, stream = build(), iid(blobs.pale, rows=50)
    serve(auto, stream, 12)
    assert (auto.changed_by == ALIGNED).all()
    return auto, stream


def with_runs() -> tuple[Auto, Batches]:
    auto, stream = build(), in_runs()
    serve(auto, stream, 30)
    assert auto.changed_by.max() == RUNS
    return auto, stream


def with_both() -> tuple[Auto, Batches]:
    auto, stream = build(), in_runs(blobs.pale)
    serve(auto, stream, 40)
    assert auto.changed_by.max() == ALIGNED + RUNS
    return auto, stream


def with_memory() -> tuple[Auto, Batches]:
    auto, stream = build("layer"), concept()
    serve(auto, stream, 20, labels=True)
    assert (auto.changed_by == MEMORY).all()
    return auto, stream


PHASES = pytest.mark.parametrize(
    "phase", [in_watch, in_shadow, in_sampled_shadow, in_service, with_runs, with_both, with_memory],
    ids=lambda phase: phase.__name__,
)  # fmt: skip


def twin_of(auto: Auto) -> Auto:
    """Another adapter in the same state, as a checkpoint brings it back."""
    made = build("layer" if auto.model[1].__class__ is nn.LayerNorm else "batch")
    made.load_state_dict(decode(encode(auto.state_dict())))
    return made


# For its parts.

K = 3


def distance() -> ClassDistance:
    reference = blobs.reference()
    return ClassDistance(reference, source_outputs(blobs.trained(), reference))


def sorted_classes(rows: int, length: int, seed: int) -> NDArray[np.int64]:
    """(rows,) classes in runs of about ``length``; 1: independent."""
    rng = np.random.default_rng(seed)
    ends = rng.random(rows) < 1.0 / length
    return rng.integers(0, K, rows)[np.maximum.accumulate(np.where(ends, np.arange(rows), 0))]
