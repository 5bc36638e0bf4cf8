"""`auto`: the frozen model to the bit until something better is shown, and what is shown when."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters.fast.auto import ALIGNED, MEMORY, RUNS
from tests.check_adapter import same
from tests.unit import auto_streams, blobs
from tests.unit.auto_streams import (
    NORMS,
    Passes,
    build,
    concept,
    frozen_of,
    iid,
    in_runs,
    of_one_class,
    serve,
    trained,
)
from tests.unit.blobs import CLASSES, SIZE

one_thread = auto_streams.one_thread


# While nothing happens.


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_on_rows_like_the_source_every_output_is_the_model_s_to_the_bit(
    norm: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = build(norm)
    passes = Passes(auto)
    for name in ("grad", "backward"):
        monkeypatch.setattr(torch.autograd, name, lambda *_, **__: pytest.fail("a gradient was asked for"))
    count = min(1536 // rows, 300)
    for x, _ in islice(iid(rows=rows), count):
        outputs, before = auto(x), passes.frozen
        assert torch.equal(outputs, frozen_of(auto, x))
        passes.frozen = before
        assert not auto.changed_by.any() and len(auto.changed_by) == rows
    assert (passes.frozen, passes.aligned) == (count, 0)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_other_shares_of_the_classes_alone_are_answered_by_the_model(norm: str) -> None:
    auto = build(norm)
    for x, _ in [*islice(iid(), 20), *islice(of_one_class(), 40)]:
        assert torch.equal(auto(x), frozen_of(auto, x))


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_even_while_a_shift_is_suspected_rows_of_one_class_keep_the_model_s_answers(norm: str) -> None:
    auto = build(norm)
    auto.alert = True
    for x, _ in [*islice(iid(), 5), *islice(of_one_class(), 40)]:
        assert torch.equal(auto(x), frozen_of(auto, x))


# A shift of the inputs.

SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "pale": blobs.pale,
    "offset": lambda x: x + 3.0,
    "scaled": lambda x: (
        x * torch.tensor([0.3, 1.0, 2.0, 1.0, 0.5, 1.0]) + torch.tensor([1.0, -2.0, 0.0, 2.0, 0.0, 0.0])
    ),
}


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("norm", NORMS)
def test_a_shift_is_found_and_undone_and_gone_the_model_serves_again(norm: str, shift: str) -> None:
    auto = build(norm)
    serve(auto, iid(), 10)
    served, frozen, ways = serve(auto, iid(SHIFTS[shift]), 50)
    assert served < 0.75 * frozen and np.mean(ways) > 0.7
    serve(auto, iid(seed=3000), 60)
    passes = Passes(auto)
    served, frozen, ways = serve(auto, iid(seed=4000), 20)
    assert passes.aligned == 0 and served == frozen and not any(ways)


def test_while_the_aligned_copy_serves_the_model_runs_on_a_sample_of_the_segments() -> None:
    auto = build()
    serve(auto, iid(blobs.pale), 12)
    passes = Passes(auto)
    for x, _ in islice(iid(blobs.pale, rows=32), 40):
        auto(x)
        assert (auto.changed_by == ALIGNED).all()
    assert (passes.frozen, passes.aligned) == (10, 40)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_batch_of_64_or_64_batches_of_one_make_nearly_the_same_of_a_shift(norm: str) -> None:
    single, whole = build(norm), build(norm)
    for auto in (single, whole):
        serve(auto, iid(), 4)
    errors = []
    for x, y in islice(iid(blobs.pale), 20):
        in_one, one_by_one = whole(x), torch.cat([single(row) for row in x.split(1)])
        errors.append([int((out.argmax(1) != y).sum()) for out in (in_one, one_by_one)])
    assert single._aligned is not None and whole._aligned is not None
    for one, other in zip(single._aligned.model._layers, whole._aligned.model._layers, strict=True):
        moved = (other.mean - other.source[0]).abs().max()
        assert (one.mean - other.mean).abs().max() < 0.15 * moved
    assert single.changed_by.all() and whole.changed_by.all()
    # A batch of 64 may be answered by what it shows itself; one by one that takes some of its rows.
    together, apart = np.sum(errors[1:], 0) / (19 * 64)
    assert abs(together - apart) < 0.02
    assert single._effective[0].value == pytest.approx(whole._effective[0].value, abs=0.5)


def test_what_is_left_of_the_source_s_moments_after_64_rows_does_not_hang_on_the_batches() -> None:
    x, left = torch.full((64, SIZE), 0.5), []
    for rows in (1, 64):
        arm = build()._aligned
        assert arm is not None
        layer = arm.model._layers[0]
        with torch.inference_mode():
            expected = trained("batch")[0](x)[0]
            for part in x.split(rows):
                arm.run(part, 1.0)
        left.append(float((layer.mean - expected).norm() / (layer.source[0] - expected).norm()))
    assert left[0] == pytest.approx(left[1], abs=0.03)


# Runs of classes.


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_rows_of_the_source_in_runs_are_answered_with_their_help(norm: str) -> None:
    auto = build(norm)
    served, frozen, ways = serve(auto, in_runs(), 80)
    assert served < 0.6 * frozen and set(ways) == {0, RUNS} and np.mean(np.array(ways) > 0) > 0.5


def test_a_shift_of_rows_in_runs_is_undone_too() -> None:
    auto = build()
    served, frozen, ways = serve(auto, in_runs(blobs.pale), 100)
    assert served < 0.5 * frozen and ALIGNED + RUNS in ways


def test_independent_rows_are_never_taken_for_runs_over_20_seeds() -> None:
    taken = 0
    for seed in range(20):
        auto = build("layer")
        _, _, ways = serve(auto, iid(seed=10_000 + 100 * seed), 16)
        taken += any(way & RUNS for way in ways)
    assert taken == 0


def test_a_model_that_prefers_a_class_after_a_shift_is_not_taken_for_runs() -> None:
    auto = build("plain")
    serve(auto, iid(), 10)
    x, _ = blobs.rows(2000, seed=3)
    away = 1.5 * (x[trained("plain")(x).argmax(1) == 2].mean(0) - x.mean(0))
    _, _, ways = serve(auto, iid(lambda x: x + away), 50)
    prediction = torch.cat([frozen_of(auto, x).argmax(1) for x, _ in islice(iid(lambda x: x + away, seed=9000), 5)])
    assert (prediction == 2).double().mean() > 0.5 and not any(way & RUNS for way in ways)


# Labels.


def test_labels_of_a_changed_concept_let_the_memory_of_errors_serve_and_nothing_else() -> None:
    auto = build("layer")
    _, _, before = serve(auto, concept(), 5)
    assert not any(before)
    served, frozen, ways = serve(auto, concept(), 60, labels=True)
    assert served < 0.5 * frozen and set(ways) == {0, MEMORY}


def test_labels_that_agree_with_the_model_change_no_answer() -> None:
    auto = build("layer")
    for x, _ in islice(iid(), 40):
        first, outputs = auto.numbered, auto(x)
        assert torch.equal(outputs, frozen_of(auto, x))
        auto.learn(x, outputs.argmax(1), torch.arange(first, first + len(x)))


def test_random_labels_let_nothing_serve_more_often_than_the_level() -> None:
    served = 0
    for seed in range(30):
        auto = build("layer")
        generator = torch.Generator().manual_seed(seed)
        for x, _ in islice(iid(seed=20_000 + 100 * seed), 8):
            first = auto.numbered
            auto(x)
            auto.learn(x, torch.randint(0, CLASSES, (len(x),), generator=generator), torch.arange(first, first + 64))
        served += auto._arms.contests["memory"].verdict > 0
    # 30 runs at the level 0.05: more than 5 has a probability of 0.3 %.
    assert served <= 5


def test_an_aligned_copy_that_labels_show_to_be_worse_is_left_out() -> None:
    auto = build("layer")
    serve(auto, iid(blobs.pale), 10)
    assert auto.changed_by.all()
    # The labels are the given model's own answers.
    for x, _ in islice(iid(blobs.pale), 20):
        first = auto.numbered
        auto(x)
        auto.learn(x, frozen_of(auto, x).argmax(1), torch.arange(first, first + len(x)))
    assert auto._arms.contests["aligned"].verdict == -1
    for x, _ in islice(iid(blobs.pale, seed=1), 10):
        auto(x)
        assert not (auto.changed_by & ALIGNED).any()


@pytest.mark.parametrize("numbers", [[-1] * 64, [-(2**24)] * 64, [10**12] * 64, list(range(64, 128)), None], ids=str)
def test_labels_of_rows_that_it_has_not_predicted_count_for_no_arm(numbers: list[int] | None) -> None:
    auto = build("layer")
    x, y = next(concept())
    auto(x)
    arms = auto._arms.state()
    auto.learn(x, y, numbers)
    assert same(auto._arms.state(), arms)
    # What the memory of errors learns of it is the same as from the rows by number.
    numbered = build("layer")
    numbered(x)
    numbered.learn(x, y, range(64))
    assert auto._memory is not None and numbered._memory is not None
    one, other = (made._memory.state()["memory"]["state"] for made in (auto, numbered))
    torch.testing.assert_close(one["features"], other["features"])


def test_a_number_given_twice_and_labels_that_can_not_be_are_endured() -> None:
    auto = build("layer")
    for x, y in islice(concept(), 12):
        first = auto.numbered
        auto(x)
        auto.learn(x, y, [first] * 64)
        auto.learn(x, torch.full((64,), -1), range(first, first + 64))
        auto.learn(torch.full_like(x, torch.nan), y, range(first, first + 64))
        auto.learn(x, torch.full((64,), CLASSES + 7), range(first, first + 64))
    assert auto(x).isfinite().all()


def test_rows_count_as_given_at_gain_0_too() -> None:
    auto, other = build("layer"), build("layer")
    auto.gain = 0.0
    x, _ = next(iid())
    auto(x)
    other(x)
    assert auto.numbered == other.numbered == 64
    assert len(auto.changed_by) == 64 and not auto.changed_by.any()


def test_numbers_that_do_not_belong_to_the_rows_are_refused() -> None:
    auto = build("layer")
    x, y = next(iid())
    auto(x)
    with pytest.raises(ValueError, match="64 rows with 3 numbers"):
        auto.learn(x, y, [0, 1, 2])
