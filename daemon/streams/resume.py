"""Where a partition goes on after a start: the checkpoint's offset against the group's."""

from __future__ import annotations

from typing import NamedTuple

from daemon.errors import StreamError


class Start(NamedTuple):
    """Where to read from, from which offset on to answer, and how many records that leaves out."""

    offset: int
    emit_from: int
    skipped: int
    reason: str


def note_of(checkpoint_id: str, sequence: int) -> str:
    """The commit's metadata string: names the checkpoint that it belongs to."""
    return f"homeostat:{checkpoint_id}:{sequence}"


def resume(
    partition: str,
    *,
    file: int | None,
    file_id: str,
    group: int | None,
    note: str,
    first: int,
    end: int,
    max_rebuild: int,
    start: str,
    out_of_range: str,
) -> Start:
    """Decide where ``partition`` goes on.

    Args:
        partition: its name, for the error.
        file: next offset in the newest checkpoint, None when it has none for this partition.
        file_id: id of that checkpoint's line of descent.
        group: offset committed by the consumer group, None when there is none.
        note: metadata of that commit; names the line of descent that made it.
        first: oldest offset on the broker.
        end: offset after the newest record.
        max_rebuild: longest run of records replayed without output.
        start: ``earliest`` or ``latest``: where a group without an offset begins.
        out_of_range: ``fail``, ``earliest`` or ``latest``.

    Raises:
        StreamError: when the offset is not on the broker and the policy is ``fail``.
    """
    if file is None and group is None:
        offset = first if start == "earliest" else end
        return Start(offset, offset, 0, f"no offset yet: {start}")
    if file is None:
        chosen = Start(group or 0, group or 0, 0, "group's offset")
    elif group is None or file >= group:
        chosen = Start(file, file, 0, "checkpoint's offset")
    elif note.startswith(f"homeostat:{file_id}:") and group - file <= max_rebuild:
        # Already answered, but our state is older: read them again for the state, not for the answers.
        chosen = Start(file, group, 0, "rebuilding state without output")
    else:
        # Another worker went on from here, or the way is too long: its records are answered, our state misses them.
        chosen = Start(group, group, group - file, "group is ahead of the checkpoint")
    if first <= chosen.offset <= end:
        return chosen
    if out_of_range == "fail":
        raise StreamError(
            f"{partition}: offset {chosen.offset} ({chosen.reason}) is not on the broker: it holds {first} to {end}. "
            "Set HOMEOSTAT_KAFKA__OUT_OF_RANGE=earliest (or latest) to go on without the missing records"
        )
    offset = first if out_of_range == "earliest" else end
    return Start(offset, offset, max(0, offset - chosen.offset), f"out of range: {out_of_range}")
