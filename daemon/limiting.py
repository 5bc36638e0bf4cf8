"""Other bounds and paces for a loop that runs."""

from __future__ import annotations

from dataclasses import replace

from daemon.learning import repaced
from daemon.loop import Loop
from daemon.settings import Settings


def limit(loop: Loop, settings: Settings, before: Settings) -> None:
    """Put those of ``settings`` in force from the next batch on; ``before`` are what the loop has been made with.

    Raises:
        ValueError: the detectors can't have that HOMEOSTAT_DETECT__ARL0; nothing has changed.
    """
    if settings.detect.arl0 != before.detect.arl0:
        loop.monitor.watch.aim(settings.detect.arl0)
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
