"""Puts a worker together from its settings: bundle, model, streams, controller, memories."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

import structlog
import torch

from daemon.actions import Actions
from daemon.bundle import Bundle, Manifest
from daemon.detector_settings import check_calibrated, check_detectors
from daemon.device import choose_device
from daemon.errors import SettingsError
from daemon.labels import LabelJoin
from daemon.learner import Learner
from daemon.limiting import aim
from daemon.loop import Loop
from daemon.monitor import Monitor
from daemon.opening import Streams, load_bundle, open_streams
from daemon.places import checkpoint_folder, is_simulated
from daemon.queries import Queries
from daemon.regulator import Regulator
from daemon.resident import Resident
from daemon.settings import Settings
from daemon.signals import Meter
from daemon.streams.codecs import Codec, codec
from daemon.tally import Tally
from daemon.telemetry import Telemetry
from daemon.tracing.opening import tracing_of
from daemon.versioning.keeper import Keeper
from daemon.worker import Worker

__all__ = ["Worker", "assemble", "build", "checkpoint_folder", "is_simulated", "load_bundle", "warm_up"]

log = structlog.get_logger("homeostat")


def _config_hash(settings: Settings, bundle: Bundle) -> str:
    """What state depends on: another bundle or another method can't go on from the old state."""
    parts = {
        "bundle": bundle.hash,
        "fast": settings.fast.model_dump(mode="json"),
        "slots": settings.slots,
        "detect": [settings.detect.name, settings.detect.features],
        "slow": settings.slow.model_dump(
            mode="json", include={"name", "memory_rows", "holdout_rows", "exact", "exact_rows", "regimes"}
        ),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _advice(variable: str, value: str, error: Exception) -> SettingsError:
    return SettingsError([f"{variable}={value}: {error}"])


def assemble(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> Worker:
    """Open the bundle and build the worker; streams are made but not opened.

    Raises:
        HomeostatError: naming the variable or file and what is wrong.
    """
    torch.set_num_threads(settings.threads)
    check_detectors(settings)
    labelled = bool(settings.labels) or is_simulated(settings)
    tracing = tracing_of(settings)
    bundle = load_bundle(settings, progress)
    worker = build(settings, bundle, lambda decoder: open_streams(settings, decoder), labelled, tracing.loop_type)
    keep_versions(worker)
    tracing.begin(worker)
    worker.tracing = tracing
    return worker


def keep_versions(worker: Worker) -> None:
    """Give the worker a keeper of its bundle's versions, where anything is kept."""
    settings, loop = worker.settings, worker.loop
    if checkpoint_folder(settings) is None and is_simulated(settings):
        return
    worker.keeper = loop.actions.keeper = Keeper(
        settings.state_dir / "versions",
        loop.resident,
        bundle=worker.bundle.hash,
        position=lambda: (loop.tally.records, loop.positions),
        failed=worker.telemetry.version_failures.inc,
    )


def assemble_beside(running: Worker, settings: Settings, fits: Callable[[Manifest], None]) -> Worker:
    """Another bundle's worker with the streams, metrics and counts of one that runs, which is not touched.

    Args:
        running: the one that runs.
        settings: the bundle is theirs.
        fits: raises where the bundle does not fit the streams.

    Raises:
        HomeostatError: naming the variable or file and what is wrong.
    """
    bundle = load_bundle(settings)
    fits(bundle.manifest)
    streams = Streams(running.source, running.sink, running.labels)
    labelled = bool(settings.labels) or is_simulated(settings)
    return build(settings, bundle, lambda decoder: streams, labelled, beside=running.loop)


def build(
    settings: Settings,
    bundle: Bundle,
    streams: Callable[[Codec], Streams],
    labelled: bool,
    loop_type: type[Loop] = Loop,
    *,
    beside: Loop | None = None,
) -> Worker:
    """Build the worker around ``bundle``; ``streams`` makes what it reads and writes.

    Args:
        settings: all but their streams is used.
        bundle: its model becomes the worker's.
        streams: called last, with the records' codec.
        labelled: whether a label stream comes with the records.
        loop_type: what carries out the loop.
        beside: the one whose metrics and counts it shares.

    Raises:
        HomeostatError: naming the variable or file and what is wrong.
    """
    check_calibrated(settings, bundle.calibration["detectors"])
    manifest = bundle.manifest
    task, shape = manifest.task, tuple(manifest.input_shape)
    try:
        device = choose_device(settings.device)
    except (ValueError, RuntimeError) as error:
        raise _advice("HOMEOSTAT_DEVICE", settings.device, error) from None
    reference = bundle.reference.to(device)
    watched = settings.detect.features is not None or bool(settings.label_queries)
    meter = Meter(task, reference, keep_probabilities=settings.probabilities, keep_features=watched)
    try:
        resident = Resident(
            bundle.model,
            meter,
            task=task,
            reference=reference,
            fast_name=settings.fast.name,
            fast_options=settings.fast.options(),
            device=device,
            twin_share=settings.twin_share,
            ring=settings.versions,
            autocast=settings.autocast,
            head=manifest.head,
        )
    except (ValueError, KeyError) as error:
        raise _advice("HOMEOSTAT_FAST", settings.fast.name, error) from None
    if settings.slots == "key" and (problem := resident.adapter.check_slots(reference.exemplars_x)):
        raise SettingsError([f"HOMEOSTAT_SLOTS=key: {problem}"])
    prior = reference.class_prior
    try:
        monitor = Monitor(
            task,
            meter.names,
            bundle.calibration,
            guard=settings.guard,
            detector=settings.detect.name,
            features=settings.detect.features,
            prior=None if prior is None else prior.cpu().numpy(),
            labelled=labelled,
            decides=resident.deciding is not None,
        )
    except (ValueError, KeyError) as error:
        raise _advice("HOMEOSTAT_DETECT", settings.detect.name, error) from None
    has_labels = labelled or settings.codec != "raw"
    classes = manifest.outputs if task == "classification" else None
    try:
        learner = Learner(
            settings.slow,
            reference,
            model=resident.frozen,
            task=task,
            classes=classes,
            input_shape=shape,
            source_error=bundle.calibration["bands"]["error"]["mean"],
            head=manifest.head,
        )
        problem = learner.check(resident.frozen) if settings.slow.enabled else None
    except (ValueError, KeyError) as error:
        raise _advice("HOMEOSTAT_SLOW", settings.slow.name, error) from None
    if problem:
        raise SettingsError([f"HOMEOSTAT_SLOW={settings.slow.name}: {problem}"])
    limits = settings.regulator
    if not settings.slow.enabled or not (has_labels or settings.slow.pseudo_labels):
        limits = _without_slow(limits)
    regulator = Regulator(limits)
    watch = monitor.watch
    names = (monitor.signal_names(), list(monitor.deviations()), list(watch.detectors), list(watch.early))
    telemetry = Telemetry(*names) if beside is None else beside.telemetry
    tally = Tally(outputs=classes or 0) if beside is None else beside.tally
    decoder = codec(settings.codec, shape, settings.registry)
    opened = streams(decoder)
    queries = None
    if opened.ask is not None:
        queries = Queries(opened.ask, settings.label_budget, task=task, counters=telemetry.queries)
    loop = loop_type(
        task=task,
        codec=decoder,
        sink=opened.sink,
        labels=opened.labels,
        resident=resident,
        monitor=monitor,
        regulator=regulator,
        join=LabelJoin(shape, settings.label_window, settings.label_window_bytes) if has_labels else None,
        actions=Actions(resident, monitor, learner, telemetry, tally, limits),
        telemetry=telemetry,
        tally=tally,
        live_times=settings.source.startswith(("kafka:", "mqtt:", "mqtts:")),
        probabilities=settings.probabilities,
        slots_by_key=settings.slots == "key",
        queries=queries,
    )
    aim(watch, settings.detect.arl0)
    log.info(
        "assembled",
        bundle=str(bundle.path),
        task=task,
        device=str(device),
        fast=settings.fast.name,
        slow=settings.slow.name if limits.slow_enabled else "off",
        dead_letters=opened.dead_letters,
    )
    parts = (opened.source, opened.sink, opened.labels, loop, telemetry)
    worker = Worker(settings, bundle, *parts, _config_hash(settings, bundle))
    if beside is None:
        worker.announce()
    return worker


def _without_slow(limits: Any) -> Any:
    from dataclasses import replace

    return replace(limits, slow_enabled=False)


def warm_up(worker: Worker) -> float:
    """Run the first, slow passes before the first record comes; state is put back to exactly what it was.

    Returns the seconds that a row of the last of them took.
    """
    resident = worker.loop.resident
    shape = tuple(worker.bundle.manifest.input_shape)
    exemplars = worker.bundle.reference.exemplars_x[:8].cpu().numpy()
    if exemplars.shape[1:] != shape:
        raise SettingsError([f"{worker.bundle.path}: exemplars of shape {exemplars.shape[1:]}, inputs of {shape}"])
    before = resident.state_dict()
    resident.set_gain(1.0)
    resident.predict(exemplars, adapt=True, serve=True)
    resident.load_state_dict(before)
    started = time.monotonic()
    resident.predict(exemplars, adapt=False, serve=True)
    seconds = (time.monotonic() - started) / len(exemplars)
    resident.load_state_dict(before)
    return seconds
