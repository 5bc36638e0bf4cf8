"""Trace context in the headers of records, as W3C Trace Context and W3C Baggage define it. Nothing here traces.

Headers come from whoever may write to the stream. What is not well-formed is left out, and never an error: an answer's
headers are always ones that other programs can read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from daemon.records import Header

PARENT, STATE, BAGGAGE = "traceparent", "tracestate", "baggage"
NAMES = frozenset((PARENT, STATE, BAGGAGE))
"""Names of the headers; in records they are looked for in this spelling alone, as all instrumentations write it."""

_IDS = rb"(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_PARENT = re.compile(rb"00-" + _IDS + rb"|(?!00|ff)[0-9a-f]{2}-" + _IDS + rb"(?:-[\x21-\x7e]*)?")
"""version-traceid-parentid-flags; versions after 00 may have more behind it (W3C Trace Context, 3.2)."""
_KEY = rb"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
_MEMBER = re.compile(_KEY + rb"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]")
"""One vendor's key and value (3.3.1.3)."""
_MEMBERS = 32
_BAGGAGE = re.compile(rb"[\x20-\x7e]+")
_PARENT_BYTES, _STATE_BYTES, _BAGGAGE_BYTES = 512, 4096, 8192
_SAMPLED = 1
_ODD = frozenset(b"13579bdf")
"""Last digits of flags with that bit."""


class Parent(NamedTuple):
    """The span that sent a record."""

    trace_id: int
    span_id: int
    flags: int
    """Bit 0: it is sampled. Bit 1: its trace id is random."""
    state: str
    """The ``tracestate`` with it; empty: none."""

    @property
    def sampled(self) -> bool:
        """Whether its sender recorded it, and asks others to."""
        return bool(self.flags & _SAMPLED)


def context_of(headers: Iterable[Header]) -> dict[str, bytes]:
    """The well-formed ``traceparent``, ``tracestate`` and ``baggage`` among a record's headers.

    Of several with one name the last counts, as for Kafka's own clients. A ``tracestate`` without its ``traceparent``
    means nothing and is left out.
    """
    found: dict[str, bytes] = {}
    for name, value in headers:
        if name in NAMES and value:
            found[name] = value
    if not found:
        return found
    if not _is_parent(found.get(PARENT, b"")):
        found.pop(PARENT, None)
        found.pop(STATE, None)
    elif STATE in found and not _is_state(found[STATE]):
        del found[STATE]
    if BAGGAGE in found and not (len(found[BAGGAGE]) <= _BAGGAGE_BYTES and _BAGGAGE.fullmatch(found[BAGGAGE])):
        del found[BAGGAGE]
    return found


def parent_of(context: dict[str, bytes]) -> Parent | None:
    """The sending span in what `context_of` gave; None where there is none."""
    given = context.get(PARENT)
    if given is None:
        return None
    return Parent(int(given[3:35], 16), int(given[36:52], 16), int(given[53:55], 16), context.get(STATE, b"").decode())


def is_sampled(context: dict[str, bytes]) -> bool:
    """Whether the sending span is sampled; cheaper than to make it."""
    given = context.get(PARENT)
    return given is not None and given[54] in _ODD


def traceparent(trace_id: int, span_id: int, flags: int) -> bytes:
    """The header's value, version 00; of the flags those that version 00 and its level 2 know."""
    return b"00-%032x-%016x-%02x" % (trace_id, span_id, flags & 3)


def _is_state(given: bytes) -> bool:
    """Whether it is a list of members, some perhaps empty. Cut first: a pattern of it all can be made to take long."""
    if len(given) > _STATE_BYTES:
        return False
    members = [member.strip(b" ") for member in given.split(b",")]
    return len(members) <= _MEMBERS and all(not member or _MEMBER.fullmatch(member) for member in members)


def _is_parent(given: bytes) -> bool:
    return len(given) <= _PARENT_BYTES and _PARENT.fullmatch(given) is not None
