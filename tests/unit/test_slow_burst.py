"""The bounded burst, alone and together with memory and gate on a toy problem."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import adapters.slow as slow
from adapters.slow import optimizers

pytestmark = pytest.mark.sweep


INPUTS, CLASSES = 128, 6
SWAP = np.array([1, 0, 2, 3, 5, 4])
F32, I64 = NDArray[np.float32], NDArray[np.int64]
# With more threads than cores to spare, a step of this size takes a hundred times longer.
torch.set_num_threads(1)
SGD = slow.BurstOptions(optimizer="sgd", lr=0.1, steps=10)


CENTRES = np.random.default_rng(99).normal(size=(CLASSES, INPUTS)) * 0.35


def draw(seed: int, rows: int) -> tuple[F32, I64]:
    """Six Gaussian classes that a linear rule tells apart nearly always."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, rows)
    return (CENTRES[y] + rng.normal(size=(rows, INPUTS))).astype(np.float32), y


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Trained on the undrifted problem, in eval mode, gradients off: as a daemon serves it."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(INPUTS, 64), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, CLASSES),
    )  # fmt: skip
    x, y = (torch.from_numpy(column) for column in draw(1, 3_000))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for start in range(0, 100 * 128, 128):
        rows = torch.arange(start, start + 128) % len(y)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    net.zero_grad(set_to_none=True)
    return net.eval().requires_grad_(False)


def error(net: nn.Module, x: F32, y: I64) -> float:
    with torch.inference_mode():
        return float((net(torch.from_numpy(x)).argmax(1).numpy() != y).mean())


def memory(x: F32, y: I64, rows: int = 2_000) -> slow.Replay:
    reference_x, reference_y = draw(2, 200)
    replay = slow.Replay((INPUTS,), rows, classes=CLASSES, seed=0, reference_x=reference_x, reference_y=reference_y)
    replay.add(x, y)
    return replay


@pytest.mark.parametrize("name", ["head", "norm_affine_head"])
def test_a_burst_restores_the_accuracy_after_a_label_swap_and_the_gate_promotes_it(model: nn.Module, name: str) -> None:
    x, y = draw(3, 600)
    holdout = slow.Holdout((INPUTS,), 96, classes=CLASSES)
    leaving = holdout.add(x, SWAP[y])
    result = slow.run_burst(
        model, slow.get(name), memory(leaving.x, leaving.y), slow.BurstOptions(), task="classification", seed=0
    )
    candidate = slow.apply_delta(model, result.delta)

    x_test, y_test = draw(4, 2_000)
    served_error = error(model, x_test, SWAP[y_test])
    assert served_error > 0.6
    assert error(candidate, x_test, SWAP[y_test]) < 0.25
    assert (result.reason, result.steps) == ("done", 60)
    assert result.loss_after < result.loss_before

    held = holdout.rows()
    x_ref, y_ref = draw(2, 200)
    new = (held.x, held.y, x_ref, y_ref)
    verdict = slow.judge(model, candidate, *new, task="classification", reference_margin=None, query=holdout.look())
    assert verdict.promote
    assert verdict.gain_low > 0.3
    # The old labels contradict the new ones, which is why the margin must be switched off for a concept change.
    refused = slow.judge(model, candidate, *new, task="classification")
    assert not refused.promote
    # By the margin, or by the classes that the reference has under their old labels.
    assert refused.reason in ("worse on reference", "worse on a slice")


def test_a_norm_affine_burst_repairs_sensors_with_a_drifted_offset(model: nn.Module) -> None:
    def aged(x: F32) -> F32:
        return (x + 3 * CENTRES[0]).astype(np.float32)

    x, y = draw(5, 1_000)
    x_test, y_test = draw(6, 2_000)
    method = slow.get("norm_affine")
    result = slow.run_burst(model, method, memory(aged(x), y), slow.BurstOptions(), task="classification", seed=0)
    candidate = slow.apply_delta(model, result.delta)
    assert error(model, aged(x_test), y_test) > 0.5
    assert error(candidate, aged(x_test), y_test) < 0.1


def test_the_given_model_is_never_changed(model: nn.Module) -> None:
    served = slow.fork(model, {}).train().requires_grad_(True)
    before = {name: value.clone() for name, value in served.state_dict().items()}
    slow.run_burst(served, slow.get("norm_affine_head"), memory(*draw(7, 300)), SGD, task="classification", seed=0)
    assert all(torch.equal(value, before[name]) for name, value in served.state_dict().items())
    assert all(module.training for module in served.modules())
    assert all(parameter.grad is None for parameter in served.parameters())
    served.requires_grad_(False)


