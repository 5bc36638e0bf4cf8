"""Ways of keeping what was known, in front of a method, and how they are put together by name."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adapters.slow as slow
from adapters.slow import keeping, registry
from adapters.slow.keeping.base import Keeping, Settling
from adapters.slow.offline import PREFIX, attach_offline, detach_offline, offline_of
from daemon.checkpoint import decode, encode
from tests.unit.slow_world import draw, error, memory, mixed, trained

pytestmark = pytest.mark.sweep


torch.set_num_threads(1)
OPTIONS = slow.BurstOptions(reference_share=0.0)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained()


def burst(
    model: nn.Module, method: slow.SlowMethod, options: slow.BurstOptions = OPTIONS, **more: Any
) -> slow.BurstResult:
    x, y = draw(3, 300)
    more = {"seed": 0} | more
    return slow.run_burst(model, method, memory(mixed(x), y), options, task="classification", **more)


def errors(model: nn.Module, result: slow.BurstResult) -> tuple[float, float]:
    """On the drifted stream and on the source."""
    candidate = slow.apply_delta(model, result.delta)
    x, y = draw(4, 2_000)
    return error(candidate, mixed(x), y), error(candidate, x, y)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# Names and options


def test_the_ways_of_keeping_are_the_files_and_each_file_registers_its_own_name() -> None:
    assert registry.keepings() == ["fisher", "interpolate", "lae"]
    for name in registry.keepings():
        kept = registry.get(f"{name}+head")
        assert isinstance(kept, registry.KeptMethod)
        assert (kept.name, kept.keepings[0].name) == (f"{name}+head", name)
        assert type(kept.keepings[0]).__module__ == f"{keeping.__name__}.{name}"
    assert not set(registry.keepings()) & set(slow.names())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fishr+head", "way of keeping 'fishr' does not exist; did you mean 'fisher'"),
        ("qqq+head", "there are fisher, interpolate, lae"),
        ("fisher+hed", "slow method 'hed' does not exist; did you mean 'head'"),
        ("fisher", r"'fisher' only keeps; name what to learn after it, as 'fisher\+head'"),
        ("lae+fisher", "'fisher' only keeps"),
        ("head+norm_affine", "'head' is a method, and only ways of keeping"),
        ("lae+lae+head", "'lae' stands there twice"),
        ("fisher+", "slow method '' does not exist"),
        ("+head", "way of keeping '' does not exist"),
    ],
)
def test_a_name_that_can_not_be_composed_says_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.get(name)


def test_options_go_to_the_part_that_has_them() -> None:
    method = registry.get("fisher+interpolate+head", strength=3.0, share=0.2, **{"fisher.rows": 10})
    assert isinstance(method, registry.KeptMethod)
    fisher, interpolate = method.keepings
    assert (vars(fisher), vars(interpolate)) == ({"strength": 3.0, "rows": 10}, {"share": 0.2})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fisher+head", {"strenth": 1}, "no option 'strenth'; did you mean 'strength'"),
        ("fisher+head", {"qqq": 1}, "it has strength, rows"),
        ("fisher+head", {"lae.momentum": 1}, "no part 'lae' for option 'lae.momentum'"),
        ("fisher+head", {"strength": 1, "fisher.strength": 2}, "given twice"),
        ("fisher+head", {"strength": -1}, "strength is -1"),
        ("fisher+head", {"strength": math.nan}, "strength is nan"),
        ("fisher+head", {"rows": 257}, "rows is 257"),
        ("interpolate+head", {"share": 0}, "share is 0"),
        ("lae+head", {"momentum": 1.0}, "momentum is 1.0"),
        ("interpolate+sparse_mask", {"share": 0.3}, "write interpolate.share or sparse_mask.share"),
    ],
)
def test_an_option_that_is_wrong_is_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.get(name, **options)


def test_a_kept_method_refuses_the_models_that_the_method_refuses() -> None:
    kept, plain = (registry.get(name) for name in ("fisher+norm_affine", "norm_affine"))
    assert kept.check(nn.Linear(2, 2)) == plain.check(nn.Linear(2, 2))
    assert kept.check(nn.Sequential(nn.LayerNorm(2))) is None


@pytest.mark.parametrize("name", ["fisher+head", "interpolate+head", "lae+head", "fisher+lae+film"])
def test_the_served_model_is_never_changed(model: nn.Module, name: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    burst(model, registry.get(name))
    assert same(before, dict(model.state_dict()))
    assert not model._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


# Fisher


@pytest.mark.parametrize("name", ["full", "film", "head"])
def test_the_anchor_trades_what_is_learnt_for_what_is_kept(model: nn.Module, name: str) -> None:
    def mean_errors(method: slow.SlowMethod) -> list[float]:
        # Over orders of the rows: one order moves the source's error by a point.
        runs = [errors(model, burst(model, method, seed=seed)) for seed in range(3)]
        return np.mean(runs, axis=0).tolist()

    free, held = mean_errors(registry.get(name)), mean_errors(registry.get(f"fisher+{name}", strength=10.0))
    still = errors(model, burst(model, registry.get(f"fisher+{name}", strength=1e12)))
    x, y = draw(4, 2_000)
    frozen = error(model, mixed(x), y), error(model, x, y)
    assert free[1] > frozen[1] + 0.02
    assert held[1] < free[1] - 0.01
    assert held[0] < frozen[0] - 0.005
    assert still == pytest.approx(frozen, abs=0.001)


def test_a_strength_of_zero_is_no_anchor_to_the_bit(model: nn.Module) -> None:
    assert same(burst(model, registry.get("fisher+head", strength=0)).delta, burst(model, registry.get("head")).delta)


@pytest.mark.parametrize("strength", [1.0, 1e6, 1e30])
@pytest.mark.parametrize("optimizer", ["sgd", "prodigy", "momo", "trial_step"])
def test_no_strength_makes_a_burst_diverge(model: nn.Module, strength: float, optimizer: str) -> None:
    options = slow.BurstOptions(optimizer=optimizer, lr=1.0, steps=30, reference_share=0.0)
    result = burst(model, registry.get("fisher+norm_affine_head", strength=strength), options)
    assert result.reason == "done"
    assert all(bool(value.isfinite().all()) for value in result.delta.values())


def test_a_later_burst_is_drawn_back_to_the_frozen_model_not_to_the_version(model: nn.Module) -> None:
    version = slow.apply_delta(model, burst(model, registry.get("head")).delta)
    result = burst(version, registry.get("fisher+head", strength=1e12), frozen=model)
    for name, value in result.delta.items():
        # Where F is exactly 0 (a unit that is dead on the reference) nothing draws.
        moved = (value - model.get_parameter(name)).abs() > 1e-4
        assert float(moved.float().mean()) < 0.1
        assert not torch.allclose(version.get_parameter(name), model.get_parameter(name), atol=1e-2)


class Scaled(nn.Module):
    """The same function with outputs `by` times as large, through one weight that is."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.head = nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return self.by * self.head(x)


