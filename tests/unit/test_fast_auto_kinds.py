"""`auto` around models and references of every kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adapters.fast as fast
from adapters.fast.auto import ALIGNED, MEMORY, Auto
from adapters.features import FeatureTap
from adapters.reference import Reference
from daemon.checkpoint import decode, encode
from tests.check_adapter import same
from tests.unit import auto_streams, blobs
from tests.unit.auto_streams import (
    PHASES,
    Batches,
    Passes,
    build,
    concept,
    frozen_of,
    iid,
    in_runs,
    reference,
    serve,
    trained,
    twin_of,
)
from tests.unit.blobs import CLASSES, SIZE

one_thread = auto_streams.one_thread


# Models and references of other kinds.


def test_without_a_reference_it_is_the_model() -> None:
    auto = fast.build("auto", trained("batch"), None)
    for x, y in islice(concept(), 10):
        assert torch.equal(auto(x), frozen_of(auto, x))
        auto.learn(x, y)


@pytest.mark.parametrize("labels", [False, True])
def test_without_features_only_labels_decide(labels: bool) -> None:
    model = nn.Sequential(nn.Conv1d(1, CLASSES, SIZE, stride=1), nn.BatchNorm1d(CLASSES), nn.Flatten())
    with torch.no_grad():
        x, y = blobs.rows(2000, seed=1)
        for kind in range(CLASSES):
            model[0].weight[kind, 0] = x[y == kind].mean(0)
        model[0].bias.copy_(-0.5 * model[0].weight[:, 0].square().sum(1))
        model.train()
        model[1].momentum = None
        model(x[:, None])
        model.eval()
        model[1].weight.copy_(model[1].running_var.sqrt())
        model[1].bias.copy_(model[1].running_mean)
    plain = replace(reference("layer"), feature_mean=None, feature_var=None, class_feature_mean=None,
                    class_feature_var=None, class_distance=None,
                    exemplars_x=reference("layer").exemplars_x[:, None])  # fmt: skip
    auto = build(model=model, changed=plain)
    served, frozen, ways = serve(auto, ((x[:, None] * 0.3 + 2, y) for x, y in iid()), 40, labels=labels)
    assert (served < 0.8 * frozen and set(ways) == {0, ALIGNED}) if labels else (served == frozen and not any(ways))


def test_where_only_labels_decide_the_copy_does_not_run_without_labels() -> None:
    # Without a class distance no verdict can come of its passes.
    auto = build(changed=replace(reference("batch"), class_prior=None))
    passes = Passes(auto)
    for x, _ in islice(iid(), 30):
        auto(x)
    assert passes.aligned == 0


def test_a_reference_without_class_moments_is_served_from_its_exemplars() -> None:
    auto = build(changed=blobs.reference("batch"))
    served, frozen, ways = serve(auto, iid(blobs.pale), 40)
    assert served < 0.5 * frozen and np.mean(ways) > 0.7


def test_a_reference_without_exemplars_is_served() -> None:
    empty = replace(reference("batch"), exemplars_x=torch.zeros(0, SIZE), exemplars_y=torch.zeros(0, dtype=torch.long))
    auto = build(changed=empty)
    served, frozen, ways = serve(auto, concept(), 60, labels=True)
    assert served < 0.6 * frozen and set(ways) <= {0, ALIGNED, MEMORY}


@pytest.mark.parametrize("classes", [2, 256, 300])
def test_two_and_many_classes_are_served_and_runs_looked_for_up_to_256(classes: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes)).eval()
    plain = replace(reference("batch"), class_prior=torch.full((classes,), 1 / classes), class_feature_mean=None,
                    class_feature_var=None, class_distance=None, feature_mean=None, feature_var=None,
                    exemplars_y=reference("batch").exemplars_y % classes)  # fmt: skip
    auto = build(model=model, changed=plain)
    assert (auto._runs is None) == (classes > 256)
    auto.alert = True
    for x, y in islice(in_runs(lambda x: 2 * x + 1), 12):
        first = auto.numbered
        assert auto(x).isfinite().all()
        auto.learn(x, y % classes, torch.arange(first, first + len(x)))
    twin = build(model=model, changed=plain)
    twin.load_state_dict(decode(encode(auto.state_dict())))
    assert torch.equal(auto(x), twin(x))


@cache
def regression() -> tuple[nn.Module, Reference]:
    """Values that hang on the features smoothly, learnt by least squares on random features."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(SIZE, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 1)).eval()
    x, _ = blobs.rows(2000, seed=1)
    with torch.no_grad():
        model[1].running_mean.copy_(model[0](x).mean(0))
        model[1].running_var.copy_(model[0](x).var(0))
        hidden = torch.cat([model[:3](x), torch.ones(len(x), 1)], 1)
        solution = torch.linalg.lstsq(hidden, value_of(x)[:, None]).solution
        model[3].weight.copy_(solution[:-1].T)
        model[3].bias.copy_(solution[-1])
    source = blobs.reference("batch")
    x, features = source.exemplars_x, None
    with torch.inference_mode(), FeatureTap(model) as tap:
        error = (model(x)[:, 0] - value_of(x)).square().mean()
        features = tap.features
    assert features is not None
    made = replace(source, class_prior=None, exemplars_y=value_of(x), error=float(error),
                   feature_mean=features.mean(0).clone(), feature_var=features.var(0).clone())  # fmt: skip
    return model, made


def value_of(x: Tensor) -> Tensor:
    return x[:, 0] + torch.sin(x[:, 1])


def test_values_are_aligned_only_once_labels_show_that_it_helps() -> None:
    model, plain = regression()
    auto = build(model=model, changed=plain)
    for x, _ in islice(iid(lambda x: 0.5 * x + 1), 20):
        assert torch.equal(auto(x), frozen_of(auto, x))
    losses = []
    for x, _ in islice(iid(seed=2000), 60):
        shifted, first = 0.5 * x + 1, auto.numbered
        losses.append([float((out[:, 0] - value_of(x)).square().mean())
                       for out in (auto(shifted), frozen_of(auto, shifted))])  # fmt: skip
        auto.learn(shifted, value_of(x), torch.arange(first, first + len(x)))
    served, frozen = np.mean(losses, 0)
    assert served < 0.7 * frozen and auto.changed_by.all()
    assert auto(shifted).shape == (64, 1)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_doubles_are_served_in_every_way(norm: str) -> None:
    model = copy.deepcopy(trained(norm)).double()
    plain = replace(reference(norm), exemplars_x=reference(norm).exemplars_x.double())
    auto = build(model=model, changed=plain)
    for stream, labels in ((in_runs(blobs.pale), False), (concept(), True)):
        for x, y in islice(stream, 30):
            first = auto.numbered
            outputs = auto(x.double())
            assert outputs.dtype == torch.float64 and outputs.isfinite().all()
            if labels:
                auto.learn(x.double(), y, torch.arange(first, first + len(x)))


@PHASES
def test_half_precision_is_served_in_every_phase(phase: Callable[[], tuple[Auto, Batches]]) -> None:
    auto, stream = phase()
    with torch.autocast("cpu", torch.bfloat16):
        for gain in (1.0, 0.5, 0.0):
            auto.gain = gain
            for x, y in islice(stream, 2):
                first = auto.numbered
                assert auto(x).isfinite().all() and auto.predict(x).isfinite().all()
                auto.learn(x, y, torch.arange(first, first + len(x)))
    assert same(twin_of(auto).state_dict(), auto.state_dict())
