from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import adapters.fast as fast
from adapters.fast.core.batch_statistics import (
    MixedNormalisation,
    SlotNormalisation,
    batch_moments,
    normalise_rows,
    row_moments,
    slot_moments,
)
from adapters.fast.core.slots import Groups
from adapters.fast.core.vector_slots import Crowd, VectorSlots

pytestmark = pytest.mark.sweep


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads on models this small only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def one_layer(shape: tuple[int, ...] = (3,), outputs: int = 2, **options: bool) -> nn.Module:
    """One BatchNorm1d with known source statistics over (B, C) or (B, C, T)."""
    layer = nn.BatchNorm1d(3, **options)
    if layer.running_mean is not None:
        layer.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
        layer.running_var.copy_(torch.tensor([1.0, 0.25, 4.0]))
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(math.prod(shape), outputs)).eval()


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SHAPES = [(64, 3), (16, 3, 5), (16, 8, 10, 12), (2, 3, 1), (40, 32, 80), (4, 3, 30, 30, 30)]
"""Small, vectors, and large enough for the moments that read everything twice."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_moments_are_those_of_double_precision(shape: tuple[int, ...], offset: float):
    x = seeded(*shape) * 3 + offset
    mean, var = batch_moments(x)
    dims = [0, *range(2, x.ndim)]
    torch.testing.assert_close(mean.double(), x.double().mean(dims), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), x.double().var(dims, correction=0), rtol=1e-4, atol=1e-5)


def test_a_constant_channel_has_no_variance_however_large_it_is():
    x = seeded(40, 32, 80)
    x[:, 5], x[:, 6] = 1e4, 0.0
    _, var = batch_moments(x)
    assert (var[[5, 6]] == 0.0).all() and (var >= 0.0).all()


def test_a_value_that_overflows_spoils_its_channel_alone():
    x = seeded(40, 32, 80)
    x[3, 5, 2] = 3e38
    mean, var = batch_moments(x)
    rest = [k for k in range(32) if k != 5]
    assert var[rest].isfinite().all() and mean[rest].isfinite().all() and not var[5].isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 3), (16, 3, 5), (40, 32, 80)])
def test_moments_of_half_precision_are_single(shape: tuple[int, ...], dtype: torch.dtype):
    x = (seeded(*shape) + 3).to(dtype)
    for ours, exact in zip(batch_moments(x), batch_moments(x.float()), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("shape", [(24, 3), (24, 3, 5), (24, 32, 100), (24, 2, 3, 4)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_moments_by_slot_are_those_of_the_slots_rows(shape: tuple[int, ...], offset: float):
    index = torch.randint(0, 6, (24,), generator=torch.Generator().manual_seed(1))
    x = seeded(*shape) + offset + index.view(-1, *[1] * (len(shape) - 1))
    mean, var, n = slot_moments(x, index, 7)
    for slot in range(7):
        rows = x[index == slot].double()
        assert n[slot] == len(rows) * math.prod(shape[2:])
        if len(rows):
            dims = [0, *range(2, x.ndim)]
            torch.testing.assert_close(mean[slot].double(), rows.mean(dims), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(var[slot].double(), rows.var(dims, correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 3, 5), (6, 3), (3, 2, 4, 4)])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("affine", [True, False])
def test_gradients_flow_through_the_batch_statistics(shape, share: float, unbiased: bool, affine: bool):
    torch.manual_seed(0)
    channels = shape[1]
    mean, var = torch.randn(channels).double(), torch.rand(channels).double() + 0.1
    x = torch.randn(*shape).double().requires_grad_()
    parameters = [torch.rand(channels).double().requires_grad_() if affine else None for _ in range(2)]
    assert torch.autograd.gradcheck(
        lambda *given: MixedNormalisation.apply(*given, mean, var, share, unbiased, 1e-5), (x, *parameters)
    )


@pytest.mark.parametrize("kind", ["any", "vectors", "many vectors"])
@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("affine", [True, False])
def test_gradients_flow_through_the_statistics_of_each_slot(
    kind: str, share: float, unbiased: bool, affine: bool, monkeypatch
):
    torch.manual_seed(0)
    if kind == "many vectors":
        monkeypatch.setattr("adapters.fast.core.vector_slots._ONE_PRODUCT", 2)
    groups = Groups(7, 4, torch.tensor([2, 0, 2, 3, 0, 2, 1]))  # slots 1 and 3 have one row
    shape = (7, 2, 3) if kind == "any" else (7, 2)
    mean, var = torch.randn(2).double(), torch.rand(2).double() + 0.1
    x = torch.randn(*shape).double().requires_grad_()
    parameters = [torch.rand(4, 2).double().requires_grad_() if affine else None for _ in range(2)]

    def by_slot(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        rest = mean, var, share, unbiased, 1e-5
        if kind == "any":
            return SlotNormalisation.apply(x, weight, bias, groups.index, groups.count, *rest)
        return VectorSlots.apply(x, weight, bias, groups.index, Crowd.of(groups), *rest)

    assert torch.autograd.gradcheck(by_slot, (x, *parameters))
    separate = torch.empty_like(x)
    for slot in range(4):
        rows = groups.index == slot
        own = [None if part is None else part[slot] for part in parameters]
        alone = (x[rows].detach(), *own, mean, var)
        many = math.prod((int(rows.sum()), *shape[2:])) > 1
        separate[rows] = MixedNormalisation.apply(*alone, share if many else 0.0, unbiased and many, 1e-5).detach()
    torch.testing.assert_close(by_slot(x, *parameters), separate)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 2, 2)])
def test_rows_are_normalised_each_with_their_own(shape: tuple[int, ...]):
    x, mean, weight, bias = seeded(*shape), *(seeded(5, 3, seed=k) for k in (1, 2, 3))
    var, wide = seeded(5, 3, seed=4).exp(), (5, 3, *[1] * (len(shape) - 2))
    expected = (x - mean.view(wide)) / (var.view(wide) + 1e-5).sqrt() * weight.view(wide) + bias.view(wide)
    torch.testing.assert_close(normalise_rows(x, mean, var, weight, bias, 1e-5), expected)


def test_the_moments_of_rows_are_their_own():
    x = seeded(6, 3, 7) + 4
    mean, var = row_moments(x)
    torch.testing.assert_close(mean, x.mean(2))
    torch.testing.assert_close(var, x.var(2, correction=0), rtol=1e-4, atol=1e-5)
    assert row_moments(x[:, :, 0])[1] is None


@pytest.mark.parametrize("gain", [0.3, 1.0])
@pytest.mark.parametrize(("name", "alpha", "unbiased"), [("norm", 1.0, False), ("alpha_norm", 0.1, True)])
@pytest.mark.parametrize("rows", [(32, 3), (32, 3, 700)])
def test_batch_statistics_are_mixed_in_by_the_gain(name: str, alpha: float, unbiased: bool, gain: float, rows):
    model = one_layer(rows[1:])
    adapter = fast.build(name, model)
    adapter.gain = gain
    x = seeded(*rows) * 2 + 1
    layer, share, dims = model[0], gain * alpha, [0, *range(2, x.ndim)]
    wide = (3, *[1] * (x.ndim - 2))
    mean = (1 - share) * layer.running_mean + share * x.mean(dims)
    var = (1 - share) * layer.running_var + share * x.var(dims, correction=int(unbiased))
    with torch.no_grad():
        expected = model[2](((x - mean.view(wide)) / (var.view(wide) + layer.eps).sqrt()).flatten(1))
    torch.testing.assert_close(adapter(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["norm", "alpha_norm", "ada_mix_norm"])
def test_one_value_per_channel_gets_the_source_statistics(name: str):
    model = one_layer()
    x = torch.randn(1, 3)
    with torch.inference_mode():
        assert torch.equal(fast.build(name, model)(x), model(x))


@pytest.mark.parametrize("name", ["norm", "alpha_norm", "ada_mix_norm"])
def test_a_vector_alone_in_its_slot_gets_the_source_statistics(name: str):
    model = one_layer()
    adapter = fast.build(name, model)
    x = torch.randn(5, 3) + 3
    alone, together = [0, 3], [1, 2, 4]
    outputs = adapter(x, slots=[7, 8, 8, 9, 8])
    with torch.inference_mode():
        torch.testing.assert_close(outputs[alone], model(x)[alone])
    torch.testing.assert_close(outputs[together], adapter(x[together]))


@pytest.mark.parametrize("name", ["norm", "alpha_norm", "ada_mix_norm", "ema_norm", "unmix_norm"])
def test_batch_norm_without_running_statistics_is_refused_alone_and_left_alone_among_others(name: str):
    without = one_layer(track_running_stats=False)
    assert "track_running_stats=False" in (fast.get(name).check(without) or "")
    mixed = nn.Sequential(nn.BatchNorm1d(3), without).eval()
    adapter = fast.build(name, mixed)
    x = torch.randn(16, 3) + 1
    assert not torch.equal(adapter(x) + adapter(x), 2 * mixed(x))
    adapter.gain = 0.0
    with torch.inference_mode():
        assert torch.equal(adapter(x), mixed(x))


def test_a_layer_used_under_two_names_is_replaced_under_both():
    layer = nn.BatchNorm1d(3)
    adapter = fast.build("norm", nn.Sequential(layer, nn.Linear(3, 3), layer, nn.Linear(3, 2)).eval())
    assert adapter.model[0] is adapter.model[2]
    assert not any(isinstance(module, nn.BatchNorm1d) for module in adapter.model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("norm", {}), ("alpha_norm", {}), ("alpha_norm", {"core_lambda": 1.0}), ("ada_mix_norm", {"loss": "gem_t"}),
        ("ema_norm", {}), ("ema_norm", {"memory_rows": None}), ("unmix_norm", {}), ("tent", {"norm": "unmix_norm"}),
    ],
)  # fmt: skip
def test_models_of_other_precision_are_served_as_those_of_single(name: str, options: dict[str, object], dtype):
    torch.manual_seed(0)
    model = one_layer((3, 4))
    adapter, other = fast.build(name, model, **options), fast.build(name, copy.deepcopy(model).to(dtype), **options)
    tolerance = 1e-5 if dtype == torch.float64 else 0.05
    for slots in (None, [0, 1, 1, 2, 0, 1, 3, 0]):
        x = seeded(8, 3, 4) + 1
        torch.testing.assert_close(
            other(x.to(dtype), slots=slots).float(), adapter(x, slots=slots), rtol=tolerance, atol=tolerance
        )


def test_the_core_loss_is_the_correlation_of_different_classes():
    adapter = fast.build("alpha_norm", one_layer(outputs=4), core_lambda=0.7, optimizer="sgd", lr=0.1, momentum=0.0)
    x = seeded(16, 3)
    before = adapter.model.state_dict()["0.weight"].clone()
    model = nn.Sequential(*adapter.model)
    with torch.enable_grad():
        weight = model[0].weight.detach().requires_grad_()
        mean = 0.9 * torch.tensor([0.5, -1.0, 2.0]) + 0.1 * x.mean(0)
        var = 0.9 * torch.tensor([1.0, 0.25, 4.0]) + 0.1 * x.var(0)
        p = model[2]((x - mean) / (var + 1e-5).sqrt() * weight + model[0].bias.detach()).softmax(1)
        together = p.T @ p / len(x)
        loss = 0.7 * (together.sum() - together.diagonal().sum())
        (gradient,) = torch.autograd.grad(loss, weight)
    adapter(x)
    torch.testing.assert_close(adapter.model.state_dict()["0.weight"], before - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_core_steps_make_the_classes_more_distinct_and_are_forgotten_by_a_reset():
    adapter = fast.build("alpha_norm", one_layer(outputs=4), core_lambda=1.0, lr=0.05)
    assert adapter.backward and adapter.slotted
    x = seeded(64, 3)

    def confused() -> float:
        p = adapter.predict(x).softmax(1)
        return float((1 - (p * p).sum(1)).mean())

    before = confused()
    for _ in range(20):
        adapter(x)
    assert confused() < 0.9 * before
    adapter.reset()
    assert confused() == before


def test_without_a_loss_alpha_norm_has_no_state_and_takes_no_gradient():
    adapter = fast.build("alpha_norm", one_layer(affine=False))
    adapter(seeded(16, 3))
    assert not adapter.backward and not adapter.state_dict()["state"]


def test_losses_of_probabilities_are_refused_for_one_output():
    model = one_layer(outputs=1)
    assert fast.build("alpha_norm", model) and fast.build("ada_mix_norm", model)
    with pytest.raises(ValueError, match=r"one output.*use '"):
        fast.build("alpha_norm", model, core_lambda=1.0)
    with pytest.raises(ValueError, match=r"one output.*use '"):
        fast.build("ada_mix_norm", model, loss="gem_t")


def test_a_method_with_its_own_statistics_refuses_others():
    for core in (0.0, 1.0):
        with pytest.raises(ValueError, match="its own statistics"):
            fast.build("alpha_norm", one_layer(), core_lambda=core, norm="ema_norm")