@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0])
def test_the_information_is_the_squared_movement_of_the_outputs_whatever_the_residuals(noise: float) -> None:
    from adapters.slow.keeping.fisher import fisher

    rng = np.random.default_rng(0)
    x = rng.normal(size=(2_000, 3)).astype(np.float32) * np.array([1, 2, 0], np.float32)
    net = Scaled(3.0)
    y = net(torch.from_numpy(x)).detach().numpy()[:, 0] + noise * rng.choice([-1, 1], 2_000).astype(np.float32)
    given = slow.Given(
        task="regression",
        seed=0,
        draw=lambda rows: (torch.zeros(rows, 3), torch.zeros(rows)),
        reference=(torch.from_numpy(x), torch.from_numpy(y.astype(np.float32))),
        frozen=net,
    )
    trainee = registry.get("head").begin(net, given)
    (information,) = fisher(trainee, given, 256).values()
    # d output / d weight = 3 x: squared 9 E[x²] = 9, 36, 0.
    assert information[0].tolist() == pytest.approx([9, 36, 0], rel=0.3, abs=1e-9)


def test_the_anchor_needs_a_reference(model: nn.Module) -> None:
    x, y = draw(3, 50)
    with pytest.raises(ValueError, match="'fisher' needs reference exemplars"):
        slow.run_burst(model, registry.get("fisher+head"), memory(x, y, 0), OPTIONS, task="classification", seed=0)


