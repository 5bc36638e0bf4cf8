"""The slow loop's optimisers: ours against their papers, rates of groups, and that none loads what no burst uses."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from adapters.slow import optimizers
from adapters.slow.optimizers.rescaled import Rescaled, follows_rates

pytestmark = pytest.mark.sweep


ROOT = Path(__file__).parents[2]
OURS = ["momo", "hypergradient", "trial_step"]
torch.set_num_threads(1)


def minimise(
    name: str, lr: float | None, condition: float, *, steps: int = 300, rates: tuple[float, ...] = (1.0,), seed: int = 0
) -> tuple[float, list[torch.Tensor]]:
    """Share of the loss left on 0.5 sum c (p - target)², and where each group ends; all is finite on the way."""
    draw = torch.Generator().manual_seed(seed)
    targets = [torch.randn(20, generator=draw) for _ in rates]
    curvature = torch.logspace(0, math.log10(condition), 20)
    leaves = [nn.Parameter(torch.zeros(20)) for _ in rates]
    groups = [{"params": [leaf], "rate": rate} for leaf, rate in zip(leaves, rates, strict=True)]
    optimizer, start = optimizers.build(name, groups, lr=lr, weight_decay=0.0)

    def loss() -> torch.Tensor:
        parts = [(curvature * (leaf - target) ** 2).sum() for leaf, target in zip(leaves, targets, strict=True)]
        return 0.5 * torch.stack(parts).sum()

    first = loss().item()
    optimizers.set_mode(optimizer, train=True)
    for step in range(steps):
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss(), leaves), strict=True):
            leaf.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = start * group["rate"] * (1 - step / steps)
        optimizer.step((lambda: loss().item()) if optimizers.wants(optimizer) != "gradient" else None)
        assert all(bool(leaf.isfinite().all()) for leaf in leaves)
    optimizers.set_mode(optimizer, train=False)
    return loss().item() / first, [leaf.detach() for leaf in leaves]


@pytest.mark.parametrize("condition", [1.0, 1e4])
@pytest.mark.parametrize("lr", [1e-4, 1e-2, 1.0, 1e2, 1e3])
@pytest.mark.parametrize("name", ["hypergradient", "trial_step"])
def test_the_rate_finds_itself_from_a_start_that_is_seven_decades_off(name: str, lr: float, condition: float) -> None:
    assert minimise(name, lr, condition)[0] < 1e-4


@pytest.mark.parametrize("condition", [1.0, 1e4])
@pytest.mark.parametrize("lr", [0.1, 1.0, 1e2, 1e3])
def test_momo_takes_any_rate_that_is_large_enough(lr: float, condition: float) -> None:
    # With plain momentum SGD 1e4 * lr must stay below 4, or it diverges.
    assert minimise("momo", lr, condition)[0] < 1e-4


@pytest.mark.parametrize("name", [*OURS, "prodigy"])
def test_the_default_rate_converges(name: str) -> None:
    assert minimise(name, None, 100.0)[0] < 1e-3


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from([*OURS, "prodigy"]), exponent=st.floats(-6, 6), seed=st.integers(0, 99))
def test_no_first_rate_leads_out_of_the_finite_numbers(name: str, exponent: float, seed: int) -> None:
    left, _ = minimise(name, 10**exponent, 1e4, steps=60, seed=seed)
    assert math.isfinite(left)


def test_prodigy_is_that_of_the_library() -> None:
    reference_make = optimizers.find("prodigy")
    import pytorch_optimizer

    torch.manual_seed(0)
    start, target = torch.randn(6, 5), torch.randn(6, 5)
    ends = []
    for make in (reference_make, pytorch_optimizer.load_optimizer("prodigy")):
        leaf = nn.Parameter(start.clone())
        optimizer = make([{"params": [leaf], "rate": 1.0}], weight_decay=0.01)
        for step in range(80):
            optimizer.param_groups[0]["lr"] = 1 - step / 80
            leaf.grad = 2 * (leaf.detach() - target)
            optimizer.step()
        ends.append(leaf.detach())
    assert (ends[0] - start).abs().max() > 0.5
    assert torch.allclose(ends[0], ends[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_quick_ones_are_torchs_to_the_bit(name: str) -> None:
    theirs: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    start = torch.linspace(-1, 1, 7)
    ends = []
    for quick in (True, False):
        leaf = nn.Parameter(start.clone())
        if quick:
            optimizer, _ = optimizers.build(name, [leaf], lr=0.1, weight_decay=0.1)
        else:
            more = {"momentum": 0.9} if name == "sgd" else {}
            optimizer = theirs[name]([leaf], lr=0.1, weight_decay=0.1, **more)
        for _ in range(5):
            leaf.grad = 2 * leaf.detach() + 1
            optimizer.step()
        ends.append(leaf.detach())
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], start)


def test_no_optimiser_of_ours_loads_the_compiler_or_the_library() -> None:
    code = """
import sys
from adapters.slow import optimizers
for name in ("prodigy", "momo", "hypergradient", "trial_step", "sgd", "adam", "adamw"):
    assert optimizers.check(name) is None
    loaded = [module for module in ("torch._dynamo", "pytorch_optimizer", "sympy") if module in sys.modules]
    assert not loaded, (name, loaded)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("name", ["prodigy", "momo", "trial_step", "sgd", "dadaptadam", "schedulefreeadamw"])
