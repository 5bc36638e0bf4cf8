"""What every slow method must do on every kind of model that it agrees to serve.

    check_method("film", "cnn_bn1d", train_head=False)

runs every check of ``CHECKS``, each on a model of its own; on a kind that the method refuses, the refusal is checked. A
failure names the check. A method that does not start as the model says so: ``identity_at_start = False``. Ways of
keeping that change the result after training (``interpolate``, ``lae``) are no methods in this sense; ``fisher`` is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import adapters.slow as slow
from adapters.slow.deltas import encoding
from adapters.slow.trainee import Trainee
from daemon import checkpoint
from tests import check_adapter
from tests.check_adapter import K, Last, same


class Tied(nn.Module):
    """Encoder and head share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(K, K)
        self.between = nn.Linear(K, K)
        self.head = nn.Linear(K, K)
        self.head.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.encode(x).relu()).relu())


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 6, num_layers=2, dropout=0.3, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))


def _computed_weight() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, K))
    nn.utils.parametrizations.weight_norm(model[2])
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **check_adapter.MODELS,
    "tied": (Tied, (K,)),
    "lstm": (Lstm, (10, 3)),
    "one_linear": (lambda: nn.Linear(6, K), (6,)),
    "cnn_without_bias": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4, bias=False),
            nn.ReLU(), Last(), nn.Linear(8, K, bias=False),
        ),
        (1, 12, 12),
    ),
    "weight_norm": (_computed_weight, (6,)),
    "regressor": (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1)), (6,)),
}  # fmt: skip
REGRESSION = {"regressor"}

QUICK: dict[str, dict[str, Any]] = {"sparse_mask": {"rows": 16, "share": 0.1}}
"""Options that make a method quick."""

BURST = slow.BurstOptions(optimizer="adamw", lr=1e-2, weight_decay=0.1, steps=4, batch_size=16)
"""Momentum and weight decay, which move what is not masked well enough."""


def build_model(kind: str) -> nn.Module:
    """As it is served: with statistics of its own, in eval mode, gradients off."""
    torch.manual_seed(7)
    make, shape = MODELS[kind]
    model = make().train()
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(32, *shape))
    return model.eval().requires_grad_(False)


class _Poisoned:
    """A memory whose rows are bad as soon as it is trained on: what a method looks at before is good."""

    def __init__(self, memory: slow.Replay) -> None:
        self._memory = memory
        self.reference_x, self.reference_y = memory.reference_x, memory.reference_y
        self.good = 1

    def sample(self, rng: np.random.Generator, n: int, reference_share: float, **options: Any) -> Any:
        x, y = self._memory.sample(rng, n, reference_share, **options)[:2]
        if reference_share == BURST.reference_share:
            self.good -= 1
            if self.good < 0:
                x = np.full_like(x, np.nan)
        return x, y


@dataclass(frozen=True)
class Subject:
    """One method and one kind of model."""

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> slow.Task:
        return "regression" if self.kind in REGRESSION else "classification"

    def method(self) -> Any:
        return slow.get(self.name, **self.options)

    def rows(self, count: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
        """Drifted inputs, and labels that their level tells."""
        rng = np.random.default_rng(seed)
        level = rng.integers(0, K, count)
        noise = rng.normal(size=(count, *MODELS[self.kind][1]))
        x = (noise + level.reshape(-1, *[1] * (noise.ndim - 1)) - 1.0).astype(np.float32)
        return x, level.astype(np.float32) if self.task == "regression" else (level + 1) % K

    def memory(self) -> slow.Replay:
        x, y = self.rows(40, seed=4)
        classes = None if self.task == "regression" else K
        memory = slow.Replay(MODELS[self.kind][1], 200, classes=classes, seed=0, reference_x=x, reference_y=y)
        memory.add(*self.rows(120))
        return memory

    def given(self, model: nn.Module, seed: int = 0) -> slow.Given:
        memory, rng = self.memory(), np.random.default_rng(seed)

        def draw(count: int) -> tuple[Tensor, Tensor]:
            x, y = memory.sample(rng, count, 0.0)[:2]
            return torch.from_numpy(x), torch.from_numpy(y)

        reference = torch.from_numpy(memory.reference_x), torch.from_numpy(memory.reference_y)
        return slow.Given(task=self.task, seed=seed, draw=draw, reference=reference, frozen=model)

    def begin(self, model: nn.Module) -> Trainee:
        with torch.enable_grad():
            return self.method().begin(model, self.given(model))

    def burst(self, model: nn.Module, memory: Any = None, seed: int = 0) -> slow.BurstResult:
        return slow.run_burst(model, self.method(), memory or self.memory(), BURST, task=self.task, seed=seed)

    def answers(self, model: nn.Module) -> Tensor:
        with torch.inference_mode():
            return model(torch.from_numpy(self.rows(24, seed=9)[0]))


def train(trainee: Trainee, subject: Subject, steps: int = 4) -> None:
    """A few steps as a burst makes them."""
    groups = [{"params": group.parameters, "lr": 0.05 * group.rate} for group in trainee.groups]
    optimizer = torch.optim.Adam(groups)
    x, y = (torch.from_numpy(column) for column in subject.rows(64))
    for _ in range(steps):
        output = trainee.module(x)
        if subject.task == "regression":
            loss = nn.functional.mse_loss(output.flatten(), y)
        else:
            loss = nn.functional.cross_entropy(output, y)
        if trainee.penalty is not None:
            loss = loss + trainee.penalty()
        leaves = trainee.parameters
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True):
            leaf.grad = gradient
        trainee.scale_gradients()
        optimizer.step()


