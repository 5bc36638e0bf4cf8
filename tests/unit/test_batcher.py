from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from daemon.batcher import STALL_S, Batcher
from daemon.records import RawBatch
from tests.unit.worlds import MemorySource, raw


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Endless(MemorySource):
    """A stream that stands still at its end instead of ending."""

    ended = False  # type: ignore[assignment]

    def poll(self, max_rows: int, timeout_s: float) -> RawBatch:
        polled = super().poll(max_rows, timeout_s)
        polled.arrived = 0.0
        return polled


def values(count: int) -> list[bytes]:
    return [str(row).encode() for row in range(count)]


@given(
    total=st.integers(0, 200),
    rows=st.integers(1, 40),
    sizes=st.lists(st.integers(0, 50), max_size=60),
    limit=st.none() | st.integers(1, 40),
)
def test_batches_are_full_until_the_end_whatever_the_poll_sizes(
    total: int, rows: int, sizes: list[int], limit: int | None
) -> None:
    source = MemorySource(values(total), sizes)
    batcher = Batcher(source, rows, 0.0, Clock())
    batches = []
    while not (source.ended and not batcher.held):
        if (batch := batcher.next(0.0, limit)) is not None:
            batches.append(batch)
    assert [value for batch in batches for value in batch.values] == values(total)
    assert [offset for batch in batches for offset in batch.offsets] == list(range(total))
    full = min(rows, limit or rows)
    assert all(len(batch) == full or batch.offsets[0] + full > total for batch in batches)


def test_a_partial_batch_waits_for_the_linger_and_no_longer() -> None:
    clock = Clock()
    batcher = Batcher(Endless(values(3)), 10, 0.5, clock)
    assert batcher.next(0.0) is None and batcher.held == 3
    clock.now = 0.4
    assert batcher.next(0.0) is None
    clock.now = 0.5
    assert batcher.next(0.0) is not None and batcher.held == 0


def test_a_partial_batch_waits_for_a_backlog_but_not_for_ever() -> None:
    clock = Clock()
    batcher = Batcher(Endless(values(20), [3, 0, 0, 0]), 10, 0.0, clock)
    assert batcher.next(0.0) is None and batcher.next(0.0) is None
    clock.now = STALL_S
    cut = batcher.next(0.0)
    assert cut is not None and len(cut) == 3


def test_rows_of_a_partition_that_went_away_are_dropped_and_the_others_kept_in_order() -> None:
    class Two(Endless):
        def poll(self, max_rows: int, timeout_s: float) -> RawBatch:
            polled = super().poll(max_rows, timeout_s)
            polled.partitions = [f"t/{offset % 2}" for offset in polled.offsets]
            return polled

    batcher = Batcher(Two(values(5), [5]), 10, 1.0, Clock())
    assert batcher.next(0.0) is None
    assert batcher.drop({"t/7"}) == 0
    assert batcher.drop({"t/1"}) == 2
    held = batcher.flush()
    assert held is not None and held.offsets == [0, 2, 4] and held.values == [b"0", b"2", b"4"]
    assert batcher.drop({"t/0"}) == 0


def test_dropping_every_row_leaves_no_batch() -> None:
    batcher = Batcher(Endless(values(4), [4]), 10, 1.0, Clock())
    assert batcher.next(0.0) is None
    assert batcher.drop({"mem/0"}) == 4 and batcher.flush() is None


def test_next_positions_are_one_past_the_last_row() -> None:
    assert raw(values(3), first=5).next_positions() == {"mem/0": 8}
