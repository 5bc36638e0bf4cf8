"""The gate on models whose answers are written down, and the intervals it rests on."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

import adapters.slow as slow
from adapters.slow.gate.blocks import Blocks, correlation_rows, cut, label_rows
from adapters.slow.gate.intervals import block_interval, fewest_blocks, winsorised
from adapters.slow.gate.judge import judge_many, look_level
from adapters.slow.gate.slices import groups, judge_slices
from daemon import checkpoint
from daemon.inspecting import digest

torch.set_num_threads(1)
N = 96
X = np.arange(N, dtype=np.float32)[:, None]
Y = np.arange(N) % 2
ORDER = np.random.default_rng(7).permutation(N)
"""Errors fall on rows in this order: runs of them would be hardly more evidence than one."""


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
    """Errs on ``wrong`` rows of ``ORDER`` from the ``first`` on."""
    right = np.ones(N, bool)
    right[ORDER[first : first + wrong]] = False
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
    # The served model errs on new rows only, the candidate on reference rows only.
    new, known = np.sort(ORDER[:46]), ORDER[46:]
    served, candidate = classifier(30), classifier(loss, first=N - loss)
    verdict = slow.judge(
        served, candidate, X[new], Y[new], X[known], Y[known], task="classification", reference_margin=margin
    )
    assert verdict.reference_loss == pytest.approx(loss / 50)
    assert verdict.promote == promote
    assert verdict.reason == ("better" if promote else "worse on reference")


def test_the_verdict_holds_plain_values_only() -> None:
    verdict = slow.judge(classifier(30), classifier(10), X, Y, X, Y, task="classification", segment=Y)
    plain = asdict(verdict)
    assert plain["slices"][0]["kind"] in ("class", "segment")
    assert digest(checkpoint.decode(checkpoint.encode(plain))) == digest(plain)
    assert json.loads(json.dumps(plain))["gain"] == plain["gain"]
    assert verdict.level == pytest.approx(0.05 * 6 / math.pi**2)
    assert verdict.blocks == 24


def test_errors_in_one_run_prove_nothing() -> None:
    right = np.ones(N, bool)
    right[20:50] = False
    said = np.where(right, Y, 1 - Y)
    served = Answers(np.where(np.arange(2) == said[:, None], 2.0, 0.0))
    verdict = judge(served, classifier(0))
    assert (verdict.promote, verdict.reason, verdict.gain) == (False, "too few rows", 30 / N)
    assert math.isnan(verdict.gain_low)


@pytest.mark.parametrize(("shares", "promote"), [(None, False), ([0.5, 0.5], False), ([0.995, 0.005], True)])
def test_one_class_alone_proves_something_only_where_the_stream_is_known_to_be_like_that(
    shares: list[float] | None, promote: bool
) -> None:
    y = np.zeros(N, np.int64)
    table = np.where(np.arange(2) == y[:, None], 2.0, 0.0)
    broken = table.copy()
    broken[ORDER[:30]] = broken[ORDER[:30], ::-1]
    models = Answers(broken), Answers(table)
    verdict = slow.judge(*models, X, y, None, None, task="classification", class_shares=shares)
    assert verdict.promote == promote
    assert verdict.reason == ("better" if promote else "too few rows")


def test_a_longer_memory_of_the_stream_can_ask_for_longer_blocks() -> None:
    assert judge(classifier(30), classifier(10), least_block_rows=12.0).blocks == 8
    assert judge(classifier(30), classifier(10), least_block_rows=14.0).reason == "too few rows"


def by_class(wrong: list[float], rng: np.random.Generator, y: NDArray[np.int64]) -> Answers:
    """Errs on a share of each class's rows."""
    said = np.where(rng.random(len(y)) < np.asarray(wrong)[y], (y + 1) % len(wrong), y)
    return Answers(np.where(np.arange(len(wrong)) == said[:, None], 2.0, 0.0))


def test_a_class_is_not_given_up_for_the_mean() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 800)
    x = np.arange(800, dtype=np.float32)[:, None]
    served = by_class([0.4, 0.4, 0.4, 0.05], rng, y)
    candidate = by_class([0.1, 0.1, 0.1, 0.35], rng, y)
    verdict = slow.judge(served, candidate, x, y, None, None, task="classification")
    assert verdict.gain_low > 0
    assert (verdict.promote, verdict.reason, verdict.worst_class) == (False, "worse on a slice", 3)
    assert (verdict.slices[0].kind, verdict.slices[0].value, verdict.slices[0].worse) == ("class", 3, True)
    assert verdict.slices[0].gain_high < 0


