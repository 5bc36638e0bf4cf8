"""The gate without labels, on a linear model whose features are a scaling and shift of the inputs."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from adapters.reference import Reference
from adapters.slow.gate.unlabelled import judge_unlabelled
from adapters.slow.gate.verdict import Verdict

torch.set_num_threads(1)
K, D, APART = 4, 8, 3.0


class Model(nn.Module):
    """Features are a fixed ramp of the inputs less a shift where a row comes from the moved sensors, then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(D + 1, D)
        self.head = nn.Linear(D, K)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(D, D + 1))
            self.body.bias.zero_()
            self.head.weight.copy_(APART * torch.eye(K, D))
            self.head.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


SHIFT = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0, -2.0, 2.0, -2.0])


def rows(n: int, seed: int, *, moved: bool, run: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (n, D + 1), the last of which says that the sensor has moved, and their classes."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, K, n // run + 1).repeat(run)[:n]
    x = APART * np.eye(K, D)[y] + rng.normal(size=(n, D))
    if moved:
        x = x + SHIFT.numpy() + 0.3
    return np.concatenate([x, np.full((n, 1), float(moved))], 1).astype(np.float32), y


def reference() -> Reference:
    x, y = rows(200, 0, moved=False)
    blank = torch.zeros(D + 1)
    return Reference(
        input_mean=blank,
        input_var=blank + 1,
        feature_mean=torch.zeros(D),
        feature_var=torch.ones(D),
        class_prior=torch.full((K,), 1 / K),
        exemplars_x=torch.from_numpy(x),
        exemplars_y=torch.from_numpy(y),
        entropy=0.1,
        error=0.02,
    )


def corrected(share: float = 1.0) -> Model:
    """A candidate that takes ``share`` of the sensors' shift out of the features of moved rows."""
    model = Model()
    with torch.no_grad():
        model.body.weight[:, D] = -share * (SHIFT + 0.3)
    return model


def judge(candidate: nn.Module, n: int = 384, run: int = 1, **options: int | float) -> Verdict:
    return judge_unlabelled(Model(), candidate, rows(n, 1, moved=True, run=run)[0], reference(), **options)  # type: ignore[arg-type]


def test_a_candidate_that_takes_the_shift_out_is_promoted() -> None:
    verdict = judge(corrected())
    assert (verdict.promote, verdict.reason, verdict.measure) == (True, "better", "class distance")
    assert 0 < verdict.gain_low < verdict.gain < verdict.gain_high
    assert verdict.reference_loss == 0.0
    assert 0 <= verdict.changed <= 0.15
    assert 8 <= verdict.blocks <= 24


def test_one_that_makes_the_shift_worse_or_changes_nothing_is_not() -> None:
    worse = judge(corrected(-1.0))
    assert not worse.promote and worse.gain_high < 0
    same = judge(Model())
    assert (same.reason, same.gain, same.changed) == ("not better", 0.0, 0.0)


def test_scaling_the_features_gains_nothing() -> None:
    scaled = Model()
    with torch.no_grad():
        scaled.body.weight *= 0.5
        scaled.head.weight *= 2.0
    verdict = judge(scaled)
    assert verdict.reason == "not better"
    assert verdict.gain == pytest.approx(0.0, abs=1e-4)


def test_one_error_more_on_the_reference_is_too_many() -> None:
    candidate = corrected()
    with torch.no_grad():
        candidate.head.bias[0] += 2.5
    verdict = judge(candidate)
    assert verdict.reference_loss > 0
    assert verdict.reason == "worse on reference"


def moving_rows_to(model: Model, push: float) -> Model:
    """Draws moved rows, and these alone, to class 0."""
    with torch.no_grad():
        model.body.weight[0, D] += push
    return model


def test_a_revolution_is_rejected() -> None:
    verdict = judge(moving_rows_to(corrected(), 6.0))
    assert verdict.changed > 0.15
    assert verdict.reason == "too many answers change"


def test_a_drift_of_the_answers_to_one_class_is_rejected() -> None:
    verdict = judge(moving_rows_to(corrected(), 1.6))
    assert 0.02 < verdict.changed <= 0.15
    assert verdict.reason == "answers collapse"


def test_one_that_is_less_sure_is_rejected() -> None:
    doubting = corrected()
    with torch.no_grad():
        doubting.head.weight *= 0.3
    assert judge(doubting).reason == "less sure"


@pytest.mark.parametrize("where", ["head.bias", "body.weight"])
def test_what_is_not_finite_is_rejected(where: str) -> None:
    broken = corrected()
    with torch.no_grad():
        broken.get_parameter(where).view(-1)[0] = math.nan
    assert judge(broken).reason == "non-finite"


def test_few_rows_stale_rows_and_rows_of_one_class_prove_nothing() -> None:
    assert judge(corrected(), n=100).reason == "too few rows"
    assert judge(corrected(), query=4, max_queries=3).reason == "stale"
    verdict = judge(corrected(), run=400)
    assert (verdict.promote, verdict.reason, verdict.blocks) == (False, "too few rows", 0)


def test_neither_model_is_changed() -> None:
    served, candidate = Model().train(), corrected().train()
    before = [copy.deepcopy(model.state_dict()) for model in (served, candidate)]
    judge_unlabelled(served, candidate, rows(384, 1, moved=True)[0], reference())
    for model, state in zip((served, candidate), before, strict=True):
        assert model.training and not model.head._forward_pre_hooks
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_it_can_not_judge_is_refused_with_advice() -> None:
    x = rows(384, 1, moved=True)[0]
    with pytest.raises(ValueError, match=r"give the model an nn\.Linear head, or give labels"):
        judge_unlabelled(nn.Identity(), nn.Identity(), x, reference())
    values = reference()
    object.__setattr__(values, "exemplars_y", values.exemplars_y.float())
    with pytest.raises(ValueError, match="exemplars with classes"):
        judge_unlabelled(Model(), Model(), x, values)
    with pytest.raises(ValueError, match=r"alpha is 1\.0"):
        judge_unlabelled(Model(), Model(), x, reference(), alpha=1.0)
