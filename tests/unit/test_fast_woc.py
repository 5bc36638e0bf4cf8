"""woc and reliable, and what holds for every wrapper around every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import adapters.fast as fast
from adapters.fast.core.losses import softmax_entropy
from tests.check_adapter import (
    Subject,
    a_stored_state_goes_on_to_the_bit,
    build_model,
    gain_0_is_the_frozen_model_to_the_bit,
    hard_batches_stay_finite,
    one_bad_row_gets_nan_and_touches_nothing_else,
    reset_is_construction_to_the_bit,
    same,
    slots_are_separate_or_declared_shared,
)
from tests.unit.sharp import MARGIN, START, at, entropies, gradient, reference, rows, sharp_mlp, stored, tensors

pytestmark = pytest.mark.sweep


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads on models this small only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.0}


def woc(**options) -> fast.FastAdapter:
    return fast.build("woc", sharp_mlp(), **SGD, **options)


def confidences(theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the frozen model, and of the adapted one in the class that the frozen one predicts."""
    with torch.no_grad():
        before, after = sharp_mlp()(x).softmax(1), at(theta)(x).softmax(1)
    return before.amax(1), after.gather(1, before.argmax(1, keepdim=True)).squeeze(1)


def test_before_anything_is_learnt_all_rows_are_kept():
    adapter = woc()
    adapter(rows())
    assert adapter.diagnostics["mask"].all()


@pytest.mark.parametrize("kind", ["mlp_bn1d", "cnn_bn2d", "transformer", "cnn_gn"])
def test_before_anything_is_learnt_all_rows_are_kept_whatever_kernels_run(kind: str):
    adapter = fast.build("woc", build_model(kind))
    x = Subject("woc", kind).batches(1, rows=64)[0]
    adapter(x, slots=torch.arange(64) % 3)
    assert adapter.diagnostics["mask"].all()


def test_the_loss_is_that_over_rows_that_became_no_less_sure_and_the_spread_of_all():
    adapter = woc(alpha=0.5)
    adapter(rows())
    theta, x = stored(adapter).clone(), rows(seed=1)
    frozen, now = confidences(theta, x)
    keep = now >= frozen - 1e-6  # but for rounding
    assert 4 < keep.sum() < 28
    model = at(theta)
    z = model(x)
    mean = z.softmax(1).mean(0)
    loss = softmax_entropy(z)[keep].mean() + 0.5 * (mean * mean.log()).sum()
    adapter(x)
    assert torch.equal(adapter.diagnostics["mask"], keep)
    torch.testing.assert_close(stored(adapter), theta - 0.1 * gradient(model, loss), rtol=1e-5, atol=1e-6)


def test_a_row_that_became_less_sure_has_no_part_in_the_step():
    first = woc(alpha=0.0)
    first(rows())
    theta, x = stored(first).clone(), rows(seed=1)
    frozen, now = confidences(theta, x)
    good, bad = x[now >= frozen], x[(now - frozen).argmin()]
    with_row, without = woc(alpha=0.0), woc(alpha=0.0)
    for adapter, batch in ((with_row, torch.cat([good, bad[None]])), (without, good)):
        adapter.load_state_dict(first.state_dict())
        adapter(batch)
    assert not torch.equal(stored(without), theta)
    torch.testing.assert_close(stored(with_row), stored(without), rtol=0, atol=1e-6)


def test_the_twin_normalises_as_it_is_told():
    x = Subject("woc", "mlp_bn1d").batches(1)[0]
    model = build_model("mlp_bn1d")
    for gain in (1.0, 0.5):
        batch, frozen = (fast.build("woc", model, twin=twin) for twin in ("batch", "frozen"))
        batch.gain = frozen.gain = gain
        outputs = batch(x)
        frozen(x)
        torch.testing.assert_close(batch.diagnostics["source_logits"], outputs)
        assert torch.equal(frozen.diagnostics["source_logits"], model(x))


@pytest.mark.parametrize("inner", ["input_prompt", "cotta", "tent"])
def test_the_twin_is_the_method_before_it_learnt_whatever_that_normalises_by(inner: str):
    subject = Subject(f"woc+{inner}", "mlp_bn1d", {"n_augmentations": 2} if inner == "cotta" else {})
    adapter = subject.build()
    adapter(subject.batches(1)[0])
    assert adapter.diagnostics["mask"].all()


def test_the_spread_of_the_mean_prediction_keeps_it_from_one_class():
    def spread(alpha: float) -> float:
        adapter = fast.build("woc", sharp_mlp(2.0), alpha=alpha, lr=0.02)
        for seed in range(60):
            adapter(rows(seed=seed % 4))
        return float(softmax_entropy(adapter.predict(rows(200)).softmax(1).mean(0, keepdim=True).log()))

    assert spread(2.0) > spread(0.0) + 0.02


