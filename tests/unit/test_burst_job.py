"""One look for a better version: what is tried, in which order, and how whatever goes wrong ends."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adapters.slow as slow
from adapters.reference import Reference
from adapters.slow.gate.judge import look_level
from daemon.burst import Bench, Job, Outcome
from daemon.inspecting import digest
from daemon.source_reference import make_reference
from tests.unit.slow_world import CLASSES, INPUTS, draw, memory, mixed, shifted, trained

OPTIONS = slow.BurstOptions(steps=40, optimizer="adam", lr=0.02)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def model() -> nn.Module:
    return trained()


@functools.cache
def reference() -> Reference:
    x, y = draw(1, 1_000)
    net = model()
    with torch.inference_mode():
        features = net[:-1](torch.from_numpy(x))
        outputs = net[-1](features)
    return make_reference(x, y, outputs, features, np.arange(200), "classification", CLASSES)


def labelled(seed: int, rows: int, drift: Callable[[Any], Any] = shifted) -> tuple[Any, Any]:
    x, y = draw(seed, rows)
    return drift(x), y


def held(rows: int = 256, drift: Callable[[Any], Any] = shifted, seed: int = 22) -> slow.Rows:
    return slow.Rows(*labelled(seed, rows, drift), np.zeros(rows, np.int64))


def bench(method: str = "norm_affine_head", **changes: Any) -> Bench:
    given: dict[str, Any] = {
        "method": slow.get(method),
        "name": method,
        "options": OPTIONS,
        "task": "classification",
        "alpha": 0.05,
        "reference_margin": None,
        "max_queries": 8,
        "reference": reference(),
        "head": "6",
        "classes": CLASSES,
    }
    return Bench(**{**given, **changes})


def job(**changes: Any) -> Job:
    given: dict[str, Any] = {
        "version": model(),
        "frozen": model(),
        "number": 3,
        "memory": memory(*labelled(21, 600)),
        "held": held(),
        "query": 1,
        "class_shares": np.full(CLASSES, 1 / CLASSES),
        "exact": {},
        "exact_name": "lda_head",
        "bank": (),
        "nearest": lambda seen: None,
        "burst": True,
        "declined": "a burst would not pay",
        "unlabelled": None,
        "seed": 7,
        "stop": lambda: False,
    }
    return Job(**{**given, **changes})


@functools.cache
def solved() -> dict[str, Tensor]:
    """An exact head of the drifted rows."""
    method = slow.get("lda_head")
    assert isinstance(method, slow.ExactMethod)
    head = method.open(model(), None, None, classes=CLASSES)
    head.update(*labelled(21, 600))
    return head.values()


def useless() -> dict[str, Tensor]:
    return {"6.bias": model()[6].bias.detach() + torch.tensor([9.0, 0, 0, 0, 0])}


def known(delta: dict[str, Tensor]) -> dict[str, Any]:
    """A bank whose only regime is always the nearest."""
    rows = slow.signature(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))
    assert rows is not None
    entry = slow.Entry(number=5, delta=delta, signature=rows, record={})
    return {"bank": (entry,), "nearest": lambda seen: entry}


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """No look leaves a trace in the model that serves, whatever becomes of it."""
    before, hooks = digest(dict(model().state_dict())), tables(model())
    flags = [(module.training, [p.requires_grad for p in module.parameters()]) for module in model().modules()]
    yield
    assert digest(dict(model().state_dict())) == before and tables(model()) == hooks
    assert flags == [(each.training, [p.requires_grad for p in each.parameters()]) for each in model().modules()]
    assert all(parameter.grad is None for parameter in model().parameters())


def tables(net: nn.Module) -> list[tuple[int, int]]:
    return [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in net.modules()]


# The order.


def test_a_known_regime_comes_first_and_nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow, "run_burst", lambda *given, **options: pytest.fail("a burst was made"))
    outcome = bench().run(job(**known(solved()), exact=solved()))
    assert (outcome.result, outcome.record["method"], outcome.regime) == ("promoted", "regime", 5)
    assert outcome.over_frozen and outcome.delta.keys() == solved().keys()
    assert outcome.record["regime"] == 5 and outcome.record["from_version"] == 3


def test_an_exact_head_comes_before_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow, "run_burst", lambda *given, **options: pytest.fail("a burst was made"))
    outcome = bench().run(job(exact=solved()))
    assert (outcome.result, outcome.record["method"], outcome.record["tried"]) == ("promoted", "lda_head", [])
    assert outcome.over_frozen and outcome.regime is None and outcome.signature is not None


def test_a_burst_is_made_when_nothing_cheaper_is_promoted_and_says_what_was_tried() -> None:
    outcome = bench().run(job(**known(useless()), exact=useless()))
    assert (outcome.result, outcome.record["method"], outcome.record["steps"]) == ("promoted", "norm_affine_head", 40)
    assert not outcome.over_frozen and outcome.regime is None
    tried = outcome.record["tried"]
    assert [each["method"] for each in tried] == ["regime", "lda_head"]
    assert all(each["reason"] != "better" and each["gain"] < 0 for each in tried)


def test_what_is_promoted_serves_the_held_back_rows_better_by_what_it_says() -> None:
    outcome = bench().run(job())
    rows = held()
    candidate = slow.apply_delta(model(), outcome.delta)
    before, after = (bench().mean_loss(net, rows.x, rows.y) for net in (model(), candidate))
    assert after == outcome.error and before - after == pytest.approx(outcome.record["gain"])
    assert outcome.record["gain_low"] > 0 and outcome.record["held_back"] == 256 and outcome.record["rows"] == 600


def test_the_same_job_gives_the_same_values_and_another_seed_others() -> None:
    first, again, other = (bench().run(job(seed=seed)) for seed in (7, 7, 8))
    assert digest(first.delta) == digest(again.delta) != digest(other.delta)
    assert first.record == again.record


def test_a_version_is_where_a_burst_begins_and_the_frozen_model_where_an_exact_head_does() -> None:
    version = slow.apply_delta(model(), {"0.bias": model()[0].bias + 0.1, **solved()})
    started: list[nn.Module] = []
    method = slow.get("norm_affine_head")
    begin = method.begin
    method.begin = lambda net, given: (started.append(net), begin(net, given))[1]  # type: ignore[method-assign]
    outcome = replace(bench(), method=method).run(job(version=version, exact=useless()))
    assert started == [version] and not outcome.over_frozen


# What is not done, and why.


def test_a_burst_that_would_not_pay_is_declined_in_words() -> None:
    outcome = bench().run(job(burst=False))
    assert (outcome.result, outcome.reason, outcome.delta) == ("declined", "a burst would not pay", {})
    outcome = bench().run(job(burst=False, exact=useless()))
    assert outcome.result == "declined"
    assert outcome.reason.startswith("a burst would not pay; lda_head: ")
    assert outcome.record["from_version"] == 3 and len(outcome.record["tried"]) == 1


def test_a_burst_that_learns_nothing_is_rejected_without_values() -> None:
    options = replace(OPTIONS, optimizer="sgd", lr=1e-9)
    outcome = bench(options=options).run(job())
    assert (outcome.result, outcome.reason, outcome.delta) == ("rejected", "not better", {})
    assert outcome.record["query"] == 1 and outcome.record["level"] < 0.05


def test_stale_rows_judge_nothing() -> None:
    outcome = bench().run(job(query=9, exact=solved()))
    assert (outcome.result, outcome.reason) == ("rejected", "stale")
    assert [each["reason"] for each in outcome.record["tried"]] == ["stale"]


def test_candidates_of_one_look_share_the_level_of_their_queries() -> None:
    alone = bench(options=replace(OPTIONS, steps=1, lr=1e-9)).run(job())
    assert alone.record["level"] == pytest.approx(look_level(0.05, 1))
    both = bench(options=replace(OPTIONS, steps=1, lr=1e-9)).run(job(exact=useless()))
    assert both.record["level"] == pytest.approx(look_level(0.05, 1, 2))
    three = bench(options=replace(OPTIONS, steps=1, lr=1e-9)).run(job(**known(useless()), exact=useless(), query=2))
    assert three.record["level"] == pytest.approx(look_level(0.05, 2, 3))
    assert [job().most, job(exact=solved()).most, job(**known(useless()), exact=solved(), burst=False).most] == [
        1,
        2,
        2,
    ]
    assert job(burst=False).most == 1


def test_a_regime_that_is_not_the_nearest_takes_no_level() -> None:
    given = {**known(useless()), "nearest": lambda seen: None}
    outcome = bench(options=replace(OPTIONS, steps=1, lr=1e-9)).run(job(**given))
    assert outcome.record["level"] == pytest.approx(look_level(0.05, 1)) and outcome.record["tried"] == []


def test_a_regime_that_serves_already_is_not_offered_again() -> None:
    version = slow.apply_delta(model(), solved())
    outcome = bench(options=replace(OPTIONS, steps=1, lr=1e-9)).run(job(version=version, **known(solved())))
    assert outcome.record["tried"] == [] and outcome.record["level"] == pytest.approx(look_level(0.05, 1))
    other = slow.apply_delta(version, {"0.bias": model()[0].bias + 1})
    outcome = bench(options=replace(OPTIONS, steps=1, lr=1e-9)).run(job(version=other, **known(solved())))
    assert [*(each["method"] for each in outcome.record["tried"]), outcome.record["method"]][0] == "regime"


# Whatever goes wrong is an outcome.


def test_a_burst_out_of_time_is_judged_by_what_it_has() -> None:
    options = replace(OPTIONS, seconds=1e-9)
    outcome = bench(options=options).run(job())
    assert (outcome.result, outcome.delta, outcome.record["steps"]) == ("overrun", {}, 0)


def test_one_out_of_time_that_is_better_already_is_promoted(monkeypatch: pytest.MonkeyPatch) -> None:
    run = slow.run_burst
    monkeypatch.setattr(slow, "run_burst", lambda *given, **more: replace(run(*given, **more), reason="overrun"))
    assert bench().run(job()).result == "promoted"


def test_one_that_needs_more_memory_than_it_may_take_ends_before_its_first_step() -> None:
    outcome = bench(options=replace(OPTIONS, memory_bytes=10)).run(job())
    assert (outcome.result, outcome.reason, outcome.delta) == ("out_of_memory", "out of memory", {})
    assert outcome.record["steps"] == 0


def test_one_that_diverges_is_non_finite() -> None:
    outcome = bench(options=replace(OPTIONS, optimizer="sgd", lr=1e38, clip_norm=1e30)).run(job())
    assert (outcome.result, outcome.delta) == ("non_finite", {})


@pytest.mark.parametrize(
    ("error", "result"),
    [(RuntimeError, "failed"), (MemoryError, "out_of_memory"), (torch.OutOfMemoryError, "out_of_memory")],
)
@pytest.mark.parametrize("place", ["run_burst", "judge", "apply_delta", "signature"])
def test_an_exception_anywhere_is_an_outcome_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, place: str, error: type[Exception], result: str
) -> None:
    def broken(*given: Any, **options: Any) -> None:
        raise error("out of luck")

    monkeypatch.setattr(slow, place, broken)
    outcome = bench().run(job())
    assert outcome.result == result and "out of luck" in outcome.reason and outcome.delta == {}
    assert outcome.seconds > 0


def test_an_optimiser_that_does_not_exist_fails_by_its_name() -> None:
    outcome = bench(options=replace(OPTIONS, optimizer="adan_typo")).run(job())
    assert outcome.result == "failed" and "adan_typo" in outcome.reason


def test_one_that_nobody_wants_any_more_is_cancelled_at_its_next_step() -> None:
    asked: list[int] = []
    outcome = bench().run(job(stop=lambda: asked.append(1) or len(asked) > 3))  # type: ignore[func-returns-value]
    assert (outcome.result, outcome.delta) == ("cancelled", {}) and len(asked) <= 5


def test_one_cancelled_before_it_begins_tries_no_exact_head() -> None:
    outcome = bench().run(job(stop=lambda: True, exact=solved()))
    assert outcome.result == "cancelled" and outcome.record["tried"] == []


@pytest.mark.parametrize(
    "delta",
    [
        {"6.bias": torch.full((CLASSES,), torch.nan)},
        {"6.weight": torch.full((CLASSES, 16), torch.inf)},
    ],
)
def test_values_that_are_not_finite_are_never_promoted(delta: dict[str, Tensor]) -> None:
    outcome = bench().run(job(exact=delta, burst=False))
    assert outcome.result == "declined" and "non-finite" in outcome.reason


def test_a_regime_of_another_architecture_is_an_outcome() -> None:
    outcome = bench().run(job(**known({"9.bias": torch.zeros(2)})))
    assert outcome.result == "failed" and "another architecture" in outcome.reason


def test_a_served_model_that_gives_nan_does_not_break_the_look() -> None:
    version = slow.apply_delta(model(), {"6.bias": torch.full((CLASSES,), torch.nan)})
    outcome = bench().run(job(version=version))
    assert outcome.result in ("non_finite", "failed", "rejected") and outcome.delta == {}


# Rows that are few, alike, or of one class.


@pytest.mark.parametrize("rows", [2, 8])
def test_a_few_rows_prove_nothing(rows: int) -> None:
    outcome = bench().run(job(held=held(rows), exact=solved()))
    assert (outcome.result, outcome.reason) == ("rejected", "too few rows")


def test_constant_inputs_end_as_an_outcome() -> None:
    x, y = labelled(21, 200)
    still = np.zeros_like(x)
    rows = slow.Rows(still[:96], y[:96], np.zeros(96, np.int64))
    outcome = bench().run(job(memory=memory(still, y), held=rows))
    assert outcome.result in ("rejected", "promoted", "non_finite")


def test_labels_of_one_class_only_make_no_version_that_forgets_the_others_where_a_margin_is_set() -> None:
    x, _ = labelled(21, 600)
    rows = slow.Rows(x[:96], np.zeros(96, np.int64), np.zeros(96, np.int64))
    given = {"memory": memory(x[96:], np.zeros(504, np.int64), reference=200), "held": rows}
    outcome = bench(reference_margin=0.02).run(job(**given, class_shares=np.eye(CLASSES)[0]))
    assert outcome.result == "rejected" and outcome.delta == {}


# Regression, models without a head, no labels.


def regression() -> tuple[nn.Module, slow.Snapshot, slow.Rows, Reference]:
    """A linear truth whose offset has moved by two of its deviations."""
    torch.manual_seed(0)
    weight = np.random.default_rng(3).normal(size=4).astype(np.float32)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).eval().requires_grad_(False)
    head = nn.Linear(4, 1)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight)[None])
        head.bias.zero_()
    net = nn.Sequential(nn.Identity(), head).eval().requires_grad_(False)
    rng = np.random.default_rng(4)
    x = rng.normal(size=(900, 4)).astype(np.float32)
    y = (x @ weight + rng.normal(size=900) * 0.1).astype(np.float32)
    moved = (y + 4.0).astype(np.float32)
    outputs = net(torch.from_numpy(x))
    known = make_reference(x, y, outputs, torch.from_numpy(x), np.arange(100), "regression", 1)
    rows = slow.Rows(x[:128], moved[:128], np.zeros(128, np.int64))
    return net, slow.Snapshot(x[200:], moved[200:], x[:100], y[:100]), rows, known


def test_a_regression_learns_and_its_error_is_a_share_of_the_variance() -> None:
    net, learnt, rows, known_rows = regression()
    made = bench("head", task="regression", reference=known_rows, head="1", classes=None)
    made = replace(made, options=slow.BurstOptions(steps=200, optimizer="adam", lr=0.1, reference_share=0.0))
    given = {"version": net, "frozen": net, "memory": learnt, "held": rows, "class_shares": None}
    before = made.mean_loss(net, rows.x, rows.y)
    assert before == pytest.approx(16 / known_rows.output_var, rel=0.1)
    outcome = made.run(job(**given))
    assert (outcome.result, outcome.record["measure"]) == ("promoted", "squared error")
    assert outcome.error < 0.1 * before


def test_a_model_without_a_linear_layer_is_learnt_without_regimes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Unflatten(1, (1, INPUTS)), nn.Conv1d(1, CLASSES, INPUTS), nn.Flatten()).eval()
    net.requires_grad_(False)
    made = bench("full", head=None)
    outcome = replace(made, options=replace(OPTIONS, steps=150)).run(job(version=net, frozen=net))
    assert outcome.result == "promoted" and outcome.signature is None


def test_a_head_that_does_not_decide_the_answer_tells_no_regime() -> None:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.aside = copy.deepcopy(model()), nn.Linear(INPUTS, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            return self.net(x)

    net = Averaged().eval().requires_grad_(False)
    made = bench("norm_affine", head="aside")
    outcome = made.run(job(version=net, frozen=net))
    assert outcome.result in ("promoted", "rejected") and outcome.signature is None


def unlabelled(rows: int = 1_024) -> dict[str, Any]:
    x, _ = labelled(31, rows, mixed)
    cut = rows * 3 // 4
    blank = slow.Rows(x[cut:], np.zeros(0, np.int64), np.zeros(0, np.int64))
    empty = slow.Snapshot(np.zeros((0, INPUTS), np.float32), np.zeros(0, np.int64), *draw(2, 200))
    return {"unlabelled": x[:cut], "held": blank, "memory": empty, "class_shares": None}


def test_without_labels_pseudo_labels_are_learnt_and_the_other_gate_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow, "judge", lambda *given, **options: pytest.fail("judged by labels that are not there"))
    outcome = bench("norm_affine").run(job(**unlabelled()))
    assert outcome.result in ("promoted", "rejected"), outcome.reason
    assert outcome.record["measure"] == "class distance" and outcome.record["pseudo_labels"] > 0
    assert outcome.record["rows"] == 0 and outcome.record["held_back"] == 256
    assert np.isnan(outcome.error)


def test_what_no_label_proves_is_rejected_there_too() -> None:
    outcome = bench().run(job(**unlabelled(), exact=useless(), burst=False))
    assert outcome.result == "declined" and outcome.delta == {}


def test_it_runs_beside_a_model_that_serves() -> None:
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.append(bench().run(job(exact=useless()))))
    thread.start()
    x = torch.from_numpy(held().x)
    with torch.inference_mode():
        answers = [model()(x) for _ in range(50)]
        thread.join(60)
        answers.append(model()(x))
    assert all(torch.equal(each, answers[0]) for each in answers)
    assert found[0].result == "promoted"
