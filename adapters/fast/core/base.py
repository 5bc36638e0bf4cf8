"""The contract of every test-time adapter, and what is the same for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from adapters.fast.core.rows import finite_rows, spread
from adapters.fast.core.share import share
from adapters.features import FeatureTap, find_head
from adapters.reference import Reference


class FastAdapter(ABC):
    """A model that adapts itself to the inputs it is given, at a gain between 0 (frozen) and 1 (all of the method).

    The given model is never changed and stays usable as the frozen twin: the adapter works on a copy of its structure
    over the same tensors, in eval mode, and owns only the tensors that the method moves. Gain 0 is the frozen model
    to the bit.

    A row holding a value that is not finite gets an output row of NaN and touches nothing else; a batch without
    usable rows changes no state. Shapes: x is (B, *input_shape), outputs are (B, K).

    A method implements `_setup`, `_predict` and, if it has a state, `_adapt`, `_state`, `_load`.
    """

    name: ClassVar[str]
    """Set by ``register``."""
    outputs: Literal["logits", "probs"] = "logits"
    """What the returned rows are; of a regression model "logits" are its plain outputs."""
    backward: bool = False
    """Whether `forward` runs a backward pass."""
    slotted: bool = False
    """Whether every slot has a state of its own; else all rows share one and slots are not looked at."""
    wrappable: bool = False
    """Whether `woc`, `gala` and the like can work around it: it moves parameters by gradient steps."""
    labelled: bool = False
    """Whether it learns from late labels, by `learn`."""

    class Options(BaseModel):
        """Settings of the method, under their names in the paper."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        head: str | None = None
        """Layer whose input are the features; by default the last ``nn.Linear`` in definition order."""

    options: Options

    def __init__(self, model: nn.Module, reference: Reference | None = None, **options: Any) -> None:
        """Build around ``model``; ValueError when an option is wrong or `check` refuses the model."""
        self.options = self._parse(options)
        if problem := self.check(model, reference):
            raise ValueError(f"{self.name} can't serve this model: {problem}")
        self.reference = reference
        self._gain = 1.0
        self.diagnostics: dict[str, Tensor] = {}
        """What the method computed on the way in the latest `forward`, by name; not part of its state."""
        self._finite: Tensor | None = None
        self._slots: Sequence[int] | Tensor | None = None
        self._slots_checked = False
        self._output_shape: torch.Size | None = None
        with torch.inference_mode(False):  # what the adapter owns must stay usable by autograd
            self.model = share(model)
            head = self.options.head or find_head(self.model)
            self._tap = FeatureTap(self.model, head) if head else None
            self._setup()
            self._initial = self._state()

    @classmethod
    def _parse(cls, options: dict[str, Any]) -> Options:
        try:
            return cls.Options(**options)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc'])) or 'options'}: {e['msg']}" for e in error.errors()]
            known = ", ".join(cls.Options.model_fields)
            raise ValueError(f"{cls.name}: {'; '.join(problems)}. Its options are: {known}") from None

    @classmethod
    def check(cls, model: nn.Module, reference: Reference | None = None) -> str | None:
        """Say why the method can't serve ``model`` and what to use instead; None when it can."""
        return None

    @classmethod
    def prepare(cls, model: nn.Module, reference: Reference, x: Tensor, y: Tensor, **options: Any) -> dict[str, Tensor]:
        """Compute, when a bundle is packed, what the method needs of the source.

        x are (N, *input_shape) source rows and y (N,) their labels. The result is stored and comes back as
        ``reference.prepared[name]``.
        """
        return {}

    def __call__(self, x: Tensor, check_finite: bool = True, *, slots: Sequence[int] | Tensor | None = None) -> Tensor:
        """Same as `forward`."""
        return self.forward(x, check_finite, slots=slots)

    def forward(self, x: Tensor, check_finite: bool = True, *, slots: Sequence[int] | Tensor | None = None) -> Tensor:
        """Predict with the state before this batch, then adapt to it. Returns (B, K) outputs, not for autograd.

        ``check_finite=False`` says that every value of ``x`` is known to be finite; nothing then waits for the device.
        ``slots`` (B,) names the sensor of each row by an integer, on the host: where `slotted`, the rows of each adapt
        with a state of their own, as if they had been given alone.
        """
        return self._run(x, check_finite, slots, adapt=True)

    def predict(self, x: Tensor, check_finite: bool = True, *, slots: Sequence[int] | Tensor | None = None) -> Tensor:
        """Return what `forward` would return now, in inference mode and without a change of state.

        Where `backward` is true, equal up to rounding: torch may choose other kernels when no gradient is wanted.
        """
        return self._run(x, check_finite, slots, adapt=False)

    def check_slots(self, x: Tensor) -> str | None:
        """Say why the rows of several slots can't be told apart, tried on x (B, *input_shape), B > 1; None if they can.

        `forward` looks once, at the first batch with slots, and raises a ValueError; ask before the stream starts.
        """
        return None if self.slotted else f"{self.name} keeps one state for all slots"

    def learn(self, x: Tensor, y: Tensor, numbers: Sequence[int] | Tensor | None = None) -> None:
        """Learn from late labels: x (B, *input_shape) as predicted earlier, y (B,) classes (int64) or values.

        ``numbers`` (B,) say which rows these were, counted from 0 over all usable ones that `forward` has been given
        since construction (a restored state goes on counting); who weighs its own answers by labels needs them.
        Rows or labels that are not finite are left out. ValueError where the method is not `labelled`.
        """
        if not self.labelled:
            raise ValueError(f"{self.name} does not learn from labels")
        if len(x) != len(y):
            raise ValueError(f"{len(x)} rows with {len(y)} labels")
        if numbers is not None and len(numbers) != len(x):
            raise ValueError(f"{len(x)} rows with {len(numbers)} numbers")
        usable = x.isfinite().flatten(1).all(1) & (y.isfinite() if y.is_floating_point() else y >= 0)
        if bool(usable.any()):
            with torch.inference_mode():
                known = None if numbers is None else torch.as_tensor(numbers, device=usable.device)[usable]
                self._learn_numbered(x[usable], y[usable], known)

    @property
    def features(self) -> Tensor | None:
        """(B, D) penultimate features of the last call, detached, NaN for rows not used; None without a linear head."""
        features = self._tap.features if self._tap else None
        if features is None or self._finite is None:
            return features
        return spread(features, self._finite)

    @property
    def gain(self) -> float:
        """Share of the method's effect in use, in [0, 1]. ValueError when set outside."""
        return self._gain

    @gain.setter
    def gain(self, value: float) -> None:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"gain must be in [0, 1], got {value}")
        self._gain = float(value)
        self._gain_changed()

    @property
    def saturated(self) -> bool:
        """Whether the method has no more authority to give."""
        return self._gain >= 1.0

    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Forget all that was learnt: the state is that of construction, to the bit, optimiser included.

        The gain is a setting, not something learnt, and stays. ``slots`` names the states to reset; there is one, 0.
        """
        if slots is not None and set(slots) - {0}:
            raise ValueError(f"{self.name} keeps one state, slot 0; can't reset slots {sorted(slots)}")
        if slots is None or len(slots):
            self._load(self._initial)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that changes, as nested dicts and lists of numbers, strings and tensors."""
        return {"method": self.name, "gain": self._gain, "state": self._state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state`` exactly; ValueError, with this adapter unchanged, when it belongs to another one."""
        if state.get("method") != self.name:
            raise ValueError(f"a state of {state.get('method')!r} can't be loaded into {self.name!r}")
        before = self._state()
        try:
            self._load(state["state"])
            self.gain = state["gain"]
        except (KeyError, IndexError, TypeError, RuntimeError, ValueError) as error:
            self._load(before)
            raise ValueError(f"this state does not fit {self.name!r} around this model: {error!r}") from error

    def _run(self, x: Tensor, check_finite: bool, slots: Sequence[int] | Tensor | None, *, adapt: bool) -> Tensor:
        finite = finite_rows(x) if check_finite and len(x) else None
        rows = x if finite is None else x[finite]
        self._finite = finite
        self._slots = slots
        if slots is not None and finite is not None:
            given = torch.as_tensor(slots, device="cpu")
            if given.shape != (len(x),):
                raise ValueError(f"slots must be ({len(x)},) integers, one per row, got {tuple(given.shape)}")
            self._slots = given[finite.cpu()]
        if not len(rows):
            return self._unanswered(x)
        if slots is not None and self.slotted and not self._slots_checked and len(rows) > 1:
            if problem := self.check_slots(rows):
                raise ValueError(f"slots can't be kept apart: {problem}")
            self._slots_checked = True
        if adapt and self.backward and self._gain > 0:
            outputs = self._adapt(rows)
        else:
            with torch.inference_mode():
                outputs = self._adapt(rows) if adapt and not self.backward else self._predict(rows)
        self._output_shape = outputs.shape[1:]
        return outputs if finite is None else spread(outputs, finite)

    def _unanswered(self, x: Tensor) -> Tensor:
        """Return NaN for every row; what a row looks like is learnt from one of zeros if need be."""
        with torch.inference_mode():
            if self._output_shape is None:
                self._slots = None
                self._output_shape = self._predict(x.new_zeros((1, *x.shape[1:]))).shape[1:]
            if self._tap and self._tap.latest is not None:
                self._tap.latest = self._tap.latest[:0]
            return torch.full((len(x), *self._output_shape), torch.nan, device=x.device)

    @abstractmethod
    def _setup(self) -> None:
        """Prepare ``self.model``: replace layers, clone what moves."""

    def _predict(self, x: Tensor) -> Tensor:
        """Outputs for (B, *input_shape) finite rows, B > 0, with the present state, which stays as it is."""
        outputs: Tensor = self.model(x)
        return outputs

    def _adapt(self, x: Tensor) -> Tensor:
        """Outputs as by `_predict`, then the method's update. In inference mode, but for methods with `backward`.

        Those are called at a gain above 0 only: at 0 their step would be zero.
        """
        return self._predict(x)

    def _learn(self, x: Tensor, y: Tensor) -> None:  # noqa: B027, only for those that are `labelled`
        """Learn from finite rows and their labels, B > 0, in inference mode."""

    def _learn_numbered(self, x: Tensor, y: Tensor, numbers: Tensor | None) -> None:
        """As `_learn`, for those that need to know which rows these were."""
        self._learn(x, y)

    def _gain_changed(self) -> None:  # noqa: B027, some look at the gain when they predict
        """React to a new ``self.gain``."""

    def _state(self) -> dict[str, Any]:
        """Return copies of all that `_adapt` changes."""
        return {}

    def _load(self, state: dict[str, Any]) -> None:  # noqa: B027, a method without a state has nothing to restore
        """Restore what `_state` gave."""
