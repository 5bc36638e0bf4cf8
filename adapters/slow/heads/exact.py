"""Heads that are solved for and not trained: exact for the rows seen, in any order, without a gradient."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from adapters.slow.heads.backbone import Backbone, head_problem, on_host
from adapters.slow.heads.moments import F64, Moments
from adapters.slow.heads.temperature import Recent, scale_of
from adapters.slow.registry import SlowMethod
from adapters.slow.trainee import Given, Trainee, Values

BATCH_ROWS = 512
"""Rows of one forward pass of the backbone."""
CALIBRATED_FROM = 32
"""Newest rows from which on the logits are scaled by them alone; with fewer, the reference exemplars are added."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """What does not change while a head learns."""

    weight: F64 = field(repr=False)
    """(T, D) of the head as it was packed."""
    bias: F64 = field(repr=False)
    """(T,); zeros when the head has none."""
    reference_h: F64 = field(repr=False)
    """(r, D) features of the reference exemplars; r may be 0."""
    reference_y: NDArray[Any] = field(repr=False)
    """(r,) their labels."""


class ExactMethod(SlowMethod):
    """A method whose result is a closed form of sums over the rows seen.

    Args:
        memory_rows: rows after which a row's weight has fallen to 1/e, for streams that go on drifting; None: all rows
            count the same.
        reference_weight: rows that the reference exemplars weigh together; they never fade. Where the features have
            drifted they hold the head back, so it is small: enough to know a class that the stream has not shown.
        calibration_rows: newest rows whose features are kept; the logits are scaled so that their labels are likeliest.
            The answer is the same, its confidence is not: a closed form knows nothing of drift. 0: not scaled.

    Raises:
        ValueError: an option is out of range.
    """

    regression: ClassVar[bool] = False
    """Whether it serves regression; else classification."""
    gram: ClassVar[bool] = False
    """Whether the features' second moments are needed: D * D numbers."""
    instead: ClassVar[str]
    """What to use for the other task."""

    def __init__(
        self, *, memory_rows: float | None = None, reference_weight: float = 1.0, calibration_rows: int = 256
    ) -> None:
        if memory_rows is not None and not 1 <= memory_rows < float("inf"):
            raise ValueError(f"memory_rows is {memory_rows}; it must be 1 or more, or None for no forgetting")
        if not 0 <= reference_weight < float("inf"):
            raise ValueError(f"reference_weight is {reference_weight}; it must be 0 or more")
        if calibration_rows < 0:
            raise ValueError(f"calibration_rows is {calibration_rows}; it must be 0 or more")
        self.memory_rows = memory_rows
        self.reference_weight = reference_weight
        self.calibration_rows = calibration_rows

    @property
    def needs_bias(self) -> str | None:
        """Why the head must have a bias, and what to do without one; None when it need not."""
        return None

    @abstractmethod
    def solve(self, sums: Moments, known: Known) -> tuple[F64, F64] | None:
        """Weight (T, D) and bias (T,) of the head; None while the rows do not determine one.

        The rows of a class that ``sums`` does not know are not looked at.
        """

    def check(self, model: nn.Module) -> str | None:
        """Why the head can't be replaced exactly; None when it can."""
        problem = head_problem(model, self.needs_bias)
        return None if problem is None else self.refuse(problem)

    def begin(self, model: nn.Module, given: Given) -> Trainee:
        """Not for this kind of method: a ValueError."""
        raise ValueError(self.refuse("has no gradient, so no burst can train it; use open() and update()"))

    def open(
        self,
        model: nn.Module,
        reference_x: ArrayLike | Tensor | None,
        reference_y: ArrayLike | Tensor | None,
        *,
        classes: int | None,
    ) -> ExactHead:
        """A head that learns from labelled rows; ``model`` is not changed.

        Args:
            model: the frozen model.
            reference_x: (r, *input_shape) reference exemplars; None or empty for none.
            reference_y: (r,) their labels.
            classes: number of classes; None for regression.

        Raises:
            ValueError: the model or the task can't be served; the text says what to use instead.
        """
        if (problem := self.check(model)) is not None:
            raise ValueError(problem)
        if (classes is None) != self.regression:
            task = "regression" if classes is None else "classification"
            raise ValueError(self.refuse(f"does not serve {task}; use {self.instead}"))
        return ExactHead(self, model, reference_x, reference_y, classes)


