"""How a dead letter is written, and read again: in Kafka's headers, and as a line of JSON.

Kafka: key and value are the record's own. Headers that begin with ``homeostat.`` say where it came from and why it
could not be answered; the record's own headers follow, by their own names. A line holds the same, bytes in base64.

A letter is not the record's only copy, so it is bounded: of many or large headers the first are kept and the others
counted, and a value with which the letter would be larger than a broker takes is left out and its length noted.
"""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from daemon.records import DeadLetter, Header

PREFIX = "homeostat."
REPLAYS = PREFIX + "replays"
"""How often the record was sent again; goes with a replayed record, so that it is known when that dies again."""
REPLAY_OF = PREFIX + "replay-of"
"""``topic/partition:offset`` of the first record of that line."""
MAX_HEADERS = 64
MAX_HEADER_BYTES = 16_384
MAX_BYTES = 1_000_000
"""Of a letter on Kafka. Brokers and producers take 1 MiB unless told otherwise: message.max.bytes, max_request_size."""

_DETAIL_BYTES = 1024
_MAX_NUMBER = 2**62
_OVERHEAD = 128
"""Bytes of a record on Kafka that are neither key, value nor header, at the most."""


@dataclass(frozen=True, slots=True)
class StoredLetter:
    """A dead letter as it was read again."""

    partition: str
    offset: int
    reason: str
    detail: str
    key: bytes | None
    value: bytes | None
    """None for a tombstone."""
    time_s: float | None = None
    """Of the record, in seconds since the epoch; None where that is not known."""
    headers: tuple[tuple[str, bytes], ...] = ()
    """The record's own."""
    replays: int = 0
    """How often the record had been sent again when it died."""
    replay_of: str = ""
    dropped: int = 0
    """Own headers that were not kept."""
    cut: int | None = None
    """Bytes of key and value, where they were too many to be kept."""

    @property
    def origin(self) -> str:
        """``partition:offset``."""
        return f"{self.partition}:{self.offset}"

    def again(self) -> list[tuple[str, bytes]]:
        """Headers of the record that is sent again: its own, and how often that is by then."""
        line = self.replay_of or self.origin
        return [*self.headers, (REPLAYS, b"%d" % (self.replays + 1)), (REPLAY_OF, line.encode("utf-8", "replace"))]


def own_headers(headers: Iterable[Header]) -> tuple[list[tuple[str, bytes]], int, int, str]:
    """The record's own headers as far as they are kept, how many were not, its count of replays, and its line."""
    kept: list[tuple[str, bytes]] = []
    dropped = replays = size = 0
    line = ""
    for name, given in headers:
        value = b"" if given is None else bytes(given)
        if name == REPLAYS:
            replays = _number(value) or 0
        elif name == REPLAY_OF:
            line = value[:_DETAIL_BYTES].decode("utf-8", "replace")
        elif not name.startswith(PREFIX):
            size += len(name.encode("utf-8", "replace")) + len(value)
            if len(kept) < MAX_HEADERS and size <= MAX_HEADER_BYTES:
                kept.append((_clean(name), value))
            else:
                dropped += 1
    return kept, dropped, replays, line


def to_kafka(letter: DeadLetter) -> tuple[bytes | None, bytes, list[tuple[str, bytes]]]:
    """Key, value and headers of the letter.

    The value of a tombstone is empty: None would be one again, and is refused without a key. A header tells them apart.
    """
    own, dropped, replays, line = own_headers(letter.headers)
    said: dict[str, Any] = {
        "partition": letter.partition,
        "offset": letter.offset,
        "timestamp": None if (ms := _milliseconds(letter.time_s)) is None else ms,
        "reason": letter.reason,
        "detail": letter.detail,
        "tombstone": 1 if letter.value is None else None,
        "replays": replays or None,
        "replay-of": line or None,
        "headers-dropped": dropped or None,
    }
    key, value = letter.key, b"" if letter.value is None else bytes(letter.value)
    headers = [
        (PREFIX + name, str(text).encode("utf-8", "replace")[:_DETAIL_BYTES])
        for name, text in said.items()
        if text is not None
    ]
    headers += own
    size = _OVERHEAD + sum(len(name.encode("utf-8", "replace")) + len(given) + 10 for name, given in headers)
    if size + len(key or b"") + len(value) > MAX_BYTES:
        headers.append((PREFIX + "cut", b"%d" % (len(key or b"") + len(value))))
        key, value = None if key is None or len(key) > MAX_HEADER_BYTES else key, b""
    return key, value, headers


