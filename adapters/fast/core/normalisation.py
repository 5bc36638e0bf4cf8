"""What BatchNorm layers normalise with while a method works: statistics as a part that any method can take."""

from __future__ import annotations

from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adapters.fast.core.norm_layers import AdaptedBatchNorm, MixedBatchNorm, Mode, check_batch_norm, replace_batch_norms
from adapters.fast.core.slots import Groups, SlotStore
from adapters.fast.core.slotted import SlottedAdapter
from adapters.reference import Reference


class Normalisation:
    """Replaces the BatchNorm layers of one model, and says before and after a batch what these use; here the batch's.

    Its state, if it has one, is in the store of the method that it works for.
    """

    rows_independent = False
    """Whether the output of a row does not depend on the other rows."""

    class Options(BaseModel):
        """Settings, under their names in the paper."""

        model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, mode: Mode, store: SlotStore, options: Options | None = None) -> None:
        """Work for the method that owns ``mode`` and ``store``."""
        self.mode, self.store = mode, store
        self.options = options or self.Options()

    def install(self, model: nn.Module) -> None:
        """Put own layers in the place of the model's, and what they remember into the store."""
        replace_batch_norms(model, self.layer)

    def layer(self, source: _BatchNorm) -> nn.Module:
        """Return what stands in for ``source``."""
        return MixedBatchNorm(source, self.mode, differentiable=True)

    def open(self, groups: Groups) -> None:
        """Have the layers use the states of these slots, which the store has open."""

    def settle(self, groups: Groups) -> None:
        """Move these states by what the layers have noted while `Mode.measuring`."""

    def stale(self) -> None:
        """Know that states or gain may have been changed from outside."""


class SourceStatistics(Normalisation):
    """Frozen: the statistics of the source data."""

    rows_independent = True

    def layer(self, source: _BatchNorm) -> nn.Module:
        """Return what stands in for ``source``."""
        return AdaptedBatchNorm(source, self.mode)


N = TypeVar("N", bound=Normalisation)


class NormAdapter(SlottedAdapter, Generic[N]):
    """A normalisation on its own: predicts with the states before the batch, then moves these. No gradient.

    A subclass returns its normalisation from `_make`.
    """

    @classmethod
    def check(cls, model: nn.Module, reference: Reference | None = None) -> str | None:
        """Need a BatchNorm with running statistics."""
        return check_batch_norm(model)

    def _make(self) -> N:
        raise NotImplementedError

    def _setup(self) -> None:
        super()._setup()
        self._norm = self._make()
        self._norm.install(self.model)

    def _open(self, rows: int, *, keep: bool) -> Groups:
        groups = super()._open(rows, keep=keep)
        self._norm.open(groups)
        return groups

    def _predict(self, x: Tensor) -> Tensor:
        self._open(len(x), keep=False)
        return self._outputs(x)

    def _adapt(self, x: Tensor) -> Tensor:
        groups = self._open(len(x), keep=True)
        outputs = self._outputs(x, measuring=True)
        self._norm.settle(groups)
        return outputs

    def _outputs(self, x: Tensor, *, measuring: bool = False) -> Tensor:
        """Run the model as it is; ``measuring`` has its layers note what they see."""
        self._mode.measuring = measuring
        try:
            outputs: Tensor = self.model(x)
            return outputs
        finally:
            self._mode.measuring = False

    def _gain_changed(self) -> None:
        super()._gain_changed()
        self._norm.stale()

    def _slots_forgotten(self) -> None:
        self._norm.stale()