class ExactHead:
    """The sums of one model's rows, and the head that follows from them. Made by `ExactMethod.open`."""

    def __init__(
        self,
        method: ExactMethod,
        model: nn.Module,
        reference_x: ArrayLike | Tensor | None,
        reference_y: ArrayLike | Tensor | None,
        classes: int | None,
    ) -> None:
        self._method = method
        self._classes = classes
        self._backbone = Backbone(model, classes, method.refuse)
        width = self._backbone.weight.shape[1]
        self.rows = 0
        """Rows learnt from so far, reference exemplars not counted."""
        self.dropped = 0
        """Rows refused so far: not finite, here or in the features, or a label that is not a class."""
        h, y = self._screened([] if reference_x is None else reference_x, [] if reference_y is None else reference_y)
        if self.dropped:
            raise ValueError(f"{self.dropped} reference exemplars are not finite or have no valid label")
        self._keep = 1.0 if method.memory_rows is None else float(np.exp(-1 / method.memory_rows))
        self._sums = self._moments(h.mean(0) if len(h) else np.zeros(width))
        self._recent = Recent(0 if classes is None else method.calibration_rows, width)
        weight, bias = self._backbone.weight, self._backbone.bias
        self._known = Known(
            weight=on_host(weight),
            bias=np.zeros(len(weight)) if bias is None else on_host(bias),
            reference_h=h,
            reference_y=y,
        )
        self._prior = self._of_reference()

    def _moments(self, origin: F64) -> Moments:
        return Moments(origin, self._classes or 1, gram=self._method.gram, one_hot=self._classes is not None)

    def _of_reference(self) -> Moments:
        prior = self._moments(self._sums.origin)
        prior.add(self._known.reference_h, self._targets(self._known.reference_y), 1.0)
        return prior

    def _targets(self, y: NDArray[Any]) -> F64:
        return y[:, None].astype(np.float64) if self._classes is None else np.eye(self._classes)[y]

    def _screened(self, x: ArrayLike | Tensor, y: ArrayLike | Tensor) -> tuple[F64, NDArray[Any]]:
        """Features and labels of the usable rows; the others are counted."""
        rows = torch.as_tensor(np.asarray(x) if not isinstance(x, Tensor) else x)
        labels = np.asarray(y.cpu() if isinstance(y, Tensor) else y, np.float64)
        if labels.ndim != 1 or len(rows) != len(labels):
            raise ValueError(f"x has {len(rows)} rows and y shape {labels.shape}; each row needs one label")
        usable = np.abs(labels) < np.finfo(np.float32).max
        if self._classes is not None:
            usable &= (labels >= 0) & (labels < self._classes) & (labels == np.floor(labels))
        if len(labels):
            usable &= torch.isfinite(rows.flatten(1)).all(1).cpu().numpy()
        parts = [np.zeros((0, self._backbone.weight.shape[1]))]
        chosen = np.flatnonzero(usable)
        for start in range(0, len(chosen), BATCH_ROWS):
            part = torch.from_numpy(chosen[start : start + BATCH_ROWS]).to(rows.device)
            parts.append(on_host(self._backbone(rows[part])))
        h = np.concatenate(parts)
        finite = np.isfinite(h).all(1)
        self.dropped += len(labels) - int(finite.sum())
        return h[finite], labels[chosen[finite]].astype(np.float64 if self._classes is None else np.int64)

    def update(self, x: ArrayLike | Tensor, y: ArrayLike | Tensor) -> int:
        """Learn from rows, oldest first: x (n, *input_shape), y (n,). Rows that are not usable are counted.

        Returns:
            int: rows learnt from.

        Raises:
            ValueError: the shapes do not fit.
        """
        return self._learn(*self._screened(x, y))

    def _learn(self, h: F64, y: NDArray[Any]) -> int:
        for start in range(0, len(y), BATCH_ROWS):
            part = slice(start, start + BATCH_ROWS)
            self._sums.add(h[part], self._targets(y[part]), self._keep)
        self._recent.add(h, y)
        self.rows += len(y)
        return len(y)

    def values(self) -> Values:
        """New values of the head by the model's names, on its device; the old ones while too little is known.

        A class without rows keeps its old row. The other rows are then moved together, by the linear function that
        makes them agree on average with the old head: the softmax between them is as solved, and the old rows stay
        comparable. Empty when the result is not finite.
        """
        sums = self._sums.with_prior(self._prior, self._method.reference_weight)
        # Hostile numbers end as values that are not finite, and these as none.
        with np.errstate(all="ignore"):
            try:
                solved = self._method.solve(sums, self._known)
            except np.linalg.LinAlgError:
                return {}
            if solved is None:
                return self._backbone.head_values()
            new, bias = solved
            if self._classes is not None:
                scale = self._scale(sums.count > 0, new, bias)
                new, bias = self._filled(sums.count > 0, scale * new, scale * bias)
        return self._backbone.head_values(new, bias)

    def _scale(self, present: NDArray[np.bool_], weight: F64, bias: F64) -> float:
        """By which the logits are multiplied: calibrated on the newest rows, on the reference while there are few."""
        h, y = self._recent.h, self._recent.y
        if len(y) < min(CALIBRATED_FROM, self._recent.capacity):
            h, y = np.concatenate((self._known.reference_h, h)), np.concatenate((self._known.reference_y, y))
        judged = present[y]
        if not self._recent.capacity or not judged.any():
            return 1.0
        logits = h[judged] @ weight[present].T + bias[present]
        return scale_of(logits, (np.cumsum(present) - 1)[y[judged]])

    def _filled(self, present: NDArray[np.bool_], weight: F64, bias: F64) -> tuple[F64, F64]:
        """The old rows for classes that no row was seen of, the others brought to their level."""
        if present.all():
            return weight, bias
        old_weight, old_bias = self._known.weight, self._known.bias
        weight = weight + (old_weight - weight)[present].mean(0)
        bias = bias + (old_bias - bias)[present].mean()
        return np.where(present[:, None], weight, old_weight), np.where(present, bias, old_bias)

    def _fingerprint(self) -> dict[str, Any]:
        """What must be the same for a state to fit. Features are not: they differ by rounding between devices."""
        crc = zlib.crc32(self._known.weight.tobytes(), zlib.crc32(self._known.reference_y.tobytes()))
        return {"method": self._method.name, "bundle_crc": crc}

    def state_dict(self) -> dict[str, Any]:
        """Copies of the sums and counters, without what belongs to the bundle."""
        return {
            **self._fingerprint(),
            "sums": self._sums.state_dict(),
            "recent": self._recent.state_dict(),
            "rows": self.rows,
            "dropped": self.dropped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where ``state_dict`` was taken.

        Raises:
            ValueError: the state is of another method, model or reference.
        """
        for name, own in self._fingerprint().items():
            if state[name] != own:
                raise ValueError(f"the saved exact head has {name} {state[name]}, this one {own}; start it empty")
        self._sums.load_state_dict(state["sums"])
        self._prior = self._of_reference()
        self._recent.load_state_dict(state["recent"])
        self.rows, self.dropped = int(state["rows"]), int(state["dropped"])
