"""What there is to know of a folder of versions, in plain values and in words; imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from daemon.versioning import files, journal
from daemon.versioning.requests import FOLDER
from daemon.versions import VersionError


def overview(folder: Path) -> dict[str, Any]:
    """Versions with their records, all decisions, what serves, and the requests that wait.

    Raises:
        VersionError: the folder can't be read.
    """
    try:
        entries = journal.read(folder)
        found = files.files(folder)
        waiting = sorted(path.stem for path in (folder / FOLDER).glob("*.json"))
    except OSError as error:
        raise VersionError(f"{folder}: {error.strerror or error}") from None
    serves = entries[-1].get("serves", 0) if entries else 0
    holds = [hold for entry in journal.live(entries) if (hold := _of(entry, "hold")) is not None]
    versions, damaged = [], []
    for number, path in found.items():
        try:
            card = files.read_card(path)
        except VersionError as error:
            damaged.append(str(error))
            continue
        versions.append(
            {
                "number": number,
                "parent": card.parent,
                "serves": number == serves,
                "pinned": card.pinned,
                "bundle": card.bundle,
                "bytes": card.size,
                "file": str(path),
                "record": card.record,
            }
        )
    return {
        "folder": str(folder),
        "serves": serves,
        "held": bool(holds and holds[-1]),
        "waiting": waiting,
        "versions": versions,
        "damaged": damaged,
        "decisions": entries,
    }


def _of(entry: journal.Entry, name: str) -> Any:
    record = entry.get("record")
    return record.get(name) if isinstance(record, dict) else None


def in_words(content: dict[str, Any], *, everything: bool = False) -> str:
    """The table of versions; with ``everything`` also every decision, one line each."""
    served = "the frozen model" if content["serves"] == 0 else f"version {content['serves']}"
    lines = [f"{content['folder']}: {served} serves" + (", held: nothing is promoted" if content["held"] else "")]
    if content["versions"]:
        lines += _table(
            ("version", "parent", "made", "method", "rows", "gain", "lost on reference", "seconds", "bytes", ""),
            [_version_row(item) for item in content["versions"]],
        )
    else:
        lines.append("no version is kept here")
    lines += [f"damaged: {line}" for line in content["damaged"]]
    if content["waiting"]:
        lines.append(f"{len(content['waiting'])} requests wait for the daemon")
    if everything and content["decisions"]:
        lines.append("")
        lines += _table(
            ("time", "decision", "version", "serves", "row", "why", ""),
            [_decision_row(entry) for entry in content["decisions"]],
        )
    return "\n".join(lines)


def _version_row(item: dict[str, Any]) -> tuple[str, ...]:
    record = item["record"]
    marks = [name for name in ("serves", "pinned") if item[name]]
    marks += [name for name in ("withdrawn", "imported") if name in record]
    return (
        str(item["number"]),
        str(item["parent"]),
        _text(record.get("made_at")),
        _text(record.get("method")),
        _text(record.get("rows")),
        gain(record),
        _text(record.get("reference_loss")),
        _text(record.get("seconds")),
        f"{item['bytes']:,}",
        ", ".join(marks),
    )


def gain(record: dict[str, Any]) -> str:
    """A gain with its bounds, as `0.052 [0.018, 0.086] error`."""
    if record.get("gain") is None:
        return "-"
    low, high = _text(record.get("gain_low")), _text(record.get("gain_high"))
    return f"{_text(record['gain'])} [{low}, {high}] {record.get('measure', '')}".strip()


def _decision_row(entry: journal.Entry) -> tuple[str, ...]:
    at = entry.get("at")
    reason = _of(entry, "reason")
    trigger = _of(entry, "trigger")
    asked = trigger.get("reasons") if isinstance(trigger, dict) else None
    why = "; ".join([*([str(reason)] if reason else []), *map(str, asked or ())])
    return (
        _text(entry.get("time")),
        entry["event"],
        _text(entry.get("version")),
        _text(entry.get("serves")),
        _text(at.get("rows") if isinstance(at, dict) else None),
        why,
        "superseded" if entry["superseded"] else "",
    )


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
