"""`homeostat pack`: a trained model and source data become a bundle.

The rows are cut in two, in their given order: the first part gives the reference (moments, class prior, exemplars), the
rest, which should be rows the model was not trained on, gives the calibration (levels, bands, thresholds). A model
looks better on its own training rows than anywhere else: with a separate calibration file there is nothing to correct.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import adapters.fast as fast
from adapters.features import FeatureTap, find_head
from adapters.reference import Reference
from daemon.bundle import Manifest, save_bundle
from daemon.calibrating import calibrate_watch, false_alarms
from daemon.errors import BundleError
from daemon.monitor import ERROR_ROWS, LEVEL_ROWS
from daemon.settings import ARL0
from daemon.signals import Meter, Rows, names
from daemon.source_reference import make_reference

CHUNK = 512
CALIBRATION_SHARE = 0.25
MIN_CALIBRATION = 50
EXEMPLARS = 256
DETECTORS = ("cusum", "adwin")
BAND_SIGMAS = 4.0
BAND_FLOOR = 0.25
ERROR_FLOOR = 0.02
Progress = Callable[[str], None]


def _tap(model: nn.Module, head: str | None) -> FeatureTap | nullcontext[None]:
    """Listens to the head's input; to nothing in a model without a linear layer."""
    return FeatureTap(model, head) if head else nullcontext()


def _outputs(model: nn.Module, x: np.ndarray, head: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    outputs, features = [], []
    with _tap(model, head) as tap, torch.inference_mode():
        for start in range(0, len(x), CHUNK):
            outputs.append(model(torch.from_numpy(np.ascontiguousarray(x[start : start + CHUNK]))))
            if tap is not None and tap.features is not None:
                features.append(tap.features)
    return torch.cat(outputs), torch.cat(features) if features else None


def _exemplars(y: np.ndarray, task: str, rng: np.random.Generator) -> np.ndarray:
    """Rows to keep: the same number of each class, or a uniform draw."""
    if task == "regression":
        return np.sort(rng.permutation(len(y))[:EXEMPLARS])
    classes = np.unique(y)
    each = max(1, EXEMPLARS // len(classes))
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(y == label))[:each] for label in classes]))