def test_a_segment_is_not_given_up_for_the_mean() -> None:
    rng = np.random.default_rng(1)
    y, segment = rng.integers(0, 4, 800), rng.integers(0, 4, 800)
    x = np.arange(800, dtype=np.float32)[:, None]
    served, candidate = by_class([0.4] * 4, rng, y), by_class([0.1] * 4, rng, y)
    good = served.table[segment == 2].clone()
    served.table[segment == 2] = candidate.table[segment == 2]
    candidate.table[segment == 2] = good
    verdict = slow.judge(served, candidate, x, y, None, None, task="classification", segment=segment)
    assert verdict.gain_low > 0 and verdict.reason == "worse on a slice"
    assert (verdict.slices[0].kind, verdict.slices[0].value) == ("segment", 2)


@pytest.mark.parametrize(("margin", "reason"), [(0.02, "worse on a slice"), (None, "better")])
def test_a_class_that_new_rows_lack_is_protected_by_its_reference_rows(margin: float | None, reason: str) -> None:
    rng = np.random.default_rng(2)
    y = rng.integers(0, 3, 400)
    known = np.arange(200) % 4
    x = np.arange(600, dtype=np.float32)[:, None]
    labels = np.concatenate([y, known])
    served, candidate = by_class([0.4, 0.4, 0.4, 0.0], rng, labels), by_class([0.1, 0.1, 0.1, 0.3], rng, labels)
    verdict = slow.judge(served, candidate, x[:400], y, x[400:], known, task="classification", reference_margin=margin)
    assert verdict.reference_loss < 0
    assert verdict.reason == reason


def test_a_candidate_that_is_worse_nowhere_is_seldom_rejected_for_a_slice() -> None:
    rng = np.random.default_rng(3)
    rejected = 0
    for _ in range(100):
        y = rng.integers(0, 4, 400)
        drops = (rng.random(400) < 0.2) * 1.0 - (rng.random(400) < 0.2)
        slices = judge_slices(cut([drops]), drops, groups(y), groups(y // 2), {}, level=0.05, margin=None, scale=1.0)
        assert len(slices) == 6
        rejected += any(part.worse for part in slices)
    assert rejected <= 12


def test_three_unlucky_rows_are_not_yet_a_lost_class_but_a_few_more_are() -> None:
    def lost(rows: int) -> bool:
        drops = np.concatenate([np.zeros(90), -np.ones(rows)])
        y = np.concatenate([np.zeros(90, np.int64), np.ones(rows, np.int64)])
        slices = judge_slices(cut([drops]), drops, groups(y), {}, {}, level=0.05, margin=0.3, scale=1.0)
        return {part.value: part.worse for part in slices}[1]

    assert not lost(3)
    assert lost(5)


class Linear(nn.Module):
    """Scores are linear in the inputs: their features are the inputs."""

    def __init__(self, weight: NDArray[np.float64]) -> None:
        super().__init__()
        self.head = nn.Linear(weight.shape[1], len(weight), bias=False)
        self.head.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


def four_classes(rows: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, rows)
    return (4 * np.eye(4)[y] + rng.normal(size=(rows, 4))).astype(np.float32), y


def test_auto_leaves_out_the_classes_that_new_labels_contradict_and_protects_the_others() -> None:
    x_ref, y_ref = four_classes(200, 0)
    x, y = four_classes(400, 1)
    swapped = np.array([1, 0, 2, 3])[y]
    served, swap = Linear(np.eye(4)), Linear(np.eye(4)[[1, 0, 2, 3]])
    forgetful = Linear(np.stack([np.eye(4)[1], np.eye(4)[0], np.eye(4)[2], np.eye(4)[3] * 0.3]))

    def verdict(candidate: nn.Module, labels: NDArray[np.int64], margin: Any) -> slow.Verdict:
        return slow.judge(served, candidate, x, labels, x_ref, y_ref, task="classification", reference_margin=margin)

    assert verdict(swap, swapped, 0.02).reason in ("worse on reference", "worse on a slice")
    good = verdict(swap, swapped, "auto")
    assert (good.promote, good.contradicted) == (True, [0, 1])
    assert verdict(forgetful, swapped, "auto").reason == "worse on a slice"
    assert verdict(served, y, "auto").contradicted == []


def test_inputs_that_moved_do_not_contradict_the_reference() -> None:
    x_ref, y_ref = four_classes(200, 0)
    x, y = four_classes(400, 1)
    moved = x + np.float32(12) * np.eye(4, dtype=np.float32)[0]
    served = Linear(np.eye(4))
    verdict = slow.judge(served, served, moved, y, x_ref, y_ref, task="classification", reference_margin="auto")
    assert verdict.contradicted == []


def test_several_candidates_share_the_level_of_their_queries() -> None:
    served = classifier(30)
    candidates = [classifier(28), classifier(5), classifier(30)]
    verdicts = judge_many(served, candidates, X, Y, None, None, task="classification", query=2)
    assert [verdict.promote for verdict in verdicts] == [False, True, False]
    joint = 0.05 * 6 / math.pi**2 * (1 / 4 + 1 / 9 + 1 / 16)
    assert sum(verdict.level for verdict in verdicts) == pytest.approx(joint)
    assert judge_many(served, [], X, Y, None, None, task="classification") == []
    stale = judge_many(served, candidates, X, Y, None, None, task="classification", query=7, max_queries=8)
    assert {verdict.reason for verdict in stale} == {"stale"}


def test_one_of_several_candidates_that_is_broken_does_not_spoil_the_others() -> None:
    broken = classifier(0)
    broken.table[3] = math.inf
    verdicts = judge_many(classifier(30), [broken, classifier(5)], X, Y, None, None, task="classification")
    assert [verdict.reason for verdict in verdicts] == ["non-finite", "better"]


def test_all_looks_together_have_the_level_asked_for() -> None:
    assert 0.049 < sum(look_level(0.05, query) for query in range(1, 200)) < 0.05
    assert look_level(0.05, 1, 3) * 3 == pytest.approx(sum(look_level(0.05, query) for query in (1, 2, 3)))


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
        ({"slice_level": 0.0}, "slice_level is 0.0"),
        ({"least_block_rows": 0.5}, "least_block_rows 0.5"),
        ({"segment": Y[:-1]}, "one per new row"),
        ({"class_shares": [1.0]}, r"must be \(2,\) shares"),
        ({"class_shares": [1.0, -1.0]}, r"must be \(2,\) shares"),
        ({"task": "regression", "reference_margin": "auto"}, "give a number or None"),
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


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=10), st.sampled_from([0.05, 0.0304, 0.01]))
def test_the_lower_bound_is_above_zero_exactly_when_flipping_signs_rejects(sums: list[int], level: float) -> None:
    values = np.array(sums, np.float64)
    signs = np.array(list(itertools.product((1, -1), repeat=len(sums))))
    p_value = float(np.mean(signs @ values >= values.sum()))
    interval = block_interval(values, np.full(len(sums), 4.0), level)
    assert (interval.low > 0) == (p_value <= level)
    assert math.isnan(interval.low) == (len(sums) < fewest_blocks(level))
    mirrored = block_interval(-values, np.full(len(sums), 4.0), level)
    assert mirrored.estimate == -interval.estimate
    if not math.isnan(interval.low):
        assert interval.low <= interval.estimate <= interval.high
        assert mirrored.low == pytest.approx(-interval.high)


