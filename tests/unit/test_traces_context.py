"""Trace context in records' headers: what is well-formed goes on to the byte, and nothing else does."""

from __future__ import annotations

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from daemon.tracing.context import Parent, context_of, is_sampled, parent_of, traceparent

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GIVEN = f"00-{TRACE}-{SPAN}-01".encode()

hostile = st.binary(max_size=80) | st.text(string.hexdigits + "-", max_size=60).map(str.encode) | st.none()
names = st.sampled_from(["traceparent", "tracestate", "baggage", "Traceparent", "other", ""])


@pytest.mark.parametrize(
    "value",
    [GIVEN, GIVEN[:-1] + b"0", GIVEN[:-2] + b"03", b"01" + GIVEN[2:], b"cc" + GIVEN[2:] + b"-what-comes-later"],
)
def test_a_well_formed_traceparent_goes_on_to_the_byte(value: bytes) -> None:
    assert context_of([("traceparent", value)]) == {"traceparent": value}


@pytest.mark.parametrize(
    "value",
    [
        b"",
        None,
        GIVEN.upper(),
        GIVEN[:-1],
        GIVEN + b"0",
        GIVEN + b"-more",
        GIVEN + b"\n",
        b" " + GIVEN,
        b"ff" + GIVEN[2:],
        b"0" + GIVEN,
        f"00-{'0' * 32}-{SPAN}-01".encode(),
        f"00-{TRACE}-{'0' * 16}-01".encode(),
        GIVEN.replace(b"-", b"_"),
        b"cc" + GIVEN[2:] + b"-" + b"x" * 1_000,
        b"cc" + GIVEN[2:] + b"-\xff",
    ],
)
def test_a_malformed_traceparent_is_left_out_with_its_state(value: bytes | None) -> None:
    assert context_of([("traceparent", value), ("tracestate", b"a=1"), ("baggage", b"k=v")]) == {"baggage": b"k=v"}


@pytest.mark.parametrize("state", [b"a=1", b"a=1,b=2", b" a=1 , ,b=2", b"t61rcwkgmze@dd=s:1;o:rum", b"a= 1", b"0@a=b"])
def test_a_well_formed_tracestate_goes_on(state: bytes) -> None:
    assert context_of([("tracestate", state), ("traceparent", GIVEN)])["tracestate"] == state


@pytest.mark.parametrize(
    "state", [b"a", b"=1", b"A=1", b"a=1=2", b"a=\n", b"a=\xff", b"a=1," * 40, b"a=" + b"x" * 300, b" " * 5_000 + b"\0"]
)
def test_a_malformed_tracestate_is_left_out_alone(state: bytes) -> None:
    assert context_of([("traceparent", GIVEN), ("tracestate", state)]) == {"traceparent": GIVEN}


def test_of_several_headers_the_last_counts_and_other_spellings_do_not() -> None:
    other = f"00-{TRACE}-{SPAN}-00".encode()
    assert context_of([("traceparent", b"no"), ("traceparent", other), ("TraceParent", GIVEN)]) == {
        "traceparent": other
    }


def test_the_sender_is_read_as_it_was_written() -> None:
    found = context_of([("traceparent", GIVEN), ("tracestate", b"a=1")])
    assert parent_of(found) == Parent(int(TRACE, 16), int(SPAN, 16), 1, "a=1")
    assert is_sampled(found)
    assert traceparent(int(TRACE, 16), int(SPAN, 16), 1) == GIVEN
    assert parent_of({"baggage": b"k=v"}) is None


@given(st.lists(st.tuples(names, hostile), max_size=6))
@example([("traceparent", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01")])
@example([("tracestate", b"a=1"), ("baggage", b"\x00")])
def test_whatever_the_headers_hold_nothing_is_raised_and_what_goes_on_is_well_formed(
    headers: list[tuple[str, bytes | None]],
) -> None:
    found = context_of(headers)
    assert found.keys() <= {"traceparent", "tracestate", "baggage"}
    assert ("tracestate" in found) <= ("traceparent" in found)
    assert all((name, value) in headers for name, value in found.items())
    assert all(value.isascii() and value.decode().isprintable() for value in found.values())
    parent = parent_of(found)
    assert (parent is not None) == ("traceparent" in found)
    assert is_sampled(found) == (parent is not None and parent.sampled)
    assert context_of(list(found.items())) == found


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 255))
def test_what_is_written_can_be_read(trace_id: int, span_id: int, flags: int) -> None:
    found = context_of([("traceparent", traceparent(trace_id, span_id, flags))])
    parent = parent_of(found)
    assert parent is not None and parent[:3] == (trace_id, span_id, flags & 3)