def test_a_group_of_rate_zero_stays_and_the_others_learn(name: str) -> None:
    left, (fast, still) = minimise(name, None, 10.0, rates=(1.0, 0.0))
    assert torch.equal(still, torch.zeros(20))
    assert fast.abs().max() > 0.1
    assert left < 1


@pytest.mark.parametrize("name", ["prodigy", "dadaptadam", "hypergradient", "adam", "lion"])
def test_a_slow_group_makes_shorter_steps(name: str) -> None:
    steps = 4
    _, (fast, slow) = minimise(name, None, 1.0, rates=(1.0, 0.1), steps=steps)
    moved = [float(group.norm()) for group in (fast, slow)]
    assert moved[0] > 0
    assert moved[1] == pytest.approx(0.1 * moved[0], rel=0.35)


def test_prodigy_with_rates_is_prodigy_in_rescaled_variables() -> None:
    make = optimizers.find("prodigy")
    start, rates = [torch.linspace(-1, 1, 5).double(), torch.linspace(0, 2, 3).double()], (1.0, 0.05)
    ends: list[list[torch.Tensor]] = []
    for rescaled in (False, True):
        leaves = [nn.Parameter(value.clone()) for value in start]
        groups = [{"params": [leaf], "rate": rate} for leaf, rate in zip(leaves, rates, strict=True)]
        optimizer = Rescaled(make, groups) if rescaled else make(groups)
        for _ in range(40):
            for leaf, group in zip(leaves, optimizer.param_groups, strict=True):
                leaf.grad, group["lr"] = 2 * leaf.detach() - 1, group["rate"]
            optimizer.step()
        ends.append([leaf.detach() for leaf in leaves])
    assert float((ends[0][0] - start[0]).abs().max()) > 0.5
    for plain, shifted in zip(*ends, strict=True):
        assert torch.allclose(plain, shifted, rtol=1e-3, atol=1e-5)


def test_the_librarys_prodigy_takes_one_rate_for_all_groups_which_is_why_ours_is_used() -> None:
    import pytorch_optimizer

    assert not follows_rates(pytorch_optimizer.load_optimizer("prodigy"), 1.0)
    assert follows_rates(pytorch_optimizer.load_optimizer("lion"), 1e-3)
    leaves = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": [leaf], "rate": rate} for leaf, rate in zip(leaves, (1.0, 0.1), strict=True)]
    assert isinstance(optimizers.build("dadaptadam", groups, lr=None, weight_decay=0)[0], Rescaled)
    assert not isinstance(optimizers.build("lion", groups, lr=None, weight_decay=0)[0], Rescaled)


def test_momo_follows_the_papers_equations() -> None:
    leaf = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer, _ = optimizers.build("momo", [leaf], lr=0.5, weight_decay=0.1)
    p, d, mean, plane, beta = torch.tensor([1.0, -2.0]).double(), torch.zeros(2).double(), 0.0, 0.0, 0.9
    for step, (gradient, loss) in enumerate([([2.0, 1.0], 1.5), ([0.1, -0.2], 0.01), ([1.0, 1.0], 3.0)], start=1):
        leaf.grad = torch.tensor(gradient)
        optimizer.step(lambda loss=loss: loss)
        g = leaf.grad.double()
        d, mean, plane = (beta * a + (1 - beta) * b for a, b in ((d, g), (mean, loss), (plane, float(g @ p))))
        rho, decay = 1 - beta**step, 1 + 0.5 * 0.1
        tau = min(0.5 / rho, max(decay * (mean - plane) + float(d @ p), 0.0) / float(d @ d))
        p = (p - tau * d) / decay
        assert torch.allclose(leaf.detach().double(), p, rtol=1e-5)


def test_a_trial_that_does_not_help_leaves_no_trace() -> None:
    leaf = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer, _ = optimizers.build("trial_step", [leaf], lr=0.1, weight_decay=0)
    for losses in ([1.0, 1.0], [1.0, 2.0], [1.0, math.nan], [math.nan, 1.0], [1.0, math.inf]):
        told = iter(losses)
        leaf.grad = torch.ones(2)
        optimizer.step(lambda told=told: next(told))
        assert leaf.tolist() == [1.0, 2.0]
    told = iter([1.0, 0.5])
    optimizer.step(lambda: next(told))
    assert leaf.tolist() != [1.0, 2.0]


@pytest.mark.parametrize("name", ["momo", "trial_step"])
def test_an_optimiser_that_needs_the_loss_says_so(name: str) -> None:
    leaf = nn.Parameter(torch.ones(1))
    leaf.grad = torch.ones(1)
    optimizer, _ = optimizers.build(name, [leaf], lr=None, weight_decay=0)
    with pytest.raises(ValueError, match="needs a closure"):
        optimizer.step()


def test_a_rate_that_is_no_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="rate is nan"):
        optimizers.build("sgd", [{"params": [nn.Parameter(torch.ones(1))], "rate": math.nan}], lr=1, weight_decay=0)
