"""What a configuration answered, and the frozen model that all are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from daemon.bundle import Bundle
from daemon.device import choose_device
from daemon.evaluation.recording import I64, Plan, Recording, batches
from daemon.records import F32, F64, Bools
from daemon.settings import Settings
from daemon.signals import Rows

Progress = Callable[[int], None]
"""Called with the rows done."""


@dataclass(kw_only=True)
class Replayed:
    """What one configuration answered on a recording of N rows, and what that took."""

    prediction: F32
    """(N,) class or value; NaN where the answer was `invalid_input`."""
    confidence: F32
    """(N,) probability of the predicted class, 0 for a regression."""
    adapted: Bools
    """(N,) answered by something else than the frozen model."""
    same: Bools
    """(N,) prediction and confidence equal to the bit what the frozen model says of the same batch."""
    backward: Bools
    """(N,) rows of batches in which a backward pass ran, the slow loop's left out."""
    states: list[str] = field(default_factory=list)
    """The controller's state after each batch."""
    decisions: list[tuple[int, str]] = field(default_factory=list)
    """(row, text): what the daemon logged, at the last row of the batch it happened in."""
    warnings: list[str] = field(default_factory=list)
    """What was logged as a warning while it was built."""
    seconds: float = 0.0
    """Processor seconds from decoded batches to encoded answers, adapting included, without the slow loop."""
    slow_seconds: float = 0.0
    """Processor seconds of the slow loop, which runs beside the stream."""
    peak_bytes: int = 0
    """Most memory in use at once, beyond what was in use before: of the device, or of the process on the CPU."""
    source_error: float | None = None
    """Loss on the bundle's reference exemplars afterwards; None where there is no such model."""
    frozen_source_error: float | None = None
    """The same of the frozen model."""
    asked: dict[int, F32] = field(default_factory=dict)
    """By the row after which it was asked: what would have been answered to rows of the future."""


class Frozen:
    """The model as it was packed, on tensors of its own: what the daemon does to its model can't reach it."""

    def __init__(self, settings: Settings, bundle: Bundle) -> None:
        self.device = choose_device(settings.device)
        self.task = bundle.manifest.task
        self.model = copy.deepcopy(bundle.model).to(self.device).eval()
        self.reference = bundle.reference.to(self.device)
        self.kind = "values" if self.task == "regression" else "logits"
        self._autocast = settings.autocast
        self._scale = float(bundle.calibration["loss_scale"])

    def answer(self, x: F32) -> Rows:
        """Answers to finite rows (B, *shape)."""
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return answers(self.model(self.upload(x)), self.kind)

    def upload(self, x: F32) -> Tensor:
        """Rows on the model's device."""
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device)

    def loss(self, prediction: F32, y: NDArray[Any]) -> F64:
        """(n,) 0/1 error, or squared error over the reference variance; 1 where nothing was predicted."""
        if self.task == "classification":
            return np.asarray(prediction != y, np.float64)
        squared = np.square(prediction.astype(np.float64) - y.astype(np.float64)) / self._scale
        return np.where(np.isnan(prediction), 1.0, squared)

    def source_error(self, ask: Callable[[F32], F32], batch_rows: int) -> float | None:
        """Mean loss on the reference exemplars, shuffled, as ``ask`` answers them; None where it can't."""
        x, y = self.reference.exemplars_x.cpu().numpy(), self.reference.exemplars_y.cpu().numpy()
        order = np.random.default_rng(0).permutation(len(x))
        loss = self.loss(asked_in_batches(ask, x[order], batch_rows), y[order])
        return float(loss.mean()) if len(loss) else None


def asked_in_batches(ask: Callable[[F32], F32], x: F32, batch_rows: int) -> F32:
    """(n,) answers to (n, *shape) rows in batches as the stream's; NaN for rows that are not finite."""
    result = np.full(len(x), np.nan, np.float32)
    usable = np.flatnonzero(np.isfinite(x.reshape(len(x), -1)).all(axis=1))
    for part in batches(len(usable), batch_rows):
        result[usable[part]] = ask(x[usable[part]])
    return result


def answers(outputs: Tensor, kind: str) -> Rows:
    """Prediction and confidence of (B, K) outputs, computed as the daemon's meter does; ``kind`` as there."""
    with torch.inference_mode():
        if kind == "values":
            value = outputs.float().reshape(len(outputs), -1)[:, 0]
            columns = torch.stack((value, torch.zeros_like(value)), 1)
        else:
            confidence, predicted = (outputs.float() if kind == "probs" else outputs.float().softmax(1)).max(1)
            columns = torch.stack((predicted.float(), confidence), 1)
        host = columns.cpu().numpy()
    return Rows(host[:, 0], host[:, 1], host[:, 2:], None)


def empty(rows: int) -> Replayed:
    """Of (rows,) with nothing answered yet."""
    nan, none = np.full(rows, np.nan, np.float32), np.zeros(rows, bool)
    return Replayed(prediction=nan, confidence=nan.copy(), adapted=none, same=none.copy(), backward=none.copy())


def write_rows(result: Replayed, rows: I64, answers: Rows) -> None:
    """Keep ``answers`` as those of ``rows`` (n,) of the recording; those that are not finite were never sent."""
    sent = np.isfinite(answers.prediction) & np.isfinite(answers.confidence)
    result.prediction[rows] = np.where(sent, answers.prediction, np.nan)
    result.confidence[rows] = np.where(sent, answers.confidence, np.nan)


def frozen_answers(twin: Frozen, recording: Recording, plan: Plan) -> Replayed:
    """The frozen model's answers, batch by batch as the stream was cut: a batch's size may change the last bit."""
    result = empty(len(recording))
    for part in batches(len(recording), plan.batch_rows):
        rows = np.flatnonzero(recording.valid[part]) + part.start
        if len(rows):
            write_rows(result, rows, twin.answer(recording.x[rows]))
    return result


def same_as_frozen(result: Replayed, frozen: Replayed) -> Bools:
    """(N,) whether prediction and confidence are the same bits."""
    pairs = ((result.prediction, frozen.prediction), (result.confidence, frozen.confidence))
    equal = [(a.view(np.int32) == b.view(np.int32)) | (np.isnan(a) & np.isnan(b)) for a, b in pairs]
    same: Bools = equal[0] & equal[1]
    return same