def result(trainee: Trainee) -> dict[str, Tensor]:
    with torch.no_grad():
        return trainee.values()


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def it_starts_as_the_model(subject: Subject) -> None:
    model, method = build_model(subject.kind), subject.method()
    if not getattr(method, "identity_at_start", True):
        return
    trainee = subject.begin(model)
    close(subject.answers(trainee.module), subject.answers(model), 1e-6)
    close(subject.answers(slow.apply_delta(model, result(trainee))), subject.answers(model), 1e-5)


def the_served_model_is_never_touched(subject: Subject) -> None:
    model = build_model(subject.kind).train().requires_grad_(True)
    before, structure = copy.deepcopy(model.state_dict()), str(model)
    trainee = subject.begin(model)
    train(trainee, subject)
    slow.apply_delta(model, result(trainee))
    subject.burst(model)
    assert same(dict(model.state_dict()), dict(before))
    assert str(model) == structure
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    fresh = build_model(subject.kind)
    for module, other in zip(model.modules(), fresh.modules(), strict=True):
        assert module.training and all(len(getattr(module, t)) == len(getattr(other, t)) for t in tables)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def what_moves_moves_and_nothing_else(subject: Subject) -> None:
    model = build_model(subject.kind)
    outcome = subject.burst(model)
    assert (outcome.reason, outcome.steps) == ("done", BURST.steps) and outcome.delta
    own = dict(model.named_parameters(remove_duplicate=False))
    moved = [name for name, value in outcome.delta.items() if name not in own or not torch.equal(value, own[name])]
    assert moved
    version = slow.apply_delta(model, outcome.delta)
    assert not torch.equal(subject.answers(version), subject.answers(model))
    tied = {id(own[name]) for name in outcome.delta if name in own}
    for name, parameter in version.named_parameters(remove_duplicate=False):
        if name in own and id(own[name]) not in tied:
            assert parameter is own[name]
    assert all(parameter.requires_grad is False for parameter in version.parameters())
    given = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    for value in outcome.delta.values():
        assert not value.requires_grad and value.untyped_storage().data_ptr() not in given


def the_result_answers_as_what_was_trained(subject: Subject) -> None:
    model = build_model(subject.kind)
    trainee = subject.begin(model)
    train(trainee, subject)
    values = result(trainee)
    assert same(values, result(trainee)), "values() gives the same twice"
    close(subject.answers(slow.apply_delta(model, values)), subject.answers(trainee.module), 1e-5)
    kept = {name: value.clone() for name, value in values.items()}
    train(trainee, subject, steps=1)
    assert same(values, kept), "a result does not change when training goes on"


def it_learns(subject: Subject) -> None:
    model = build_model(subject.kind)
    options = slow.BurstOptions(optimizer="adamw", lr=2e-2, steps=30, batch_size=32)
    outcome = slow.run_burst(model, subject.method(), subject.memory(), options, task=subject.task, seed=0)
    assert outcome.loss_after < outcome.loss_before


def the_same_seed_gives_the_same_result(subject: Subject) -> None:
    first = subject.burst(build_model(subject.kind))
    torch.manual_seed(12345)  # the process's own generator is not what is drawn from
    assert same(first.delta, subject.burst(build_model(subject.kind)).delta)


