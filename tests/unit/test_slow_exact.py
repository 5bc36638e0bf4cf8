"""Heads that are solved for: equal to the closed form, whatever the order, and harmless."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import prune

import adapters.slow as slow
from adapters.slow.heads.exact import ExactHead, ExactMethod
from adapters.slow.heads.temperature import scale_of
from adapters.slow.methods.lda_head import oas
from daemon import checkpoint

CLASSES, INPUTS, WIDTH = 3, 6, 5
F64 = NDArray[np.float64]
HEADS = ["lda_head", "prototype_head"]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mlp(outputs: int = CLASSES, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Linear(WIDTH, outputs)).eval()


def blobs(rows: int, seed: int = 0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, rows)
    centres = np.random.default_rng(99).normal(size=(CLASSES, INPUTS))
    return torch.from_numpy(
        (centres[y] + shift + rng.normal(size=(rows, INPUTS))).astype(np.float32)
    ), torch.from_numpy(y)


def opened(name: str, model: nn.Module | None = None, reference: bool = True, **options: Any) -> ExactHead:
    method = slow.get(name, **options)
    assert isinstance(method, ExactMethod)
    x, y = blobs(40, seed=7) if reference else (None, None)
    if name == "ridge_head":
        return method.open(model or mlp(1), x, None if x is None else x.sum(1), classes=None)
    return method.open(model or mlp(), x, y, classes=CLASSES)


def features(x: Tensor) -> F64:
    with torch.inference_mode():
        return mlp()[:-1](x).double().numpy()


def closed_form(h: F64, y: NDArray[Any], shrinkage: float, weights: F64 | None = None, counted: bool = False) -> Any:
    """The textbook's discriminant, row by row: log-softmax of the logits of ``h`` itself."""
    weights = np.ones(len(y)) if weights is None else weights
    means = np.stack([np.average(h[y == k], axis=0, weights=weights[y == k]) for k in range(CLASSES)])
    centred = h - means[y]
    covariance = (centred * weights[:, None]).T @ centred / weights.sum()
    covariance = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / WIDTH * np.eye(WIDTH)
    precision = np.linalg.inv(covariance)
    logits = np.stack([-0.5 * ((h - m) @ precision * (h - m)).sum(1) for m in means], axis=1)
    if counted:
        counts = np.array([weights[y == k].sum() for k in range(CLASSES)])
        logits += np.log((counts + 1) / (counts.sum() + CLASSES))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def log_softmax(h: F64, values: dict[str, Tensor]) -> F64:
    weight, bias = (value.double().numpy() for value in values.values())
    logits = h @ weight.T + bias
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_lda_is_the_closed_form_of_all_rows(shrinkage: float, counted: bool) -> None:
    x, y = blobs(300)
    head = opened(
        "lda_head",
        shrinkage=shrinkage,
        prior="counted" if counted else "uniform",
        reference_weight=0,
        calibration_rows=0,
    )
    head.update(x, y)
    expected = closed_form(features(x), y.numpy(), shrinkage, counted=counted)
    assert np.abs(log_softmax(features(x), head.values()) - expected).max() < 1e-5


def test_lda_with_forgetting_and_reference_is_the_closed_form_of_weighted_rows() -> None:
    (x, y), (xr, yr) = blobs(300), blobs(40, seed=7)
    head = opened("lda_head", shrinkage=0.1, memory_rows=50, reference_weight=20, calibration_rows=0)
    head.update(x[:120], y[:120])
    head.update(x[120:], y[120:])
    weights = np.concatenate((np.exp(-np.arange(299, -1, -1) / 50), np.full(40, 0.5)))
    h, labels = np.concatenate((features(x), features(xr))), np.concatenate((y, yr))
    expected = closed_form(h, labels, 0.1, weights)
    assert np.abs(log_softmax(h, head.values()) - expected).max() < 1e-5


def test_oas_shrinks_few_rows_much_and_many_rows_little_and_never_beyond_one() -> None:
    rng = np.random.default_rng(0)
    covariance = np.diag([4.0, 1.0, 1.0, 0.25])
    shares = [oas(covariance, rows) for rows in (1, 10, 100, 10_000)]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < 1e-3
    assert shares[0] <= 1
    assert oas(np.eye(4), 50) == 1.0
    assert 0 < oas(np.cov(rng.normal(size=(3, 8)).T), 2) <= 1


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(12)), name=st.sampled_from(HEADS), reference=st.booleans())
def test_the_order_and_the_batches_of_the_rows_do_not_matter(order: list[int], name: str, reference: bool) -> None:
    x, y = blobs(120)
    parts = list(zip(x.split(10), y.split(10), strict=True))
    whole, parted = (opened(name, reference=reference, calibration_rows=0) for _ in range(2))
    whole.update(x, y)
    for index in order:
        parted.update(*parts[index])
    left, right = (log_softmax(features(x), head.values()) for head in (whole, parted))
    assert np.abs(left - right).max() < 1e-5
    assert whole.rows == parted.rows == 120


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 199), max_size=5), name=st.sampled_from([*HEADS, "ridge_head"]))
def test_forgetting_counts_rows_and_not_batches(cuts: list[int], name: str) -> None:
    x, y = blobs(200)
    y = x.sum(1) if name == "ridge_head" else y
    whole, parted = (opened(name, memory_rows=30) for _ in range(2))
    whole.update(x, y)
    edges = [0, *sorted(cuts), 200]
    for start, stop in itertools.pairwise(edges):
        parted.update(x[start:stop], y[start:stop])
    left, right = whole.values(), parted.values()
    assert all(torch.allclose(left[key], right[key], rtol=1e-4, atol=1e-5) for key in left)


