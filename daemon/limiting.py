"""Other bounds and paces for a loop that runs."""

from __future__ import annotations

from dataclasses import replace

import structlog

from daemon.learning import repaced
from daemon.loop import Loop
from daemon.settings import Settings
from daemon.watch import Watch

log = structlog.get_logger("homeostat")


def aim(watch: Watch, arl0: float | None) -> None:
    """Set how often the detectors may be wrong; where their bundle does not tell how, they stay and that is logged."""
    try:
        watch.aim(arl0)
    except ValueError as error:
        log.warning(
            "the bundle's detectors are calibrated for another HOMEOSTAT_DETECT__ARL0: pack it again to change that",
            asked=arl0,
            bundle=watch.arl0,
            reason=str(error),
        )


def limit(loop: Loop, settings: Settings, before: Settings) -> None:
    """Put those of ``settings`` in force from the next batch on; ``before`` are what the loop has been made with."""
    if settings.detect.arl0 != before.detect.arl0:
        aim(loop.monitor.watch, settings.detect.arl0)
    # Without labels the slow loop was switched off at the start, whatever the settings say.
    never = before.regulator.slow_enabled and not loop.regulator.limits.slow_enabled
    limits = replace(settings.regulator, slow_enabled=False) if never else settings.regulator
    loop.regulator.limits = loop.actions.limits = limits
    loop.regulator.band.limit(limits)
    loop.monitor.fast_guard.limits = loop.monitor.slow_guard.limits = settings.guard
    learner = loop.actions.learner
    learner.settings, learner.bench = settings.slow, repaced(learner.bench, settings.slow)
    learner.worth.price = settings.slow.price
    if loop.queries is not None:
        loop.queries.share = settings.label_budget.share
