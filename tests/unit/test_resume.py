"""Where a partition goes on: nothing skipped, nothing answered twice that need not be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.errors import StreamError
from daemon.streams.resume import note_of, resume

OWN = note_of("mine", 4)


def decide(**given: Any) -> Any:
    facts: dict[str, Any] = {
        "file": None,
        "file_id": "mine",
        "group": None,
        "note": "",
        "first": 0,
        "end": 1_000,
        "max_rebuild": 100,
        "start": "earliest",
        "out_of_range": "fail",
    }
    return resume("t/0", **(facts | given))


def test_a_new_group_begins_where_it_is_told() -> None:
    assert decide(first=5).offset == 5
    assert decide(start="latest").offset == 1_000


def test_the_checkpoint_wins_when_it_is_not_behind_the_group() -> None:
    assert decide(file=50, group=50, note=OWN)[:3] == (50, 50, 0)
    assert decide(file=50, group=40, note=OWN)[:3] == (50, 50, 0)


def test_a_group_ahead_by_our_own_commit_is_caught_up_without_output() -> None:
    assert decide(file=50, group=90, note=OWN)[:3] == (50, 90, 0)


def test_a_group_ahead_by_another_worker_is_followed_and_the_jump_counted() -> None:
    assert decide(file=50, group=90, note=note_of("other", 1))[:3] == (90, 90, 40)


def test_a_way_longer_than_max_rebuild_is_not_walked() -> None:
    assert decide(file=50, group=500, note=OWN)[:3] == (500, 500, 450)


def test_an_offset_that_is_gone_fails_unless_a_jump_is_allowed() -> None:
    with pytest.raises(StreamError, match=r"t/0: offset 50 .* holds 60 to 1000"):
        decide(file=50, first=60)
    assert decide(file=50, first=60, out_of_range="earliest")[:3] == (60, 60, 10)
    assert decide(file=50, first=60, out_of_range="latest")[:3] == (1_000, 1_000, 950)


@given(
    st.none() | st.integers(0, 200),
    st.none() | st.integers(0, 200),
    st.sampled_from(["", OWN, note_of("other", 9)]),
    st.integers(0, 150),
)
def test_no_record_between_the_offsets_is_ever_lost_silently(
    file: int | None, group: int | None, note: str, max_rebuild: int
) -> None:
    start = decide(file=file, group=group, note=note, max_rebuild=max_rebuild)
    assert start.emit_from >= start.offset
    answered = max(offset for offset in (file, group, 0) if offset is not None)
    assert start.emit_from <= answered, "a record that nobody answered would be left out"
    if file is not None:
        assert start.skipped == max(0, start.offset - file), "what the state misses is counted"
