"""`auto`: what must hold whatever serves, and rows that are not like others."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adapters.fast.auto import ALIGNED, RUNS, Auto
from tests.check_adapter import same
from tests.unit import auto_streams, blobs
from tests.unit.auto_streams import (
    PHASES,
    Batches,
    build,
    frozen_of,
    iid,
    in_runs,
    in_service,
    of_one_class,
    serve,
    twin_of,
    with_both,
)
from tests.unit.blobs import CLASSES, SIZE

one_thread = auto_streams.one_thread


@PHASES
def test_predict_gives_what_forward_will_and_changes_nothing(phase: Callable[[], tuple[Auto, Batches]]) -> None:
    auto, stream = phase()
    for x, _ in islice(stream, 6):
        before = auto.state_dict()
        predicted, features, by = auto.predict(x), auto.features, auto.changed_by
        assert same(auto.state_dict(), before)
        assert torch.equal(auto(x), predicted) and (auto.changed_by == by).all()
        assert auto.features is not None and features is not None and torch.equal(auto.features, features)


@PHASES
def test_a_stored_state_goes_on_to_the_bit(phase: Callable[[], tuple[Auto, Batches]]) -> None:
    auto, stream = phase()
    other = twin_of(auto)
    for x, y in islice(stream, 8):
        first = auto.numbered
        assert torch.equal(auto(x), other(x)) and (auto.changed_by == other.changed_by).all()
        for made in (auto, other):
            made.learn(x, y, torch.arange(first, first + len(x)))
    assert same(auto.state_dict(), other.state_dict())


@PHASES
def test_gain_0_is_the_model_to_the_bit_and_gain_a_half_is_half_way(phase: Callable[[], tuple[Auto, Batches]]) -> None:
    auto, stream = phase()
    half, none = twin_of(auto), twin_of(auto)
    half.gain, none.gain = 0.5, 0.0
    for x, _ in islice(stream, 3):
        frozen, outputs = frozen_of(auto, x), auto(x)
        assert torch.equal(none(x), frozen) and torch.equal(none.predict(x), frozen)
        torch.testing.assert_close(half(x), torch.lerp(frozen, outputs, 0.5), rtol=1e-4, atol=1e-4)


@PHASES
def test_a_reset_is_construction(phase: Callable[[], tuple[Auto, Batches]]) -> None:
    auto, stream = phase()
    auto.reset()
    fresh = build("layer" if auto.model[1].__class__ is nn.LayerNorm else "batch")
    assert same(auto.state_dict(), fresh.state_dict())
    for x, _ in islice(stream, 3):
        assert torch.equal(auto(x), fresh(x))


@PHASES
def test_bad_rows_are_passed_over_and_outliers_stay_out_of_the_moments(
    phase: Callable[[], tuple[Auto, Batches]],
) -> None:
    auto, stream = phase()
    clean = twin_of(auto)
    x, _ = next(stream)
    dirty = torch.cat([x[:5], torch.full((1, SIZE), torch.nan), x[5:]])
    outputs, expected = auto(dirty), clean(x)
    assert outputs[5].isnan().all() and torch.equal(outputs[[*range(5), *range(6, len(dirty))]], expected)
    assert same(auto.state_dict(), clean.state_dict())
    wild = torch.cat([x[:5], torch.full((1, SIZE), 1e6), x[5:]])
    outputs = auto(wild)
    assert outputs.isfinite().all() and not auto.changed_by[5] & ALIGNED
    if not auto.changed_by[5]:
        torch.testing.assert_close(outputs[5], frozen_of(auto, wild)[5])
    assert auto._aligned is not None
    for layer in auto._aligned.model._layers:
        assert layer.mean.abs().max() < 20.0


KINDS: dict[str, Callable[[int], Batches]] = {
    "source": lambda rows: iid(rows=rows),
    "pale": lambda rows: iid(blobs.pale, rows=rows),
    "runs": lambda rows: in_runs(rows=rows),
    "one class": lambda rows: of_one_class(rows=rows),
    "wild": lambda rows: iid(lambda x: x * torch.where(torch.arange(len(x)) % 7 == 0, 1e6, 1.0)[:, None], rows=rows),
    "huge": lambda rows: iid(lambda x: 1e37 * x, rows=rows),
    "constant": lambda rows: iid(torch.zeros_like, rows=rows),
    "missing": lambda rows: iid(lambda x: x.masked_fill(torch.arange(len(x))[:, None] % 3 == 0, torch.nan), rows=rows),
}
STEPS = st.lists(
    st.tuples(
        st.sampled_from(list(KINDS)),
        st.sampled_from([1, 7, 64, 300]),
        st.integers(1, 6),
        st.sampled_from([None, None, True, False]),
        st.sampled_from([1.0, 1.0, 1.0, 0.5, 0.0]),
        st.sampled_from(["none", "none", "true", "swapped", "random"]),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@settings(max_examples=25, deadline=None)
@given(steps=STEPS, restart=st.integers(0, 7))
def test_whatever_comes_predict_is_forward_and_a_stored_state_goes_on(
    norm: str, steps: list[Any], restart: int
) -> None:
    auto = other = build(norm)
    for number, (kind, rows, count, alert, gain, labels) in enumerate(steps):
        if number == restart:
            other = twin_of(auto)
        for made in (auto, other):
            made.alert, made.gain = alert, gain
        for x, y in islice(KINDS[kind](rows), count):
            first, before = auto.numbered, auto.state_dict()
            predicted = auto.predict(x)
            assert same(auto.state_dict(), before)
            outputs = auto(x)
            assert torch.equal(predicted.nan_to_num(), outputs.nan_to_num())
            usable = x.isfinite().all(1)
            plain = frozen_of(auto, x[usable]) if usable.any() else outputs[usable]
            # What the model can't answer stays so; all else is finite.
            assert (outputs[usable].isfinite().all(1) >= plain.isfinite().all(1)).all()
            if gain == 0.0:
                assert torch.equal(outputs[usable].nan_to_num(), plain.nan_to_num())
            if other is not auto:
                assert torch.equal(other(x).nan_to_num(), outputs.nan_to_num())
            given = {"true": y, "swapped": (y + 1) % CLASSES, "random": y[torch.randperm(len(y))]}
            for made in {id(made): made for made in (auto, other)}.values():
                if labels in given:
                    made.learn(x, given[labels], torch.arange(first, first + len(x)))
    assert same(auto.state_dict(), other.state_dict())


# Rows that are not like others.


@pytest.mark.parametrize("rows", [1, 2, 64])
def test_outliers_never_enter_the_moments_not_even_the_first_row(rows: int) -> None:
    # The batch that opens the copy has nothing before it that says what is usual.
    auto = build()
    auto.alert = True
    x, _ = next(iid(rows=rows, seed=77))
    x[0] = 1e6
    auto(x)
    assert auto._aligned is not None and auto._aligned.open
    assert auto._aligned.model._layers[0].mean.abs().max() < 20.0


@pytest.mark.parametrize("rows", [1, 64])
def test_one_wild_row_in_a_hundred_changes_little_of_what_is_won(rows: int) -> None:
    auto, wrong, plainly = build(), 0, 0
    count = 0
    for number, (x, y) in enumerate(islice(iid(blobs.pale, rows=rows), 2048 // rows)):
        wild = torch.arange(number * rows, (number + 1) * rows) % 100 == 50
        x[wild] = 1e6
        frozen, outputs = frozen_of(auto, x), auto(x)
        assert outputs.isfinite().all()
        if wild.any():
            assert not auto.changed_by[wild.numpy()].any() and torch.allclose(outputs[wild], frozen[wild])
        wrong += int((outputs.argmax(1) != y)[~wild].sum())
        plainly += int((frozen.argmax(1) != y)[~wild].sum())
        count += int((~wild).sum())
    assert wrong < 0.5 * plainly


def test_a_batch_of_outliers_alone_does_not_forget_the_runs() -> None:
    # At one row a batch, one wild row in a hundred would keep runs from ever being used beside the aligned copy.
    auto, stream = with_both()
    auto(torch.full((1, SIZE), 1e6))
    auto(next(stream)[0])
    assert (auto.changed_by == ALIGNED + RUNS).any()


def test_constant_inputs_do_not_harm_what_comes_after() -> None:
    auto = build()
    serve(auto, iid(), 5)
    for value in (0.0, 1.0):
        for _ in range(20):
            assert auto(torch.full((64, SIZE), value)).isfinite().all()
    serve(auto, iid(seed=2000), 40)
    served, frozen, ways = serve(auto, iid(seed=3000), 20)
    assert served == frozen and not any(ways)


def test_an_aligned_copy_that_is_not_finite_is_closed_and_the_model_answers() -> None:
    auto, stream = in_service()
    assert auto._aligned is not None
    handle = auto._aligned.model.model.register_forward_hook(lambda module, inputs, outputs: outputs * torch.nan)
    x, _ = next(stream)
    outputs = auto(x)
    handle.remove()
    assert torch.equal(outputs, frozen_of(auto, x)) and not auto.changed_by.any()
    for layer in auto._aligned.model._layers:
        assert torch.equal(layer.mean, layer.source[0]) and torch.equal(layer.var, layer.source[1])
    _, _, ways = serve(auto, stream, 15)
    assert ways[-1] == ALIGNED  # it has begun again


def test_moments_that_are_not_finite_are_never_kept() -> None:
    auto, stream = in_service()
    assert auto._aligned is not None
    layer = auto._aligned.model._layers[0]
    before = auto._aligned.model.state()
    layer.var = layer.var * torch.inf
    outputs = auto(next(stream)[0])
    assert outputs.isfinite().all()
    assert all(part["var"].isfinite().all() for part in auto._aligned.model.state()) and len(before) == 1
