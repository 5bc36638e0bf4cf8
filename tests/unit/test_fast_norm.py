from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adapters.fast as fast
from adapters.fast.core.batch_statistics import MixedNormalisation, batch_moments


def one_layer(shape: tuple[int, ...] = (3,), **options: bool) -> nn.Module:
    """One BatchNorm1d with known source statistics over (B, C) or (B, C, T)."""
    layer = nn.BatchNorm1d(3, **options)
    if layer.running_mean is not None:
        layer.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
        layer.running_var.copy_(torch.tensor([1.0, 0.25, 4.0]))
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(math.prod(shape), 2)).eval()


def statistics(adapter: fast.FastAdapter) -> tuple[torch.Tensor, torch.Tensor]:
    mean, var = adapter.state_dict()["state"]["statistics"]
    return mean, var


@pytest.mark.parametrize("shape", [(64, 3), (16, 3, 5), (16, 8, 10, 12), (2, 3, 1), (40, 32, 40)])
def test_moments_are_those_of_double_precision(shape: tuple[int, ...]):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3 + 50
    mean, var = batch_moments(x)
    dims = [0, *range(2, x.ndim)]
    torch.testing.assert_close(mean.double(), x.double().mean(dims), rtol=2e-6, atol=0.0)
    torch.testing.assert_close(var.double(), x.double().var(dims, correction=0), rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("gain", [0.3, 1.0])
@pytest.mark.parametrize(("name", "alpha", "unbiased"), [("norm", 1.0, False), ("alpha_norm", 0.1, True)])
def test_batch_statistics_are_mixed_in_by_the_gain(name: str, alpha: float, unbiased: bool, gain: float):
    model = one_layer()
    adapter = fast.build(name, model)
    adapter.gain = gain
    x = torch.randn(32, 3) * 2 + 1
    layer, share = model[0], gain * alpha
    mean = (1 - share) * layer.running_mean + share * x.mean(0)
    var = (1 - share) * layer.running_var + share * x.var(0, unbiased=unbiased)
    with torch.no_grad():
        expected = model[2]((x - mean) / (var + layer.eps).sqrt())
    torch.testing.assert_close(adapter(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["norm", "alpha_norm"])
def test_one_value_per_channel_gets_the_source_statistics(name: str):
    model = one_layer()
    x = torch.randn(1, 3)
    with torch.inference_mode():
        assert torch.equal(fast.build(name, model)(x), model(x))


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=8), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_ema_is_the_moving_average_of_x_and_x_squared_for_any_batch_sizes(sizes: list[int], seed: int):
    adapter = fast.build("ema_norm", one_layer(), memory_rows=30.0)
    mean, var = (value.double().numpy() for value in statistics(adapter))
    square = var + mean**2
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        x = torch.randn(size, 3, generator=generator) * 2 + 1
        adapter(x)
        m = 1 - math.exp(-size / 30.0)
        rows = x.double().numpy()
        mean, square = (1 - m) * mean + m * rows.mean(0), (1 - m) * square + m * (rows**2).mean(0)
    now_mean, now_var = statistics(adapter)
    np.testing.assert_allclose(now_mean, mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(now_var, square - mean**2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 10, 50])
def test_ema_forgets_by_rows_whatever_the_batch_size(rows: int):
    adapter = fast.build("ema_norm", one_layer(), memory_rows=100.0)
    source = statistics(adapter)[0].clone()
    for _ in range(100 // rows):
        adapter(torch.zeros(rows, 3))
    torch.testing.assert_close(statistics(adapter)[0], source / math.e)


def test_ema_predicts_with_the_statistics_before_the_batch():
    model = one_layer()
    adapter = fast.build("ema_norm", model, memory_rows=5.0)
    x = torch.randn(16, 3) + 3
    with torch.inference_mode():
        assert torch.equal(adapter(x), model(x))
        assert not torch.equal(adapter(x), model(x))


def test_ema_goes_on_following_at_gain_0():
    model = one_layer()
    adapter, other = fast.build("ema_norm", model), fast.build("ema_norm", model)
    adapter.gain = 0.0
    x = torch.randn(16, 3) + 3
    adapter(x), other(x)
    adapter.gain = 1.0
    assert torch.equal(adapter.predict(x), other.predict(x))


def test_a_finite_but_huge_row_never_poisons_the_moving_average():
    adapter = fast.build("ema_norm", one_layer((3, 4)))
    x = torch.randn(8, 3, 4)
    x[2, 1] = 3e38  # its square is infinite
    before = adapter.state_dict()["state"]["statistics"]
    adapter(x)
    after = adapter.state_dict()["state"]["statistics"]
    assert after.isfinite().all()
    assert torch.equal(after[:, 1], before[:, 1])
    assert not (after[:, [0, 2]] == before[:, [0, 2]]).any()


def test_layers_a_forward_does_not_reach_stay_where_they_are():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high, self.head = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.high(x) if len(x) > 4 else self.low(x))

    adapter = fast.build("ema_norm", Two().eval())
    adapter(torch.ones(8, 3))
    mean, _ = statistics(adapter)
    assert (mean[:3] == 0).all() and (mean[3:] > 0).all()


@pytest.mark.parametrize("name", ["norm", "alpha_norm", "ema_norm"])
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
