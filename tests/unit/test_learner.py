"""The slow loop's memories, when it looks for a better version, and that its state goes on to the bit."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adapters.slow as slow
from adapters.reference import Reference
from daemon import checkpoint
from daemon.burst import Bench, Job
from daemon.errors import SettingsError
from daemon.inspecting import digest
from daemon.labels import Joined
from daemon.learner import Learner, Outcome
from daemon.learning import Unlabelled
from daemon.settings import Slow
from daemon.source_reference import make_reference
from tests.unit.worlds import build, build_regression, source_rows, worker


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def learner(folder: Path, **changes: Any) -> tuple[Learner, Any]:
    options = {
        "inline": True, "steps": 2, "min_labels": 32, "holdout_rows": 32, "optimizer": "sgd", "lr": 0.01, "price": 0.0,
        "exact": "", "eager": False,
    }  # fmt: skip
    made = worker(folder, slow={**options, **changes})
    return made.loop.actions.learner, made.loop.resident.frozen


def joined(rows: int, seed: int = 1) -> Joined:
    x, y = source_rows(rows, seed=seed)
    blank = np.zeros(rows, np.float32)
    return Joined(x, y, *[blank] * 11)


def test_a_wanted_burst_waits_for_labels_enough(tmp_path: Path) -> None:
    made, model = learner(tmp_path)
    made.ask()
    made.add(joined(40))
    assert made.step(model, 0) is None and made.busy
    made.add(joined(40, seed=2))
    outcome = made.step(model, 0)
    assert outcome is not None and outcome.result in ("promoted", "rejected") and not made.busy


def test_the_next_burst_waits_for_new_labels(tmp_path: Path) -> None:
    made, model = learner(tmp_path)
    made.add(joined(100))
    made.ask()
    assert made.step(model, 0) is not None
    made.ask()
    assert made.step(model, 0) is None and made.busy
    made.add(joined(32, seed=3))
    assert made.step(model, 0) is not None


def test_only_a_promoted_candidate_comes_with_weights(tmp_path: Path) -> None:
    made, model = learner(tmp_path, lr=1e-9)
    made.add(joined(100))
    made.ask()
    outcome = made.step(model, 0)
    assert outcome is not None and outcome.result == "rejected" and outcome.delta == {} and outcome.reason


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyError, ZeroDivisionError])
def test_a_burst_that_breaks_fails_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise error("out of luck")

    monkeypatch.setattr(slow, "run_burst", broken)
    made, model = learner(tmp_path)
    made.add(joined(100))
    made.ask()
    outcome = made.step(model, 0)
    assert outcome is not None and outcome.result == ("out_of_memory" if error is MemoryError else "failed")
    assert error.__name__ in outcome.reason and "out of luck" in outcome.reason


def beside(made: Learner, model: Any) -> threading.Thread:
    """A burst beside the stream, started and finished, but not handed over yet."""
    made.add(joined(100))
    made.ask()
    assert made.step(model, 0) is None and made.busy
    thread = made._thread
    assert thread is not None
    thread.join(60)
    return thread


def test_a_burst_beside_the_stream_is_handed_over_at_a_later_batch(tmp_path: Path) -> None:
    made, model = learner(tmp_path, inline=False)
    beside(made, model)
    outcome = made.step(model, 0)
    assert outcome is not None and outcome.result in ("promoted", "rejected") and not made.busy


def test_what_finished_before_it_saw_its_cancellation_is_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, model = learner(tmp_path, inline=False)
    monkeypatch.setattr(Bench, "run", lambda *job: Outcome("promoted", "better", {"3.bias": model[3].bias}))
    beside(made, model)
    made.cancel()
    outcome = made.step(model, 0)
    assert outcome is not None and outcome.result == "cancelled" and outcome.delta == {}


def test_a_running_burst_is_wanted_again_after_a_restart(tmp_path: Path) -> None:
    made, model = learner(tmp_path, inline=False)
    beside(made, model)
    assert made.state_dict()["wanted"] is True


def test_its_state_goes_through_a_checkpoint_to_the_bit(tmp_path: Path) -> None:
    made, model = learner(tmp_path)
    made.add(joined(100))
    made.ask()
    made.step(model, 0)
    other, _ = learner(tmp_path)
    other.load_state_dict(checkpoint.decode(checkpoint.encode(made.state_dict())))
    assert digest(other.state_dict()) == digest(made.state_dict())
    for each in (made, other):
        each.add(joined(64, seed=9))
        each.ask()
    first, second = made.step(model, 0), other.step(model, 0)
    assert first is not None and second is not None
    assert (first.result, first.record) == (second.result, second.record)


# When it looks of its own accord.


@functools.cache
def reference(task: str) -> Reference:
    x, y = source_rows(600, task=task)
    net = build() if task == "classification" else build_regression()
    with torch.inference_mode():
        features = net[:-1](torch.from_numpy(x))
        outputs = net[-1](features)
    return make_reference(x, y, outputs, features, np.arange(100), task, outputs.shape[1])


def small(task: str = "classification", model: nn.Module | None = None, **changes: Any) -> tuple[Learner, nn.Module]:
    """A learner without a daemon around it; 40 labels a look, learning in the loop."""
    own = build() if task == "classification" else build_regression()
    net = (own if model is None else model).eval().requires_grad_(False)
    options = {
        "inline": True, "steps": 20, "min_labels": 40, "holdout_rows": 64, "optimizer": "adam", "lr": 0.05,
    }  # fmt: skip
    made = Learner(
        Slow(**{**options, **changes}),
        reference(task),
        model=net,
        task=task,
        classes=3 if task == "classification" else None,
        input_shape=(4,),
        source_error=0.1,
    )
    return made, net


def rows_of(x: np.ndarray, y: np.ndarray) -> Joined:
    return Joined(x, y, *[np.zeros(len(y), np.float32)] * 11)


def drawn(seed: int, rows: int = 32, *, turn: int = 0, shift: float = 0.0, noise: bool = True) -> Joined:
    """Rows whose classes are all renamed by ``turn``."""
    x, y = source_rows(rows, seed=seed)
    x = (x + np.float32(shift)).astype(np.float32)
    if not noise:
        with torch.inference_mode():
            y = build()(torch.from_numpy(x)).argmax(1).numpy()
    return rows_of(x, (y + turn) % 3)


def follow(made: Learner, frozen: nn.Module, batches: list[Joined]) -> list[Outcome]:
    """Serve batches as the daemon does: each look's outcome, promoted ones in service at once."""
    found: list[Outcome] = []
    serving, number, delta = frozen, 0, {}
    for batch in batches:
        made.seen(batch.x)
        made.add(batch)
        outcome = made.step(serving, number)
        if outcome is None:
            continue
        found.append(outcome)
        if outcome.result == "promoted":
            delta = outcome.delta if outcome.over_frozen else {**delta, **outcome.delta}
            serving, number = slow.apply_delta(frozen, delta), number + 1
            made.keep(delta, outcome)
    return found