def from_kafka(key: bytes | None, value: bytes | None, headers: Iterable[Header], timestamp_ms: int) -> StoredLetter:
    """The letter that ``to_kafka`` wrote; ``timestamp_ms`` is its own, for letters that don't know their record's.

    Raises:
        ValueError: it is not a dead letter.
    """
    given = list(headers)
    said = {name.removeprefix(PREFIX): bytes(item or b"") for name, item in given if name.startswith(PREFIX)}
    offset = _number(said.get("offset", b""))
    if "partition" not in said or "reason" not in said or offset is None:
        raise ValueError("no headers homeostat.partition, .offset and .reason")
    own, _, replays, line = own_headers(given)
    reason, ms = said["reason"].decode("utf-8", "replace"), _number(said.get("timestamp", b""))
    ms = timestamp_ms if ms is None else ms
    return StoredLetter(
        partition=said["partition"].decode("utf-8", "replace"),
        offset=offset,
        reason=reason,
        detail=said.get("detail", b"").decode("utf-8", "replace"),
        key=key,
        value=None if "tombstone" in said or reason == "tombstone" else value or b"",
        time_s=None if ms < 0 else ms / 1000,
        headers=tuple(own),
        replays=replays,
        replay_of=line,
        dropped=_number(said.get("headers-dropped", b"")) or 0,
        cut=_number(said["cut"]) if "cut" in said else None,
    )


def to_line(letter: DeadLetter) -> bytes:
    """The letter as a line of JSON, without its end. What says nothing is left out, but for key and value."""
    own, dropped, replays, line = own_headers(letter.headers)
    time_s = letter.time_s
    said: dict[str, Any] = {
        "time": None if time_s is None or not math.isfinite(time_s) else time_s,
        "replays": replays or None,
        "replay_of": line or None,
        "headers": [[name, _text(value)] for name, value in own] or None,
        "headers_dropped": dropped or None,
    }
    always = {
        "partition": _clean(letter.partition),
        "offset": letter.offset,
        "reason": letter.reason,
        "detail": _clean(letter.detail),
        "key": _text(letter.key),
        "value": _text(letter.value),
    }
    return msgspec.json.encode(always | {name: item for name, item in said.items() if item is not None})


class _Line(msgspec.Struct):
    partition: str
    offset: int
    reason: str
    detail: str = ""
    key: str | None = None
    value: str | None = None
    time: float | None = None
    replays: int = 0
    replay_of: str = ""
    headers: list[tuple[str, str]] = []
    headers_dropped: int = 0


_decode = msgspec.json.Decoder(_Line).decode


def from_line(line: bytes) -> StoredLetter:
    """The letter that ``to_line`` wrote.

    Raises:
        ValueError: it is not a dead letter.
    """
    try:
        found = _decode(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if not 0 <= found.offset <= _MAX_NUMBER:
        raise ValueError(f"offset {found.offset}")
    return StoredLetter(
        partition=found.partition,
        offset=found.offset,
        reason=found.reason,
        detail=found.detail,
        key=_bytes(found.key),
        value=_bytes(found.value),
        time_s=found.time if found.time is not None and math.isfinite(found.time) else None,
        headers=tuple((name, b64decode(value, validate=True)) for name, value in found.headers),
        replays=min(max(found.replays, 0), _MAX_NUMBER),
        replay_of=found.replay_of,
        dropped=found.headers_dropped,
    )


def printable(text: str, most: int = 160) -> str:
    """``text`` for a terminal: no control character reaches it, and at most ``most`` characters."""
    shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def partition_of(origin: str, partitions: Collection[int]) -> int:
    """Which of a topic's ``partitions`` takes what came from ``origin``: always the same, so that its order is kept."""
    number = origin.rpartition("/")[2]
    place = int(number) if number.isdecimal() and len(number) < 10 else sum(origin.encode("utf-8", "replace"))
    ordered = sorted(partitions)
    return ordered[place % len(ordered)]


def _number(text: bytes) -> int | None:
    """A number from 0 to 2**62, None for anything else: whoever writes to the topic may write anything there."""
    if not text.isdigit() or len(text) > 19:
        return None
    value = int(text)
    return value if value <= _MAX_NUMBER else None


def _milliseconds(time_s: float | None) -> int | None:
    if time_s is None or not math.isfinite(time_s) or not 0 <= time_s < 1e13:
        return None
    return round(time_s * 1000)


def _clean(text: str) -> str:
    """``text`` without halves of surrogate pairs, which no encoder takes."""
    return text.encode("utf-8", "replace").decode()


def _text(value: bytes | None) -> str | None:
    return None if value is None else b64encode(value).decode()


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else b64decode(text, validate=True)
