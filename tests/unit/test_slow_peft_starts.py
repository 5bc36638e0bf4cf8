"""How a low-rank adapter starts, and what a layer is fed, against plain linear algebra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adapters.slow.lora_family.init import DAMPING, corda, eva, olora, pissa
from adapters.slow.lora_family.inputs import patches, second_moments
from adapters.slow.lora_family.targets import find_targets
from tests.check_adapter import build_model

torch.set_num_threads(1)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (4, 4), (1, 3)])
def test_at_full_rank_every_start_from_the_weights_is_the_weights(shape: tuple[int, int]) -> None:
    weight, x = matrix(*shape), matrix(50, shape[1], 1)
    full, second = min(shape), x.T @ x
    for b, a in (
        pissa(weight, full),
        olora(weight, full),
        corda(weight, full, second, keep=False),
        corda(weight, full, second, keep=True),
    ):
        torch.testing.assert_close(b @ a, weight)


def test_pissa_is_the_best_approximation_of_its_rank() -> None:
    weight = matrix(9, 6)
    b, a = pissa(weight, 2)
    singular = torch.linalg.svdvals(weight)
    torch.testing.assert_close((weight - b @ a).square().sum(), singular[2:].square().sum())


def test_eva_spans_the_directions_in_which_the_inputs_vary_most_and_changes_nothing() -> None:
    x = matrix(200, 6) * torch.tensor([3.0, 0.1, 2.0, 0.1, 0.1, 1.0])
    b, a = eva(matrix(4, 6), 3, x.T @ x)
    assert bool((b == 0).all()) and b.shape == (4, 3)
    expected = torch.linalg.svd(x, full_matrices=False).Vh[:3]
    torch.testing.assert_close(a.T @ a, expected.T @ expected)
    torch.testing.assert_close(a @ a.T, torch.eye(3, dtype=a.dtype))


def test_corda_takes_what_matters_most_to_the_rows_and_keeps_what_does() -> None:
    weight = matrix(6, 6)
    x = matrix(300, 6) * torch.tensor([10.0, 10.0, 0.01, 0.01, 0.01, 0.01])
    second = x.T @ x
    most, least = corda(weight, 2, second, keep=False), corda(weight, 2, second, keep=True)
    answers = (x @ weight.T).norm()
    assert (x @ (weight - most.b_RK @ most.a_KC).T).norm() < 0.01 * answers
    assert (x @ (least.b_RK @ least.a_KC).T).norm() < 0.01 * answers


def test_corda_takes_inputs_that_never_come() -> None:
    weight, x = matrix(3, 5), matrix(2, 5)
    x[:, 3:] = 0
    for second in (x.T @ x, torch.zeros(5, 5)):
        b, a = corda(weight, 3, second, keep=False)
        assert b.isfinite().all() and a.isfinite().all()
        torch.testing.assert_close(b @ a, weight, rtol=1e-6, atol=1e-8 / DAMPING)


@settings(max_examples=40, deadline=None)
@given(
    dimensions=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same", "valid"]),
    mode=st.sampled_from(["zeros", "replicate"]),
)
def test_patches_times_the_weight_are_the_convolution(
    dimensions: int, groups: int, kernel: int, stride: int, dilation: int, padding: Any, mode: str
) -> None:
    if padding == "same" and kernel == 2:
        kernel = 3  # torch warns of a copy that it makes for even kernels
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    conv = kind(
        4, 6, kernel, stride=1 if padding == "same" else stride, dilation=dilation, padding=padding, groups=groups,
        padding_mode=mode, bias=False,
    )  # fmt: skip
    x = torch.randn(2, 4, *[6] * dimensions)
    expected = conv(x)
    places = patches(conv, x).reshape(groups, -1, conv.weight[0].numel())
    own = conv.weight.reshape(groups, 6 // groups, -1)
    made = torch.einsum("gnc,grc->grn", places, own).reshape(6, 2, -1).transpose(0, 1)
    torch.testing.assert_close(made.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_second_moments_are_those_of_what_each_layer_is_fed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(70, 3)
    x[5, 1] = torch.nan
    seen = second_moments(model, find_targets(model), x)
    clean = x[x.isfinite().all(1)]
    hidden = F.relu(model[0](clean)).double()
    torch.testing.assert_close(seen["0.weight"], clean.double().T @ clean.double())
    torch.testing.assert_close(seen["2.weight"], hidden.T @ hidden, rtol=1e-5, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("kind", "names"), [
    ("gru", {"rnn.weight_ih_l0"}),
    ("transformer", {"embed.weight", "layer.self_attn.in_proj_weight", "layer.linear1.weight", "layer.linear2.weight"}),
    ("cnn_bn3d", {"0.weight"}),
])  # fmt: skip
def test_what_is_used_by_its_weights_is_not_seen_and_the_rest_is(kind: str, names: set[str]) -> None:
    model = build_model(kind)
    shape = (1, 6, 6, 6) if kind == "cnn_bn3d" else (10, 3)
    seen = second_moments(model, find_targets(model), torch.randn(4, *shape))
    assert seen.keys() == names
    assert all(bool((torch.linalg.eigvalsh(value) > -1e-6).all()) for value in seen.values())