def stream(batches: int, seed: int = 0, **how: Any) -> list[Joined]:
    return [drawn(1_000 * seed + number + 1, **how) for number in range(batches)]


def test_nothing_is_looked_for_and_no_thread_begins_while_labels_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "run", lambda self, job: pytest.fail("it looked for a better version"))
    made, model = small(inline=False)
    made._warm = threading.current_thread()
    before = threading.active_count()
    assert follow(made, model, stream(40, noise=False)) == []
    assert threading.active_count() == before and not made.busy


def test_no_forward_pass_is_made_before_labels_enough_have_come() -> None:
    made, model = small(exact="")
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for number in range(200):
        made.seen(drawn(number).x)
        assert made.step(model, 0, 0.9) is None
    made.add(drawn(1, 39, turn=1))
    assert made.step(model, 0, 0.9) is None and calls == []


def test_it_makes_none_at_all_for_its_own_sake_where_it_is_not_eager() -> None:
    made, model = small(exact="", eager=False)
    calls: list[int] = []
    monitored = slow.fork(model, {})
    monitored.register_forward_hook(lambda *_: calls.append(1))
    for batch in stream(20, turn=1):
        made.add(batch)
        assert made.step(monitored, 0, 0.9) is None
    made.ask()
    outcome = made.step(model, 0, 0.9)
    assert outcome is not None and outcome.record["asked"] is True


