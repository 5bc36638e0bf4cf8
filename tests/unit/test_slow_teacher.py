"""Pseudo-labels: what counts, and that learning by them does not collapse where plain self-training does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adapters.slow as slow
from adapters.slow.teacher import Teacher
from adapters.slow.trainee import private_copy
from tests.unit.slow_world import CLASSES, INPUTS, answers, draw, error, memory, shifted, trained

torch.set_num_threads(1)
METHOD = slow.get("norm_affine_head")
NOTHING = (np.zeros((0, INPUTS), np.float32), np.zeros(0, np.int64))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained()


def plain_self_training(model: nn.Module, x: np.ndarray, lr: float) -> nn.Module:
    """The student's own argmax as label, every row, nothing beside."""
    twin, moved = private_copy(model, METHOD.parameters(model))  # type: ignore[attr-defined]
    optimizer = torch.optim.SGD(moved.values(), lr=lr, momentum=0.9)
    rng = np.random.default_rng(0)
    for _ in range(150):
        output = twin(torch.from_numpy(x[rng.integers(0, len(x), 64)]))
        optimizer.zero_grad()
        nn.functional.cross_entropy(output, output.argmax(1)).backward()
        optimizer.step()
    return twin


@pytest.mark.parametrize("lr", [0.03, 0.3])
@pytest.mark.parametrize("reference", [5, 200])
@pytest.mark.parametrize("skewed", [False, True])
def test_it_gains_where_plain_self_training_collapses(
    model: nn.Module, lr: float, reference: int, skewed: bool
) -> None:
    x, y = draw(8, 3_000)
    if skewed:
        x = x[(y == 1) | (np.arange(len(y)) % 10 == 0)]
    x_test, y_test = draw(4, 2_000)
    frozen = error(model, shifted(x_test), y_test)
    collapsed = plain_self_training(model, shifted(x), lr)
    assert error(collapsed, shifted(x_test), y_test) > frozen + 0.15
    assert (answers(collapsed, shifted(x_test)) == 1).mean() > 0.95

    options = slow.BurstOptions(optimizer="sgd", lr=lr, steps=150, unlabelled_share=1.0)
    result = slow.run_burst(
        model, METHOD, memory(*NOTHING, reference), options, task="classification", seed=0, unlabelled=shifted(x)
    )
    learnt = slow.apply_delta(model, result.delta)
    assert error(learnt, shifted(x_test), y_test) < frozen - 0.03
    assert error(learnt, x_test, y_test) < error(model, x_test, y_test) + 0.02
    assert result.pseudo_labels > 1_000


def test_the_same_seed_gives_the_same_bits_and_labelled_rows_keep_their_order(model: nn.Module) -> None:
    x, y = draw(3, 200)
    options = slow.BurstOptions(steps=10)

    def delta(**more: object) -> Tensor:
        return slow.run_burst(model, METHOD, memory(x, y), options, task="classification", seed=0, **more).delta[
            "6.weight"
        ]  # type: ignore[arg-type]

    once, again = (delta(unlabelled=shifted(draw(8, 300)[0])) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, delta())
    # Rows of which none is believed add nothing.
    hostile = np.full((4, INPUTS), np.nan, np.float32)
    assert torch.equal(delta(unlabelled=hostile), delta())


def test_rows_that_are_not_finite_are_left_out(model: nn.Module) -> None:
    x, y = draw(3, 100)
    rows = draw(8, 100)[0].astype(np.float64)
    rows[::2, 3], rows[1, 0] = np.nan, 1e300
    result = slow.run_burst(
        model, METHOD, memory(x, y), slow.BurstOptions(), task="classification", seed=0, unlabelled=rows
    )
    assert result.reason == "done"
    assert result.pseudo_labels > 0


