"""Methods that take gradient steps on some parameters at test time, by default the norm layers' scales and shifts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from adapters.fast.core.affine import Adapted, check_affine, norm_parameters
from adapters.fast.core.norm_layers import adaptable
from adapters.fast.core.normalisation import Normalisation
from adapters.fast.core.normalisations import make_normalisation
from adapters.fast.core.objective import Batch, Objective, Part
from adapters.fast.core.optim import SlotOptimizer
from adapters.fast.core.slots import Groups
from adapters.fast.core.slotted import SlottedAdapter
from adapters.fast.core.unmix import Unmix
from adapters.features import find_head
from adapters.reference import Reference

__all__ = ["Batch", "GradientAdapter", "Objective", "Part", "check_classes"]

_TWO_PASSES_BELOW = 0.5
"""Share of rows kept below which a second forward over these alone is cheaper than a backward over all."""


class GradientAdapter(SlottedAdapter):
    """Predicts, then takes one optimiser step per batch on a loss of its outputs.

    A subclass gives the loss, `_objective`, and may choose rows to learn from, `_keep`. Both are written for slots:
    a mean over the kept rows of each slot is ``batch.mean``, and tensors of the store have the slots in front.
    A loss or gradient that is not finite skips the step, and nothing changes then.
    """

    backward = True
    wrappable = True

    class Options(SlottedAdapter.Options):
        """Settings of every gradient method."""

        optimizer: str = "adam"
        """``sgd``, ``adam``, or any name of ``pytorch_optimizer``; these last keep no slots apart."""
        lr: float | None = Field(default=None, gt=0.0)
        """Learning rate; None: 1e-3 for sgd and adam, the library's own default for others."""
        betas: tuple[float, float] = (0.9, 0.999)
        """Decay of the first and second moments, for those that have them."""
        momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
        """Momentum, for those that have it."""
        weight_decay: float = Field(default=0.0, ge=0.0)
        """Pull of the adapted parameters to zero."""
        steps: int = Field(default=1, ge=1)
        """Gradient steps per batch."""
        norm: Literal["batch", "source", "ema_norm", "unmix_norm"] = "batch"
        """Statistics of the BatchNorm layers: the batch's, with gradients through them, or those of that method."""
        norm_options: dict[str, Any] = Field(default_factory=dict)
        """Settings of that method, under its own names."""

    options: Options

    @classmethod
    def check(cls, model: nn.Module, reference: Reference | None = None) -> str | None:
        """Need a scale or shift in a normalisation layer, and at least two classes."""
        return check_affine(model) or check_classes(model)

    def _setup(self) -> None:
        super()._setup()
        self.parts: list[Part] = []
        """What wrappers add."""
        self._rows_independent = not any(map(adaptable, self.model.modules()))
        self._normalisation = Normalisation(self._mode, self._store)
        if type(self)._replace_layers is not GradientAdapter._replace_layers and self.options.norm != "batch":
            raise ValueError(f"{self.name} has its own statistics: the option norm can't be {self.options.norm!r}")
        self._replace_layers()
        self._adapted = Adapted(self.model, self._store, self._mode, self._parameters())
        o = self.options
        self._optimizer = SlotOptimizer(
            self._store,
            name=o.optimizer, lr=o.lr, betas=o.betas, momentum=o.momentum, weight_decay=o.weight_decay,
        )  # fmt: skip
        settles = type(self)._settle is not GradientAdapter._settle
        self._settle_hook = self._settle if settles else None
        self._shown: int | None = None
        self._kept_share = 1.0

    def _replace_layers(self) -> None:
        """Have BatchNorm layers normalise as the option ``norm`` says."""
        o = self.options
        self._normalisation = make_normalisation(o.norm, o.norm_options, self._mode, self._store)
        self._normalisation.install(self.model)
        self._rows_independent = self._rows_independent or self._normalisation.rows_independent

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Return what moves, by name."""
        return norm_parameters(self.model)

    def _keep(self, batch: Batch) -> Tensor | None:
        """Choose the rows to learn from, (B,) bool, from detached outputs; None: all."""
        return None

    def _objective(self, batch: Batch) -> Objective:
        """Return the loss of the batch's kept rows. Changes nothing."""
        raise NotImplementedError

    def _settle(self, theta: Tensor) -> Tensor:
        """Map theta (G, P) after a step."""
        return theta

    def _answer(self, z: Tensor, groups: Groups) -> Tensor:
        """Return what is answered for logits (B, K)."""
        return z

    def _open(self, rows: int, *, keep: bool) -> Groups:
        groups = super()._open(rows, keep=keep)
        self._normalisation.open(groups)
        if groups.index is not None or self._shown != self._store.ids[0]:
            self._serve(groups)
        return groups

    def check_slots(self, x: Tensor) -> str | None:
        """Say why the rows of several slots can't be told apart, or None."""
        if not self._optimizer.several:
            return f"the optimizer {self.options.optimizer!r} keeps no state per slot; take sgd or adam"
        return super().check_slots(x) or self._adapted.lay_out()

    def _serve(self, groups: Groups) -> None:
        self._adapted.serve(groups, self.gain)
        self._shown = self._store.ids[0] if groups.index is None else None

    def _gain_changed(self) -> None:
        super()._gain_changed()
        self._slots_forgotten()

    def _slots_forgotten(self) -> None:
        self._normalisation.stale()
        with torch.inference_mode():
            self._serve(self._store.open(None, 1, keep=False))

    def _predict(self, x: Tensor) -> Tensor:
        groups = self._open(len(x), keep=False)
        return self._answer(super()._predict(x), groups)

    def _adapt(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            rows = x.clone() if x.is_inference() else x  # autograd can't save a tensor of inference mode
            groups = self._open(len(rows), keep=True)
            self._mode.measuring = True  # in the first forward only: statistics move once a batch
            outputs = self._answer(self._learn_rows(rows, groups), groups)
            features = self._tap.latest if self._tap else None
            for _ in range(self.options.steps - 1):
                if groups.index is not None:
                    self._serve(groups)
                self._learn_rows(rows, groups)
            with torch.no_grad():
                self._normalisation.settle(groups)
        if self._tap:
            self._tap.latest = features
        return outputs

    def _learn_rows(self, x: Tensor, groups: Groups) -> Tensor:
        """Take one step; returns the (B, K) logits from before it, detached."""
        two_passes = self._rows_independent and self._kept_share < _TWO_PASSES_BELOW
        with torch.set_grad_enabled(not two_passes):
            try:
                z: Tensor = self.model(x)
            finally:
                self._mode.measuring = False
        batch = Batch(x, z, groups, self._features(), groups)
        with torch.no_grad():
            batch.keep = self._chosen(batch)
        if batch.keep is not None:
            kept = int(batch.keep.sum())
            self._kept_share += 0.1 * (kept / len(x) - self._kept_share)
            self.diagnostics["kept"] = batch.keep
            if not kept and not self._steps_without_rows:
                return z.detach()
        latest = self._tap.latest if self._tap else None
        learnt = self._of_kept_rows(batch) if two_passes else batch
        self._update(learnt)
        if self._tap:
            self._tap.latest = latest
        return z.detach()

    _steps_without_rows = False
    """Whether a batch of which no row is kept still makes a step."""

    def _of_kept_rows(self, batch: Batch) -> Batch:
        if batch.keep is None:
            return replace(batch, z=self.model(batch.x))
        rows = batch.keep.nonzero().flatten()
        groups = batch.groups.pick(rows)
        if self._mode.groups is not None:
            self._mode.groups = groups
        return batch.pick(rows, self.model(batch.x[rows]), self._features())

    def _features(self) -> Tensor | None:
        return self._tap.features if self._tap else None

    def _chosen(self, batch: Batch) -> Tensor | None:
        keep = self._keep(batch)
        for part in self.parts:
            chosen = part.keep(batch)
            if chosen is not None:
                keep = chosen if keep is None else keep & chosen
        return keep

    def _update(self, batch: Batch) -> None:
        """Step once on the objective of ``batch``."""
        objective = self._with_parts(batch, self._objective(batch))
        gradient = self._adapted.gradient(objective.loss.sum(), self.gain)
        with torch.no_grad():
            if objective.gradient is not None:
                gradient += objective.gradient
            self._step(gradient, objective, batch.groups)

    def _with_parts(self, batch: Batch, objective: Objective) -> Objective:
        for part in self.parts:
            extra = part.loss(batch)
            if extra is not None:
                objective.loss = objective.loss + extra
        return objective

    def _step(self, gradient: Tensor, objective: Objective, groups: Groups) -> None:
        """Move theta (G, P) against ``gradient`` in the slots that want it, unless it is not finite."""
        # the sum of squares: an overflow there would stay in an optimiser's second moment for good
        wanted = (torch.linalg.vecdot(gradient, gradient) + objective.loss.detach()).isfinite()
        if objective.wanted is not None:
            wanted = wanted & objective.wanted
        for part in self.parts:
            selected = part.select(gradient, self._adapted)
            if selected is not None:
                gradient, stepping = selected
                wanted = wanted if stepping is None else wanted & stepping
        states = dict(objective.state)
        for part in self.parts:
            states.update(part.stepped(self._store["theta"], gradient))
        self._optimizer.step(gradient, wanted, self._settle_hook)
        self._store.write(states, wanted)
        self._serve_after(groups)

    def _serve_after(self, groups: Groups) -> None:
        if groups.index is None:
            self._serve(groups)

    def set_components(self, components: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Start the components of ``norm="unmix_norm"`` at these; see there. ValueError when it has none."""
        if not isinstance(self._normalisation, Unmix):
            raise ValueError(f"there are no components with norm {self.options.norm!r}")
        self._normalisation.set_components(components)
        self.remember_initial()

    @property
    def adapted(self) -> Adapted:
        """The parameters that move."""
        return self._adapted

    def proposed(self, gradient: Tensor) -> Tensor | None:
        """Return (G, P) theta after a step by ``gradient`` (G, P); None where the optimiser can't tell in advance."""
        theta = self._optimizer.proposed(gradient)
        return None if theta is None else self._settle(theta)

    def remember_initial(self) -> None:
        """Take the present state for that of construction: for a wrapper that has added to it."""
        self._initial = self._state()

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "optimizer": self._optimizer.state_dict(), "kept_share": self._kept_share}

    def _load(self, state: dict[str, Any]) -> None:
        share = float(state["kept_share"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._kept_share = share
        super()._load(state)


def check_classes(model: nn.Module) -> str | None:
    """Say why a loss of class probabilities can't be had: there must be at least two."""
    head = find_head(model)
    if head is not None and model.get_submodule(head).out_features == 1:
        return "it has one output, whose entropy is constant; use 'ema_norm'"
    return None