def test_an_error_above_the_source_s_is_looked_into_and_won_back() -> None:
    made, model = small()
    outcomes = follow(made, model, stream(20, turn=1))
    assert outcomes[0].result == "promoted" and outcomes[0].record["asked"] is False
    assert outcomes[0].error < 0.5


def test_a_served_answer_that_is_good_already_needs_no_look() -> None:
    # The version alone errs on nine rows of ten, what is served together with the adapter does not.
    made, model = small(exact="")
    for batch in stream(20, turn=1):
        made.add(batch)
        assert made.step(model, 0, 0.1) is None


def test_no_burst_is_made_that_would_not_pay_and_the_outcome_says_so() -> None:
    made, model = small(price=10.0, exact="")
    assert follow(made, model, stream(20, turn=1)) == []
    made.ask()
    (outcome,) = follow(made, model, stream(2, 7, turn=1))
    assert outcome.result == "declined"
    assert "a burst would not pay: " in outcome.reason and "of error to be expected" in outcome.reason


def test_fruitless_looks_come_less_and_less_often_and_a_rise_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(Bench, "run", lambda self, job: looks.append(job.query) or Outcome("rejected", "not better"))
    made, model = small(exact="", price=0.0)
    when: list[int] = []
    for number in range(200):
        made.add(drawn(number, 8, turn=1))
        before = len(looks)
        made.step(model, 0, 0.3)
        when += [number] if len(looks) > before else []
    gaps = np.diff(when)
    assert (np.diff(gaps) >= 0).all() and gaps[-1] == 8 * 40 / 8
    # Once the error has risen, forty labels since the last look are enough again.
    while len(looks) == len(when):
        made.add(drawn(number, 8, turn=1))
        made.step(model, 0, 0.3)
    for _ in range(4):
        made.add(drawn(number, 8, turn=1))
        made.step(model, 0, 0.6)
    assert len(looks) == len(when) + 1
    made.add(drawn(number, 8, turn=1))
    made.step(model, 0, 0.6)
    assert len(looks) == len(when) + 2


# Regimes.


def test_regimes_that_come_back_are_offered_before_anything_is_trained() -> None:
    made, model = small(exact="", price=0.0, steps=60)
    one, other = {"turn": 1}, {"turn": 2, "shift": 3.0}
    turns = [*stream(12, 1, **one), *stream(12, 2, **other), *stream(12, 3, **one), *stream(12, 4, **other)]
    outcomes = follow(made, model, turns)
    assert made.bank is not None
    promoted = [each for each in outcomes if each.result == "promoted"]
    assert [each.record["method"] for each in promoted] == ["norm_affine_head", "norm_affine_head", "regime", "regime"]
    assert [each.regime for each in promoted[2:]] == [entry.number for entry in made.bank.entries]
    assert [entry.uses for entry in made.bank.entries] == [1, 1]
    assert made.bank.entries[1].record["from_version"] == 1 and made.bank.entries[1].record["gain"] > 0


def test_where_none_are_kept_nothing_is_offered() -> None:
    made, model = small(exact="", price=0.0, regimes=0)
    outcomes = follow(made, model, [*stream(12, 1, turn=1), *stream(12, 3, turn=1)])
    assert made.bank is None and outcomes
    assert {each.record["method"] for each in outcomes if each.result == "promoted"} == {"norm_affine_head"}


# Queries.


