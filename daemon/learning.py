"""From the settings of the slow loop to what learns: the method, its limits, the exact head, rows without labels."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

import adapters.slow as slow
from adapters.features import find_head
from adapters.reference import Reference
from adapters.slow import optimizers
from daemon.burst import Bench
from daemon.errors import SettingsError
from daemon.records import F32
from daemon.settings import Slow

UNLABELLED_ROWS = 1_024
"""Newest rows kept for pseudo-labels; the last quarter of them judges and is not learnt from."""
JUDGED = 0.25
"""Share of them that judges."""


def make_bench(
    settings: Slow, reference: Reference, model: nn.Module, task: str, classes: int | None, head: str | None
) -> Bench:
    """The method by its name, and how much a look may do.

    Raises:
        ValueError: no such method, ``HOMEOSTAT_SLOW__OPTIONS`` has one that it does not know, or pseudo-labels are
            asked for where there can't be any.
    """
    head = head or find_head(model)
    if settings.enabled and settings.pseudo_labels:
        _check_unlabelled(reference, task, head)
    return Bench(
        method=_method(settings),
        name=settings.name,
        options=_paces(settings),
        task="regression" if task == "regression" else "classification",
        alpha=settings.alpha,
        reference_margin=settings.reference_margin,
        max_queries=settings.max_queries,
        run_rows=settings.run_rows or None,
        reference=reference.to("cpu"),
        head=head,
        classes=classes,
    )


def repaced(bench: Bench, settings: Slow) -> Bench:
    """The same method with other paces and bounds; a burst that runs keeps its own."""
    return replace(
        bench,
        options=_paces(settings),
        alpha=settings.alpha,
        reference_margin=settings.reference_margin,
        run_rows=settings.run_rows or None,
    )


def _paces(settings: Slow) -> slow.BurstOptions:
    return slow.BurstOptions(
        steps=settings.steps,
        batch_size=settings.batch_rows,
        optimizer=settings.optimizer,
        lr=settings.lr,
        reference_share=settings.reference_share,
        seconds=None if settings.inline else settings.seconds,
        duty=1.0 if settings.inline else settings.duty,
        memory_bytes=settings.burst_bytes,
    )


def check_optimizer(settings: Slow, *, gradients: bool) -> None:
    """Raise SettingsError where bursts can't be made with it.

    The usual one is known to work and not looked at: importing it takes seconds, which a start should not wait for.
    """
    usual = settings.optimizer == Slow.model_fields["optimizer"].default and settings.lr is None
    if usual or not (gradients and settings.enabled):
        return
    if problem := optimizers.check(settings.optimizer, lr=settings.lr):
        raise SettingsError([f"HOMEOSTAT_SLOW__OPTIMIZER={settings.optimizer}: {problem}"])


def _method(settings: Slow) -> slow.SlowMethod:
    """The method with its own options."""
    plain = f"HOMEOSTAT_SLOW__OPTIONS={json.dumps(settings.options, default=str)}"
    if "name" in settings.options:
        # What is no JSON object is read as a name, as that of a section would be.
        raise ValueError(f'{plain}: give a JSON object of the method\'s own options, for example {{"rank": 4}}')
    try:
        return slow.get(settings.name, **settings.options)
    except (ValueError, TypeError) as error:
        if not settings.options:
            raise
        slow.get(settings.name)  # The name itself may be wrong: that error is the better one.
        raise ValueError(f"{plain}: {error}") from None


def _check_unlabelled(reference: Reference, task: str, head: str | None) -> None:
    """What pseudo-labels and the gate without labels need."""
    problem = None
    if task == "regression":
        problem = "pseudo-labels are classes, and a regression learns from labels alone"
    elif head is None:
        problem = "without labels a candidate is judged by the features of an nn.Linear head, and the model has none"
    elif not len(reference.exemplars_x):
        problem = "without labels a candidate is judged by the reference exemplars: pack the bundle with some"
    if problem:
        raise ValueError(f"HOMEOSTAT_SLOW__PSEUDO_LABELS=true: {problem}; or leave it unset")


def open_exact(
    settings: Slow, method: slow.SlowMethod, reference: Reference, model: nn.Module, classes: int | None
) -> slow.ExactHead | None:
    """The exact head that is the method, or that is learnt beside it; None where this model has none.

    Raises:
        ValueError: the method is an exact head and can't serve the model, or ``HOMEOSTAT_SLOW__EXACT`` is none.
    """
    x, y = reference.exemplars_x, reference.exemplars_y
    if isinstance(method, slow.ExactMethod):
        return method.open(model, x, y, classes=classes) if method.check(model) is None else None
    if not (settings.exact and settings.enabled):
        return None
    variable = f"HOMEOSTAT_SLOW__EXACT={settings.exact}"
    try:
        beside = slow.get(settings.exact)
    except ValueError as error:
        raise ValueError(f"{variable}: {error}") from None
    if not isinstance(beside, slow.ExactMethod):
        raise ValueError(f"{variable} is no exact head: use lda_head or prototype_head, or leave it empty for none")
    beside = type(beside)(memory_rows=settings.exact_rows)
    if classes is None or beside.check(model) is not None:
        return None
    try:
        return beside.open(model, x, y, classes=classes)
    except ValueError:
        return None  # a convenience beside the method: a model that it can't serve goes without


class Unlabelled:
    """The newest answered rows, for pseudo-labels where no labels come.

    Args:
        input_shape: of one row.
        most_bytes: of all rows; fewer than `UNLABELLED_ROWS` are kept where they would take more.
    """

    def __init__(self, input_shape: tuple[int, ...], most_bytes: int) -> None:
        self.capacity = max(1, min(UNLABELLED_ROWS, most_bytes // (4 * int(np.prod(input_shape, dtype=np.int64)))))
        self._blank = np.zeros((0, *input_shape), np.float32)
        self._parts: list[F32] = []
        self._rows = 0

    @property
    def full(self) -> bool:
        """Whether there are rows enough to learn from and to judge by."""
        return self._rows >= self.capacity

    def add(self, x: F32) -> None:
        """Take in rows (B, *input_shape), oldest first."""
        self._parts.append(x[-self.capacity :].copy())
        self._rows += len(self._parts[-1])
        while self._rows - len(self._parts[0]) >= self.capacity:
            self._rows -= len(self._parts.pop(0))

    def take(self) -> tuple[F32, F32]:
        """Rows to learn from and newer ones to judge by; none are left, so that no row judges twice."""
        rows = self._all()
        self.clear()
        cut = len(rows) - round(JUDGED * len(rows))
        return rows[:cut], rows[cut:]

    def clear(self) -> None:
        """Forget all rows."""
        self._parts, self._rows = [], 0

    def _all(self) -> F32:
        return np.concatenate((self._blank, *self._parts))[-self.capacity :]

    def state(self) -> F32:
        """(n, *input_shape) for a checkpoint."""
        return self._all().copy()

    def load(self, rows: Any) -> None:
        """From a checkpoint."""
        self.clear()
        if len(rows):
            self.add(np.array(rows, np.float32))