@pytest.mark.parametrize("name", HEADS)
def test_old_rows_fade_so_that_a_swap_of_classes_is_learnt(name: str) -> None:
    x, y = blobs(600)
    swapped = (y + 1) % CLASSES

    def error(memory_rows: float | None) -> float:
        head = opened(name, memory_rows=memory_rows)
        head.update(x[:400], y[:400])
        head.update(x[400:], swapped[400:])
        answers = log_softmax(features(x), head.values()).argmax(1)
        return float((answers != swapped.numpy()).mean())

    assert error(60) < 0.35 < error(None)


def test_prototypes_are_scaled_unit_vectors_and_answer_by_the_cosine() -> None:
    x, y = blobs(300)
    head = opened("prototype_head", reference_weight=0)
    head.update(x, y)
    weight, bias = (value.double().numpy() for value in head.values().values())
    h, centre = features(x), features(blobs(40, seed=7)[0]).mean(0)
    means = np.stack([h[y.numpy() == k].mean(0) for k in range(CLASSES)]) - centre
    cosine = ((h - centre) @ means.T) / np.linalg.norm(means, axis=1)
    norms = np.linalg.norm(weight, axis=1)
    assert np.allclose(norms, norms[0], rtol=1e-5)
    assert np.allclose(h @ weight.T + bias, norms[0] * cosine, atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_a_class_that_no_row_was_seen_of_keeps_its_old_row(name: str) -> None:
    model, (x, y) = mlp(), blobs(300)
    head = opened(name, model, reference=False)
    known = y != 2
    head.update(x[known], y[known])
    values = head.values()
    assert torch.equal(values["3.weight"][2], model[3].weight[2])
    assert torch.equal(values["3.bias"][2], model[3].bias[2])
    assert not torch.equal(values["3.weight"][0], model[3].weight[0])
    for key in values:
        assert torch.allclose(values[key][:2].mean(0), model.state_dict()[key][:2].mean(0), atol=1e-4)


@pytest.mark.parametrize("name", [*HEADS, "ridge_head"])
def test_without_rows_and_with_one_class_the_head_is_the_old_one(name: str) -> None:
    model = mlp(1 if name == "ridge_head" else CLASSES)
    head = opened(name, model, reference=False)
    if name != "ridge_head":
        x, _ = blobs(20)
        head.update(x, torch.zeros(20, dtype=torch.long))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in head.values().items())


@pytest.mark.parametrize("name", HEADS)
def test_a_class_long_unseen_is_still_known(name: str) -> None:
    x, y = blobs(400)
    head = opened(name, reference=False, memory_rows=2)
    head.update(x, y)
    later = y != 1
    for _ in range(20):
        head.update(x[later], y[later])
    values = head.values()
    assert all(value.isfinite().all() for value in values.values())
    assert (log_softmax(features(x), values).argmax(1) == 1).any(), "1,000 time constants later, it has its mean"


@pytest.mark.parametrize("name", [*HEADS, "ridge_head"])
def test_a_restored_head_goes_on_bit_by_bit(name: str) -> None:
    x, y = blobs(200)
    y = x.sum(1) if name == "ridge_head" else y
    original = opened(name, memory_rows=100)
    original.update(x[:120], y[:120])
    original.update([[np.nan] * INPUTS], [0])
    restored = opened(name, memory_rows=100)
    restored.load_state_dict(checkpoint.decode(checkpoint.encode(original.state_dict())))
    for head in (original, restored):
        head.update(x[120:], y[120:])
    assert checkpoint.encode(original.state_dict()) == checkpoint.encode(restored.state_dict())
    left, right = original.values(), restored.values()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert (restored.rows, restored.dropped) == (200, 1)


def test_a_state_is_a_copy() -> None:
    x, y = blobs(50)
    head = opened("lda_head")
    head.update(x, y)
    state = head.state_dict()
    before = checkpoint.encode(state)
    head.update(x, y)
    assert checkpoint.encode(state) == before