def autocorrelation_time(values: np.ndarray) -> float:
    """Rows per independent row, at least 1: from the variance of batch means (Geyer 1992's initial positive sums)."""
    centred = values - values.mean()
    variance = float(centred @ centred) / len(values)
    if variance <= 0:
        return 1.0
    total = 1.0
    for lag in range(1, len(values) // 4, 2):
        pair = sum(float(centred[k:] @ centred[:-k]) / len(values) / variance for k in (lag, lag + 1))
        if pair <= 0:
            break
        total += 2 * pair
    return total


def band(values: np.ndarray, memory_rows: int, floor: float) -> dict[str, float]:
    """Reference level of a signal and the half-width in which its exponential mean over ``memory_rows`` may wander."""
    time = autocorrelation_time(values)
    effective = max(1.0, 2 * memory_rows / time)
    deviation = float(values.std())
    width = max(BAND_SIGMAS * deviation / np.sqrt(effective), floor, 1e-6)
    return {"mean": float(values.mean()), "band": float(width), "scale": max(deviation, 1e-6), "memory": float(time)}


def pack(
    out: Path,
    *,
    model: nn.Module,
    factory: str,
    x: np.ndarray,
    y: np.ndarray,
    calibration: tuple[np.ndarray, np.ndarray] | None = None,
    task: str = "classification",
    head: str | None = None,
    arl0: float = ARL0,
    watch: Sequence[str] = DETECTORS,
    watch_features: str | None = None,
    seed: int = 0,
    prepare: Sequence[str] = (),
    progress: Progress = lambda text: None,
) -> Manifest:
    """Write a bundle to ``out``.

    Args:
        out: folder to write.
        model: the trained module, in eval mode, on the CPU.
        factory: how the module is built, for the manifest.
        x: (N, *shape) source rows.
        y: (N,) their classes or values.
        calibration: rows of the same kind that the model was not trained on; the last quarter of ``x`` without it.
        task: classification or regression.
        head: name of the last linear layer; found when None.
        arl0: mean rows between false alarms of all detectors together.
        watch: detectors to calibrate; the daemon runs with one of these.
        watch_features: detector of rows to calibrate on the features.
        seed: of the draws.
        prepare: fast methods that are to compute what they need from the source rows.
        progress: told what is being done.

    Raises:
        BundleError: when the rows don't fit the model or are too few, or a fast method can't serve it.
    """
    methods = [_fast_method(name) for name in prepare]
    if calibration is None:
        cut = int(len(x) * (1 - CALIBRATION_SHARE))
        calibration = x[cut:], y[cut:]
        x, y = x[:cut], y[:cut]
    held_x, held_y = calibration
    if len(held_x) < MIN_CALIBRATION or len(x) < MIN_CALIBRATION:
        raise BundleError(
            f"{len(x)} reference and {len(held_x)} calibration rows are too few; {MIN_CALIBRATION} each at least"
        )
    if held_x.shape[1:] != x.shape[1:]:
        raise BundleError(f"calibration rows have shape {held_x.shape[1:]}, the data {x.shape[1:]}")
    progress(f"reference: {len(x)} rows of shape {x.shape[1:]}")
    head = head or find_head(model)
    try:
        outputs, features = _outputs(model, x, head)
    except (RuntimeError, ValueError, TypeError) as error:
        raise BundleError(f"the model can't run on rows of shape {x.shape[1:]}: {error}") from None
    if not torch.isfinite(outputs).all():
        raise BundleError("the model's outputs on the data are not all finite; check the weights")
    if task == "classification" and outputs.ndim != 2:
        raise BundleError(f"the model's outputs have shape {tuple(outputs.shape)}; a classifier's are (rows, classes)")
    count = 1 if outputs.ndim == 1 else outputs.shape[1]
    if task == "classification" and (y.min() < 0 or y.max() >= count or (y != np.round(y)).any()):
        raise BundleError(f"labels run from {y.min()} to {y.max()}, the model has {count} classes (0 to {count - 1})")
    rows = _exemplars(y, task, np.random.default_rng(seed))
    reference = make_reference(x, y, outputs, features, rows, task, count)
    for method in methods:
        reference = _prepared(method, model, reference, x, y, task, head=head, seed=seed, progress=progress)

    progress(f"calibration: {len(held_x)} rows")
    rows_seen, losses, loss_scale = _measure(model, reference, held_x, held_y, task, head, features is not None)
    report: dict[str, Any] = {"bands": {}, "loss_scale": loss_scale, "arl0": arl0}
    columns = {name: rows_seen.signals[:, index].astype(np.float64) for index, name in enumerate(names(task))}
    for name, values in columns.items():
        report["bands"][name] = band(values, LEVEL_ROWS, BAND_FLOOR * float(values.std()))
    if reference.class_feature_mean is not None:
        held = columns["class_shift"]
        reference = replace(reference, class_distance=torch.tensor([held.mean(), held.std()], dtype=torch.float32))
    floor = ERROR_FLOOR if task == "classification" else 0.25 * float(losses.mean())
    report["bands"]["error"] = band(losses, ERROR_ROWS, floor)
    report["detectors"] = calibrate_watch(
        columns,
        losses,
        rows_seen.prediction.astype(np.float64),
        rows_seen.features,
        task=task,
        names=watch,
        features_name=watch_features,
        arl0=arl0,
        seed=seed,
        progress=progress,
    )
    return save_bundle(
        out,
        {
            "task": task,
            "input_shape": list(x.shape[1:]),
            "outputs": count,
            "factory": factory,
            "head": head,
            "reference_rows": len(x),
            "calibration_rows": len(held_x),
            "prepared": sorted(reference.prepared),
            "false_alarms": false_alarms(report["detectors"]),
        },
        model,
        reference,
        report,
    )


def _fast_method(name: str) -> type[fast.FastAdapter]:
    """The class of a method; of ``woc+eata`` that of ``eata``, around which the others are."""
    try:
        return fast.get(name.rpartition("+")[2])
    except ValueError as error:
        raise BundleError(f"--fast={name}: {error}") from None


def _prepared(
    method: type[fast.FastAdapter],
    model: nn.Module,
    reference: Reference,
    x: np.ndarray,
    y: np.ndarray,
    task: str,
    *,
    head: str | None,
    seed: int,
    progress: Progress,
) -> Reference:
    """The reference with what ``method`` computes from the source rows."""
    progress(f"fast method {method.name}: preparing from {len(x)} rows")
    labels = torch.from_numpy(y.astype(np.int64 if task == "classification" else np.float32))
    options = {"head": head, "seed": seed}
    known = {key: value for key, value in options.items() if key in method.Options.model_fields}
    tensors = method.prepare(model, reference, torch.from_numpy(np.ascontiguousarray(x)), labels, **known)
    if tensors:
        own = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        reference = replace(reference, prepared={**reference.prepared, method.name: own})
    else:
        progress(f"fast method {method.name}: needs nothing from the rows")
    if problem := method.check(model, reference):
        raise BundleError(f"--fast={method.name}: it can't serve this model: {problem}")
    return reference


def _measure(
    model: nn.Module,
    reference: Reference,
    x: np.ndarray,
    y: np.ndarray,
    task: str,
    head: str | None,
    with_features: bool,
) -> tuple[Rows, np.ndarray, float]:
    """What is measured of the calibration rows (n), their losses (n,) and the scale of a regression's loss."""
    meter = Meter(task, reference, keep_features=with_features)
    kind = "logits" if task == "classification" else "values"
    chunks: list[Rows] = []
    with _tap(model, head) as tap, torch.inference_mode():
        for start in range(0, len(x), CHUNK):
            chunk = torch.from_numpy(np.ascontiguousarray(x[start : start + CHUNK]))
            outputs = model(chunk)
            chunks.append(meter.measure(chunk, outputs, None if tap is None else tap.features, kind=kind))
    watched = [rows.features for rows in chunks if rows.features is not None]
    whole = Rows(
        np.concatenate([rows.prediction for rows in chunks]),
        np.concatenate([rows.confidence for rows in chunks]),
        np.concatenate([rows.signals for rows in chunks]),
        None,
        features=np.concatenate(watched) if watched else None,
    )
    if task == "classification":
        return whole, (whole.prediction != y).astype(np.float64), 1.0
    scale = max(float(np.var(y)), 1e-12)
    return whole, (whole.prediction.astype(np.float64) - y) ** 2 / scale, scale
