"""What the slow methods move, and forks that share memory with the model they come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import adapters.slow as slow
from adapters.slow import methods
from adapters.slow.trainee import private_copy


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)
    )


class Tied(nn.Module):
    """Encoder and head share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(5, 5)
        self.head = nn.Linear(5, 5)
        self.head.weight = self.encode.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encode(x))


def test_the_methods_are_the_files_and_each_file_registers_its_own_name() -> None:
    files = sorted(path.stem for path in Path(methods.__file__ or "").parent.glob("*.py") if path.stem != "__init__")
    assert {"head", "norm_affine", "norm_affine_head", "film", "full", "sparse_mask", "bottleneck"} <= set(files)
    assert slow.names() == files
    for name in files:
        assert slow.get(name).name == name


def test_an_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="did you mean 'norm_affine'"):
        slow.get("norm_afine")
    with pytest.raises(ValueError, match=f"there are {', '.join(slow.names())}"):
        slow.get("qqq")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("head", ["5.weight", "5.bias"]),
        ("norm_affine", ["1.weight", "1.bias", "4.weight", "4.bias"]),
        ("norm_affine_head", ["1.weight", "1.bias", "4.weight", "4.bias", "5.weight", "5.bias"]),
    ],
)
def test_a_method_moves_exactly_what_its_name_says(name: str, expected: list[str]) -> None:
    model = mlp().requires_grad_(False)
    moved = slow.get(name).parameters(model)
    assert list(moved) == expected
    assert all(moved[key] is dict(model.named_parameters())[key] for key in expected)


def test_a_model_that_is_one_linear_layer_is_all_head() -> None:
    assert list(slow.get("head").parameters(nn.Linear(2, 2))) == ["weight", "bias"]


@pytest.mark.parametrize(
    ("name", "model", "advice"),
    [
        ("head", nn.Sequential(nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1)), "use 'norm_affine'"),
        ("norm_affine", nn.Linear(2, 2), "use 'head'"),
        ("norm_affine", nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2)), "use 'head'"),
        ("norm_affine_head", nn.Conv1d(1, 1, 1), "add either"),
    ],
)
def test_a_method_that_can_move_nothing_says_what_to_do(name: str, model: nn.Module, advice: str) -> None:
    method = slow.get(name)
    assert advice in (method.check(model) or "")
    with pytest.raises(ValueError, match=advice):
        method.parameters(model)


def test_the_default_method_serves_a_model_without_norms_as_head_does() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert slow.get("norm_affine_head").check(model) is None
    assert slow.get("norm_affine_head").parameters(model) == slow.get("head").parameters(model)


def test_a_delta_replaces_what_it_names_and_shares_all_else() -> None:
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new = slow.apply_delta(model, {"5.bias": torch.tensor([1.0, 2.0, 3.0])})
    assert new is not model
    for name, value in new.state_dict().items():
        shared = value.data_ptr() == model.state_dict()[name].data_ptr()
        assert shared == (name != "5.bias")
    assert new[5].bias.tolist() == [1.0, 2.0, 3.0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_delta_is_copied_so_that_the_caller_may_reuse_it() -> None:
    delta = {"5.bias": torch.zeros(3)}
    new = slow.apply_delta(mlp(), delta)
    delta["5.bias"] += 1
    assert new[5].bias.tolist() == [0.0, 0.0, 0.0]


def test_values_take_the_layout_of_the_model_whatever_theirs_is() -> None:
    """A transposed weight is multiplied in another order: a version restored from a file would round differently."""
    model = mlp()
    transposed = model.state_dict()["5.weight"].T.contiguous().T
    assert not transposed.is_contiguous()
    assert slow.apply_delta(model, {"5.weight": transposed})[5].weight.is_contiguous()


def test_a_delta_for_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no parameter '9\.bias'"):
        slow.apply_delta(mlp(), {"9.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"'5.bias' has shape \(3,\) in the model and \(4,\)"):
        slow.apply_delta(mlp(), {"5.bias": torch.zeros(4)})


@pytest.mark.parametrize("name", ["encode.weight", "head.weight"])
def test_tied_parameters_stay_tied(name: str) -> None:
    new = slow.apply_delta(Tied(), {name: torch.eye(5)})
    assert new.encode.weight is new.head.weight
    assert torch.equal(new.encode.weight, torch.eye(5))


def test_watching_hooks_stay_with_the_served_model() -> None:
    class Watch:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, *_: object) -> None:
            self.calls += 1

        def __deepcopy__(self, memo: object) -> Watch:
            raise TypeError("holds a lock")

    model, before, after = mlp(), Watch(), Watch()
    model[5].register_forward_pre_hook(before)
    model.register_forward_hook(after)
    new = slow.apply_delta(model, {})
    new.eval()(torch.zeros(2, 8))
    assert (before.calls, after.calls) == (0, 0)
    model.eval()(torch.zeros(2, 8))
    assert (before.calls, after.calls) == (1, 1)


def test_a_pruned_layer_stays_pruned_in_a_fork() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    prune.random_unstructured(model[1], "weight", amount=0.5)
    original = slow.get("head").parameters(model)
    new = slow.apply_delta(model, {name: torch.ones_like(value) for name, value in original.items()})
    expected = nn.functional.linear(model[0](torch.ones(1, 4)), model[1].weight_mask, torch.ones(2))
    assert torch.equal(new(torch.ones(1, 4)), expected)


def test_the_private_copy_is_in_eval_mode_whatever_the_model_is_in() -> None:
    model = mlp().train()
    twin, moved = private_copy(model, slow.get("head").parameters(model))
    assert not any(module.training for module in twin.modules())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in moved.values())