def test_a_state_of_another_method_or_model_is_refused() -> None:
    state = opened("lda_head").state_dict()
    with pytest.raises(ValueError, match="method lda_head, this one prototype_head"):
        opened("prototype_head").load_state_dict(state)
    with pytest.raises(ValueError, match="bundle_crc"):
        opened("lda_head", mlp(seed=1)).load_state_dict(state)
    with pytest.raises(ValueError, match="bundle_crc"):
        opened("lda_head", reference=False).load_state_dict(state)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("bad", [(np.nan, 0), (np.inf, 0), (1.0, -1), (1.0, CLASSES), (1.0, 0.5), (1.0, np.nan)])
def test_an_unusable_row_leaves_no_trace(name: str, bad: tuple[float, float]) -> None:
    x, y = blobs(100)
    clean, dirty = opened(name), opened(name)
    clean.update(x, y)
    dirty.update(x[:50], y[:50])
    assert dirty.update([[bad[0]] * INPUTS], [bad[1]]) == 0
    dirty.update(x[50:], y[50:])
    assert dirty.dropped == 1
    left, right = clean.values(), dirty.values()
    assert all(torch.allclose(left[key], right[key], atol=1e-5) for key in left)


def test_values_that_are_not_finite_are_none() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(INPUTS, CLASSES)).eval()
    head = opened("lda_head", model, reference=False, shrinkage=0.0, calibration_rows=0)
    x, y = blobs(60)
    head.update(x * 1e-39, y)
    assert head.values() == {}, "the discriminant of features of 1e-39 has weights beyond float32"


@pytest.mark.parametrize("name", [*HEADS, "ridge_head"])
@pytest.mark.parametrize("size", [1e30, 3e38])
def test_a_hostile_row_gives_finite_values_or_none(name: str, size: float) -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(INPUTS, 1 if name == "ridge_head" else CLASSES)).eval()
    head = opened(name, model)
    head.update(torch.full((1, INPUTS), size), [1e300 if name == "ridge_head" else 1])
    head.update(torch.full((1, INPUTS), -size), [1])
    assert all(value.isfinite().all() for value in head.values().values())


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).softmax(1)


class Sequence(nn.Module):
    """The head answers each step, the model their average."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x))).mean(1)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("build", "shape"), [(Pixels, (1, 8, 8)), (Sequence, (7, 3)), (mlp, (INPUTS,))])
def test_every_kind_of_backbone_learns_and_the_model_is_not_touched(name: str, build: Any, shape: Any) -> None:
    torch.manual_seed(0)
    model = build().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.integers(0, CLASSES, 300))
    level = y.reshape(-1, *[1] * len(shape))
    x = torch.from_numpy(rng.normal(size=(300, *shape)).astype(np.float32)) + 2 * level
    method = slow.get(name)
    assert isinstance(method, ExactMethod)
    head = method.open(model, x[:20], y[:20], classes=CLASSES)
    head.update(x[:200], y[:200])
    learnt = slow.apply_delta(model, head.values()).eval()
    with torch.inference_mode():
        error = float((learnt(x[200:]).argmax(1) != y[200:]).float().mean())
    assert error < 0.5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_ridge_is_the_closed_form_and_keeps_the_old_head_where_rows_say_nothing() -> None:
    model, (x, _) = mlp(1), blobs(400)
    y = x.sum(1).double().numpy()
    head = opened("ridge_head", model, reference=False, ridge=4.0)
    head.update(x, y)
    h = model[:-1](x).detach().double().numpy()
    z = np.concatenate((h, np.ones((400, 1))), axis=1)
    old = np.concatenate((model[3].weight.detach().numpy()[0], model[3].bias.detach().numpy()))
    penalty = 4.0 * np.diag([float((h**2).mean())] * WIDTH + [1.0])
    expected = np.linalg.solve(z.T @ z + penalty, z.T @ y + penalty @ old)
    found = torch.cat((head.values()["3.weight"][0], head.values()["3.bias"])).double().numpy()
    assert np.abs(found - expected).max() < 1e-4
    firm = opened("ridge_head", model, reference=False, ridge=1e9)
    firm.update(x, y)
    assert torch.allclose(firm.values()["3.weight"], model[3].weight, atol=1e-4)


def test_confidence_is_that_of_the_newest_answers_and_the_answers_stay() -> None:
    x, y = blobs(400)
    wrong = torch.where(torch.arange(400) % 3 == 0, (y + 1) % CLASSES, y)
    scaled, plain = opened("lda_head"), opened("lda_head", calibration_rows=0)
    for head in (scaled, plain):
        head.update(x[:300], y[:300])
        head.update(x[300:], wrong[300:])
    h = features(x)
    p, q = (log_softmax(h, head.values()) for head in (scaled, plain))
    assert (p.argmax(1) == q.argmax(1)).all()
    rows = np.arange(300, 400)
    assert -p[rows, wrong[300:]].mean() < -q[rows, wrong[300:]].mean()


@given(scale=st.floats(0.05, 20), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_the_scale_undoes_one_that_was_put_on_and_is_finite_where_all_is_right(scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(4_000, CLASSES))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    y = (p.cumsum(1) > rng.random((4_000, 1))).argmax(1)
    assert scale_of(z * scale, y) * scale == pytest.approx(1, abs=0.12)
    assert 0 < scale_of(z * scale, z.argmax(1)) * scale < 1e5


def test_logits_that_say_nothing_are_not_scaled() -> None:
    assert scale_of(np.zeros((5, 3)), np.zeros(5, int)) == 1.0


@pytest.mark.parametrize(
    ("name", "model", "advice"),
    [
        ("lda_head", nn.Conv1d(1, 1, 1), "no nn.Linear layer.*use 'norm_affine'"),
        ("lda_head", nn.Linear(2, CLASSES, bias=False), "no bias; use 'prototype_head' with centre=False"),
        ("prototype_head", nn.Linear(2, CLASSES, bias=False), "set centre=False"),
        ("lda_head", nn.Linear(2, 5), "has 5 outputs; it must have 3"),
        ("lda_head", prune.identity(nn.Linear(2, CLASSES), "weight"), "computed from other parameters"),
    ],
)
def test_a_model_that_can_not_be_served_is_refused_with_advice(name: str, model: nn.Module, advice: str) -> None:
    method = slow.get(name)
    assert isinstance(method, ExactMethod)
    with pytest.raises(ValueError, match=f"slow method '{name}'.*{advice}"):
        method.open(model, None, None, classes=CLASSES)


class Backwards(nn.Module):
    """Its head is defined before its body."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(INPUTS, CLASSES)
        self.body = nn.Linear(INPUTS, INPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.head = nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES)
        self.head.weight = self.encode.weight