def test_a_delta_holds_only_what_moved(model: nn.Module) -> None:
    result = slow.run_burst(model, slow.get("head"), memory(*draw(7, 300)), SGD, task="classification", seed=0)
    assert set(result.delta) == {"6.weight", "6.bias"}
    assert not any(value.requires_grad for value in result.delta.values())
    assert not torch.equal(result.delta["6.weight"], model.state_dict()["6.weight"])


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(model: nn.Module) -> None:
    def burst(seed: int) -> torch.Tensor:
        replay = memory(*draw(7, 300))
        return slow.run_burst(
            model, slow.get("head"), replay, slow.BurstOptions(steps=15), task="classification", seed=seed
        ).delta["6.weight"]

    assert torch.equal(burst(1), burst(1))
    assert not torch.equal(burst(1), burst(2))


def test_a_snapshot_gives_the_same_burst_as_the_memory_it_was_taken_from(model: nn.Module) -> None:
    replay = memory(*draw(7, 300), rows=200)
    snapshot = replay.snapshot()
    expected = slow.run_burst(model, slow.get("head"), replay, SGD, task="classification", seed=0)
    replay.add(*draw(8, 300))
    again = slow.run_burst(model, slow.get("head"), snapshot, SGD, task="classification", seed=0)
    assert torch.equal(again.delta["6.weight"], expected.delta["6.weight"])


@pytest.mark.parametrize("wanted", [0, 4])
def test_stop_ends_the_burst_at_the_next_step(model: nn.Module, wanted: int) -> None:
    asked = iter(range(100))
    replay = memory(*draw(7, 300))
    result = slow.run_burst(
        model, slow.get("head"), replay, SGD, task="classification", seed=0, stop=lambda: next(asked) >= wanted
    )
    assert (result.reason, result.steps) == ("stopped", wanted)
    assert torch.equal(result.delta["6.weight"], model.state_dict()["6.weight"]) == (wanted == 0)


def test_a_burst_that_diverges_ends_as_non_finite_with_no_delta(model: nn.Module) -> None:
    options = dataclasses.replace(SGD, lr=1e38)
    result = slow.run_burst(model, slow.get("head"), memory(*draw(7, 300)), options, task="classification", seed=0)
    assert result.reason == "non-finite"
    assert result.steps < options.steps
    assert result.delta == {}


def test_the_learning_rate_falls_linearly_and_reaches_zero_after_the_last_step(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []

    class Recording(torch.optim.SGD):
        def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])

    monkeypatch.setitem(optimizers._OURS, "sgd", Recording)
    options = slow.BurstOptions(optimizer="sgd", lr=0.1, steps=4)
    slow.run_burst(model, slow.get("head"), memory(*draw(7, 100)), options, task="classification", seed=0)
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


@pytest.mark.parametrize(
    "optimizer",
    [
        "adam",
        "adamw",
        "Prodigy",
        "momo",
        "hypergradient",
        "trial_step",
        "dadaptadam",
        "schedulefreeadamw",
        "lion",
    ],
)
def test_the_loss_falls_with_optimisers_by_name(model: nn.Module, optimizer: str) -> None:
    x, y = draw(7, 300)
    options = slow.BurstOptions(optimizer=optimizer, reference_share=0)
    result = slow.run_burst(model, slow.get("head"), memory(x, SWAP[y]), options, task="classification", seed=0)
    assert result.reason == "done"
    assert result.loss_after < result.loss_before


def test_an_optimiser_that_can_not_be_used_is_named_with_what_to_use() -> None:
    with pytest.raises(ValueError, match="did you mean prodigy"):
        optimizers.find("prodgy")
    with pytest.raises(ValueError, match="can't be used"):
        optimizers.find("qqqqq")
    with pytest.raises(ValueError, match="set one"):
        optimizers.build("a2grad", [nn.Parameter(torch.zeros(1))], lr=None, weight_decay=0)


@pytest.mark.parametrize("name", ["lbfgs", "adahessian", "bsam", "muon", "spectralsphere"])
def test_an_optimiser_that_needs_more_than_gradients_is_found_before_the_first_burst(name: str) -> None:
    assert f"optimizer {name!r}" in (optimizers.check(name) or "")


@pytest.mark.parametrize("name", ["sgd", "prodigy", "schedulefreeadamw"])
def test_the_check_passes_what_a_burst_can_use(name: str) -> None:
    assert optimizers.check(name) is None