@pytest.mark.parametrize(("options", "looks"), [({"exact": ""}, 1), ({}, 2)])
def test_each_candidate_of_a_look_counts_as_a_query_of_the_held_back_rows(options: dict[str, Any], looks: int) -> None:
    made, model = small(price=0.0, holdout_rows=200, **options)
    for batch in stream(8, turn=1):
        made.add(batch)
    made.step(model, 0)
    assert made.holdout.queries == looks


# State, threads, cancelling.


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 29), st.sampled_from(["norm_affine_head", "lda_head"]), st.booleans())
def test_a_state_of_any_moment_goes_on_to_the_bit(cut: int, name: str, pseudo: bool) -> None:
    options: dict[str, Any] = {"price": 0.0, "steps": 3, "name": name, "pseudo_labels": pseudo}
    batches = [*stream(10, 1, turn=1), *stream(10, 2, turn=2, shift=3.0), *stream(10, 3, turn=1)]
    through, model = small(**options)
    follow(through, model, batches[:cut])
    body = checkpoint.encode(through.state_dict())
    again, _ = small(**options)
    again.load_state_dict(checkpoint.decode(body))
    assert digest(again.state_dict()) == digest(through.state_dict())
    outcomes = [follow(each, model, batches[cut:]) for each in (through, again)]
    told = [[(each.result, each.reason, each.record, digest(each.delta)) for each in every] for every in outcomes]
    assert digest(told[0]) == digest(told[1])
    assert digest(again.state_dict()) == digest(through.state_dict())


def test_a_look_beside_the_stream_is_made_from_the_rows_of_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, end = threading.Event(), threading.Event()
    run = Bench.run

    def slowly(self: Bench, job: Job) -> Outcome:
        begin.set()
        assert end.wait(60)
        return run(self, job)

    monkeypatch.setattr(Bench, "run", slowly)
    made, model = small(inline=False, exact="", price=0.0)
    made._warm = threading.current_thread()
    for batch in stream(6, turn=1):
        made.add(batch)
    assert made.step(model, 0) is None and made.busy and begin.wait(60)
    thread = made._thread
    assert thread is not None
    for batch in stream(6, 5, turn=2):
        made.add(batch)
        assert made.step(model, 0) is None
    end.set()
    thread.join(60)
    outcome = made.step(model, 0)
    assert outcome is not None and outcome.record["rows"] == 6 * 32 - 64


def test_closing_ends_a_look_under_way_and_throws_it_away() -> None:
    made, model = small(inline=False, exact="", price=0.0, steps=10**6)
    made._warm = threading.current_thread()
    for batch in stream(6, turn=1):
        made.add(batch)
    assert made.step(model, 0) is None and made._thread is not None
    made.close(60)
    assert not made._thread.is_alive()
    outcome = made.step(model, 0)
    assert outcome is not None and (outcome.result, outcome.delta) == ("cancelled", {})


def test_a_thread_that_dies_is_a_failure_and_the_next_look_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    made, model = small(inline=False, exact="", price=0.0)
    made._warm = threading.current_thread()
    monkeypatch.setattr(made, "_run_aside", lambda job: None)
    for batch in stream(6, turn=1):
        made.add(batch)
    assert made.step(model, 0) is None and made._thread is not None
    made._thread.join(60)
    outcome = made.step(model, 0)
    assert outcome is not None and outcome.result == "failed" and not made.busy


def test_nothing_is_imported_where_nothing_may_be_learnt() -> None:
    made, _ = small(inline=False, enabled=False)
    made.add(drawn(1))
    assert made._warm is None


# What comes in.


BAD = [np.nan, np.inf, -np.inf, -1.0, 3.0, 1.5, 1e300, -1e300, 2.0**63]


@given(st.lists(st.sampled_from([*BAD, 0.0, 1.0, 2.0]), min_size=1, max_size=60))
def test_labels_that_are_no_class_are_neither_learnt_nor_counted(labels: list[float]) -> None:
    made, _ = small()
    y = np.array(labels)
    fine = np.isin(y, [0.0, 1.0, 2.0])
    made.add(rows_of(source_rows(len(y))[0], y))
    state = made.state_dict()
    assert state["fresh"] == fine.sum() == len(made.holdout) + len(made.replay)
    assert state["labels"].tolist() == [float((y == label).sum()) for label in range(3)]
    assert set(made.holdout.rows().y) <= {0, 1, 2}


