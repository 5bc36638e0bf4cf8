"""Golden cases: recorded outputs of published implementations, replayed with the registered adapters.

A case says its method, settings and optimiser in its json; here they are translated by rule, method by method and
never case by case. A setting that can't be translated fails the case, so nothing is compared under other settings.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import adapters.fast as fast
from adapters.fast import FastAdapter
from adapters.fast.lame import Lame, affinity

OUTPUTS = ("logits", "probs", "scores", "features")


@dataclass(frozen=True)
class Method:
    """How the cases of one published method are run with ours."""

    name: str
    """Our name."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options that select the published form."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Settings which ours has no option for because it always does this."""
    not_kept: tuple[str, ...] = ()
    """Endings of final arrays that the reference keeps without ever using them; ours does not have them."""
    arrays: dict[str, Callable[[Any], Tensor]] = field(default_factory=dict)
    """Intermediate values by group, computed from the adapter after a batch."""


def lame_kernel(adapter: Lame) -> Tensor:
    assert adapter.features is not None
    return affinity(adapter.features, adapter.options.affinity, adapter.options.k)


BATCH_STATISTICS = {"eps": 1e-5, "momentum": 0.1, "reset_stats": False, "no_stats": False}
METHODS = {
    "source": Method("none"),
    "norm": Method("norm", fixed=BATCH_STATISTICS, not_kept=("running_mean", "running_var", "num_batches_tracked")),
    "alphabn": Method("alpha_norm", not_kept=("running_mean", "running_var")),
    "emabn": Method("ema_norm", options={"memory_rows": None}, not_kept=("num_batches_tracked",)),
    "tent": Method("tent", fixed={"episodic": False}),
    "lame": Method("lame", arrays={"kernel": lame_kernel}),
}


@dataclass(frozen=True)
class Case:
    """One recorded run."""

    folder: Path
    info: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.info["case"])

    @property
    def method(self) -> str:
        """The published method without its variant: ``tent`` of ``tent-sgd``."""
        return str(self.info["method"]).split("-")[0]

    @property
    def covered(self) -> bool:
        return self.method in METHODS and METHODS[self.method].name in fast.names()


def cases(folder: Path) -> list[Case]:
    """All cases of a golden folder, by name; FileNotFoundError when there are none."""
    found = [Case(folder, json.loads(path.read_text())) for path in sorted(folder.glob("cases/*.json"))]
    if not found:
        raise FileNotFoundError(f"{folder} holds no cases/*.json")
    return found


@cache
def models_of(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_models", folder / "models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options_of(case: Case) -> dict[str, Any]:
    """Translate the case's settings; ValueError names one that ours can't be run with."""
    method = METHODS[case.method]
    known = fast.get(method.name).Options.model_fields
    options = dict(method.options)
    optimizer = dict(case.info.get("optimizer") or {})
    if optimizer:
        optimizer["optimizer"] = optimizer.pop("type").lower()
    for key, value in (case.info["hyper"] | optimizer).items():
        if key in method.fixed:
            if value != method.fixed[key]:
                raise ValueError(f"{key}={value!r}: ours always has {method.fixed[key]!r}")
        elif key in known:
            if value is not None:
                options[key] = value.lower() if isinstance(value, str) else value
        else:
            raise ValueError(f"{key}={value!r}: {method.name} has no such option")
    return options


@dataclass
class Result:
    """Largest differences of one case, and what was wrong; no problems means it is reproduced."""

    case: Case
    compared: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def line(self) -> str:
        verdict = "differs" if self.problems else "equal"
        worst = ", ".join(f"{group} {difference:.1e}" for group, difference in self.worst.items())
        problems = "".join(f"\n    {problem}" for problem in self.problems)
        return f"{verdict:8}{self.case.name:32} {self.compared:3} arrays; largest difference: {worst}{problems}"

    def compare(self, key: str, ours: Tensor | None, theirs: np.ndarray) -> None:
        """Count one array, exactly or within the case's tolerance."""
        group, rule = key.split("/")[0], self.case.info["compare"]
        if ours is None or tuple(ours.shape) != theirs.shape:
            self.problems.append(f"{key}: ours is {None if ours is None else tuple(ours.shape)}, not {theirs.shape}")
            return
        self.compared += 1
        exact = group in rule["exact_groups"] or theirs.dtype.kind in "iub"
        kind = "outputs_atol" if group in OUTPUTS else "other_float_atol"
        atol = 0.0 if exact else float(rule["tolerance"][kind])
        mine, other = ours.detach().cpu().double().numpy(), theirs.astype(np.float64)
        equal_nan = np.isnan(mine) & np.isnan(other)
        difference = float(np.where(equal_nan, 0.0, np.abs(mine - other)).max(initial=0.0))
        self.worst[group] = max(self.worst.get(group, 0.0), difference)
        if not difference <= atol:  # a NaN on one side only is a difference
            self.problems.append(f"{key}: differs by {difference:.2e}, allowed {atol:.0e}")


def arrays_by_batch(recorded: Any, skip: set[str]) -> dict[str, dict[str, np.ndarray]]:
    """{"0": {"logits/0": array, ...}, ..., "final": {"final/n1.weight": array, ...}}."""
    batches: dict[str, dict[str, np.ndarray]] = {}
    for key in recorded:
        group, _, rest = key.partition("/")
        if group not in skip:
            batches.setdefault("final" if group == "final" else rest, {})[key] = recorded[key]
    return batches


def run(case: Case) -> Result:
    """Replay one covered case on the CPU."""
    result, method = Result(case), METHODS[case.method]
    try:
        options = options_of(case)
    except ValueError as error:
        result.problems.append(str(error))
        return result
    inputs, rule = case.info["inputs"], case.info["compare"]
    model = models_of(case.folder).load(case.info["model"], case.folder / inputs["weights"])
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = fast.build(method.name, model, **options)
    recorded = np.load(case.folder / "cases" / f"{case.name}.npz")
    expected = arrays_by_batch(recorded, set(rule["do_not_compare"]) | set(rule["inputs_stored_in_case"]))
    pixels = np.load(case.folder / inputs["batches"])["x_u8"]
    for t, batch in enumerate(pixels):
        if t == case.info.get("reset_before_batch"):
            adapter.reset()
        outputs = adapter(torch.from_numpy(batch.astype(np.float32)) / 255)
        for key, theirs in expected.pop(str(t), {}).items():
            result.compare(key, value_of(key, adapter, outputs, method), theirs)
    state = adapter.model.state_dict()
    for key, theirs in expected.pop("final", {}).items():
        name = key.removeprefix("final/")
        if not name.endswith(method.not_kept or ("\0",)):
            result.compare(key, state.get(name), theirs)
    result.problems += [f"{keys}: recorded, but for no batch that was fed" for keys in expected]
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, frozen[name])]
    result.problems += [f"{name}: the given model was changed" for name in changed]
    return result


def value_of(key: str, adapter: FastAdapter, outputs: Tensor, method: Method) -> Tensor | None:
    group = key.split("/")[0]
    if group == adapter.outputs:
        return outputs
    if group == "features":
        return adapter.features
    return method.arrays[group](adapter) if group in method.arrays else None


def not_covered(found: list[Case]) -> Iterator[str]:
    """Published methods with cases and no adapter here, with their number of cases."""
    missing = [case.method for case in found if not case.covered]
    return (f"{name} ({missing.count(name)})" for name in sorted(set(missing)))
