"""Carries out what an operator asks, in the loop's own thread, and writes down who asked for what."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from daemon.assembly import Worker
from daemon.errors import HomeostatError
from daemon.operating.desk import Desk, Wish
from daemon.versions import VersionError

log = structlog.get_logger("homeostat.operator")


class Hands:
    """One worker's.

    Args:
        worker: what is acted on, with its journal of decisions.
        save: makes all that was answered durable and writes a checkpoint; whether both happened.
        drain: asks the worker to finish and end.
        reload: reads the settings again; returns what became of it.
    """

    def __init__(
        self, worker: Worker, save: Callable[[], bool], drain: Callable[[], None], reload: Callable[[], str]
    ) -> None:
        self.desk = Desk()
        self._hung_up = False
        self._worker, self._save, self._drain, self._reload = worker, save, drain, reload

    def hang_up(self) -> None:
        """SIGHUP came: as if ``reload`` were asked for. For its handler, which must not wait for the desk's lock."""
        self._hung_up = True

    def step(self) -> None:
        """Carry out what waits; each is followed by a checkpoint, so that a restart does not undo it."""
        wishes = self.desk.take()
        if self._hung_up:
            self._hung_up = False
            wishes.append(Wish("reload", who="SIGHUP"))
        for wish in wishes:
            try:
                text = self._do(wish)
            except HomeostatError as error:
                self._end(wish, str(error), fine=False)
                continue
            if wish.action in ("drain", "reload") or self._save():
                self._end(wish, text)
            else:
                late = "no checkpoint could be written now: the log says why"
                self._end(
                    wish, late if wish.action == "checkpoint" else f"{text}; {late}", fine=wish.action != "checkpoint"
                )

    def _do(self, wish: Wish) -> str:
        loop = self._worker.loop
        actions, versions = loop.actions, loop.resident.versions
        match wish.action:
            case "freeze":
                actions.freeze()
                loop.adapt = False
                return (
                    f"frozen: version {versions.current.number} answers as it is, nothing adapts and nothing is learnt"
                )
            case "resume":
                actions.unfreeze()
                versions.held = False
                return "resumed: it adapts and learns again"
            case "reset":
                actions.forget_fast()
                return "fast adaptation begins again from nothing"
            case "rollback":
                before = versions.current.number
                actions.rollback(wish.number)
                versions.held |= wish.hold
                held = ", and nothing is promoted until resume" if versions.held else ""
                return f"version {wish.number} answers in place of {before}{held}"
            case "checkpoint":
                return "checkpoint written"
            case "reload":
                return self._reload()
            case "drain":
                self._drain()
                return "draining: it answers what it has read, and ends"
        raise VersionError(f"there is no action {wish.action!r}")

    def _end(self, wish: Wish, text: str, *, fine: bool = True) -> None:
        say = log.info if fine else log.error
        chronicle = self._worker.loop.actions.chronicle
        chronicle.tell(say, "asked by an operator", action=wish.action, who=wish.who, done=fine, text=text)
        record = {"asked": wish.action, "who": wish.who, "done": fine, "text": text}
        self._worker.keeper.decided("operator", record, version=wish.number if wish.action == "rollback" else None)
        wish.end(text, fine=fine)