@given(st.lists(st.sampled_from([np.nan, np.inf, 1e300, -1e300, 0.5, -2.0]), min_size=1, max_size=60))
def test_targets_that_are_no_number_are_neither_learnt_nor_counted(labels: list[float]) -> None:
    made, _ = small("regression", exact="lda_head")
    y = np.array(labels)
    made.add(rows_of(source_rows(len(y))[0], y))
    fine = np.abs(np.nan_to_num(y, nan=np.inf)) < 1e38
    assert made.state_dict()["fresh"] == fine.sum() == len(made.holdout) + len(made.replay)


def test_a_regression_learns_an_offset_without_an_exact_head() -> None:
    made, model = small("regression", price=0.0, steps=100, reference_share=0.0, lr=0.1)
    assert made._exact is None
    batches = []
    for number in range(16):
        x, y = source_rows(32, seed=number, task="regression")
        batches.append(rows_of(x, y + 3.0))
    promoted = [each for each in follow(made, model, batches) if each.result == "promoted"]
    assert promoted and promoted[-1].error < 0.3 * 9.0 / max(reference("regression").output_var, 1e-12)


def test_a_model_without_a_linear_layer_goes_without_exact_head_and_regimes() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 4), nn.Flatten())
    made, model = small(model=net, name="full", price=0.0, steps=100)
    assert made._exact is None
    outcomes = follow(made, model, stream(20, turn=1))
    assert outcomes[0].result == "promoted" and made.bank is not None and len(made.bank) == 0


def test_one_class_alone_ends_no_look_badly() -> None:
    made, model = small(price=0.0)
    outcomes = follow(made, model, [rows_of(batch.x, np.zeros(32)) for batch in stream(20)])
    assert outcomes and {each.result for each in outcomes} <= {"promoted", "rejected", "declined"}


def test_rows_that_are_all_alike_end_no_look_badly() -> None:
    made, model = small(price=0.0)
    outcomes = follow(made, model, [rows_of(np.ones_like(batch.x), batch.y) for batch in stream(20, turn=1)])
    assert {each.result for each in outcomes} <= {"promoted", "rejected", "declined", "non_finite"}
    assert outcomes


def test_an_exact_head_is_the_method_where_its_name_is_given() -> None:
    made, model = small(name="lda_head")
    assert not made.gradients
    outcomes = follow(made, model, stream(20, turn=1))
    assert outcomes[0].result == "promoted" and outcomes[0].record["method"] == "lda_head"
    assert all(each.result in ("promoted", "declined") for each in outcomes)


# Without any label.


def test_without_labels_the_newest_rows_are_learnt_from_once_and_only_when_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs: list[Job] = []
    monkeypatch.setattr(Bench, "run", lambda self, job: jobs.append(job) or Outcome("rejected", "not better"))
    made, model = small(pseudo_labels=True)
    for number in range(40):
        made.seen(drawn(number).x)
        assert made.step(model, 0) is None
    made.ask()
    assert made.step(model, 0) is not None
    (found,) = jobs
    assert found.unlabelled is not None and (len(found.unlabelled), len(found.held.x), len(found.held.y)) == (
        768,
        256,
        0,
    )
    np.testing.assert_array_equal(found.held.x[-32:], drawn(39).x)
    np.testing.assert_array_equal(found.unlabelled[:32], drawn(8).x)
    # The rows that judged are not asked again: the level is for rows that no candidate has seen.
    made.ask()
    made.seen(drawn(40).x)
    assert made.step(model, 0) is None and made.busy
    for number in range(31):
        made.seen(drawn(number).x)
    assert made.step(model, 0) is not None and len(jobs) == 2


