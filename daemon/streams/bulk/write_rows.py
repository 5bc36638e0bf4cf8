"""What becomes of rows that were handed to a producer: their acknowledgement, and the memory they hold till then."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from kafka import errors as kafka_errors


class Room:
    """The bytes that rows may hold before the broker has acknowledged them.

    kafka-python 3 has no such bound: its ``send`` never waits, and a broker that is away fills the memory.

    Args:
        limit: bytes; one row that is larger still passes, alone.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._used = 0
        self._changed = threading.Condition()

    @property
    def used(self) -> int:
        """Bytes held now."""
        return self._used

    def take(self, costs: Sequence[int]) -> int:
        """Take room for as many of the leading ``costs`` as there is room for; how many these are."""
        with self._changed:
            total = sum(costs)
            free = self.limit - self._used
            if total <= free:
                count = len(costs)
            else:
                count = total = 0
                for cost in costs:
                    if total + cost > free and (count or self._used):
                        break
                    total += cost
                    count += 1
            self._used += total
            return count

    def give(self, size: int) -> None:
        """Give ``size`` bytes back."""
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def wait(self, size: int, timeout_s: float) -> bool:
        """Wait until ``size`` bytes are free, or all of them; whether that came to be."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._used or self.limit - self._used >= size, timeout_s)

    def wait_empty(self, timeout_s: float | None) -> bool:
        """Wait until nothing is held; whether that came to be."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._used, timeout_s)


class SentRows:
    """Rows of one call that went into one batch: acknowledged, or refused, together.

    It stands in the batch's list of futures once for each of its rows. When the broker finds a batch too large,
    kafka-python cuts it in two and calls ``rebind`` for each row: from then on the rows are counted where they went.

    Args:
        partition: kafka-python's TopicPartition.
        rows: how many.
    """

    __slots__ = ("_bound", "_left", "_room", "_size", "exception", "is_done", "partition", "rows")

    def __init__(self, partition: Any, rows: int) -> None:
        self.partition = partition
        self.rows = rows
        self.is_done = False
        self.exception: BaseException | None = None
        self._left = rows
        self._bound: dict[Any, list[int]] = {}  # per batch's future: places of the rows in the batch
        self._room: Room | None = None
        self._size = 0

    def failed(self) -> bool:
        """Whether the broker refused any of the rows for good; ``exception`` says why."""
        return self.is_done and self.exception is not None

    def succeeded(self) -> bool:
        """Whether all of the rows are acknowledged."""
        return self.is_done and self.exception is None

    def holds(self, room: Room, size: int) -> None:
        """Give ``size`` bytes back to ``room`` when done."""
        self._room, self._size = room, size

    def bind(self, produce_future: Any, first: int) -> None:
        """The rows are those from place ``first`` of the batch that ``produce_future`` belongs to."""
        self._bound[produce_future] = [first, self.rows]
        produce_future.add_callback(self._finished, produce_future)

    def rebind(self, produce_future: Any, place: int) -> None:
        """One more row, in order, is now at ``place`` of another batch; the batch it was in never finishes."""
        bound = self._bound.get(produce_future)
        if bound is None:
            self._bound[produce_future] = [place, 1]
            produce_future.add_callback(self._finished, produce_future)
        else:
            bound[1] += 1

    def fail(self, error: BaseException) -> SentRows:
        """Done, and refused."""
        self.exception = error
        self._done()
        return self

    def _finished(self, produce_future: Any, result: Any) -> None:
        first, rows = self._bound.pop(produce_future)
        error_of = result[2]  # a batch's future always succeeds: a refusal is a function from row to error
        if error_of is not None and self.exception is None:
            errors = [error_of(place) for place in range(first, first + rows)]
            # Where the broker names the rows at fault, the others get a bare KafkaError.
            self.exception = next((error for error in errors if type(error) is not kafka_errors.KafkaError), errors[0])
        self._left -= rows
        if self._left == 0:
            self._done()

    def _done(self) -> None:
        self._bound.clear()
        self.is_done = True
        if self._room is not None:
            self._room.give(self._size)
