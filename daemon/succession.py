"""A new bundle in the place of the old one, while records go on being answered.

It is loaded and warmed beside the old one in a thread of its own, then answers in shadow: some rows of each batch, and
every row whose label comes, where its loss is compared with that of the answer that went out. Unless it is shown to be
worse, or answers what is not finite, it takes over between two batches: the old state is made durable, the new bundle
begins unadapted at the same offsets, and a checkpoint follows. A restart would do the same without the comparison.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import structlog

from daemon.assembly import assemble_beside, keep_versions, warm_up
from daemon.bundle import Manifest
from daemon.errors import HomeostatError
from daemon.limiting import limit
from daemon.settings import Settings
from daemon.shadow import Shadow
from daemon.worker import Worker

log = structlog.get_logger("homeostat.bundle")

CLOSE_S = 2.0


class UnfitError(HomeostatError):
    """The new bundle can't take over from the old one while the daemon runs."""


def check_fits(old: Manifest, new: Manifest) -> None:
    """Raise UnfitError where the stream, its labels or the metrics would have to change with the bundle."""
    for name in ("task", "input_shape", "outputs"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            raise UnfitError(f"its {name} is {after}, that of the one in service {before}: that needs a restart")


class Succession:
    """One worker's; all but the loading happens in the loop's own thread.

    Args:
        worker: whose bundle is replaced.
        state: the present checkpoints' line of descent and number.
        save: makes all that was answered durable and writes a checkpoint; whether both happened.
    """

    def __init__(self, worker: Worker, state: Callable[[], tuple[str, int]], save: Callable[[], bool]) -> None:
        self._worker, self._state, self._save = worker, state, save
        self._thread: threading.Thread | None = None
        self._settings: Settings | None = None
        self._made: Worker | HomeostatError | None = None

    def begin(self, settings: Settings) -> str:
        """Load the bundle that ``settings`` name, beside the one in service; returns what will happen."""
        if self._settings is not None:
            return f"{self._settings.bundle} is on its way already: the log will say what became of it"
        self._settings, self._made = settings, None
        self._thread = threading.Thread(target=self._load, args=(settings,), name="bundle", daemon=True)
        self._thread.start()
        return f"{settings.bundle} is being loaded, and takes over after {settings.bundle_rows} rows if it is no worse"

    def _load(self, settings: Settings) -> None:
        try:
            made = assemble_beside(self._worker, settings, lambda new: check_fits(self._worker.bundle.manifest, new))
            warm_up(made)
            self._made = made
        except HomeostatError as error:
            self._made = error
        except Exception as error:
            log.exception("bundle not loaded")
            self._made = UnfitError(f"{type(error).__name__}: {error}")

    def step(self) -> None:
        """Between two batches: begin to compare, refuse, or take over."""
        loop, made = self._worker.loop, self._made
        if self._settings is None or made is None:
            return
        if isinstance(made, HomeostatError):
            self._end("failed", {"reason": str(made)})
        elif loop.shadow is None:
            loop.shadow = Shadow(made.loop.resident, loop.monitor)
        elif (problem := loop.shadow.problem()) is not None:
            self._end("refused", {"reason": problem, **loop.shadow.record()})
        elif loop.shadow.rows >= self._settings.bundle_rows and self._save():
            record, before = loop.shadow.record(), self._worker.bundle.hash
            self._take_over(made, self._settings)
            self._end("taken", {**record, "before": before})
            self._save()

    def _end(self, result: str, record: dict[str, Any]) -> None:
        settings, self._settings, self._made, self._thread = self._settings, None, None, None
        worker, loop = self._worker, self._worker.loop
        loop.shadow = None
        told = {"bundle": str(settings and settings.bundle), **record}
        worker.telemetry.bundles[result].inc()
        say = log.info if result == "taken" else log.error
        loop.actions.chronicle.tell(say, f"bundle {result}", **told)
        worker.keeper.decided("bundle", {"result": result, **told})

    def _take_over(self, made: Worker, settings: Settings) -> None:
        """The same loop, streams, counts and metrics around the new model."""
        worker, loop, new = self._worker, self._worker.loop, made.loop
        old, held = loop.actions, loop.resident.versions.held
        old.learner.cancel()
        old.learner.close(CLOSE_S)
        worker.keeper.close(CLOSE_S)
        loop.resident, loop.monitor, loop.regulator = new.resident, new.monitor, new.regulator
        loop.actions, loop.adapt = new.actions, new.adapt
        loop.actions.chronicle, loop.actions.rests = old.chronicle, old.rests
        loop.resident.versions.held = held
        limit(loop, worker.settings, settings)  # they may have changed while it was compared
        if old.frozen:
            loop.actions.freeze()
            loop.adapt = False
        if loop.join is not None:
            loop.join.outdate()
        worker.bundle, worker.config_hash = made.bundle, made.config_hash
        worker.settings = worker.settings.model_copy(update={"bundle": settings.bundle, "factory": settings.factory})
        keep_versions(worker)
        lineage, sequence = self._state()
        worker.keeper.open(lineage, sequence or None)
        worker.tracing.follow(worker)
        worker.announce()
