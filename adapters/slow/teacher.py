"""Pseudo-labels for rows that have no label: from a slow teacher, where the frozen model says the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.slow.options import BurstOptions
from adapters.slow.rows import Array
from adapters.slow.trainee import Given, Trainee

BAR_DECAY = 0.9
"""Of the averages that the bars are made of: about ten batches, a burst has some sixty."""


class Labelled(NamedTuple):
    """What a teacher says of a batch."""

    y: Tensor
    """(B,) int64 classes."""
    weight: Tensor
    """(B,) in [0, 1]; 0 where the row does not count."""


class Teacher:
    """The exponential moving average of the student, and who believes it.

    A row counts only where the frozen model answers the same class and the teacher's confidence is over the class's
    bar: the teacher can't lead the student anywhere that the frozen model does not confirm. The bars follow Wang et
    al., "FreeMatch: Self-adaptive Thresholding for Semi-supervised Learning", ICLR 2023: the mean confidence, times the
    class's mean probability over that of the likeliest class; they start at the first batch's. A row weighs its
    confidence, and a class that has more than its even share of a batch's rows is weighed down to it: collapse feeds
    on the class that wins.

    Args:
        trainee: the student; the teacher starts as it.
        frozen: the model as it was packed.
        decay: of the average, in [0, 1).
        confidence: the bar of every class, in [0, 1]; None: adaptive.
    """

    def __init__(self, trainee: Trainee, frozen: nn.Module, *, decay: float, confidence: float | None) -> None:
        self._trainee, self._frozen = trainee, frozen
        self._decay, self._fixed = decay, confidence
        self._mean = [leaf.detach().clone() for leaf in trainee.parameters]
        self._confidence: Tensor | None = None
        self._classes: Tensor | None = None
        self.believed = 0
        """Rows that counted so far."""

    @torch.no_grad()
    def label(self, x: Tensor) -> Labelled:
        """Label rows (B, *input_shape). Before the student's forward pass: its parameters are swapped meanwhile."""
        with self._teaching():
            p_BK = self._trainee.module(x).softmax(1)
        confidence, y = p_BK.max(1)
        sure = confidence >= self._bars(p_BK)[y]
        kept = sure & (self._frozen(x).argmax(1) == y) & p_BK.isfinite().all(1)
        count = torch.bincount(y[kept], minlength=p_BK.shape[1])
        even = count.sum() / (count > 0).sum().clamp(min=1)
        balance = (even / count.clamp(min=1)).clamp(max=1.0)
        self.believed += int(kept.sum())
        return Labelled(y, torch.where(kept, confidence * balance[y], 0.0))

    def _bars(self, p_BK: Tensor) -> Tensor:
        """(K,) least confidence, after taking in the rows of a batch on which the teacher is finite."""
        if self._fixed is not None:
            return p_BK.new_full((p_BK.shape[1],), self._fixed)
        finite = p_BK[p_BK.isfinite().all(1)]
        if len(finite):
            mean, classes = finite.max(1).values.mean(), finite.mean(0)
            if self._confidence is None or self._classes is None:
                self._confidence, self._classes = mean, classes
            self._confidence = torch.lerp(mean, self._confidence, BAR_DECAY)
            self._classes = torch.lerp(classes, self._classes, BAR_DECAY)
        if self._confidence is None or self._classes is None:
            return p_BK.new_full((p_BK.shape[1],), math.inf)
        return self._confidence * self._classes / self._classes.max()

    @torch.no_grad()
    def follow(self) -> None:
        """Take in the student after a step."""
        for mean, leaf in zip(self._mean, self._trainee.parameters, strict=True):
            mean.lerp_(leaf, 1 - self._decay)

    @contextmanager
    def _teaching(self) -> Iterator[None]:
        """The trainee's module with the teacher's values: any method's, whatever its module does with them."""
        leaves = self._trainee.parameters
        students = [leaf.data for leaf in leaves]
        try:
            for leaf, mean in zip(leaves, self._mean, strict=True):
                leaf.data = mean
            yield
        finally:
            for leaf, student in zip(leaves, students, strict=True):
                leaf.data = student


class Taught:
    """The rows without labels of a burst, and their teacher.

    Args:
        x: (n, *input_shape) finite rows, on the host.
        trainee: the student.
        teacher: labels them.
        rows: of one step.
        weight: of their loss.
        seed: of the order in which they are drawn; that of the labelled rows does not hang on it.
    """

    def __init__(self, x: Array, trainee: Trainee, teacher: Teacher, *, rows: int, weight: float, seed: int) -> None:
        self._x, self._trainee, self.teacher, self.rows, self._weight = x, trainee, teacher, rows, weight
        self._rng = np.random.default_rng([seed, 2])

    @classmethod
    def of(cls, x: Array | None, trainee: Trainee, given: Given, options: BurstOptions) -> Taught | None:
        """Leave out rows that are not finite; None when none is left.

        Raises:
            ValueError: the task is no classification, or the rows have another shape than the memory's.
        """
        if x is None or not len(x):
            return None
        if given.task != "classification":
            raise ValueError("pseudo-labels are classes; a regression learns from labels alone: leave unlabelled out")
        shape = tuple(given.draw(1)[0].shape[1:])
        if x.shape[1:] != shape:
            raise ValueError(f"unlabelled has rows of shape {x.shape[1:]}; the memory's are {shape}")
        # A value beyond float32 turns infinite here and is then left out.
        with np.errstate(over="ignore"):
            x = x.astype(np.float32, copy=False)
        x = x[np.isfinite(x).reshape(len(x), -1).all(axis=1)]
        teacher = Teacher(trainee, given.frozen, decay=options.teacher_decay, confidence=options.teacher_confidence)
        rows = max(1, round(options.batch_size * options.unlabelled_share))
        weight = options.unlabelled_weight
        return cls(x, trainee, teacher, rows=rows, weight=weight, seed=given.seed) if len(x) else None

    @property
    def believed(self) -> int:
        """Rows whose pseudo-label counted so far."""
        return self.teacher.believed

    def loss(self) -> Tensor:
        """0-d; of the next rows. The mean is over all of them, so that few believed rows have little say."""
        chosen = self._rng.integers(0, len(self._x), self.rows)
        x = torch.from_numpy(self._x[chosen]).to(self._trainee.parameters[0].device)
        labelled = self.teacher.label(x)
        losses = F.cross_entropy(self._trainee.module(x), labelled.y, reduction="none")
        return self._weight * (losses * labelled.weight).mean()
