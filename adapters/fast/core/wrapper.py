"""Wrappers: what works around any gradient method, and around another wrapper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

from pydantic import ConfigDict, Field
from torch import Tensor, nn

from adapters.fast.core.affine import Adapted
from adapters.fast.core.base import FastAdapter
from adapters.fast.core.objective import Batch, Wrappable
from adapters.reference import Reference


class Wrapper(FastAdapter):
    """A gradient method with something added: it is called, stored and reset as that method is.

    ``build("woc+eata", model, d_margin=0.1)`` is `woc` around `eata`; options that the wrapper does not have are those
    of the method inside. A subclass fills in `keep`, `loss`, `select` or `stepped`, see `Part`.
    """

    inner_default: ClassVar[str] = "tent"
    """The method inside when none is named."""

    class Options(FastAdapter.Options):
        """Settings of every wrapper; others go to the method inside."""

        model_config = ConfigDict(extra="allow", frozen=True)

        inner: str | None = Field(default=None)
        """The method inside, itself perhaps a wrapper (``gala+eata``)."""

    options: Options

    def __init__(self, model: nn.Module, reference: Reference | None = None, **options: Any) -> None:
        """Build the method inside around ``model`` and add this to it; ValueError as there."""
        parsed = self._parse(options)
        assert isinstance(parsed, Wrapper.Options)
        self.options = parsed
        if problem := self._check_inner(self._inner_class(self.options.inner), model, reference):
            raise ValueError(f"{self.name} can't serve this model: {problem}")
        self.reference = reference
        rest = dict(self.options.model_extra or {})
        if self.options.head is not None:
            rest["head"] = self.options.head
        self.inner = self._inner_class(self.options.inner)(model, reference, **rest)
        base = self.inner
        while isinstance(base, Wrapper):
            base = base.inner
        self.method = cast(Wrappable, base)
        """The gradient method at the core."""
        self.outputs, self.backward = self.inner.outputs, self.inner.backward
        self.slotted, self.labelled = self.inner.slotted, self.inner.labelled
        self.model, self.diagnostics = base.model, base.diagnostics
        self.method.parts.append(self)
        self._setup()
        self.method.remember_initial()

    @classmethod
    def _inner_class(cls, name: str | None) -> type[FastAdapter]:
        from adapters.fast.core.registry import get  # the registry knows the wrappers too

        return get(name or cls.inner_default)

    @classmethod
    def _check_inner(cls, inner: type[FastAdapter], model: nn.Module, reference: Reference | None) -> str | None:
        if not (inner.wrappable or issubclass(inner, Wrapper)):
            return f"'{inner.name}' takes no gradient steps for it to work around; use 'tent' or another inside"
        return inner.check(model, reference)

    @classmethod
    def check(cls, model: nn.Module, reference: Reference | None = None) -> str | None:
        """Need what the method inside needs."""
        return cls._check_inner(cls._inner_class(None), model, reference)

    def _setup(self) -> None:
        """Prepare what the wrapper itself needs; ``self.method`` is built."""

    # What it adds, see `Part`.

    def keep(self, batch: Batch) -> Tensor | None:
        """Return (B,) bool, the rows to learn from, from detached outputs."""
        return None

    def loss(self, batch: Batch) -> Tensor | None:
        """Return a (G,) loss to add."""
        return None

    def select(self, gradient: Tensor, adapted: Adapted) -> tuple[Tensor, Tensor | None] | None:
        """Return the (G, P) gradient to use, and (G,) bool whether to step."""
        return None

    def stepped(self, old_theta: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        """Return (G, ...) new values of tensors in the store after a step."""
        return {}

    # All else is that of the method inside.

    def forward(self, x: Tensor, check_finite: bool = True, *, slots: Sequence[int] | Tensor | None = None) -> Tensor:
        """Predict, then adapt, as the method inside does."""
        return self.inner.forward(x, check_finite, slots=slots)

    def predict(self, x: Tensor, check_finite: bool = True, *, slots: Sequence[int] | Tensor | None = None) -> Tensor:
        """Return what `forward` would return now, without a change of state."""
        return self.inner.predict(x, check_finite, slots=slots)

    def learn(self, x: Tensor, y: Tensor, numbers: Sequence[int] | Tensor | None = None) -> None:
        """Learn from late labels where the method inside does."""
        self.inner.learn(x, y, numbers)

    @property
    def features(self) -> Tensor | None:
        """(B, D) penultimate features of the last call."""
        return self.inner.features

    @property
    def gain(self) -> float:
        """Share of the method's effect in use, in [0, 1]. ValueError when set outside."""
        return self.inner.gain

    @gain.setter
    def gain(self, value: float) -> None:
        self.inner.gain = value

    @property
    def saturated(self) -> bool:
        """Whether the method inside has no more authority to give."""
        return self.inner.saturated

    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Forget all that was learnt, or only what these slots did."""
        self.inner.reset(slots)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that changes."""
        return {"method": self.name, "gain": self.gain, "state": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state`` exactly; ValueError, with this adapter unchanged, when it belongs to another one."""
        if state.get("method") != self.name:
            raise ValueError(f"a state of {state.get('method')!r} can't be loaded into {self.name!r}")
        inner = state.get("state")
        if not isinstance(inner, dict):
            raise ValueError(f"this state does not fit {self.name!r} around this model: there is no state inside")
        try:
            gain = float(state["gain"])
            if not 0.0 <= gain <= 1.0:
                raise ValueError(f"gain {gain} is not in [0, 1]")
            self.inner.load_state_dict(inner)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this state does not fit {self.name!r} around this model: {error}") from error
