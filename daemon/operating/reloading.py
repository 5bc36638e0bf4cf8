"""SIGHUP and `homeostat ctl reload`: read the settings again and put in force what may change between two batches."""

from __future__ import annotations

from typing import Protocol

import structlog

from daemon.batcher import Batcher
from daemon.bundle import read_manifest
from daemon.config import load_settings
from daemon.env_file import VARIABLE
from daemon.errors import BundleError, HomeostatError, SettingsError
from daemon.limiting import limit
from daemon.logs import set_level
from daemon.operating.live import compare
from daemon.pressure import Pressure
from daemon.progress import Progress
from daemon.settings import Settings
from daemon.succession import Succession
from daemon.worker import Worker

log = structlog.get_logger("homeostat.operator")


WITH_BUNDLE = ("HOMEOSTAT_BUNDLE", "HOMEOSTAT_FACTORY")
"""What a new bundle brings along."""


class Service(Protocol):
    """What is reloaded."""

    worker: Worker
    succession: Succession
    progress: Progress
    batcher: Batcher
    pressure: Pressure


class NotReloadedError(HomeostatError):
    """Nothing was changed."""


def reload(service: Service) -> str:
    """Change what may change; returns what did, and what needs a restart.

    Raises:
        NotReloadedError: there is no file to read again, or a setting in it is wrong; nothing has changed then.
    """
    worker = service.worker
    if worker.settings.env_file is None:
        raise NotReloadedError(f"{VARIABLE} is not set: the environment of a running process does not change")
    try:
        new = load_settings()
        change = compare(worker.settings, new)
    except SettingsError as error:
        raise NotReloadedError("nothing is changed: " + "; ".join(error.problems)) from None
    differs = _differs(service, new)
    # Unchanged, it was refused or not at the start: no reason to refuse all else now.
    if (arl0 := new.detect.arl0) != worker.settings.detect.arl0:
        try:
            worker.loop.monitor.watch.aim(arl0)
        except ValueError as error:
            raise NotReloadedError(f"nothing is changed: HOMEOSTAT_DETECT__ARL0={arl0}: the bundle's {error}") from None
    _put_in_force(service, change.settings)
    bundle = _begin(service, new) if differs else ""
    restart = [name for name in change.restart if not (bundle and name in WITH_BUNDLE)]
    log.info("settings read again", changed=change.live, bundle=bundle or None, needs_restart=restart)
    parts = [f"changed: {', '.join(change.live)}"] if change.live else []
    parts += [bundle] if bundle else []
    parts = parts or ["nothing is changed"]
    return "; ".join([*parts, f"needs a restart: {', '.join(restart)}"] if restart else parts)


def _differs(service: Service, new: Settings) -> bool:
    """Whether another bundle is named, or another lies where the one in service was read."""
    old = service.worker.settings.bundle
    if new.bundle is None or old is None or new.bundle != old:
        return new.bundle is not None and new.bundle != old
    try:
        return read_manifest(new.bundle).hash != service.worker.bundle.hash
    except BundleError as error:
        raise NotReloadedError(f"nothing is changed: {error}") from None


def _begin(service: Service, new: Settings) -> str:
    present = service.worker.settings
    return service.succession.begin(present.model_copy(update={"bundle": new.bundle, "factory": new.factory}))


def _put_in_force(service: Service, settings: Settings) -> None:
    limit(service.worker.loop, settings, service.worker.settings)
    service.worker.settings = settings
    set_level(settings.log_level)
    service.progress.timeout_s = settings.progress_timeout_s
    service.batcher.linger_s = settings.linger_ms / 1000
    service.pressure.change(settings)
