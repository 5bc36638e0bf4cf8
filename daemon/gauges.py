"""The gauges that are read rather than counted: brought up to date for whoever is about to read them."""

from __future__ import annotations

from daemon.device import memory_bytes, memory_limit_bytes
from daemon.loop import Loop


def refresh(loop: Loop, lag: int | None) -> None:
    """Set them from the loop's parts; from any thread, and no part of the hot path.

    Args:
        loop: what they are read from.
        lag: records that wait at the source; None: unknown.
    """
    telemetry, monitor = loop.telemetry, loop.monitor
    telemetry.lag.set(float("nan") if lag is None else lag)
    telemetry.gain.set(loop.resident.gain)
    telemetry.frozen.set(float(loop.actions.frozen))
    telemetry.version.set(loop.resident.current.number)
    for name, value in monitor.signals().items():
        telemetry.signal[name].set(value)
    for name, value in monitor.deviations().items():
        telemetry.deviation[name].set(value)
    for name, detector in monitor.watch.detectors.items():
        telemetry.statistic[name].set(detector.statistic)
        telemetry.threshold[name].set(detector.threshold)
    telemetry.shift_is(monitor.watch.shift.kind)
    for model, level in monitor.errors.items():
        telemetry.error[model].set(level.value)
    for test, value in monitor.evidence().items():
        telemetry.evidence[test].set(value)
    telemetry.labels_seen(
        joined=loop.tally.labels,
        late=0 if loop.join is None else loop.join.late,
        rejected=loop.tally.labels_rejected + (0 if loop.labels is None else sum(loop.labels.rejected.values())),
    )
    telemetry.device_memory.set(memory_bytes(loop.resident.device))
    telemetry.device_limit.set(memory_limit_bytes(loop.resident.device))
    telemetry.enter(loop.regulator.state)
