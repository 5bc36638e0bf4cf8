from __future__ import annotations

import pytest
import torch
from torch import nn

from adapters.features import FeatureTap, find_head
from adapters.reference import Reference


def test_the_head_is_the_last_linear_layer_that_is_called():
    assert find_head(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(1))) == "2"
    assert find_head(nn.MultiheadAttention(8, 2)) is None
    assert find_head(nn.Conv1d(3, 3, 3)) is None
    assert find_head(nn.Linear(3, 2)) == ""


def test_a_tap_gives_one_feature_row_per_input_row():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with FeatureTap(model) as tap:
        assert tap.features is None
        x = torch.randn(5, 3)
        model(x)
        assert torch.equal(tap.features, model[0](x)) and not tap.features.requires_grad
        series = torch.randn(5, 7, 3)
        model(series)
        torch.testing.assert_close(tap.features, model[0](series).mean(1))


def test_a_closed_tap_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    tap = FeatureTap(model, "0")
    model(torch.randn(5, 3))
    assert tap.features.shape == (5, 3)
    tap.close()
    tap.close()
    model(torch.randn(5, 3))
    assert tap.features is None and not model[0]._forward_pre_hooks


def test_a_tap_without_a_layer_says_which_there_are():
    with pytest.raises(ValueError, match="no nn.Linear layer"):
        FeatureTap(nn.ReLU())
    with pytest.raises(ValueError, match="no layer 'head'; its linear layers: 0"):
        FeatureTap(nn.Sequential(nn.Linear(2, 2)), "head")


def reference(**changes: object) -> Reference:
    parts = {
        "input_mean": torch.zeros(6),
        "input_var": torch.ones(6),
        "feature_mean": torch.zeros(4),
        "feature_var": torch.ones(4),
        "class_prior": torch.tensor([0.25, 0.75]),
        "exemplars_x": torch.randn(10, 2, 3),
        "exemplars_y": torch.randint(0, 2, (10,)),
        "entropy": 0.1234567890123,
        "error": 0.05,
    }
    return Reference(**(parts | changes))


@pytest.mark.parametrize("changes", [{}, {"class_prior": None}, {"feature_mean": None, "feature_var": None}])
def test_a_reference_survives_its_tensors(changes: dict[str, object]):
    given = reference(**changes)
    tensors = given.to_tensors()
    again = Reference.from_tensors(tensors).to("cpu")
    assert again.entropy == given.entropy and again.error == given.error
    assert again.class_prior is None if "class_prior" in changes else torch.equal(again.class_prior, given.class_prior)
    assert again.to_tensors().keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in again.to_tensors().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"input_var": torch.ones(5)},
        {"feature_var": None},
        {"feature_var": torch.ones(3)},
        {"class_prior": torch.ones(2, 2)},
        {"exemplars_y": torch.zeros(9)},
    ],
)
def test_parts_that_do_not_belong_together_are_refused(changes: dict[str, object]):
    with pytest.raises(ValueError, match=next(iter(changes))):
        reference(**changes)


def test_missing_and_unknown_parts_are_named():
    tensors = reference().to_tensors()
    with pytest.raises(ValueError, match="lacks input_mean"):
        Reference.from_tensors({key: value for key, value in tensors.items() if key != "input_mean"})
    with pytest.raises(ValueError, match="unknown parts prototypes"):
        Reference.from_tensors(tensors | {"prototypes": torch.ones(1)})