def test_a_burst_works_inside_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        result = slow.run_burst(model, slow.get("head"), memory(*draw(7, 300)), SGD, task="classification", seed=0)
    assert result.reason == "done"
    assert not result.delta["6.weight"].is_inference()


@pytest.mark.parametrize("shape", [(1,), ()])
def test_regression_learns_a_shifted_target(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)]
    net = nn.Sequential(*layers, *([] if shape else [nn.Flatten(0)])).eval()
    x = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    replay = slow.Replay((4,), 300, classes=None, seed=0)
    replay.add(x, x.sum(axis=1) + 3)
    result = slow.run_burst(net, slow.get("head"), replay, slow.BurstOptions(), task="regression", seed=0)
    assert result.loss_after < 0.3 * result.loss_before


def test_a_recurrent_model_learns_without_its_dropout() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(3, 5, num_layers=2, dropout=0.9, batch_first=True)
            self.norm = nn.LayerNorm(5)
            self.head = nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.cell(x)[0][:, -1]))

    net = Recurrent().eval()
    x = np.random.default_rng(0).normal(size=(100, 7, 3)).astype(np.float32)
    replay = slow.Replay((7, 3), 100, classes=2, seed=0)
    replay.add(x, (x[:, -1, 0] > 0).astype(int))
    method, options = slow.get("norm_affine_head"), slow.BurstOptions(optimizer="sgd", lr=0.3)
    first = slow.run_burst(net, method, replay, options, task="classification", seed=0)
    again = slow.run_burst(net, method, replay, options, task="classification", seed=0)
    assert first.loss_after < first.loss_before
    assert torch.equal(first.delta["head.weight"], again.delta["head.weight"])
    assert net.cell.dropout == 0.9


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_head_that_is_not_called_is_an_error_not_a_silent_nothing(requires_grad: bool) -> None:
    class Decoy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Conv1d(1, 2, 3)
            self.unused = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x[:, None]).mean(dim=2)

    replay = slow.Replay((3,), 10, classes=2, seed=0)
    replay.add(np.zeros((4, 3)), [0, 1, 0, 1])
    net = Decoy().requires_grad_(requires_grad)
    with pytest.raises(ValueError, match="takes part in the model's output"):
        slow.run_burst(net, slow.get("head"), replay, SGD, task="classification", seed=0)


def test_labels_the_model_has_no_output_for_are_refused_before_they_reach_a_kernel(model: nn.Module) -> None:
    replay = slow.Replay((INPUTS,), 10, classes=9, seed=0)
    replay.add(np.zeros((1, INPUTS)), [8])
    with pytest.raises(ValueError, match="labels run from 8 to 8, the model has classes 0 to 5"):
        slow.run_burst(model, slow.get("head"), replay, SGD, task="classification", seed=0)


# The clock


class Clock:
    """Fake time: a step takes ``step_s``, and resting takes what it says."""

    def __init__(self, step_s: float) -> None:
        self.now, self.step_s, self.rested = 100.0, step_s, 0.0

    def __call__(self) -> float:
        return self.now

    def rest(self, seconds: float) -> None:
        self.now += seconds
        self.rested += seconds

    def stop(self) -> bool:
        """Never; asked once before each step, and while resting."""
        return False