def test_a_layer_that_does_not_decide_the_answer_is_no_head() -> None:
    with pytest.raises(ValueError, match="has 6 outputs"):
        opened("lda_head", Backwards())
    other = nn.Sequential(mlp(), nn.Linear(CLASSES, CLASSES), nn.Hardtanh(-1e-9, 1e-9))
    with pytest.raises(ValueError, match=r"the model's answer is not that of '1'"):
        opened("lda_head", other)
    assert "shares its weight with 'encode.weight'" in (slow.get("lda_head").check(Tied()) or "")


def test_what_follows_a_regressors_head_is_refused() -> None:
    scaled = nn.Sequential(mlp(1), nn.Threshold(1e3, 7.0))
    with pytest.raises(ValueError, match="let the model end in it"):
        opened("ridge_head", scaled)


@pytest.mark.parametrize("name", [*HEADS, "ridge_head"])
def test_a_burst_can_not_train_it(name: str) -> None:
    replay = slow.Replay((INPUTS,), 10, classes=CLASSES, seed=0)
    replay.add(np.zeros((2, INPUTS)), [0, 1])
    with pytest.raises(ValueError, match=rf"'{name}': has no gradient.*use open\(\)"):
        slow.run_burst(mlp(), slow.get(name), replay, slow.BurstOptions(), task="classification", seed=0)


def test_the_other_task_is_refused_with_the_method_for_it() -> None:
    for name, classes, advice in (("lda_head", None, "ridge_head"), ("ridge_head", 3, "lda_head")):
        method = slow.get(name)
        assert isinstance(method, ExactMethod)
        with pytest.raises(ValueError, match=f"does not serve.*{advice}"):
            method.open(mlp(), None, None, classes=classes)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lda_head", {"shrinkage": 2}, "shrinkage is 2"),
        ("lda_head", {"shrinkage": "lw"}, "shrinkage is 'lw'"),
        ("lda_head", {"prior": "flat"}, "prior is 'flat'"),
        ("lda_head", {"memory_rows": 0.5}, "memory_rows is 0.5"),
        ("prototype_head", {"reference_weight": -1}, "reference_weight is -1"),
        ("prototype_head", {"calibration_rows": -1}, "calibration_rows is -1"),
        ("ridge_head", {"ridge": 0}, "ridge is 0"),
    ],
)
def test_wrong_options_are_refused_with_their_values(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slow.get(name, **options)


def test_rows_and_labels_must_belong_together_and_exemplars_be_usable() -> None:
    with pytest.raises(ValueError, match="x has 2 rows and y shape"):
        opened("lda_head").update(torch.zeros(2, INPUTS), [0])
    method = slow.get("lda_head")
    assert isinstance(method, ExactMethod)
    with pytest.raises(ValueError, match="1 reference exemplars are not finite"):
        method.open(mlp(), [[np.nan] * INPUTS], [0], classes=CLASSES)