def test_what_can_not_be_labelled_is_refused(model: nn.Module) -> None:
    x, y = draw(3, 100)
    with pytest.raises(ValueError, match=r"rows of shape \(7,\); the memory's are \(32,\)"):
        slow.run_burst(
            model, METHOD, memory(x, y), slow.BurstOptions(), task="classification", seed=0,
            unlabelled=np.zeros((3, 7), np.float32),
        )  # fmt: skip
    with pytest.raises(ValueError, match="a regression learns from labels alone"):
        slow.run_burst(
            nn.Linear(INPUTS, 1), slow.get("head"), slow.Snapshot(x, y.astype(np.float32), x, y.astype(np.float32)),
            slow.BurstOptions(), task="regression", seed=0, unlabelled=x,
        )  # fmt: skip


class Table(nn.Module):
    """Logits by row number."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[x.long()]


def teacher_of(student: Table, frozen: Table, **options: object) -> Teacher:
    trainee = slow.Trainee(module=student, groups=[slow.Group([student.logits])], values=dict)
    return Teacher(trainee, frozen, **{"decay": 0.5, "confidence": 0.0} | options)  # type: ignore[arg-type]


def test_a_row_counts_only_where_the_frozen_model_says_the_same() -> None:
    student = Table([[4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    frozen = Table([[0.1, 0.0], [0.0, 9.0], [0.0, 0.1]])
    said = teacher_of(student, frozen).label(torch.arange(3))
    assert said.y.tolist() == [0, 0, 1]
    assert (said.weight > 0).tolist() == [True, False, True]


def test_a_row_counts_only_over_the_bar_and_a_rare_class_has_a_lower_one() -> None:
    sure, unsure = [3.0, 0.0], [1.0, 0.0]
    student = Table([sure] * 8 + [unsure, [0.0, 1.0]])
    rows = torch.arange(10)
    fixed = teacher_of(student, student, confidence=0.9).label(rows)
    assert (fixed.weight > 0).tolist() == [True] * 8 + [False, False]
    adaptive = teacher_of(student, student, confidence=None).label(rows)
    # Equal confidence: not enough for the class that is everywhere, enough for the one that is rare.
    assert (adaptive.weight > 0).tolist() == [True] * 8 + [False, True]


def test_a_class_with_more_than_its_share_of_a_batch_is_weighed_down() -> None:
    student = Table([[5.0, 0.0]] * 9 + [[0.0, 5.0]])
    weight = teacher_of(student, student).label(torch.arange(10)).weight
    assert float(weight[:9].sum()) == pytest.approx(5 * float(weight[9]), rel=1e-5)
    assert float(weight.max()) <= 1


def test_a_row_on_which_the_teacher_is_not_finite_never_counts() -> None:
    student = Table([[math.nan, 0.0], [math.inf, 0.0], [2.0, 0.0]])
    for confidence in (0.0, None):
        teacher = teacher_of(student, student, confidence=confidence)
        for _ in range(2):
            said = teacher.label(torch.arange(3))
            assert said.weight.isfinite().all()
            assert said.weight[:2].tolist() == [0, 0]
    # And what it did not take in does not blind it to what comes.
    assert teacher.label(torch.tensor([2])).weight.item() > 0


def test_the_teacher_follows_slowly_and_leaves_the_student_as_it_is() -> None:
    student = Table([[2.0, 0.0]])
    teacher = teacher_of(student, Table([[0.0, 1.0]]))
    with torch.no_grad():
        student.logits.copy_(torch.tensor([[0.0, 2.0]]))
    before, place = student.logits.detach().clone(), student.logits.data_ptr()
    assert teacher.label(torch.tensor([0])).y.item() == 0
    teacher.follow()
    teacher.follow()
    assert teacher.label(torch.tensor([0])).y.item() == 1
    assert torch.equal(student.logits, before)
    assert student.logits.data_ptr() == place


@pytest.mark.parametrize("name", ["film", "full", "fisher+lae+head"])
def test_any_method_can_be_taught(model: nn.Module, name: str) -> None:
    x, y = draw(3, 100)
    method, options = slow.get(name), slow.BurstOptions(steps=20)
    result = slow.run_burst(
        model, method, memory(x, y), options, task="classification", seed=0, unlabelled=shifted(draw(8, 300)[0])
    )
    assert result.reason == "done"
    assert 0 < result.pseudo_labels <= 20 * 32
    assert slow.apply_delta(model, result.delta)(torch.from_numpy(x)).shape[1] == CLASSES