def the_process_draws_what_it_would_have_drawn(subject: Subject) -> None:
    model = build_model(subject.kind)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    subject.begin(model)
    assert torch.equal(torch.rand(1), expected)


def bad_numbers_end_the_burst(subject: Subject) -> None:
    model = build_model(subject.kind)
    memory = _Poisoned(subject.memory())
    outcome = subject.burst(model, memory)
    assert outcome.reason == "non-finite" and not outcome.delta and memory.good < 0


def the_delta_ships_and_comes_back(subject: Subject) -> None:
    model = build_model(subject.kind)
    base = dict(model.named_parameters(remove_duplicate=False))
    delta = subject.burst(model).delta
    tensors = encoding.encode(delta, base)
    assert encoding.nbytes(tensors) <= sum(value.nbytes for value in delta.values())
    again = encoding.decode(load(save(tensors)), base)
    assert set(again) <= set(delta)
    for name, value in delta.items():
        back = again.get(name, base.get(name))
        assert back.dtype == value.dtype
        assert float((back - value).abs().max()) <= encoding.TOLERANCE * float(value.abs().max())
    close(subject.answers(slow.apply_delta(model, again)), subject.answers(slow.apply_delta(model, delta)), 1e-4)
    assert same(checkpoint.decode(checkpoint.encode(delta)), delta)


def a_next_burst_goes_on_from_the_version(subject: Subject) -> None:
    model = build_model(subject.kind)
    first = subject.burst(model).delta
    version = slow.apply_delta(model, first)
    if getattr(subject.method(), "identity_at_start", True):
        close(subject.answers(subject.begin(version).module), subject.answers(version), 1e-6)
    second = subject.burst(version, seed=1).delta
    # As the daemon keeps versions: cumulative over the frozen model.
    together = slow.apply_delta(model, {**first, **second})
    close(subject.answers(together), subject.answers(slow.apply_delta(version, second)), 1e-5)


def a_version_can_be_copied(subject: Subject) -> None:
    version = slow.apply_delta(model := build_model(subject.kind), subject.burst(model).delta)
    expected = subject.answers(version)
    close(subject.answers(copy.deepcopy(version)), expected, 1e-6)
    close(subject.answers(slow.fork(version, {})), expected, 1e-6)


CHECKS: list[Callable[[Subject], None]] = [
    it_starts_as_the_model,
    the_served_model_is_never_touched,
    what_moves_moves_and_nothing_else,
    the_result_answers_as_what_was_trained,
    it_learns,
    the_same_seed_gives_the_same_result,
    the_process_draws_what_it_would_have_drawn,
    bad_numbers_end_the_burst,
    the_delta_ships_and_comes_back,
    a_next_burst_goes_on_from_the_version,
    a_version_can_be_copied,
]


QUICK_CHECKS = [it_starts_as_the_model, the_result_answers_as_what_was_trained]
"""Those without a burst."""


def _raises(call: Callable[[], object], text: str) -> None:
    try:
        call()
    except ValueError as error:
        assert text in str(error), str(error)
    else:
        raise AssertionError("a model was served that can't be")


def _refused(subject: Subject) -> str | None:
    """ "refused" or "exact", when its errors are as they must be; None for a method that is to be trained."""
    model, method = build_model(subject.kind), subject.method()
    exact = hasattr(method, "open")
    if exact:
        _raises(lambda: subject.begin(model), "open")
    problem = method.check(model)
    if problem is None:
        return "exact" if exact else None
    assert problem.startswith(f"slow method {subject.name.rsplit('+', 1)[-1]!r}: ") and len(problem) > 40
    if exact:
        x, y = subject.rows(40)
        _raises(lambda: method.open(model, x, y, classes=K), problem)
    else:
        _raises(lambda: subject.begin(model), problem)
    return "refused"


def check_method(name: str, kind: str, checks: Sequence[Callable[[Subject], None]] = CHECKS, **options: Any) -> str:
    """Run the checks on the method ``name`` and a model of this kind; AssertionError names the check.

    Returns:
        "served"; "refused", with a text of its own; or "exact": a method without gradients, which only opens a head.
    """
    subject = Subject(name, kind, {**QUICK.get(name, {}), **options})
    at = "check"
    try:
        if outcome := _refused(subject):
            return outcome
        for check in checks:
            at = check.__name__
            check(subject)
    except Exception as error:
        error.add_note(f"{name} on {kind} with {subject.options}: {at}")
        raise
    return "served"