def test_reliable_keeps_sure_rows():
    adapter, model, x = fast.build("reliable", sharp_mlp(), **SGD), sharp_mlp(), rows()
    entropy = softmax_entropy(model(x))
    adapter(x)
    assert torch.equal(adapter.diagnostics["kept"], entropy < MARGIN)
    expected = START - 0.1 * gradient(model, entropy[entropy < MARGIN].mean())
    torch.testing.assert_close(stored(adapter), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inner", ["tent", "rpl", "eta", "eata", "sar", "deyo", "recap"])
def test_an_unsure_row_has_no_part_in_any_step_behind_reliable(inner: str):
    known = fast.get(inner).Options.model_fields
    wide = {
        "reset_constant": 0.0,
        "margin_e0": 9.0,
        "deyo_margin": 9.0,
        "margin": 9.0,
        "d_margin": 2.0,
        "aug_type": "occ",
    }
    options = SGD | {name: value for name, value in wide.items() if name in known}
    if "plpd_threshold" in known and inner == "deyo":
        options["plpd_threshold"] = -1.0
    x = rows()
    entropy = entropies(sharp_mlp(), x)
    given = reference(rows(8, seed=9), torch.full((16,), 0.01))
    adapters = [
        fast.build(f"reliable+{inner}", sharp_mlp(), given, e_margin=0.5, **options)
        if inner not in ("eta", "eata")
        else fast.build(f"reliable+{inner}", sharp_mlp(), given, **options)
        for _ in range(2)
    ]
    bound = adapters[0].options.e_margin or MARGIN
    sure = x[entropy < bound]
    with_row, without = adapters
    with_row(torch.cat([sure, x[entropy.argmax()][None]]))
    without(sure)
    assert not torch.equal(stored(without), START)
    torch.testing.assert_close(stored(with_row), stored(without), rtol=0, atol=2e-6)


def test_options_find_their_owner():
    adapter = fast.build("woc+gala+eta", sharp_mlp(), alpha=0.25, threshold=0.5, d_margin=0.1)
    inside = adapter.inner.inner
    assert (adapter.options.alpha, adapter.inner.options.threshold, inside.options.d_margin) == (0.25, 0.5, 0.1)
    with pytest.raises(ValueError, match="eta: nonsense"):
        fast.build("woc+gala+eta", sharp_mlp(), nonsense=1)


@pytest.mark.parametrize("inside", ["lame", "none", "norm"])
def test_what_takes_no_steps_can_not_be_wrapped(inside: str):
    problem = fast.get(f"woc+{inside}").check(build_model("mlp_bn1d"))
    assert "use 'tent'" in (problem or "")


def test_slots_of_which_no_row_is_left_do_not_move():
    for name in ("reliable", "woc", "reliable+gala", "woc+eata"):
        options = {"lr": 0.05} | ({"d_margin": 2.0, "e_margin": 2.0} if name.endswith("eata") else {})
        adapter = fast.build(name, sharp_mlp(), reference(rows(8, seed=9)), **options)
        x = rows(64)
        slots = torch.arange(64) % 2
        adapter(x, slots=slots)
        before = tensors(adapter)["theta"].clone()
        p = adapter.predict(x, slots=slots)
        order = softmax_entropy(p).argsort()
        sure, unsure = order[slots[order] == 0][:8], order[slots[order] == 1][-3:]
        if name.startswith("woc"):
            frozen = sharp_mlp()(x).softmax(1)
            now = p.softmax(1).gather(1, frozen.argmax(1, keepdim=True)).squeeze(1)
            change = now - frozen.amax(1)
            order = change.argsort(descending=True)
            sure, unsure = order[slots[order] == 0][:8], order[slots[order] == 1][-3:]
        chosen = torch.cat([sure, unsure])
        adapter(x[chosen], slots=slots[chosen])
        kept = adapter.diagnostics["kept"]
        assert kept[:8].any() and not kept[8:].any(), name
        after = tensors(adapter)["theta"]
        assert not torch.equal(after[0], before[0]), name
        assert torch.equal(after[1], before[1]), name


WIDE: dict[str, Any] = {
    **{
        "margin_e0": 1.36,
        "deyo_margin": 1.36,
        "margin": 1.4,
        "e_margin": 1.36,
        "d_margin": 2.0,
        "plpd_threshold": -1.0,
    },
    **{"n_augmentations": 2, "memory_size": 20, "update_every": 12, "update_frequency": 12},
}
"""Options with which rows of a small untrained model are learnt from, and soon."""
COMPOSITIONS = [
    *(
        f"{wrapper}+{name}"
        for wrapper in ("woc", "gala", "reliable")
        for name in fast.names()
        if fast.get(name).wrappable
    ),
    "woc+gala+eta",
    "reliable+woc+tent",
]


def composed(name: str, kind: str) -> Subject:
    known = set(fast.get(name.split("+")[-1]).Options.model_fields)
    known |= {"e_margin"} if "reliable" in name else set()
    return Subject(name, kind, {option: value for option, value in WIDE.items() if option in known})


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_wrapper_works_around_every_method_with_gradient_steps(name: str):
    subject = composed(name, "mlp_bn1d")
    adapter = subject.build()
    at_start = adapter.state_dict()
    for x in subject.batches(4):
        outputs = adapter(x)
        assert outputs.shape == (len(x), 4) and outputs.isfinite().all()
    assert not same(adapter.state_dict(), at_start)
    for check in (
        reset_is_construction_to_the_bit,
        a_stored_state_goes_on_to_the_bit,
        slots_are_separate_or_declared_shared,
    ):
        check(subject)


@pytest.mark.parametrize("name", ["woc+gala+eta", "reliable+woc+tent", "gala+sar"])
@pytest.mark.parametrize("kind", ["transformer", "cnn_bn2d", "mlp_ln"])
def test_wrappers_in_wrappers_pass_where_the_method_alone_does(name: str, kind: str):
    subject = composed(name, kind)
    for check in (
        gain_0_is_the_frozen_model_to_the_bit,
        one_bad_row_gets_nan_and_touches_nothing_else,
        hard_batches_stay_finite,
        slots_are_separate_or_declared_shared,
    ):
        check(subject)
