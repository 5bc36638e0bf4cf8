"""Every slow method on every kind of model; what each kind of movement promises; modules that a delta inserts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import adapters.slow as slow
from adapters.slow.inserted import (
    CallBottleneck,
    fresh_bottlenecks,
    join_bottleneck,
    kind_of,
    layers_with_bottleneck,
    split_bottleneck,
)
from tests.check_adapter import LONG
from tests.check_slow import CHECKS, MODELS, QUICK_CHECKS, Subject, build_model, check_method, result, train

pytestmark = pytest.mark.sweep


torch.set_num_threads(1)

THOROUGH = ("gru", "tied")
"""Kinds on which a quick run makes every check."""
LIGHT = ("cnn_without_bias", "cnn_bn3d", "transformer", "weight_norm", "one_linear", "no_linear", "regressor")
"""Kinds on which it makes those without a burst."""
REFUSED = {
    "film": {"gru", "lstm", "one_linear"},
    "full": set(),
    "sparse_mask": set(),
    "bottleneck": {"one_linear"},
    "head": {"no_linear"},
}


@pytest.mark.parametrize("kind", MODELS if LONG else (*THOROUGH, *LIGHT))
@pytest.mark.parametrize("name", slow.names())
def test_a_slow_method_does_on_every_model_what_all_must(name: str, kind: str) -> None:
    outcome = check_method(name, kind, CHECKS if LONG or kind in THOROUGH else QUICK_CHECKS)
    assert outcome in ("served", "refused", "exact")
    if name in REFUSED:
        assert outcome == ("refused" if kind in REFUSED[name] else "served")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("film", {"train_head": False}),
        ("bottleneck", {"train_head": False, "width": 3}),
        ("bottleneck", {"layers": ("layer.linear1", "embed")}),
        ("sparse_mask", {"score": "gradient", "share": 0.2}),
        ("full", {"backbone_rate": 1.0}),
    ],
)
def test_options_keep_the_promises(name: str, options: dict[str, object]) -> None:
    assert check_method(name, "transformer", **options) == "served"


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("full", {"backbone_rate": 0.0}, "backbone_rate is 0.0"),
        ("full", {"backbone_rate": float("nan")}, "backbone_rate is nan"),
        ("sparse_mask", {"share": 0.0}, "share is 0.0"),
        ("sparse_mask", {"share": 1.5}, "share is 1.5"),
        ("sparse_mask", {"score": "magnitude"}, "score is 'magnitude'; it must be one of fisher, gradient"),
        ("sparse_mask", {"rows": 0}, "rows is 0"),
        ("bottleneck", {"width": 0}, "width is 0"),
    ],
)
def test_an_option_out_of_range_is_named(name: str, options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        slow.get(name, **options)


def moved_by(name: str, kind: str, **options: object) -> tuple[nn.Module, dict[str, Tensor]]:
    model = build_model(kind)
    delta = Subject(name, kind, dict(options)).burst(model).delta
    own = dict(model.named_parameters())
    return model, {key: value for key, value in delta.items() if key not in own or not torch.equal(value, own[key])}


def test_film_moves_each_channel_by_one_scale_and_one_shift() -> None:
    model, delta = moved_by("film", "mlp_plain", train_head=False)
    assert set(delta) == {"0.weight", "0.bias"}
    ratio = delta["0.weight"] / model[0].weight
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    shift = delta["0.bias"] - ratio[:, 0] * model[0].bias
    assert float((ratio - 1).abs().min()) > 0 and float(shift.abs().min()) > 0


def test_films_shift_of_a_layer_without_bias_goes_to_the_norm_that_follows_or_nowhere() -> None:
    _, delta = moved_by("film", "cnn_without_bias", train_head=False)
    # The second convolution has neither a bias nor a norm behind it.
    assert set(delta) == {"0.weight", "1.bias", "3.weight"}


def test_film_scales_a_weight_that_two_layers_share_once_and_the_heads_not_at_all() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    trainee = slow.get("film", train_head=False).begin(model, Subject("film", "tied").given(model))
    assert set(result(trainee)) == {"0.weight", "0.bias"}
    model[2].weight = model[4].weight
    trainee = slow.get("film", train_head=False).begin(model, Subject("film", "tied").given(model))
    assert set(result(trainee)) == {"0.weight", "0.bias"}


def test_film_learns_in_full_precision_and_answers_in_the_models() -> None:
    model = build_model("mlp_plain").to(torch.bfloat16)
    trainee = slow.get("film").begin(model, Subject("film", "mlp_plain").given(model))
    assert {leaf.dtype for leaf in trainee.module.scales} == {torch.float32}
    assert {value.dtype for value in result(trainee).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("mlp_plain", {"0.weight": 0.1, "0.bias": 0.1, "2.weight": 1.0, "2.bias": 1.0}),
        ("one_linear", {"weight": 1.0, "bias": 1.0}),
        ("no_linear", {"0.weight": 0.1, "0.bias": 0.1, "1.weight": 0.1, "1.bias": 0.1}),
        # What the head shares with the backbone is slow.
        (
            "tied",
            {"encode.weight": 0.1, "encode.bias": 0.1, "between.weight": 0.1, "between.bias": 0.1, "head.bias": 1.0},
        ),
    ],
)
def test_full_moves_the_head_fast_and_the_backbone_slowly(kind: str, rates: dict[str, float]) -> None:
    trainee = Subject("full", kind).begin(build_model(kind))
    names = {id(leaf): name for name, leaf in trainee.module.named_parameters()}
    assert {names[id(leaf)]: group.rate for group in trainee.groups for leaf in group.parameters} == rates


@pytest.mark.parametrize("score", ["fisher", "gradient"])
@pytest.mark.parametrize("share", [1e-6, 0.05, 0.3, 1.0])
def test_a_sparse_mask_moves_its_share_of_the_weights_and_no_other(share: float, score: str) -> None:
    model = build_model("mlp_ln")
    delta = Subject("sparse_mask", "mlp_ln", {"share": share, "score": score, "rows": 16}).burst(model).delta
    own = dict(model.named_parameters())
    moved = sum(int((value != own[name]).sum()) for name, value in delta.items())
    total = sum(value.numel() for value in own.values())
    # The burst has momentum and weight decay. Where a value is not moved, its unit is shut or it is zero already.
    assert 0 < moved <= max(1, round(share * total))
    assert moved >= 0.8 * share * total - 1


def test_a_sparse_mask_takes_the_weights_that_the_loss_depends_on() -> None:
    model = nn.Sequential(nn.Linear(6, 4)).requires_grad_(False)
    with torch.no_grad():
        model[0].weight[:, 2:] = 0.5
    subject = Subject("sparse_mask", "one_linear")
    given = subject.given(model)
    # Only the first two inputs are ever on, the first strongly.
    scale = torch.tensor([10.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    x, y = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)) * scale, torch.arange(64) % 4
    given = slow.Given(task="classification", seed=0, draw=lambda n: (x[:n], y[:n]), reference=(x, y), frozen=model)
    trainee = slow.get("sparse_mask", share=4 / 28, rows=64).begin(model, given)
    train(trainee, subject, steps=2)
    assert (result(trainee)["0.weight"] != model[0].weight).nonzero()[:, 1].tolist() == [0, 0, 0, 0]


def test_a_bottleneck_follows_each_layer_but_the_head() -> None:
    def layers(kind: str) -> list[str]:
        return layers_with_bottleneck(result(Subject("bottleneck", kind).begin(build_model(kind))))

    assert layers("cnn_bn1d") == ["0", "3"]
    assert layers("cnn_bn3d") == ["0"]
    assert layers("lstm") == ["rnn"]
    # One for the transformer's layer as a whole.
    assert layers("transformer") == ["embed", "layer"]
    # Nothing here is an nn.Linear, and a bottleneck must not become the head.
    assert layers("no_linear") == ["0"]
    version = slow.apply_delta(model := build_model("no_linear"), Subject("bottleneck", "no_linear").burst(model).delta)
    assert slow.get("head").check(version) is not None


def test_a_bottleneck_keeps_the_names_and_is_no_wider_than_its_layer() -> None:
    model, delta = moved_by("bottleneck", "cnn_bn3d")
    version = slow.apply_delta(model, delta)
    assert set(model.state_dict()) <= set(version.state_dict())
    assert version.get_parameter("0.homeostat_bottleneck.down.weight").shape == (4, 4, 1, 1, 1)


def test_a_next_burst_goes_on_training_the_bottlenecks_of_a_version() -> None:
    model, first = moved_by("bottleneck", "mlp_plain", width=3)
    version = slow.apply_delta(model, first)
    second = Subject("bottleneck", "mlp_plain", {"width": 5}).burst(version, seed=1).delta
    name = "0.homeostat_bottleneck.down.weight"
    assert second[name].shape == (3, 16) and not torch.equal(second[name], first[name])
    assert len(version[0]._forward_hooks) == len(slow.apply_delta(version, second)[0]._forward_hooks) == 1
    assert {name} <= set(Subject("full", "mlp_plain").burst(version).delta)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_bottleneck_stays_where_a_transformer_is_given_a_padding_mask() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    encoder.requires_grad_(False)
    twin = slow.apply_delta(encoder, fresh_bottlenecks(encoder, ["layers.0"], 4, torch.Generator()))
    with torch.no_grad():
        twin.layers[0].homeostat_bottleneck.up.bias.fill_(1.0)
    x, padding = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    with torch.inference_mode():
        there, before = twin(x, src_key_padding_mask=padding), encoder(x, src_key_padding_mask=padding)
    assert there.shape == before.shape and there.isfinite().all()
    assert float((there - before)[~padding].abs().min()) > 0
    assert encoder.use_nested_tensor


def test_a_bottleneck_adapts_the_sequence_of_a_recurrent_layer_packed_or_not() -> None:
    layer = nn.GRU(3, 4, batch_first=True).eval()
    values = fresh_bottlenecks(layer, [""], 8, torch.Generator().manual_seed(0))
    values[join_bottleneck("", "up.bias")] += 1.0
    twin = slow.apply_delta(layer, values)
    sequences = [torch.randn(5, 3), torch.randn(2, 3)]
    with torch.no_grad():
        out, last = twin(sequences[0][None])
        plain, plain_last = layer(sequences[0][None])
        torch.testing.assert_close(out, plain + 1.0)
        assert torch.equal(last, plain_last)
        packed, _ = twin(pack_sequence(sequences))
        assert isinstance(packed, PackedSequence)
        torch.testing.assert_close(packed.data, layer(pack_sequence(sequences))[0].data + 1.0)


def test_a_bottleneck_on_what_gives_no_tensor_says_so() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"out": super().forward(x)}

    model = Odd(2, 2)
    twin = slow.apply_delta(model, fresh_bottlenecks(model, [""], 8, torch.Generator()))
    with pytest.raises(TypeError, match="gives a dict, not a tensor; name other layers with the option layers"):
        twin(torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("layers", "text"),
    [(("nowhere",), "no layer 'nowhere'"), (("1",), "layer '1' is a ReLU, whose channels aren't known")],
)
def test_layers_that_cant_be_followed_are_refused_by_name(layers: tuple[str, ...], text: str) -> None:
    assert text in (slow.get("bottleneck", layers=layers).check(build_model("mlp_plain")) or "")


def test_a_delta_whose_bottleneck_does_not_fit_is_refused_by_layer() -> None:
    model = build_model("mlp_plain")
    good = fresh_bottlenecks(model, ["0"], 8, torch.Generator())
    name = join_bottleneck("0", "up.bias")
    for wrong, text in (
        ({key: value for key, value in good.items() if key != name}, "layer '0' has"),
        ({**good, name: torch.zeros(15)}, "layer '0' has"),
        ({join_bottleneck("9", "up.bias"): torch.zeros(2)}, "layer '9', which the model doesn't have"),
        ({key.replace("0.", "1.", 1): value for key, value in good.items()}, "a ReLU, can't hold one"),
        ({join_bottleneck("0", "down.weight"): torch.tensor(1.0)}, "layer '0' has"),
    ):
        with pytest.raises(ValueError, match=text):
            slow.apply_delta(model, wrong)
    for name in ("0.homeostat_bottleneck.left.weight", "0.homeostat_bottleneck", "xhomeostat_bottleneck.up.bias"):
        assert kind_of(name) is None
        with pytest.raises(ValueError, match="no parameter"):
            slow.apply_delta(model, {name: torch.zeros(2)})


@pytest.mark.parametrize("layer", ["", "0", "layers.2", "a.homeostat_bottleneck.down"])
def test_a_reserved_name_says_its_layer(layer: str) -> None:
    assert split_bottleneck(join_bottleneck(layer, "down.weight")) == (layer, "down.weight")
    offline = kind_of("offline::" + join_bottleneck(layer, "down.weight"))
    assert offline is not None and offline is kind_of("offline::any.weight") is not kind_of(
        join_bottleneck(layer, "up.bias")
    )


def test_a_fork_of_a_version_keeps_what_was_inserted_and_drops_who_watches() -> None:
    model, delta = moved_by("bottleneck", "mlp_plain")
    version = slow.apply_delta(model, delta)
    calls: list[int] = []
    version[0].register_forward_hook(lambda *_: calls.append(1))
    for twin in (slow.fork(version, {}), slow.apply_delta(version, {})):
        x = torch.randn(3, 6)
        assert [type(hook) for hook in twin[0]._forward_hooks.values()] == [CallBottleneck]
        assert torch.equal(twin(x), slow.apply_delta(model, delta)(x))
        assert twin[0].homeostat_bottleneck is not version[0].homeostat_bottleneck
        assert twin[0].homeostat_bottleneck.up.weight is version[0].homeostat_bottleneck.up.weight
    assert not calls
    copied = copy.deepcopy(slow.apply_delta(model, delta))
    with torch.no_grad():
        copied[0].homeostat_bottleneck.up.bias += 1
        assert not torch.equal(copied(x), twin(x)), "a copied hook calls the copy's module"


def test_inserting_in_inference_mode_leaves_a_version_that_can_be_learnt_from() -> None:
    model = build_model("mlp_plain")
    with torch.inference_mode():
        version = slow.apply_delta(model, fresh_bottlenecks(model, ["0"], 8, torch.Generator()))
    assert not any(parameter.is_inference() for parameter in version.parameters())
    assert Subject("bottleneck", "mlp_plain").burst(version).reason == "done"


@pytest.mark.parametrize("name", ["film", "bottleneck", "sparse_mask"])
def test_a_sensor_that_drifted_before_a_nonlinearity_is_repaired(name: str) -> None:
    rng, shape = np.random.default_rng(0), (2_000, 8)
    y = rng.integers(0, 4, shape[0])
    centres = rng.normal(size=(4, 8)) * 1.5
    x = (centres[y] + rng.normal(size=shape)).astype(np.float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
    model.requires_grad_(False).eval()
    aged = (0.4 * x + 3.0).astype(np.float32)
    memory = slow.Replay((8,), 2_000, classes=4, seed=0, reference_x=x[:50], reference_y=y[:50])
    memory.add(aged[:1_000], y[:1_000])
    options = slow.BurstOptions(optimizer="adamw", lr=2e-2, steps=60)
    method = slow.get(name, **({"share": 0.1} if name == "sparse_mask" else {}))
    outcome = slow.run_burst(model, method, memory, options, task="classification", seed=0)

    def error(net: nn.Module) -> float:
        return float((net(torch.from_numpy(aged[1_000:])).argmax(1).numpy() != y[1_000:]).mean())

    assert error(model) > 0.3
    assert error(slow.apply_delta(model, outcome.delta)) < 0.5 * error(model)
