"""A dead letter comes back as it was written, whatever the record held; what was sent is noted exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kafka.record.default_records import DefaultRecordBatchBuilder

from daemon.dead_letters.progress import MOST_CHARS, Progress
from daemon.records import DeadLetter, RawBatch
from daemon.streams import dead_letters
from daemon.streams.dead_letters import (
    MAX_BYTES,
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    REPLAYS,
    StoredLetter,
    from_kafka,
    from_line,
    partition_of,
    printable,
    to_kafka,
    to_line,
)

names = st.text(st.characters(codec="utf-8"), max_size=12)
headers = st.lists(st.tuples(names, st.none() | st.binary(max_size=40)), max_size=6)
letters = st.builds(
    DeadLetter,
    partition=st.sampled_from(["sensors/0", "sensors/11", "file:/data/in.jsonl"]),
    offset=st.integers(0, 2**50),
    key=st.none() | st.binary(max_size=30),
    value=st.none() | st.binary(max_size=60),
    reason=st.sampled_from(["undecodable", "empty", "tombstone", "wrong_shape"]),
    detail=st.text(max_size=60),
    headers=headers,
    time_s=st.none() | st.integers(0, 2**43).map(lambda ms: ms / 1000),
)


def kept(letter: DeadLetter) -> tuple[tuple[str, bytes], ...]:
    return tuple((name, value or b"") for name, value in letter.headers if not name.startswith("homeostat."))


def written(letter: DeadLetter) -> StoredLetter:
    key, value, found = to_kafka(letter)
    return from_kafka(key, value, found, timestamp_ms=-1)


@given(letters)
def test_a_letter_on_kafka_gives_the_record_back(letter: DeadLetter) -> None:
    found = written(letter)
    assert (found.partition, found.offset, found.reason) == (letter.partition, letter.offset, letter.reason)
    assert found.key == letter.key
    # A tombstone is told from an empty value.
    assert found.value == (None if letter.reason == "tombstone" else letter.value)
    assert found.headers == kept(letter)
    assert found.time_s == (None if letter.time_s is None else pytest.approx(letter.time_s, abs=5e-4))


@given(letters)
def test_a_letter_in_a_file_gives_the_record_back(letter: DeadLetter) -> None:
    line = to_line(letter)
    assert b"\n" not in line
    found = from_line(line)
    assert (found.partition, found.offset, found.reason) == (letter.partition, letter.offset, letter.reason)
    assert (found.key, found.value, found.headers, found.time_s) == (
        letter.key,
        letter.value,
        kept(letter),
        letter.time_s,
    )


@given(letters, st.integers(1, 5))
def test_each_replay_counts_one_and_the_first_origin_stays_known(letter: DeadLetter, times: int) -> None:
    first = written(letter)
    stored, line = first, first.replay_of or first.origin
    for _ in range(times):
        again = stored.again()
        # What is sent again holds the count once, and the record's own headers as they were.
        assert [name for name, _ in again].count(REPLAYS) == 1
        assert tuple(again[: len(first.headers)]) == first.headers
        stored = written(DeadLetter("sensors/4", 99, letter.key, letter.value, letter.reason, "", again))
        assert from_line(to_line(DeadLetter("p/0", 1, None, b"", "empty", "", again))).replays == stored.replays
    assert stored.replays == first.replays + times
    assert stored.replay_of == line


@given(st.lists(st.tuples(names, st.none() | st.binary(max_size=30)), max_size=5), st.binary(max_size=200))
@example([("homeostat.partition", b"p/0"), ("homeostat.offset", b"-1"), ("homeostat.reason", b"r")], b"")
@example([("homeostat.partition", b"p/0"), ("homeostat.offset", "٣".encode()), ("homeostat.reason", b"r")], b"")
@example([("homeostat.partition", b"\xff"), ("homeostat.offset", b"9" * 400), ("homeostat.reason", b"r")], b"")
def test_what_is_no_letter_is_refused_and_never_breaks_the_reader(
    found: list[tuple[str, bytes | None]], line: bytes
) -> None:
    with pytest.raises(ValueError):
        from_kafka(None, b"", found, 0)
    with pytest.raises(ValueError):
        from_line(line)


def test_a_forged_count_of_replays_is_a_number_or_nothing() -> None:
    for text, count in ((b"2", 2), (b"-1", 0), (b"1e9", 0), (b"9" * 30, 0), (b"", 0), (None, 0)):
        assert written(DeadLetter("p/0", 1, None, b"x", "empty", "", [(REPLAYS, text)])).replays == count


def test_headers_that_only_look_like_ours_don_t_change_where_a_letter_came_from() -> None:
    forged = [("homeostat.partition", b"other/9"), ("homeostat.offset", b"1"), ("homeostat.cut", b"5"), ("mine", b"1")]
    found = written(DeadLetter("p/0", 7, None, b"x", "empty", "", forged))
    assert (found.origin, found.cut, found.headers) == ("p/0:7", None, (("mine", b"1"),))


@pytest.mark.parametrize(
    ("given_headers", "count"),
    [
        ([("h", b"")] * (MAX_HEADERS + 5), MAX_HEADERS),
        ([("a", b"x" * (MAX_HEADER_BYTES - 1)), ("b", b"x")], 1),
    ],
)
def test_of_many_or_large_headers_the_first_are_kept_and_the_others_counted(
    given_headers: list[tuple[str, bytes]], count: int
) -> None:
    letter = DeadLetter("p/0", 1, None, b"x", "empty", "", given_headers)
    for found in (written(letter), from_line(to_line(letter))):
        assert (len(found.headers), found.dropped) == (count, len(given_headers) - count)


@pytest.mark.parametrize("over", [-1, 0, 1, 5 << 20])
def test_a_letter_is_never_larger_than_a_broker_takes(over: int) -> None:
    letter = DeadLetter("sensors/0", 1, b"k" * 100, b"v" * (MAX_BYTES + over), "too_large", "d" * 5000, [("h", b"1")])
    key, value, found = to_kafka(letter)
    size = DefaultRecordBatchBuilder.estimate_size_in_bytes(key, value, found)
    assert size <= MAX_BYTES < 1_048_576
    assert from_kafka(key, value, found, 0).cut == MAX_BYTES + over + 100
    fits = DeadLetter("sensors/0", 1, b"k", b"v" * (MAX_BYTES - 2_000), "too_large", "", [])
    assert written(fits).cut is None and written(fits).value == fits.value


def test_letters_from_before_the_record_s_time_was_noted_have_their_own() -> None:
    old = [("homeostat.partition", b"p/0"), ("homeostat.offset", b"3"), ("homeostat.reason", b"tombstone")]
    found = from_kafka(b"k", b"", old, 1_500)
    assert (found.time_s, found.value, found.replays) == (1.5, None, 0)


def test_a_row_of_a_batch_dies_with_its_own_headers_and_time() -> None:
    raw = RawBatch([b"a", None], [None, b"k"], [1.5, 2.5], ["p/0", "p/0"], [6, 7], {("p/0", 7): [("h", b"1")]})
    assert raw.dead_letter(0, "empty", "d") == DeadLetter("p/0", 6, None, b"a", "empty", "d", (), 1.5)
    assert raw.dead_letter(1, "tombstone", "d") == DeadLetter(
        "p/0", 7, b"k", None, "tombstone", "d", [("h", b"1")], 2.5
    )


@given(st.sampled_from(["sensors/0", "sensors/7", "file:/a/b", "odd/name/x", "", "p/" + "9" * 30]), st.integers(1, 12))
def test_what_comes_from_one_partition_always_goes_to_the_same_one(origin: str, count: int) -> None:
    partitions = set(range(count))
    assert partition_of(origin, partitions) == partition_of(origin, sorted(partitions, reverse=True)) in partitions
    if origin == "sensors/7":
        assert partition_of(origin, partitions) == 7 % count


@given(st.text())
def test_no_control_character_of_a_record_reaches_the_terminal(text: str) -> None:
    shown = printable(text)
    assert (shown.isprintable() or not shown) and len(shown) <= 160


offsets = st.integers(0, 400)


@given(st.lists(st.tuples(offsets, st.booleans())), offsets)
def test_progress_wants_exactly_what_was_not_sent(steps: list[tuple[int, bool]], first: int) -> None:
    progress, sent, high = Progress(first), set[int](), first
    for offset, goes in sorted(steps):
        if not progress.wants(offset):
            continue
        if goes:
            progress.sent(offset)
            sent.add(offset)
        else:
            progress.leave(offset)
        high = max(high, offset + 1)
    read = Progress.read(progress.first, progress.note())
    looked_at = {offset for offset, _ in steps if offset >= first}
    for offset in range(first, 402):
        assert read.wants(offset) == progress.wants(offset)
        if offset in looked_at:
            assert progress.wants(offset) == (offset not in sent)
    assert all(progress.first <= offset for offset in range(first, 410) if progress.wants(offset))
    assert progress.next == read.next == high
    cut = Progress.read(progress.first, progress.note())
    cut.begin_at(200)
    assert [cut.wants(offset) for offset in range(200, 410)] == [progress.wants(offset) for offset in range(200, 410)]


@given(offsets, st.text(max_size=60) | st.from_regex(r"replay:[0-9]{1,6}:[!-~]{0,40}", fullmatch=True))
def test_a_damaged_note_sends_letters_again_rather_than_losing_them(first: int, note: str) -> None:
    progress = Progress.read(first, note)
    assert progress.first >= first and progress.wants(progress.next)


def test_a_note_is_small_or_refused_and_a_bomb_is_neither_unpacked_nor_believed() -> None:
    one_reason_of_five = Progress()
    for offset in range(40_000):
        (one_reason_of_five.sent if offset % 5 else one_reason_of_five.leave)(offset)
    assert len(one_reason_of_five.note()) < MOST_CHARS
    scattered, state = Progress(), 1
    for offset in range(60_000):
        state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        (scattered.sent if state >> 63 else scattered.leave)(offset)
    with pytest.raises(ValueError, match="letters were left"):
        scattered.note()
    bomb = Progress()
    bomb.leave(0)
    bomb.sent(100_000_000)
    with pytest.raises(ValueError, match="stretch of 100000001"):
        bomb.note()


def test_a_file_s_lines_stay_readable_for_a_person(tmp_path: Path) -> None:
    line = json.loads(to_line(DeadLetter("p/0", 3, None, b"", "empty", "the value has no bytes", [("h", None)], 2.0)))
    assert line == {
        "partition": "p/0",
        "offset": 3,
        "reason": "empty",
        "detail": "the value has no bytes",
        "key": None,
        "value": "",
        "time": 2.0,
        "headers": [["h", ""]],
    }
    assert dead_letters.from_line(json.dumps(line).encode()).headers == (("h", b""),)
