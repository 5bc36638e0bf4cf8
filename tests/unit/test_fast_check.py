"""What every fast adapter must do around every kind of model it agrees to serve."""

from __future__ import annotations

import copy
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adapters.fast as fast
from adapters.fast import FastAdapter

K = 4
STEPS = 5000 if os.environ.get("HOMEOSTAT_LONG") == "1" else 300


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads on models this small only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 12, batch_first=True)
        self.head = nn.Linear(12, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


class Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


MODELS = {
    "cnn_bn1d": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), nn.ReLU(),
            Last(), nn.Linear(8, K),
        ),
        (3, 16),
    ),
    "cnn_bn2d": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, affine=False),
            nn.ReLU(), Last(), nn.Linear(8, K),
        ),
        (1, 12, 12),
    ),
    "mlp_bn1d": (
        lambda: nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Linear(16, K),
        ),
        (6,),
    ),
    "mlp_ln": (lambda: nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, K)), (6,)),
    "cnn_gn": (
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), Last(), nn.Linear(8, K)),
        (3, 16),
    ),
    "gru": (Recurrent, (10, 3)),
    "transformer": (Transformer, (10, 3)),
    "mlp_plain": (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, K)), (6,)),
    "no_linear": (lambda: nn.Sequential(nn.Conv1d(3, K, 3), nn.BatchNorm1d(K), Last()), (3, 16)),
}  # fmt: skip
WITHOUT_BATCH_NORM = {"mlp_ln", "cnn_gn", "gru", "transformer", "mlp_plain"}
WITHOUT_NORM = {"gru", "mlp_plain"}
REFUSED = {
    "none": set(),
    "norm": WITHOUT_BATCH_NORM,
    "alpha_norm": WITHOUT_BATCH_NORM,
    "ema_norm": WITHOUT_BATCH_NORM,
    "tent": WITHOUT_NORM,
    "lame": {"no_linear"},
}
"""Models that a method can't serve. One that is not listed here must serve them all."""
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "ema_norm": [{}, {"memory_rows": None}],
    "tent": [{}, {"optimizer": "sgd", "lr": 0.01}, {"steps": 2, "weight_decay": 0.01}],
    "lame": [{}, {"affinity": "rbf", "force_symmetry": True}, {"affinity": "linear"}],
}

PAIRS = [
    pytest.param(name, kind, options, id="-".join([name, kind, *(f"{k}={v}" for k, v in options.items())]))
    for name in fast.names()
    for kind in MODELS
    for options in VARIANTS.get(name, [{}])
    if kind not in REFUSED.get(name, set())
]
served = pytest.mark.parametrize(("name", "kind", "options"), PAIRS)


def build_model(kind: str) -> nn.Module:
    """A model with source statistics that are not those of `batches`."""
    torch.manual_seed(7)
    make, shape = MODELS[kind]
    model = make().train()
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(32, *shape))
    return model.eval()


def batches(kind: str, count: int, rows: int = 16, seed: int = 1) -> list[Tensor]:
    """Drifted, class-sorted batches: the mean moves in steps."""
    generator = torch.Generator().manual_seed(seed)
    shape = MODELS[kind][1]
    levels = torch.arange(count) * 8 // max(count, 8) % K
    return [1.5 * torch.randn(rows, *shape, generator=generator) + float(level) for level in levels]


def frozen_outputs(model: nn.Module, adapter: FastAdapter, x: Tensor) -> Tensor:
    with torch.inference_mode():
        outputs = model(x)
        return outputs.softmax(1) if adapter.outputs == "probs" else outputs