def test_two_that_act_after_the_step_both_do(model: nn.Module) -> None:
    from adapters.slow.keeping.base import with_after_step

    trainee = slow.Trainee(module=model, groups=[], values=dict)
    told: list[tuple[str, list[float]]] = []
    inner = with_after_step(trainee, lambda lengths: told.append(("inner", list(lengths))))
    outer = with_after_step(inner, lambda lengths: told.append(("outer", list(lengths))))
    assert isinstance(outer, Settling)
    outer.after_step([0.5])
    assert told == [("outer", [0.5]), ("inner", [0.5])]


# Interpolation


def test_interpolation_ends_on_the_way(model: nn.Module) -> None:
    whole = burst(model, registry.get("head")).delta
    part = burst(model, registry.get("interpolate+head", share=0.3)).delta
    assert same(burst(model, registry.get("interpolate+head", share=1.0)).delta, whole)
    for name, value in part.items():
        start = model.get_parameter(name)
        assert torch.allclose(value, start + 0.3 * (whole[name] - start), atol=1e-6)


def test_half_the_way_forgets_less(model: nn.Module) -> None:
    whole = errors(model, burst(model, registry.get("full")))
    half = errors(model, burst(model, registry.get("interpolate+full")))
    assert half[1] < whole[1] - 0.01
    assert half[0] < 0.15


# LAE


def test_a_version_answers_by_the_surer_of_both_models(model: nn.Module) -> None:
    delta = burst(model, registry.get("lae+head")).delta
    assert set(delta) == {"6.weight", "6.bias", "offline::6.weight", "offline::6.bias"}
    online = {name: value for name, value in delta.items() if not name.startswith(PREFIX)}
    offline = {name.removeprefix(PREFIX): value for name, value in delta.items() if name.startswith(PREFIX)}
    assert same(online, burst(model, registry.get("head")).delta)
    for name, value in offline.items():
        start = model.get_parameter(name)
        assert torch.allclose(value, start + 0.1 * (online[name] - start), atol=1e-6)

    x = torch.from_numpy(draw(4, 50)[0])
    both = slow.apply_delta(model, delta)(x).exp()
    surer = torch.maximum(*(slow.apply_delta(model, part)(x).softmax(1) for part in (online, offline)))
    assert torch.allclose(both, surer / surer.sum(1, keepdim=True), atol=1e-6)


def test_the_next_burst_trains_the_online_model_alone_and_folds_it_into_the_same_offline_one(model: nn.Module) -> None:
    method = registry.get("lae+head", momentum=0.5)
    first = burst(model, method).delta
    version = slow.apply_delta(model, first)
    second = burst(version, method, frozen=model)
    online = slow.apply_delta(model, {name: value for name, value in first.items() if not name.startswith(PREFIX)})
    assert same(
        {name: value for name, value in second.delta.items() if not name.startswith(PREFIX)},
        burst(online, registry.get("head")).delta,
    )
    for name in ("6.weight", "6.bias"):
        expected = 0.5 * first[PREFIX + name] + 0.5 * second.delta[name]
        assert torch.allclose(second.delta[PREFIX + name], expected, atol=1e-6)
    # The version's delta over the frozen model is the union, and answers as the delta over the version.
    x = torch.from_numpy(draw(4, 50)[0])
    over_version = slow.apply_delta(version, second.delta)(x)
    assert torch.equal(over_version, slow.apply_delta(model, first | second.delta)(x))
    assert len(slow.apply_delta(version, second.delta)._forward_hooks) == 1


