"""What `homeostat versions` does: it reads the folder, writes files elsewhere, and leaves requests for the daemon."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemon.errors import SettingsError
from daemon.versioning import durable, files, journal
from daemon.versioning.overview import in_words, overview
from daemon.versioning.requests import Action, submit
from daemon.versions import VersionError

if TYPE_CHECKING:
    from daemon.bundle import Bundle
    from daemon.settings import Settings

LOOK_S = 0.1


def listed(folder: Path, *, everything: bool = False, as_json: bool = False) -> int:
    """Print the versions; returns 0."""
    content = overview(folder)
    if as_json:
        print(json.dumps(content, indent=1))
    else:
        print(in_words(content, everything=everything))
        if not content["versions"] and not content["decisions"]:
            print("nothing was decided yet, or HOMEOSTAT_STATE_DIR (--state) is another; the simulator keeps versions")
            print("where HOMEOSTAT_CHECKPOINT names a folder")
    return 0


def show(folder: Path, number: int, *, as_json: bool = False) -> int:
    """Print one version: record, parents down to the frozen model, tensors; returns 0.

    Raises:
        VersionError: it is not on disk.
    """
    card = files.read_card(find(folder, number))
    decisions = [entry for entry in journal.live(journal.read(folder)) if entry.get("version") == number]
    content: dict[str, Any] = {
        "number": card.number,
        "parent": card.parent,
        "parents": _parents(folder, card),
        "pinned": card.pinned,
        "bundle": card.bundle,
        "file": str(card.path),
        "bytes": card.size,
        "record": card.record,
        "tensors": card.tensors,
        "decisions": [{name: entry.get(name) for name in ("time", "event", "at", "serves")} for entry in decisions],
    }
    if as_json:
        print(json.dumps(content, indent=1))
    else:
        from daemon.inspecting import print_tree

        print_tree(content)
    return 0


def _parents(folder: Path, card: files.Card) -> list[int]:
    known, chain = files.files(folder), []
    while card.parent < card.number:
        chain.append(card.parent)
        if card.parent not in known:
            break
        card = files.read_card(known[card.parent])
    return chain


def find(folder: Path, number: int) -> Path:
    """A version's file.

    Raises:
        VersionError: there is none; naming those that there are.
    """
    known = files.files(folder)
    if number == 0:
        raise VersionError("version 0 is the frozen model: its weights are the bundle's, it has no file")
    if number not in known:
        there = ", ".join(map(str, known)) or "none"
        raise VersionError(f"{folder}: no file of version {number}; there are {there}")
    return known[number]


def export(folder: Path, number: int, target: Path) -> int:
    """Copy a version's file; returns 0.

    Raises:
        VersionError: it is not there, or the target exists or can't be written.
    """
    source = find(folder, number)
    files.read_card(source)
    _write_new(target, source.read_bytes())
    print(f"{target}: version {number}")
    return 0


def _write_new(target: Path, data: bytes) -> None:
    if target.exists():
        raise VersionError(f"{target}: exists already; name another file")
    try:
        durable.write(target, data)
    except OSError as error:
        raise VersionError(f"{target}: {error.strerror or error}") from None


def _bundle(settings: Settings) -> Bundle:
    from daemon.opening import load_bundle

    return load_bundle(settings, lambda text: print(text, file=sys.stderr, flush=True))


def merge(folder: Path, settings: Settings, sources: list[str], weights: list[float] | None, out: Path) -> int:
    """Average versions of one bundle and write the result; returns 0.

    Raises:
        HomeostatError: a source, the weights or the bundle is wrong; naming it.
    """
    if len(sources) < 2:
        raise VersionError(f"{sources[0]} alone is nothing to merge: name two versions or more")
    if weights is not None and len(weights) != len(sources):
        raise VersionError(f"--weights has {len(weights)} numbers for {len(sources)} versions; give one for each")
    if out.exists():
        raise VersionError(f"{out}: exists already; name another file")
    paths = [find(folder, int(source)) if source.isdecimal() else Path(source) for source in sources]
    for path in paths:
        files.read_card(path)
    from adapters.slow.deltas import encoding

    bundle = _bundle(settings)
    base = dict(bundle.model.named_parameters(remove_duplicate=False))
    read = [files.read(path, base, bundle=bundle.hash) for path in paths]
    try:
        delta = encoding.merge([delta for _, delta in read], files.host_of(base), weights)
    except ValueError as error:
        raise VersionError(f"{', '.join(map(str, paths))}: can't be merged: {error}") from None
    record = {
        "method": "merge",
        "merged": [{"number": card.number, "record": card.record} for card, _ in read],
        "weights": weights,
        "made_at": durable.now(),
    }
    try:
        size = files.write(out, delta, base, bundle=bundle.hash, number=0, parent=0, record=record)
    except OSError as error:
        raise VersionError(f"{out}: {error.strerror or error}") from None
    print(f"{out}: {len(delta)} parameters of {len(paths)} versions, {size:,} bytes")
    return 0


def take_in(folder: Path, settings: Settings, path: Path, *, wait_s: float) -> int:
    """Hand a file to the daemon; checked here where the settings name the bundle. Returns the exit code.

    Raises:
        HomeostatError: it is no version's file, or of another bundle.
    """
    card = files.read_card(path)
    if settings.bundle is not None:
        bundle = _bundle(settings)
        files.read(path, dict(bundle.model.named_parameters(remove_duplicate=False)), bundle=bundle.hash)
    return ask(folder, "import", number=card.number, data=path.read_bytes(), wait_s=wait_s)


def rollback(folder: Path, number: int | None, *, hold: bool, resume: bool, wait_s: float) -> int:
    """Ask for another version, or for the end of a hold; returns the exit code.

    Raises:
        SettingsError: neither or both.
    """
    if resume == (number is not None) or (resume and hold):
        raise SettingsError(["versions rollback: give a version's number (and --hold), or --resume alone"])
    if number is not None:
        return ask(folder, "rollback", number=number, hold=hold, wait_s=wait_s)
    return ask(folder, "resume", wait_s=wait_s)


def ask(
    folder: Path, action: Action, *, number: int = 0, hold: bool = False, data: bytes | None = None, wait_s: float
) -> int:
    """Leave a request, wait for what the daemon makes of it; returns 0, or 2 where it refuses."""
    if not folder.parent.is_dir():
        raise VersionError(f"{folder.parent}: no such folder; set HOMEOSTAT_STATE_DIR or --state to the daemon's")
    request = submit(folder, action, number=number, hold=hold, data=data)
    deadline = time.monotonic() + wait_s
    while True:
        for entry in reversed(journal.read(folder)):
            if entry.get("request") == request.name and not entry["superseded"]:
                return _answer(action, entry)
        if time.monotonic() >= deadline:
            print(f"{action}: asked; not taken up within {wait_s:g} s, a stopped daemon does it at its next start")
            return 0
        time.sleep(LOOK_S)


def _answer(action: str, entry: journal.Entry) -> int:
    record = entry.get("record") or {}
    if entry["event"] == "refused":
        print(f"homeostat: {action}: refused: {record.get('reason')}", file=sys.stderr)
        return VersionError.exit_code
    what = f"version {entry.get('version')} is there, pinned; " if action == "import" else ""
    held = "; held: nothing is promoted until `homeostat versions rollback --resume`" if record.get("hold") else ""
    print(f"{action}: done; {what}version {entry.get('serves')} serves{held}")
    return 0