def same(a: Any, b: Any) -> bool:
    """Equality to the bit of two states."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def plain(value: Any) -> bool:
    """Whether a state holds only what may be stored without pickle."""
    if isinstance(value, dict):
        return all(type(key) is str and plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or type(value) in (int, float, bool, str, bytes, Tensor, np.ndarray)


@pytest.mark.parametrize("name", fast.names())
@pytest.mark.parametrize("kind", MODELS)
def test_check_and_constructor_agree_on_which_models_can_be_served(name: str, kind: str):
    model = build_model(kind)
    problem = fast.get(name).check(model)
    assert (problem is not None) == (kind in REFUSED.get(name, set()))
    if problem is not None:
        assert "use '" in problem and f"'{name}'" not in problem
        with pytest.raises(ValueError, match="can't serve this model"):
            fast.build(name, model)


@served
def test_the_given_model_is_never_touched(name: str, kind: str, options: dict[str, Any]):
    model = build_model(kind)
    model.train()  # the adapter must not depend on it, nor change it
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    before, structure = copy.deepcopy(model.state_dict()), str(model)
    adapter = fast.build(name, model, **options)
    for gain in (1.0, 0.5, 0.0):
        adapter.gain = gain
        for x in batches(kind, 3):
            adapter(x)
    adapter.reset()
    assert same(dict(model.state_dict()), dict(before))
    assert str(model) == structure and model.training and not calls
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@served
def test_gain_0_is_the_frozen_model_to_the_bit(name: str, kind: str, options: dict[str, Any]):
    model = build_model(kind)
    adapter = fast.build(name, model, **options)
    *drifted, last = batches(kind, 5)
    for x in drifted:
        adapter(x)
    adapter.gain = 0.0
    expected = frozen_outputs(model, adapter, last)
    assert torch.equal(adapter.predict(last), expected)
    assert torch.equal(adapter(last), expected)
    assert torch.equal(adapter(last), expected)


@served
@pytest.mark.parametrize("gain", [1.0, 0.4])
def test_predict_gives_what_forward_will_and_changes_nothing(name, kind, options, gain: float):
    adapter = fast.build(name, build_model(kind), **options)
    adapter.gain = gain
    for x in batches(kind, 4):
        before = adapter.state_dict()
        predicted = adapter.predict(x)
        predicted_features = adapter.features
        assert same(adapter.state_dict(), before)
        outputs = adapter(x)
        if adapter.backward:  # without gradients torch picks other kernels for a transformer
            torch.testing.assert_close(predicted, outputs, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(predicted, outputs)
        assert (adapter.features is None) == (kind == "no_linear")
        if adapter.features is not None:
            torch.testing.assert_close(adapter.features, predicted_features, rtol=1e-5, atol=1e-5)
            assert not adapter.features.requires_grad and len(adapter.features) == len(x)


@served
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_row_gets_nan_and_touches_nothing_else(name, kind, options, bad: float):
    with_row, without_row = (fast.build(name, build_model(kind), **options) for _ in range(2))
    for x in batches(kind, 3):
        dirty = torch.cat([x[:5], x[:1], x[5:]])
        dirty[5].view(-1)[0] = bad
        outputs, clean = with_row(dirty), without_row(x)
        assert outputs[5].isnan().all()
        assert torch.equal(outputs[[*range(5), *range(6, len(dirty))]], clean)
        assert same(with_row.state_dict(), without_row.state_dict())
        if with_row.features is not None:
            assert with_row.features[5].isnan().all() and len(with_row.features) == len(dirty)


@served
def test_a_batch_without_usable_rows_changes_nothing(name: str, kind: str, options: dict[str, Any]):
    adapter = fast.build(name, build_model(kind), **options)
    x = batches(kind, 1)[0]
    for _ in range(2):  # before the first usable batch, and after
        before = adapter.state_dict()
        for call in (adapter.forward, adapter.predict):
            outputs = call(torch.full_like(x, torch.nan))
            assert outputs.shape == (len(x), K) and outputs.isnan().all()
            assert adapter.features is None or len(adapter.features) == len(x)
            assert call(x[:0]).shape == (0, K)
            assert adapter.features is None or len(adapter.features) == 0
        assert same(adapter.state_dict(), before)
        adapter(x)


@served
def test_hard_batches_stay_finite(name: str, kind: str, options: dict[str, Any]):
    adapter = fast.build(name, build_model(kind), **options)
    x = batches(kind, 1)[0]
    for hard in (x[:1], x[:1].expand_as(x), torch.zeros_like(x), x[:2], 1e4 * x):
        for _ in range(3):
            assert adapter(hard).isfinite().all()
    assert adapter(x).isfinite().all()


@served
def test_a_long_class_sorted_stream_stays_finite(name: str, kind: str, options: dict[str, Any]):
    adapter = fast.build(name, build_model(kind), **options)
    stream = batches(kind, STEPS if not options else STEPS // 10, rows=8)
    assert all(bool(adapter(x).isfinite().all()) for x in stream)


@served
def test_reset_is_construction_to_the_bit(name: str, kind: str, options: dict[str, Any]):
    adapter = fast.build(name, build_model(kind), **options)
    at_start, stream = adapter.state_dict(), batches(kind, 4)
    first = [adapter(x) for x in stream]
    adapter.reset()
    assert same(adapter.state_dict(), at_start)
    assert all(map(torch.equal, first, [adapter(x) for x in stream]))
    adapter.reset(slots=[0])
    assert same(adapter.state_dict(), at_start)
    with pytest.raises(ValueError, match="slot 0"):
        adapter.reset(slots=[1])


@served
def test_a_stored_state_goes_on_to_the_bit(name: str, kind: str, options: dict[str, Any]):
    adapter, other = (fast.build(name, build_model(kind), **options) for _ in range(2))
    stream = batches(kind, 8)
    adapter.gain = 0.7
    for x in stream[:4]:
        adapter(x)
    stored = adapter.state_dict()
    assert plain(stored)
    expected = [adapter(x) for x in stream[4:]]
    other.load_state_dict(stored)
    assert other.gain == 0.7
    assert all(map(torch.equal, expected, [other(x) for x in stream[4:]]))
    assert same(adapter.state_dict(), other.state_dict())


@served
def test_a_stored_state_is_a_copy(name: str, kind: str, options: dict[str, Any]):
    adapter = fast.build(name, build_model(kind), **options)
    stored = adapter.state_dict()
    kept = copy.deepcopy(stored)
    for x in batches(kind, 3):
        adapter(x)
    assert same(stored, kept)
    adapter.load_state_dict(stored)
    for x in batches(kind, 3):
        adapter(x)
    assert same(stored, kept)


@served
def test_two_runs_are_the_same(name: str, kind: str, options: dict[str, Any]):
    one, two = (fast.build(name, build_model(kind), **options) for _ in range(2))
    for x in batches(kind, 4):
        assert torch.equal(one(x), two(x, check_finite=False))
    assert same(one.state_dict(), two.state_dict())


@pytest.mark.parametrize("name", fast.names())
def test_a_gain_outside_0_to_1_and_a_foreign_state_are_refused(name: str):
    adapter = fast.build(name, build_model("mlp_bn1d"))
    for gain in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="gain must be in"):
            adapter.gain = gain
    assert adapter.gain == 1.0 and adapter.saturated
    before = adapter.state_dict()
    with pytest.raises(ValueError, match="can't be loaded"):
        adapter.load_state_dict(before | {"method": "another"})
    larger = fast.build(name, nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, K)).eval()).state_dict()
    for state in (before | {"gain": 2.0}, {"method": name}, *([larger] if before["state"] else [])):
        with pytest.raises(ValueError, match="does not fit"):
            adapter.load_state_dict(state)
        assert same(adapter.state_dict(), before)
