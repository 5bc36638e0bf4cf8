"""Deltas on their way: as small as their kind allows, back as they were, merged by product; hostile files."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

import adapters.slow as slow
from adapters.slow.deltas.encoding import TOLERANCE, decode, encode, merge, nbytes
from adapters.slow.inserted import fresh_bottlenecks

torch.set_num_threads(1)

M, N = 48, 64


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


W = draw(M, N, scale=N**-0.5)
BASE = {
    "w": W,
    "b": draw(M, seed=1),
    "conv": draw(32, 8, 3, 3, seed=2, scale=0.1),
    "half": draw(8, 8).to(torch.bfloat16),
}
LOW = draw(M, 3, seed=3, scale=0.1) @ draw(3, N, seed=4, scale=N**-0.5)


def changed(value: Tensor, count: int) -> Tensor:
    out = value.clone().flatten()
    out[torch.arange(count) * 7 % len(out)] += 0.5
    return out.view(value.shape)


def dora() -> Tensor:
    return (W + LOW) * (1 + draw(M, seed=5, scale=0.1))[:, None]


CASES: list[tuple[str, Tensor, str, int]] = [
    ("w", changed(W, 5), "sparse", 5 * 8),
    ("b", changed(BASE["b"], 2), "sparse", 2 * 8),
    ("b", BASE["b"] + 1, "dense", M * 4),
    ("w", W * draw(M, 1, seed=6), "row_scale", M * 4),
    ("conv", BASE["conv"] * draw(32, 1, 1, 1, seed=6), "row_scale", 32 * 4),
    ("w", W + LOW, "low_rank", 3 * (M + N) * 4),
    ("conv", BASE["conv"] + (draw(32, 2) @ draw(2, 72, seed=9)).view(32, 8, 3, 3), "low_rank", 2 * (32 + 72) * 4),
    ("w", dora(), "scaled_low_rank", (M + 4 * (M + N)) * 4),
    ("w", W + draw(M, N, seed=8, scale=1e-3), "dense", M * N * 4),
    ("w", torch.zeros(M, N), "row_scale", M * 4),
    ("half", BASE["half"] + draw(8, 8, seed=7).to(torch.bfloat16), "dense", 128),
]


@pytest.mark.parametrize(("name", "value", "kind", "most"), CASES, ids=[f"{case[2]}-{case[0]}" for case in CASES])
def test_a_parameter_is_stored_as_the_smallest_kind_and_comes_back(
    name: str, value: Tensor, kind: str, most: int
) -> None:
    tensors = encode({name: value}, BASE)
    assert {key.partition(".")[0] for key in tensors} == {kind}
    assert nbytes(tensors) <= most
    back = decode(load(save(tensors)), BASE)[name]
    assert back.dtype == value.dtype and back.shape == value.shape
    assert float((back - value).abs().max()) <= TOLERANCE * float(value.abs().max())
    if kind in ("sparse", "dense"):
        assert torch.equal(back, value)


def test_what_is_the_bases_is_left_out() -> None:
    assert encode({"w": W.clone(), "b": BASE["b"]}, BASE) == {}
    assert decode({}, BASE) == {}


def test_a_wide_matrix_ships_by_its_rank_alone() -> None:
    base = {"w": draw(300, 700, scale=0.04)}
    value = base["w"] + draw(300, 20, seed=1, scale=0.1) @ draw(20, 700, seed=2, scale=0.04)
    tensors = encode({"w": value}, base)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        "low_rank.up/w": (300, 20),
        "low_rank.down/w": (20, 700),
    }


def test_encoding_is_the_same_every_time() -> None:
    torch.manual_seed(1)
    first = encode({"w": dora()}, BASE)
    torch.manual_seed(2)
    again = encode({"w": dora()}, BASE)
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


SHAPES = st.lists(st.integers(0, 9), max_size=4)


@given(
    shape=SHAPES,
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(["dense", "sparse", "rows", "rank", "same", "zero"]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
@settings(max_examples=150, deadline=None)
def test_any_delta_comes_back(shape: list[int], dtype: torch.dtype, seed: int, kind: str, scale: float) -> None:
    own = draw(*shape, seed=seed, scale=scale)
    other = draw(*shape, seed=seed + 1, scale=scale)
    rows = own.reshape(shape[0], -1) if own.numel() and shape else None
    if kind == "same":
        other = own.clone()
    elif kind == "zero":
        other = torch.zeros_like(own)
    elif kind == "sparse":
        other = torch.where(draw(*shape, seed=seed + 2) > 1.5, other, own)
    elif kind == "rows" and rows is not None:
        other = (rows * draw(len(rows), 1, seed=seed + 2)).reshape(shape)
    elif kind == "rank" and rows is not None:
        other = (rows + draw(len(rows), 1, seed=1) @ draw(1, rows.shape[1], seed=2)).reshape(shape)
    base, value = {"p.weight": own.to(dtype)}, other.to(dtype)
    tensors = encode({"p.weight": value}, base)
    assert nbytes(tensors) <= value.nbytes
    back = decode(load(save(tensors)), base).get("p.weight", base["p.weight"])
    assert back.shape == value.shape and back.dtype == value.dtype
    if value.numel():
        error = (back.double() - value.double()).abs().max()
        assert float(error) <= TOLERANCE * float(value.double().abs().max())


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).requires_grad_(False)


def base_of(net: nn.Module) -> dict[str, Tensor]:
    return dict(net.named_parameters())


def bottleneck(net: nn.Module, seed: int, width: int = 3) -> dict[str, Tensor]:
    values = fresh_bottlenecks(net, ["0"], width, torch.Generator().manual_seed(seed))
    return {name: value + draw(*value.shape, seed=seed, scale=0.3) for name, value in values.items()}


def test_inserted_modules_and_offline_values_ship_too() -> None:
    net = model()
    inserted = bottleneck(net, 1)
    delta = {
        **inserted,
        "2.bias": draw(4),
        "offline::2.bias": net[2].bias.clone(),
        "offline::0.weight": changed(net[0].weight, 2),
        **{f"offline::{name}": value * 0.5 for name, value in inserted.items()},
    }
    tensors = encode(delta, base_of(net))
    back = decode(load(save(tensors)), base_of(net))
    # An offline value that is the base's is kept: an offline model that changed nothing still answers.
    assert back.keys() == delta.keys()
    assert all(torch.equal(back[name], delta[name]) for name in delta)
    assert tensors["sparse.index/offline::2.bias"].numel() == 0


def test_a_decoded_delta_holds_nothing_of_the_files_tensors() -> None:
    tensors = encode({"w": W + draw(M, N, seed=8)}, BASE)
    back = decode(tensors, BASE)["w"]
    tensors["dense.value/w"].zero_()
    assert float(back.abs().min()) > 0


NAN = torch.full((M,), float("nan"))
HOSTILE: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
    (lambda t: t.update({"dense.value/x": W}), "parameter 'x' is not the base's"),
    (lambda t: t.update({"w": W}), "entry 'w' is not of a delta"),
    (lambda t: t.update({"magic.value/w": W}), "entry 'magic.value/w' is not of a delta"),
    (lambda t: t.update({"sparse.scale/w": W}), "entry 'sparse.scale/w' is not of a delta"),
    (lambda t: t.update({"dense.value/w": W}), "parameter 'w' is there as sparse and as dense"),
    (lambda t: t.pop("sparse.value/w"), "parameter 'w' is sparse without its value"),
    (lambda t: t.update({"dense.value/b": NAN}), "'dense.value/b' holds values that are not finite"),
    (lambda t: t.update({"dense.value/b": torch.ones(M, dtype=torch.int64)}), "'dense.value/b' holds values"),
    (lambda t: t.update({"dense.value/b": torch.ones(M + 1)}), r"'b' has shape \(48,\) in the base and \(49,\)"),
    (lambda t: t.update({"dense.value/b": torch.ones(())}), r"'b' has shape \(48,\)"),
    (lambda t: t["sparse.index/w"].fill_(M * N), "'sparse.index/w' must rise"),
    (lambda t: t["sparse.index/w"].fill_(-1), "'sparse.index/w' must rise"),
    (lambda t: t["sparse.index/w"].fill_(3), "'sparse.index/w' must rise"),
    (lambda t: t.update({"sparse.index/w": torch.zeros(5)}), "values that are not|which doesn't fit"),
    (lambda t: t.update({"sparse.index/w": torch.zeros(5, 1, dtype=torch.int32)}), "'w' is sparse with"),
    (lambda t: t.update({"sparse.value/w": torch.zeros(4)}), "'w' is sparse with"),
    (lambda t: t.update({"row_scale.scale/conv": torch.ones(31)}), "'conv' is row_scale with"),
    (lambda t: t.update({"row_scale.scale/conv": torch.full((32,), 3e38)}), "not finite numbers"),
    (lambda t: t.update({"dense.value/0.homeostat_bottleneck.up.bias": torch.ones(3)}), "is not the base's"),
]


@pytest.mark.parametrize(("change", "text"), HOSTILE)
def test_a_hostile_file_is_refused_by_its_entry(change: Callable[[dict[str, Tensor]], object], text: str) -> None:
    base = {**BASE, "conv": BASE["conv"] * 100}
    tensors = encode({"w": changed(W, 5), "b": BASE["b"] + 1, "conv": base["conv"] * 2}, base)
    assert {"row_scale.scale/conv", "sparse.index/w", "dense.value/b"} <= tensors.keys()
    decode(tensors, base)
    change(tensors)
    with pytest.raises(ValueError, match=text):
        decode(tensors, base)


@pytest.mark.parametrize(
    ("up", "down"), [((M, 2), (3, N)), ((M + 1, 2), (2, N)), ((M, 2), (2, N + 1)), ((M,), (2, N)), ((), (1, N))]
)
def test_factors_that_do_not_fit_are_refused(up: tuple[int, ...], down: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="'w' is low_rank with"):
        decode({"low_rank.up/w": torch.zeros(up), "low_rank.down/w": torch.zeros(down)}, BASE)
    with pytest.raises(ValueError, match="'b' is row_scale with"):
        decode({"row_scale.scale/b": torch.ones(M)}, BASE)


def test_a_relative_kind_needs_something_to_be_relative_to() -> None:
    net = model()
    name = "0.homeostat_bottleneck.up.bias"
    with pytest.raises(ValueError, match="the base has none that it could be relative to"):
        decode({f"row_scale.scale/{name}": torch.ones(3)}, base_of(net))


@pytest.mark.parametrize(
    ("delta", "text"),
    [
        ({"x": torch.zeros(2)}, "parameter 'x' is not the base's"),
        ({"b": torch.zeros(2)}, r"'b' has shape \(48,\) in the base and \(2,\)"),
        ({"b": NAN}, "'b' has values that are not finite"),
        ({"offline::x": torch.zeros(2)}, "parameter 'offline::x' is not the base's"),
    ],
)
def test_what_cant_be_shipped_or_merged_is_named(delta: dict[str, Tensor], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        encode(delta, BASE)
    with pytest.raises(ValueError, match=text):
        merge([delta], BASE)


def test_a_merge_is_the_mean_of_whole_values_and_the_base_counts_where_nothing_was_moved() -> None:
    one, two = {"w": W + LOW, "b": BASE["b"] + 1}, {"w": W - 2 * LOW}
    merged = merge([one, two], BASE, [3.0, 1.0])
    torch.testing.assert_close(merged["w"], W + 0.25 * LOW)
    torch.testing.assert_close(merged["b"], BASE["b"] + 0.75)
    assert all(torch.equal(merge([one], BASE)[name], one[name]) for name in one)
    torch.testing.assert_close(merge([one, two], BASE)["w"], W - 0.5 * LOW)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=4), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_merged_bottlenecks_give_the_mean_of_what_each_gives(weights: list[float], seed: int) -> None:
    net = model()
    deltas = [bottleneck(net, seed + i, width=1 + i) if i % 3 != 2 else {} for i in range(len(weights))]
    x = draw(5, 6, seed=seed)
    outputs = [slow.apply_delta(net, delta)[0](x) for delta in deltas]
    expected = sum(w / sum(weights) * out for w, out in zip(weights, outputs, strict=True))
    merged = slow.apply_delta(net, merge(deltas, base_of(net), weights))
    torch.testing.assert_close(merged[0](x), expected, rtol=1e-4, atol=1e-4)


def test_merging_what_grew_from_the_same_bottleneck_does_not_widen_it() -> None:
    net = model()
    one = bottleneck(net, 1)
    two = {name: value * 2 if ".up." in name else value for name, value in one.items()}
    merged = merge([one, two], base_of(net))
    name = "0.homeostat_bottleneck.up.weight"
    torch.testing.assert_close(merged[name], 1.5 * one[name])
    assert all(torch.equal(value, one[name]) for name, value in merge([one, one], base_of(net)).items())


def test_a_bottleneck_that_lacks_a_part_or_is_of_another_layer_is_not_merged() -> None:
    net = model()
    one = bottleneck(net, 1)
    part = {"0.homeostat_bottleneck.up.bias": one["0.homeostat_bottleneck.up.bias"]}
    with pytest.raises(ValueError, match="'0.homeostat_bottleneck' has only up.bias"):
        merge([one, part], base_of(net))
    other = {name: torch.zeros(2, 2) if "weight" in name else torch.zeros(2) for name in one}
    with pytest.raises(ValueError, match="layers of different shapes"):
        merge([one, other], base_of(net))


def test_a_delta_without_an_offline_model_counts_for_it_by_its_own_values() -> None:
    one = {"b": BASE["b"] + 1, "offline::b": BASE["b"] + 0.1}
    two = {"b": BASE["b"] - 1, "w": W + LOW}
    merged = merge([one, two], BASE)
    torch.testing.assert_close(merged["offline::b"], BASE["b"] + (0.1 - 1) / 2)
    torch.testing.assert_close(merged["offline::w"], W + LOW / 2)
    torch.testing.assert_close(merged["b"], BASE["b"])


@pytest.mark.parametrize(
    ("count", "weights", "text"),
    [
        (0, None, "0 deltas have 0 weights"),
        (2, [1.0], "2 deltas have 1 weights"),
        (2, [1.0, -1.0], "0 or more"),
        (2, [0.0, 0.0], "not all 0"),
        (1, [float("nan")], "finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(count: int, weights: list[float] | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        merge([{"b": BASE["b"]}] * count, BASE, weights)
