"""error_memory: late labels tell how the model errs near a row, and the answer is corrected by that."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import one_hot

from adapters.fast.core.base import FastAdapter
from adapters.fast.core.neighbours import RowMemory, nearest
from adapters.fast.core.output import full_precision, linear_head, mix
from adapters.fast.core.registry import register
from adapters.fast.core.source import source_outputs
from adapters.features import find_head
from adapters.reference import Reference


@register("error_memory")
class ErrorMemory(FastAdapter):
    """The errors of the labelled rows nearest to a row, weighted by nearness, are added to its answer.

        e_j = onehot(y_j) − p_j  (classes),  y_j − f(x_j)  (values);      a = softmax_{j ∈ kNN}(−d²_j / (τ·mean d²))
        ê = Σ a_j·e_j,    v = Σ a_j·‖e_j − ê‖² / ‖ê‖²,    n = 1 / Σ a²_j
        served: p + weight·s·ê,    s = max(0, 1 − shrinkage·(v/n + 1/n²))

    d are distances of penultimate features, in units of the reference's deviations where there is a reference, and
    against the mean over the k neighbours, so that τ has no scale. s is James and Stein's factor, from the variance of
    the weighted mean over its square; 1/n² keeps one neighbour alone from being believed. With ``shrinkage=0`` s is 1
    and ê is added as published. Late labels come by `learn`, which runs the frozen model on their rows.

    With ``anchors`` the reference's exemplars and the model's errors on them are neighbours too, for good: a row of a
    class that has had no labels for long finds its own kind there, and not the errors of others. Before the first
    label, and without labels, it is the frozen model.

    Returns *probabilities*, negative ones cut and normalised again, or values in regression; at gain g (1 − g)·frozen
    + g·corrected. Labels are learnt at gain 0 too. Rows whose features or outputs overflow are neither stored nor
    corrected. Needs a linear head; without a reference no deviations and no anchors. Memory: the latest ``capacity``
    labelled rows of D + K values, and the anchors. Can't do: errors that features don't tell apart; labels so late that
    their errors are over.

    Zhu et al., ReLoop2: Building Self-Adaptive Recommendation Models via Responsive Error Compensation Loop, KDD 2023,
    who find the neighbours by hashing; here they are exact, and s and the anchors are added.
    """

    outputs: Literal["logits", "probs"] = "probs"
    labelled = True

    class Options(FastAdapter.Options):
        """Settings of the error memory."""

        capacity: int = Field(default=1024, ge=1)
        """Late-labelled rows remembered, the latest."""
        k: int = Field(default=16, ge=1)
        """Neighbours whose errors count."""
        temperature: float = Field(default=0.3, gt=0.0)
        """τ; the lower, the more the nearest count."""
        weight: float = Field(default=1.0, ge=0.0, le=1.0)
        """Share of the estimated error that is corrected."""
        anchors: bool = True
        """Whether the reference's exemplars with the model's errors on them are part of the memory, and stay."""
        shrinkage: float = Field(default=1.0, ge=0.0)
        """How much scatter among the neighbours' errors speaks against their mean; 0: not at all."""

    options: Options

    @classmethod
    def check(cls, model: nn.Module, reference: Reference | None = None) -> str | None:
        """Need a linear head."""
        if not find_head(model):  # none, or the model is nothing else and has no features
            return "it has no nn.Linear head to read features from; use 'ema_norm' or 'tent'"
        return None

    def _setup(self) -> None:
        assert self._tap is not None
        head, reference = linear_head(self.model, self._tap.head), self.reference
        values = head.out_features == 1 or (reference is not None and reference.class_prior is None)
        if values:
            self.outputs = "logits"
        centre, scale = head.weight.new_zeros(2, head.in_features).float()
        scale = scale + 1.0
        if reference is not None and reference.feature_mean is not None and reference.feature_var is not None:
            centre, variance = reference.feature_mean.to(centre), reference.feature_var.to(scale)
            scale = (variance + 1e-3 * variance.mean() + torch.finfo(variance.dtype).tiny).sqrt()
        self._centre, self._scale = centre, scale
        z_ND, error_NV = centre[None, :][:0], scale.new_zeros(0, head.out_features)
        if self.options.anchors and reference is not None and len(reference.exemplars_x):
            source = source_outputs(self.model, reference, self.options.head)
            assert source.features is not None
            f_NV = source.logits if values else source.logits.softmax(1)
            z_ND, error_NV = self._usable(
                f_NV.reshape(len(f_NV), -1), (source.features - centre) / scale, source.labels
            )
        self._memory = RowMemory(self.options.capacity, z_ND, error_NV)

    def _frozen(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The model's outputs as they are served at gain 0, the same as (B, V) float32, and (B, D) scaled features."""
        outputs = super()._predict(x)
        if self.outputs == "probs":
            outputs = outputs.softmax(1)
        assert self._tap is not None and self._tap.features is not None
        z = (self._tap.features.float() - self._centre) / self._scale
        return outputs, outputs.float().reshape(len(x), -1), z

    def _predict(self, x: Tensor) -> Tensor:
        outputs, f_BV, z_BD = self._frozen(x)
        if not self.labels or self.gain == 0.0:
            return outputs
        corrected = self._corrected(f_BV, z_BD)
        return mix(outputs.reshape(len(x), -1), corrected, self.gain).view_as(outputs)

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        device: torch.device = self._centre.device
        return device

    @property
    def labels(self) -> int:
        """How many labelled rows there are in the memory."""
        return self._memory.count - self._memory.protected

    def correct(self, outputs: Tensor, features: Tensor) -> Tensor:
        """Corrected (B, V) probabilities or values, for whoever has run the frozen model already.

        ``outputs`` are its logits or values (B, V), ``features`` (B, D) the inputs of its head.
        """
        f_BV, z_BD = self._scaled(outputs, features)
        corrected = self._corrected(f_BV, z_BD)
        return corrected.where(corrected.isfinite().all(1, keepdim=True), f_BV)

    def _corrected(self, f_BV: Tensor, z_BD: Tensor) -> Tensor:
        with full_precision(f_BV.device):
            error = self._estimate(z_BD)
            self.diagnostics["error"] = error
            corrected = f_BV + self.options.weight * error
            if self.outputs == "probs":
                corrected = corrected.clamp_min(0.0)
                corrected = corrected / corrected.sum(1, keepdim=True)
        return corrected

    def _estimate(self, z_BD: Tensor) -> Tensor:
        """(B, V) errors to expect, shrunk."""
        o = self.options
        squares_Bk, places_Bk = nearest(z_BD, self._memory.features, o.k)
        local_B1 = squares_Bk.mean(1, keepdim=True).clamp_min(torch.finfo(squares_Bk.dtype).tiny)
        a_B1k = (-squares_Bk / (o.temperature * local_B1)).softmax(1)[:, None]
        errors_BkV = self._memory.values[places_Bk]
        mean_B1V = a_B1k @ errors_BkV
        scatter_B1 = (a_B1k @ (errors_BkV - mean_B1V).square()).sum(2)
        signal_B1 = mean_B1V.square().sum(2).clamp_min(torch.finfo(scatter_B1.dtype).tiny)
        one_over_n_B1 = a_B1k.square().sum(2)
        noise_B1 = one_over_n_B1 * (scatter_B1 / signal_B1 + one_over_n_B1)
        return mean_B1V.squeeze(1) * (1.0 - o.shrinkage * noise_B1).clamp_min(0.0)

    def _learn(self, x: Tensor, y: Tensor) -> None:
        assert self._tap is not None
        latest = self._tap.latest  # the features of the latest forward are still asked for
        _, f_BV, z_BD = self._frozen(x)
        self._tap.latest = latest
        self._memory.add(*self._usable(f_BV, z_BD, y))

    def remember(self, outputs: Tensor, features: Tensor, y: Tensor) -> None:
        """Learn from labelled rows whose outputs (B, V) and features (B, D) by the frozen model have been kept."""
        self._memory.add(*self._usable(*self._scaled(outputs, features), y))

    def _scaled(self, outputs: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        f_BV = (outputs.softmax(1) if self.outputs == "probs" else outputs).float().reshape(len(outputs), -1)
        return f_BV, (features.float() - self._centre) / self._scale

    def _usable(self, f_BV: Tensor, z_BD: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Features and errors of the rows that can be stored."""
        if self.outputs == "probs":
            classes = f_BV.shape[1]
            known = (y >= 0) & (y < classes)
            error = one_hot(y.long().clamp(0, classes - 1), classes).to(f_BV) - f_BV
        else:
            known = y.isfinite()
            error = torch.zeros_like(f_BV)
            error[:, 0] = y.to(f_BV) - f_BV[:, 0]  # labels are of the first output
        usable = known & z_BD.isfinite().all(1) & error.isfinite().all(1)
        return z_BD[usable], error[usable]

    def _state(self) -> dict[str, Any]:
        return self._memory.state()

    def _load(self, state: dict[str, Any]) -> None:
        self._memory.load(state)
