"""Every registered method around every kind of model; the checks themselves are in `tests.check_adapter`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import adapters.fast as fast
from tests.check_adapter import (
    CHECKS,
    LONG,
    MODELS,
    WITHOUT_BATCH_NORM,
    WITHOUT_HEAD,
    WITHOUT_NORM,
    K,
    Subject,
    build_model,
    check_adapter,
    on_a_gpu_the_outputs_are_those_of_the_cpu,
    reference_for,
    same,
)

pytestmark = pytest.mark.sweep


_BY_REASON: list[tuple[set[str], str]] = [
    (set(), "none cotta psmt rna label_shift"),
    (WITHOUT_BATCH_NORM, "norm alpha_norm ada_mix_norm ema_norm unmix_norm iabn note rotta"),
    (WITHOUT_NORM, "tent eta eata sar deyo rpl roid info_max self_learning poem woc gala reliable"),
    (WITHOUT_NORM | WITHOUT_HEAD, "recap cafa feature_align"),
    (WITHOUT_HEAD, "lame t3a ada_npc error_memory gain_control input_prompt dpcore drm rmt vida"),
    ({"gru"}, "nhl"),
]
REFUSED = {name: kinds for kinds, names in _BY_REASON for name in names.split()}
"""Models that a method can't serve, given a reference."""
NEEDS_REFERENCE = {
    "eata", "poem", "cafa", "feature_align", "label_shift", "input_prompt", "dpcore", "rna", "drm",
}  # fmt: skip
"""Methods that can serve nothing without one."""
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "ema_norm": [{}, {"memory_rows": None}],
    "tent": [{}, {"optimizer": "sgd", "lr": 0.01}, {"steps": 2, "weight_decay": 0.01}],
    "eta": [{"e_margin": 1.3, "d_margin": 2.0, "lr": 0.05}],
    "eata": [{"e_margin": 1.3, "d_margin": 2.0, "lr": 0.05}],
    "sar": [{"margin_e0": 1.36, "lr": 0.05}, {"margin_e0": 1.3, "lr": 0.1, "reset_constant": 1.2}],
    "deyo": [
        {"deyo_margin": 1.36, "plpd_threshold": -0.02, "lr": 0.05},
        {"deyo_margin": 1.36, "plpd_threshold": -0.02, "lr": 0.05, "aug_type": "occ"},
    ],
    "recap": [{"margin": 1.4, "lr": 0.05}, {"margin": 1.36, "plpd_threshold": -0.02, "lr": 0.05}],
    "reliable": [{"e_margin": 1.36}],
    "lame": [{}, {"affinity": "rbf", "force_symmetry": True}, {"affinity": "linear"}],
    "iabn": [{}, {"iabn_k": 0.5}],
    "cotta": [{"n_augmentations": 4}, {"n_augmentations": 3, "ap": 0.0, "rst": 0.1, "optimizer": "adabelief"}],
    "rotta": [{"memory_size": 20, "update_frequency": 12, "lr": 0.01, "nu": 0.05}],
    "note": [{"memory_size": 20, "update_every": 12, "lr": 0.01, "epochs": 2, "loader_batch": 12}],
    "woc+cotta": [{"n_augmentations": 3}],
    "reliable+rotta": [{"memory_size": 20, "update_frequency": 12}],
    "gala+note": [{"memory_size": 20, "update_every": 12}],
    "ada_npc": [{"beta": 0.4, "capacity": 80}, {"capacity": 70}],
    "label_shift": [{}, *({"estimator": e, "memory_rows": 50} for e in ("bbse_soft", "bbse_hard", "rlls", "elsa"))],
    "error_memory": [{"capacity": 64}, {"capacity": 40, "k": 5, "shrinkage": 0}],
    "gain_control": [{}, {"basis": "principal"}],
    "t3a": [{"filter_K": 5}, {"filter_K": -1}],
}
"""Options to be checked, by default none."""
COMPOSED = [
    "woc+eta",
    "gala+sar",
    "reliable+rpl",
    "woc+gala+tent",
    "woc+cotta",
    "gala+rmt",
    "reliable+rotta",
    "gala+note",
]

SOME_KINDS = {"cnn_bn1d", "mlp_ln", "gru"}
"""Where further options of a method, and wrappers, are checked too; the first ones are on every kind."""


def _options(name: str, kind: str) -> list[dict[str, Any]]:
    variants = VARIANTS.get(name, [{}])
    if LONG or kind in SOME_KINDS:
        return variants
    return [] if name in COMPOSED else variants[:1]


