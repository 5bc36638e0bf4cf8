"""Keeps the folder's version files in step with the versions in memory, in a thread of its own.

Encoding takes singular values of every matrix that changed, seconds on a large model, and must not stand in a batch's
way. What the thread did not get done before a crash is done at the next start: the checkpoint holds the versions.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import structlog

from daemon.versioning import durable, files
from daemon.versions import Version, VersionError

if TYPE_CHECKING:
    from torch import Tensor

log = structlog.get_logger("homeostat.versions")


class Wanted(NamedTuple):
    """One version that must have a file."""

    version: Version
    pinned: bool


class Shelf:
    """Writes, renames and removes version files; a failure is logged and counted, and tried again when asked."""

    def __init__(
        self, folder: Path, base: Mapping[str, Tensor], *, bundle: str, failed: Callable[[], None] = lambda: None
    ) -> None:
        self.folder = folder
        self.bundle = bundle
        self.stale = False
        """Whether the last attempt failed: the folder is behind."""
        self._base = base
        self._failed = failed
        self._next: Sequence[Wanted] | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def ask(self, wanted: Sequence[Wanted]) -> None:
        """Bring the folder to ``wanted``, beside the stream; only the newest wish counts."""
        with self._lock:
            self._next = wanted
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="versions", daemon=True)
                self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Until the folder is in step; False when it is not in time."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return self._thread is None

    def _work(self) -> None:
        while True:
            with self._lock:
                wanted, self._next = self._next, None
                if wanted is None:
                    self._thread = None
                    return
            try:
                self.bring(wanted)
                self.stale = False
            except Exception as error:
                # A full disk, or a delta that the encoding refuses: the model serves from memory and goes on.
                self.stale = True
                self._failed()
                problem = f"{type(error).__name__}: {error}"
                log.error("versions not written, tried again later", folder=str(self.folder), problem=problem)

    def bring(self, wanted: Sequence[Wanted]) -> None:
        """Write what is missing, name files by their pins, remove what is no longer kept.

        Raises:
            OSError: the folder can't be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        durable.sweep(self.folder)
        for version, pinned in wanted:
            path = files.path_of(self.folder, version.number, pinned=pinned)
            other = files.path_of(self.folder, version.number, pinned=not pinned)
            if other.exists():
                os.replace(other, path)
                durable.sync_folder(self.folder)
            if not self._holds(path, version):
                files.write(
                    path,
                    version.delta,
                    self._base,
                    bundle=self.bundle,
                    number=version.number,
                    parent=version.parent,
                    record=version.record,
                )
        numbers = {version.number for version, _ in wanted}
        for number, path in files.files(self.folder).items():
            if number not in numbers and not self._foreign_pin(path):
                path.unlink(missing_ok=True)

    def _holds(self, path: Path, version: Version) -> bool:
        """Whether the file is this very version: a replay after a crash may make another one of the same number."""
        try:
            card = files.read_card(path)
        except VersionError:
            return False
        record = json.loads(json.dumps(durable.plain(version.record)))
        return (card.bundle, card.number, card.record) == (self.bundle, version.number, record)

    def _foreign_pin(self, path: Path) -> bool:
        """Pinned for another bundle, or unreadable: nothing that this daemon may throw away."""
        if not path.name.endswith(".pinned.safetensors"):
            return False
        try:
            return files.read_card(path).bundle != self.bundle
        except VersionError:
            return True