def test_a_burst_that_moves_other_parameters_leaves_the_offline_values_of_the_first(model: nn.Module) -> None:
    first = burst(model, registry.get("lae+head")).delta
    version = slow.apply_delta(model, first)
    second = burst(version, registry.get("lae+norm_affine"), frozen=model).delta
    x = torch.from_numpy(draw(4, 50)[0])
    over_version = slow.apply_delta(version, second)
    assert torch.allclose(over_version(x), slow.apply_delta(model, first | second)(x), atol=1e-6)
    other = offline_of(over_version)
    assert other is not None
    assert torch.equal(other.get_parameter("6.weight"), first[PREFIX + "6.weight"])


def test_a_plain_method_on_a_version_with_an_offline_model_keeps_it(model: nn.Module) -> None:
    version = slow.apply_delta(model, burst(model, registry.get("lae+head")).delta)
    result = burst(version, registry.get("head"))
    candidate = slow.apply_delta(version, result.delta)
    assert offline_of(candidate) is offline_of(version)
    assert result.loss_after < result.loss_before


@pytest.mark.parametrize("name", ["lae+film", "lae+bottleneck", "interpolate+lae+head", "fisher+lae+full"])
def test_an_offline_model_goes_with_any_method_and_again_on_its_version(model: nn.Module, name: str) -> None:
    method = registry.get(name)
    version, delta = model, {}
    for seed in range(2):
        result = burst(version, method, frozen=model, seed=seed)
        assert result.reason == "done"
        version, delta = slow.apply_delta(version, result.delta), delta | result.delta
    x = torch.from_numpy(draw(4, 50)[0])
    assert offline_of(version) is not None
    assert torch.allclose(version(x), slow.apply_delta(model, delta)(x), atol=1e-5)


def test_a_delta_with_an_offline_part_survives_a_checkpoint_to_the_bit(model: nn.Module) -> None:
    delta = burst(model, registry.get("fisher+lae+head")).delta
    assert same(decode(encode({"delta": delta}))["delta"], delta)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_a_regressor_answers_by_the_mean_of_both(shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Linear(2, 1), *([nn.Flatten(0)] if len(shape) == 1 else []))
    twin = slow.fork(net, {})
    attach_offline(twin, net, {"offline::0.bias": net[0].bias.detach() + 2})
    x = torch.randn(6, 2)
    assert twin(x).shape == shape
    assert torch.allclose(twin(x), net(x) + 1)


def test_an_offline_model_is_no_part_of_the_names_and_is_shared_by_copies(model: nn.Module) -> None:
    twin = slow.fork(model, {})
    attach_offline(twin, model, {"6.bias": torch.zeros(5)})
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert [name for name, _ in twin.named_modules()] == [name for name, _ in model.named_modules()]
    other = offline_of(twin)
    assert other is not None
    assert other.get_parameter("0.weight").data_ptr() == model.get_parameter("0.weight").data_ptr()
    x = torch.from_numpy(draw(4, 5)[0])
    for copied in (copy.deepcopy(twin), slow.fork(twin, {})):
        assert offline_of(copied) is other
        assert torch.equal(copied(x), twin(x))
    detach_offline(twin)
    assert torch.equal(twin(x), model(x))


def test_an_offline_value_that_does_not_fit_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no parameter 'nine'"):
        slow.apply_delta(model, {"offline::nine": torch.zeros(1)})
    with pytest.raises(ValueError, match="has shape"):
        slow.apply_delta(model, {"offline::6.bias": torch.zeros(4)})


def test_keeping_is_abstract() -> None:
    with pytest.raises(TypeError):
        Keeping()  # type: ignore[abstract]