class Timed(nn.Module):
    """A model of which each training step takes fake time."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = [clock]
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad or torch.is_grad_enabled():
            self.clock[0].now += self.clock[0].step_s
        return self.head(x)

    def __deepcopy__(self, memo: dict[int, object]) -> Timed:
        twin = Timed(self.clock[0])
        twin.head.load_state_dict(self.head.state_dict())
        for name, parameter in self.head.named_parameters():
            twin.head._parameters[name] = memo.get(id(parameter), parameter)  # type: ignore[assignment]
        return twin


def timed(clock: Clock, stop: Callable[[], bool] = lambda: False, **options: float) -> slow.BurstResult:
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    rows = slow.Snapshot(x, (x[:, 0] > 0).astype(np.int64), x[:0], np.zeros(0, np.int64))
    torch.manual_seed(0)
    return slow.run_burst(
        Timed(clock), slow.get("head"), rows, dataclasses.replace(SGD, **options), task="classification", seed=0,
        stop=stop, clock=clock, rest=clock.rest,
    )  # fmt: skip


def test_a_burst_that_takes_longer_than_its_seconds_ends_with_what_it_has() -> None:
    result = timed(Clock(1.0), seconds=3.5)
    assert (result.reason, result.steps, result.seconds) == ("overrun", 4, 4.0)
    assert set(result.delta) == {"head.weight", "head.bias"}
    assert timed(Clock(1.0), seconds=10.5).reason == "done"


@pytest.mark.parametrize("duty", [0.1, 0.5, 1.0])
def test_a_burst_works_its_share_of_the_time(duty: float) -> None:
    clock = Clock(0.2)
    result = timed(clock, duty=duty)
    assert result.seconds == pytest.approx(2.0)
    # Nothing is left to do after the last step but to read off the result.
    assert clock.rested == pytest.approx(2.0 * (1 / duty - 1))
    assert (result.reason, result.steps) == ("done", 10)


def test_rests_do_not_count_as_overrun_and_change_nothing_of_what_is_learnt() -> None:
    lazy, busy = timed(Clock(1.0), duty=0.1, seconds=50.0), timed(Clock(1.0))
    assert lazy.reason == "done"
    assert torch.equal(lazy.delta["head.weight"], busy.delta["head.weight"])


def test_stop_is_seen_while_resting() -> None:
    clock = Clock(1.0)
    result = timed(clock, stop=lambda: clock.rested > 3, duty=0.01)
    assert (result.reason, result.steps) == ("stopped", 1)
    assert clock.rested < 3.2


# Memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
    ],
)
@pytest.mark.parametrize("at", [0, 1, 7])
def test_running_out_of_memory_ends_the_burst_with_no_delta(error: Exception, at: int) -> None:
    class Hungry(nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Hungry.calls += 1
            if Hungry.calls > at:
                raise error
            return super().forward(x)

    x = np.zeros((5, 3), np.float32)
    rows = slow.Snapshot(x, np.zeros(5, np.int64), x[:0], np.zeros(0, np.int64))
    result = slow.run_burst(Hungry(3, 2), slow.get("head"), rows, SGD, task="classification", seed=0)
    assert (result.reason, result.delta) == ("out of memory", {})
    assert result.steps == max(0, at - 4)


def test_another_error_of_the_runtime_is_not_taken_for_memory() -> None:
    class Broken(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("a kernel failed")

    x = np.zeros((5, 3), np.float32)
    rows = slow.Snapshot(x, np.zeros(5, np.int64), x[:0], np.zeros(0, np.int64))
    with pytest.raises(RuntimeError, match="a kernel failed"):
        slow.run_burst(Broken(3, 2), slow.get("head"), rows, SGD, task="classification", seed=0)


def test_a_burst_that_would_take_more_memory_than_it_may_never_starts(model: nn.Module) -> None:
    def burst(memory_bytes: int, batch_size: int = 64) -> slow.BurstResult:
        options = dataclasses.replace(SGD, memory_bytes=memory_bytes, batch_size=batch_size)
        x, y = draw(7, 300)
        rows = slow.Snapshot(x, y, *draw(2, 50))
        return slow.run_burst(model, slow.get("norm_affine_head"), rows, options, task="classification", seed=0)

    refused = burst(20_000)
    assert (refused.reason, refused.steps, refused.delta) == ("out of memory", 0, {})
    assert burst(20_000, batch_size=2).reason == "done"
    assert burst(10_000_000).reason == "done"


@pytest.mark.parametrize("rows", [3, 50])
def test_the_estimate_of_memory_counts_what_the_backward_pass_keeps(rows: int) -> None:
    from adapters.slow.memory_need import COPIES, needed_bytes

    layer = nn.Linear(7, 5)
    net = nn.Sequential(nn.Linear(10, 7), nn.Tanh(), layer)
    trainee = slow.Trainee(module=net, groups=[slow.Group([layer.weight])], values=dict)
    for parameter in net.parameters():
        parameter.requires_grad_(parameter is layer.weight)
    # Only the layer's own input, 7 floats a row, is needed for its weight's gradient.
    assert needed_bytes(trainee, torch.randn(1, 10), rows) == 2 * 4 * 7 * rows + COPIES * 4 * 35


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"clip_norm": 0.0},
        {"lr": -1.0},
        {"weight_decay": -1.0},
        {"reference_share": 2},
        {"seconds": 0.0},
        {"duty": 0.0},
        {"duty": 1.1},
        {"memory_bytes": 0},
        {"unlabelled_share": 0.0},
        {"unlabelled_weight": -1.0},
        {"unlabelled_weight": float("inf")},
        {"teacher_decay": 1.0},
        {"teacher_confidence": 1.5},
        {"lr": float("nan")},
        {"seconds": float("nan")},
    ],
)
def test_options_out_of_range_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        slow.BurstOptions(**wrong)  # type: ignore[arg-type]