def test_labels_end_the_learning_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []
    monkeypatch.setattr(Bench, "run", lambda self, job: jobs.append(job) or Outcome("rejected", "not better"))
    made, model = small(pseudo_labels=True)
    for batch in stream(40, turn=1):
        made.seen(batch.x)
        made.add(batch)
    made.ask()
    made.step(model, 0)
    assert jobs[0].unlabelled is None and len(jobs[0].held.y) == 64


def test_what_is_kept_without_labels_fits_the_memory() -> None:
    kept = Unlabelled((4,), 4 * 4 * 10)
    assert kept.capacity == 10
    for number in range(5):
        kept.add(drawn(number, 7).x)
        assert len(kept.state()) <= 10
    everything = np.concatenate([drawn(number, 7).x for number in range(5)])
    np.testing.assert_array_equal(kept.state(), everything[-10:])
    assert kept.full


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 40))
def test_rows_without_labels_are_the_newest_and_go_through_a_checkpoint(sizes: list[int], capacity: int) -> None:
    kept, other = (Unlabelled((1,), 4 * capacity) for _ in range(2))
    rows = np.arange(sum(sizes), dtype=np.float32)[:, None]
    for size, end in zip(sizes, np.cumsum(sizes), strict=True):
        kept.add(rows[end - size : end])
    np.testing.assert_array_equal(kept.state(), rows[max(0, len(rows) - capacity) :])
    other.load(kept.state())
    assert other.full == kept.full == (len(rows) >= capacity)
    more = -np.ones((3, 1), np.float32)
    for each in (kept, other):
        each.add(more)
    np.testing.assert_array_equal(kept.state(), other.state())
    learnt, judged = kept.take()
    np.testing.assert_array_equal(np.concatenate((learnt, judged)), other.state())
    assert len(judged) == round(len(other.state()) / 4) and not kept.full and not len(kept.state())


# What the settings say wrong.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "norm_afine"}, r"slow method 'norm_afine' does not exist; did you mean 'norm_affine'"),
        ({"name": "lora", "options": {"rnk": 4}}, r'HOMEOSTAT_SLOW__OPTIONS=\{"rnk": 4\}.*did you mean .rank'),
        ({"name": "lora", "options": {"rank": "x"}}, r'HOMEOSTAT_SLOW__OPTIONS=\{"rank": "x"\}.*rank is'),
        ({"name": "lora", "options": {"name": "[4]"}}, r"HOMEOSTAT_SLOW__OPTIONS=.*JSON object"),
        ({"name": "lda_head", "options": {"memory_rows": "x"}}, r"HOMEOSTAT_SLOW__OPTIONS="),
        ({"name": "typo", "options": {"rank": 4}}, r"^slow method 'typo' does not exist"),
        ({"exact": "lda_haed"}, r"HOMEOSTAT_SLOW__EXACT=lda_haed: .*did you mean 'lda_head'"),
        ({"exact": "head"}, r"HOMEOSTAT_SLOW__EXACT=head is no exact head: use .* or leave it empty"),
    ],
)
def test_a_wrong_setting_is_refused_by_the_variable_s_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small(**changes)


def test_pseudo_labels_are_refused_where_there_can_be_none() -> None:
    with pytest.raises(ValueError, match="HOMEOSTAT_SLOW__PSEUDO_LABELS=true: .*regression"):
        small("regression", pseudo_labels=True)
    conv = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 4), nn.Flatten())
    with pytest.raises(ValueError, match=r"HOMEOSTAT_SLOW__PSEUDO_LABELS=true: .*nn\.Linear head"):
        small(model=conv, name="full", pseudo_labels=True)
    assert small("regression", pseudo_labels=True, enabled=False)


def test_a_daemon_says_the_variable_too(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r'HOMEOSTAT_SLOW=head: HOMEOSTAT_SLOW__OPTIONS=\{"rank": 4\}'):
        worker(tmp_path, slow={"name": "head", "options": {"rank": 4}})
