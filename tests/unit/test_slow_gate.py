"""The gate on models whose answers are written down, and the intervals it rests on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

import adapters.slow as slow
from adapters.slow.intervals import binomial_tail, paired_errors, paired_losses, proportion_low, student_t_quantile

torch.set_num_threads(1)
N = 96
X = np.arange(N, dtype=np.float32)[:, None]
Y = np.arange(N) % 2


class Answers(nn.Module):
    """Answers row ``x`` with ``table[x]``; its norm layer would show if the gate ran it in train mode."""

    def __init__(self, table: NDArray[np.float64]) -> None:
        super().__init__()
        self.register_buffer("table", torch.tensor(table, dtype=torch.float32))
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.norm(x)
        return self.table[x[:, 0].long()]


def classifier(wrong: int, *, first: int = 0, confidence: float = 2.0) -> Answers:
    """Errs on ``wrong`` rows from row ``first`` on."""
    right = np.ones(N, bool)
    right[first : first + wrong] = False
    said = np.where(right, Y, 1 - Y)
    return Answers(np.where(np.arange(2) == said[:, None], confidence, 0.0))


def judge(served: nn.Module, candidate: nn.Module, **options: object) -> slow.Verdict:
    return slow.judge(served, candidate, X, Y, None, None, task="classification", **options)  # type: ignore[arg-type]


def test_a_better_candidate_is_promoted() -> None:
    verdict = judge(classifier(30), classifier(10))
    assert (verdict.promote, verdict.reason, verdict.measure) == (True, "better", "error")
    assert verdict.gain == pytest.approx(20 / N)
    assert 0 < verdict.gain_low < verdict.gain <= verdict.gain_high
    assert math.isnan(verdict.reference_loss)


def test_a_worse_candidate_is_rejected() -> None:
    verdict = judge(classifier(10), classifier(30))
    assert (verdict.promote, verdict.reason) == (False, "not better")
    assert verdict.gain_high < 0


def test_a_candidate_that_may_be_better_by_luck_is_rejected() -> None:
    verdict = judge(classifier(12), classifier(9, first=10))
    assert (verdict.promote, verdict.reason) == (False, "not better")
    assert verdict.gain_low < 0 < verdict.gain


def test_the_served_model_itself_is_never_promoted() -> None:
    verdict = judge(classifier(10), classifier(10))
    assert (verdict.promote, verdict.measure, verdict.gain) == (False, "log loss", 0.0)


def test_with_equal_errors_the_surer_model_wins_by_log_loss() -> None:
    verdict = judge(classifier(1), classifier(1, confidence=2.5))
    assert (verdict.promote, verdict.measure) == (True, "log loss")
    assert not judge(classifier(1, confidence=2.5), classifier(1)).promote


@pytest.mark.parametrize(("loss", "margin", "promote"), [(3, 0.02, False), (1, 0.02, True), (3, None, True)])
def test_the_reference_exemplars_may_lose_no_more_than_the_margin(
    loss: int, margin: float | None, promote: bool
) -> None:
    # The served model errs on rows 0 to 39, the candidate on the last three, which are reference rows.
    served, candidate = classifier(40), classifier(loss, first=N - loss)
    verdict = slow.judge(
        served, candidate, X[:46], Y[:46], X[46:], Y[46:], task="classification", reference_margin=margin
    )
    assert verdict.reference_loss == pytest.approx(loss / 50)
    assert verdict.promote == promote
    assert verdict.reason == ("better" if promote else "worse on reference")


def test_the_worst_class_is_reported() -> None:
    table = np.zeros((N, 2))
    table[:, 0] = 1.0
    verdict = judge(classifier(N), Answers(table))
    assert (verdict.worst_class, verdict.worst_class_gain) == (1, 0.0)
    assert verdict.promote


def test_too_few_rows_prove_nothing() -> None:
    verdict = slow.judge(classifier(N), classifier(0), X[:31], Y[:31], None, None, task="classification")
    assert (verdict.promote, verdict.reason) == (False, "too few rows")


def test_a_stale_set_is_refused_before_it_is_looked_at() -> None:
    assert judge(classifier(N), classifier(0), query=3, max_queries=3).promote
    assert judge(classifier(N), classifier(0), query=4, max_queries=3).reason == "stale"


def test_each_further_look_needs_more_evidence() -> None:
    served, candidate = classifier(12), classifier(2)
    verdicts = [judge(served, candidate, query=query) for query in range(1, 9)]
    bounds = [verdict.gain_low for verdict in verdicts]
    assert bounds == sorted(bounds, reverse=True)
    assert verdicts[0].promote
    assert not verdicts[-1].promote


@pytest.mark.parametrize("broken", ["served", "candidate"])
@pytest.mark.parametrize("row", [0, N - 1])
def test_an_answer_that_is_not_finite_is_never_promoted(broken: str, row: int) -> None:
    models = {"served": classifier(40), "candidate": classifier(0)}
    models[broken].table[row] = math.nan
    verdict = slow.judge(models["served"], models["candidate"], X[:60], Y[:60], X[60:], Y[60:], task="classification")
    assert (verdict.promote, verdict.reason) == (False, "non-finite")


def test_models_in_train_mode_are_judged_in_eval_mode_and_left_as_they_are() -> None:
    models = classifier(30).train(), classifier(10).train()
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    assert judge(*models) == judge(classifier(30).eval(), classifier(10).eval(), batch_rows=7)
    for model, state in zip(models, before, strict=True):
        assert model.training
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def regress(noise: float, outliers: float = 0.0) -> Answers:
    rng = np.random.default_rng(0)
    table = Y + noise * rng.normal(size=N)
    table[:3] += outliers
    return Answers(table[:, None])


def test_regression_promotes_the_smaller_squared_error_only() -> None:
    def verdict(served: nn.Module, candidate: nn.Module) -> slow.Verdict:
        return slow.judge(served, candidate, X, Y, X, Y, task="regression")

    better = verdict(regress(1.0), regress(0.1))
    assert (better.promote, better.measure, better.worst_class) == (True, "squared error", None)
    assert better.reference_loss < 0
    assert verdict(regress(0.1), regress(1.0)).reason == "not better"
    assert verdict(regress(0.1), regress(0.1)).reason == "not better"


def test_three_rows_of_triumph_do_not_carry_a_regressor_but_three_of_disaster_sink_it() -> None:
    def gain(served: nn.Module, candidate: nn.Module) -> slow.Verdict:
        return slow.judge(served, candidate, X, Y, None, None, task="regression")

    assert gain(regress(0.1, outliers=50.0), regress(0.1)).gain < 0.1
    assert not gain(regress(0.5), regress(0.1, outliers=50.0)).promote


def test_the_reference_loss_of_a_regressor_is_a_share_of_the_targets_variance() -> None:
    served, candidate = Answers(np.stack([Y + 0.0], axis=1)), Answers(np.stack([Y + 0.1], axis=1))
    verdict = slow.judge(served, candidate, X, Y, X, Y, task="regression")
    assert verdict.reference_loss == pytest.approx(0.01 / 0.25, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "ranking"}, "use 'classification' or 'regression'"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"query": 0}, "query 0"),
        ({"min_rows": 1}, "min_rows 1"),
        ({"y_new": Y[:-1]}, "96 rows of x have 95 labels"),
        ({"y_new": Y + 5}, "labels run from 5 to 6"),
        ({"task": "regression"}, "one output per row"),
    ],
)
def test_wrong_arguments_are_refused_with_their_values(options: dict[str, object], message: str) -> None:
    arguments = {"x_new": X, "y_new": Y, "x_ref": None, "y_ref": None, "task": "classification"} | options
    with pytest.raises(ValueError, match=message):
        slow.judge(classifier(3), classifier(1), **arguments)  # type: ignore[arg-type]


def test_a_classifier_must_give_one_row_of_logits() -> None:
    with pytest.raises(ValueError, match="needs logits"):
        judge(Answers(np.zeros(N)), classifier(1))


@given(better=st.integers(0, 40), worse=st.integers(0, 40), level=st.sampled_from([0.05, 0.01, 0.001]))
def test_the_lower_bound_is_above_zero_exactly_when_mcnemars_test_rejects(
    better: int, worse: int, level: float
) -> None:
    differ = better + worse
    p_value = sum(math.comb(differ, k) for k in range(better, differ + 1)) / 2**differ
    interval = paired_errors(better, worse, 100, level)
    assert (interval.low > 0) == (p_value <= level)
    assert interval.low <= interval.estimate <= interval.high
    mirrored = paired_errors(worse, better, 100, level)
    assert mirrored.low == pytest.approx(-interval.high)


def test_the_binomial_tail_is_exact_and_survives_thousands_of_trials() -> None:
    assert binomial_tail(3, 5, 0.5) == pytest.approx(0.5)
    assert binomial_tail(0, 5, 0.5) == 1.0
    assert binomial_tail(2, 2, 0.1) == pytest.approx(0.01)
    assert binomial_tail(2_500, 5_000, 0.5) == pytest.approx(0.5 + math.comb(5_000, 2_500) / 2**5_001)


def test_the_clopper_pearson_bound_solves_its_equation() -> None:
    assert proportion_low(0, 7, 0.05) == 0.0
    assert proportion_low(5, 5, 0.05) == pytest.approx(0.05 ** (1 / 5))
    assert binomial_tail(60, 90, proportion_low(60, 90, 0.01)) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("p", "freedom", "expected"),
    [(0.95, 31, 1.695519), (0.975, 31, 2.039513), (0.99, 40, 2.423257), (0.9995, 31, 3.633456), (0.95, 95, 1.661052)],
)
def test_students_quantile_agrees_with_the_tables(p: float, freedom: int, expected: float) -> None:
    assert student_t_quantile(p, freedom) == pytest.approx(expected, rel=1e-5)


def test_the_t_interval_is_missed_about_as_often_as_its_level_says() -> None:
    rng = np.random.default_rng(0)
    missed = np.mean([paired_losses(rng.normal(size=64), 0.05).low > 0 for _ in range(2_000)])
    assert 0.02 < missed < 0.06


def test_few_large_gains_are_capped_and_few_large_losses_are_not() -> None:
    drops = np.full(100, 0.01)
    drops[0] = 1_000.0
    assert paired_losses(drops, 0.05).estimate == pytest.approx(0.01, rel=0.2)
    assert paired_losses(-drops, 0.05).estimate == pytest.approx(-10.0, rel=0.01)