@pytest.mark.parametrize("blocks", [7, 12, 24])
def test_the_bounds_are_missed_as_often_as_their_level_says_for_few_blocks_too(blocks: int) -> None:
    rng = np.random.default_rng(blocks)
    sizes = np.full(blocks, 1.0)
    missed = np.mean([block_interval(rng.normal(size=blocks), sizes, 0.05).low > 0 for _ in range(600)])
    assert 0.02 < missed < 0.08


def test_correlation_times_are_found() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=4_000)
    slow_values = np.convolve(noise, np.ones(20), "valid")
    assert correlation_rows(noise) < 1.5
    assert 14 < correlation_rows(slow_values) < 28
    assert correlation_rows(np.ones(50)) == 1.0
    assert correlation_rows(np.linspace(0, 1, 100)) == 100.0


def test_runs_of_labels_make_rows_count_less_only_beyond_what_chance_makes() -> None:
    even = np.full(2, 0.5)
    rng = np.random.default_rng(0)
    assert label_rows(rng.integers(0, 2, 2_000), even) < 4
    assert label_rows(rng.integers(0, 8, 2_000), np.full(8, 0.125)) < 2
    assert label_rows(np.repeat(np.arange(40) % 2, 20), even) == pytest.approx(19, rel=0.2)
    assert label_rows((rng.random(2_000) < 0.02).astype(np.int64), np.array([0.98, 0.02])) < 2_000 / 24
    assert label_rows(np.zeros(200, np.int64), even) > 100
    noisy = np.where(np.arange(200) % 20 == 7, 1, 0)
    assert label_rows(noisy, even) > 100
    assert label_rows(np.zeros(200, np.int64), np.array([1.0, 0.0])) == 1.0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.floats(1.0, 400.0))
def test_blocks_hold_every_row_once(values: list[float], least: float) -> None:
    drops = np.array(values)
    blocks = cut([drops], least)
    assert blocks.number == 0 or 7 <= blocks.number <= 24
    if blocks.number:
        sums, sizes = blocks.sums(np.ones(len(drops)))
        assert sizes.sum() == len(drops) and (sums == sizes).all()
        assert sizes.min() >= min(math.floor(least), sizes.max() - 1)


def test_blocks_without_a_row_of_a_slice_are_left_out() -> None:
    blocks = Blocks(np.arange(0, 70, 10), 70)
    sums, sizes = blocks.sums(np.ones(70), np.arange(70) < 25)
    assert sizes.tolist() == sums.tolist() == [10, 10, 5]


def test_few_large_gains_are_capped_and_few_large_losses_are_not() -> None:
    drops = np.full(100, 0.01)
    drops[0] = 1_000.0
    assert winsorised(drops).mean() == pytest.approx(0.01, rel=0.2)
    assert winsorised(-drops).mean() == pytest.approx(-10.0, rel=0.01)