PAIRS = [
    pytest.param(name, kind, options, id="-".join([name, kind, *(f"{k}={v}" for k, v in options.items())]))
    for name in [*fast.names(), *COMPOSED]
    for kind in MODELS
    for options in _options(name, kind)
    if kind not in REFUSED.get(name.rsplit("+", 1)[-1], set())
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads on models this small only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "kind", "options"), PAIRS)
def test_the_method_passes_every_check(name: str, kind: str, options: dict[str, Any]):
    check_adapter(name, kind, **options)


HERE = [
    check for check in CHECKS if torch.cuda.is_available() or check is not on_a_gpu_the_outputs_are_those_of_the_cpu
]


@pytest.mark.parametrize("check", HERE, ids=lambda check: check.__name__)
def test_a_check_can_fail(check):
    """Around an adapter that does everything wrong, each check finds something."""
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        check(BrokenSubject("none", "mlp_bn1d"))


class Broken(fast.FastAdapter):
    """Adapts the given model in place, remembers every batch, and gives what it learnt at once."""

    name = "broken"
    slotted = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.given = model
        self.kept: list[torch.Tensor] = []

    def _setup(self) -> None:
        self.calls = torch.zeros(1)

    def _run(self, x, check_finite, slots, *, adapt):
        self.kept.append(torch.randn(64, 64))
        self.calls += torch.nan_to_num(x, 1.0).sum() + float(torch.rand(()))
        with torch.no_grad():
            self.given[0].weight += 1.0
        too_much = torch.inf if float(x.abs().max()) > 1e3 or len(self.kept) > 25 else 1.0
        return self.given[-1](torch.ones(len(x), 16)) * self.calls * too_much

    def _state(self):
        return {"calls": self.calls, "kept": list(getattr(self, "kept", []))}


class BrokenSubject(Subject):
    def build(self, model: nn.Module | None = None):
        return Broken(model or self.model())


@pytest.mark.parametrize("name", fast.names())
@pytest.mark.parametrize("kind", MODELS)
def test_check_and_constructor_agree_on_which_models_can_be_served(name: str, kind: str):
    model, reference = build_model(kind), reference_for(kind, name)
    problem = fast.get(name).check(model, reference)
    assert (problem is not None) == (kind in REFUSED.get(name, set())), problem
    for given in (reference, None):
        problem = fast.get(name).check(model, given)
        if problem is None:
            fast.build(name, model, given)
        else:
            assert "use '" in problem and f"'{name}'" not in problem
            with pytest.raises(ValueError, match="can't serve this model"):
                fast.build(name, model, given)
    if kind not in REFUSED.get(name, set()):
        assert (problem is not None) == (name in NEEDS_REFERENCE), problem


@pytest.mark.parametrize("name", fast.names())
def test_a_gain_outside_0_to_1_and_a_foreign_state_are_refused(name: str):
    reference = reference_for("mlp_bn1d", name)
    adapter = fast.build(name, build_model("mlp_bn1d"), reference)
    for gain in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="gain must be in"):
            adapter.gain = gain
    assert adapter.gain == 1.0 and adapter.saturated
    before = adapter.state_dict()
    with pytest.raises(ValueError, match="can't be loaded"):
        adapter.load_state_dict(before | {"method": "another"})
    for state in (before | {"gain": 2.0}, {"method": name}):
        with pytest.raises(ValueError, match="does not fit"):
            adapter.load_state_dict(state)
        assert same(adapter.state_dict(), before)


@pytest.mark.parametrize("name", fast.names())
def test_a_state_of_another_model_is_refused_and_changes_nothing(name: str):
    adapter = fast.build(name, build_model("mlp_bn1d"), reference_for("mlp_bn1d", name))
    other = fast.build(name, build_model("cnn_bn2d"), reference_for("cnn_bn2d", name))
    for a, kind in ((adapter, "mlp_bn1d"), (other, "cnn_bn2d")):
        x = Subject(name, kind).batches(1)[0]
        a(x)
        if a.labelled:
            a.learn(x, torch.arange(len(x)) % K)
    before, foreign = adapter.state_dict(), other.state_dict()
    if same(before["state"], foreign["state"]):
        return  # nothing in it depends on the model
    with pytest.raises(ValueError, match="does not fit"):
        adapter.load_state_dict(foreign)
    assert same(adapter.state_dict(), before)


@pytest.mark.parametrize("name", fast.names())
def test_slots_must_be_one_integer_per_row(name: str):
    adapter = fast.build(name, build_model("mlp_bn1d"), reference_for("mlp_bn1d", name))
    if not adapter.slotted:
        assert not hasattr(adapter.options, "resident_slots")
        return
    x = Subject(name, "mlp_bn1d").batches(1)[0]
    before = adapter.state_dict()
    for slots in ([0], [0.5] * len(x), torch.zeros(len(x), 1, dtype=torch.long)):
        with pytest.raises(ValueError, match="slots must be"):
            adapter(x, slots=slots)
    assert same(adapter.state_dict(), before)
