"""How much a burst may do, and what it leaves behind."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Reason = Literal["done", "stopped", "non-finite", "overrun", "out of memory"]


@dataclass(frozen=True, kw_only=True)
class BurstOptions:
    """How much a burst may do."""

    steps: int = 60
    """Gradient steps."""
    batch_size: int = 64
    """Rows of one gradient step."""
    optimizer: str = "prodigy"
    """prodigy, momo, hypergradient, trial_step, sgd, adam, adamw, or any name of pytorch_optimizer."""
    lr: float | None = None
    """Learning rate at the first step; None: the optimiser's own, which is learning-rate-free for the default."""
    weight_decay: float = 0.0
    """Weight decay, as the optimiser defines it."""
    clip_norm: float = 1.0
    """Largest norm of the gradient over all moved parameters; a longer one is scaled down."""
    reference_share: float = 0.25
    """Share of each batch drawn from the protected reference exemplars."""
    seconds: float | None = None
    """Seconds of work after which the burst ends as ``overrun``; None: as long as the steps take."""
    duty: float = 1.0
    """Share of the time that is worked; after each step the thread rests for the others."""
    memory_bytes: int | None = None
    """Memory that the steps may take on the device, by an estimate before the first (`needed_bytes`): kernels'
    workspaces, some tens of MB, come on top. None: what there is."""
    unlabelled_share: float = 0.5
    """Rows without labels in each step, where there are any, as a share of ``batch_size``; on top of it."""
    unlabelled_weight: float = 1.0
    """Weight of their loss beside that of the labelled rows."""
    teacher_decay: float = 0.95
    """Of the average of the student that labels them."""
    teacher_confidence: float | None = None
    """Least confidence at which a pseudo-label counts; None: adaptive for each class."""

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        for name in ("steps", "batch_size", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("lr", "seconds", "memory_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0, or None")
        for name in ("weight_decay", "unlabelled_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more, and finite")
        for name in ("reference_share", "teacher_confidence"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it must be in [0, 1]")
        for name in ("duty", "unlabelled_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in (0, 1]")
        if not 0 <= self.teacher_decay < 1:
            raise ValueError(f"teacher_decay is {self.teacher_decay}; it must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class BurstResult:
    """What a burst leaves behind."""

    delta: dict[str, Tensor] = field(repr=False)
    """New values (not differences) of the moved parameters, on the model's device; empty if not finite or when memory
    ran out."""
    steps: int
    """Gradient steps made."""
    loss_before: float
    """Mean loss of the given model on a fixed sample of the memory (it is training loss: the gate judges); NaN when
    memory ran out before it was taken."""
    loss_after: float
    """Mean loss after the burst, same rows; NaN when the delta is empty."""
    reason: Reason
    """``done``; ``stopped`` and ``overrun`` with the values so far; ``non-finite`` and ``out of memory`` with none."""
    seconds: float = 0.0
    """Seconds of work, rests not counted."""
    pseudo_labels: int = 0
    """Rows without labels that were learnt from, counted as often as they were drawn."""
