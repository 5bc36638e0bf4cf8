"""Whether the installed kafka-python is the one that bulk producing was written for: version, names, and a trial."""

from __future__ import annotations

import functools
import re
from typing import Any

from kafka.partitioner.default import DefaultPartitioner, murmur2
from kafka.producer.producer_batch import ProducerBatch
from kafka.record.memory_records import MemoryRecordsBuilder
from kafka.structs import TopicPartition
from kafka.version import __version__

from daemon.streams.bulk.write_encode import Rows, encode_headers, fill
from daemon.streams.bulk.write_partitions import murmur2_all

_PRODUCER = ("_accumulator", "_closed", "_metadata", "_sender", "_transaction_manager", "_wait_on_metadata", "config")
_ACCUMULATOR = (
    "_appends_in_progress",
    "_batches",
    "_closed",
    "_flushes_in_progress",
    "_incomplete",
    "_tp_lock",
    "begin_flush",
    "config",
    "split_and_reenqueue",
)


@functools.cache
def usable() -> str | None:
    """None when records encoded in bulk are those that kafka-python writes; else what is wrong. Takes some 10 ms."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", __version__)
    if numbers is None or not (3, 0, 12) <= tuple(map(int, numbers.groups())) < (4, 0, 0):
        return f"kafka-python {__version__} is not between 3.0.12 and 4"
    try:
        return _trial()
    except Exception as error:  # whatever the private names have become, rows can still go one by one
        return f"kafka-python {__version__}: the trial of bulk encoding failed: {error!r}"


def unfit(producer: Any) -> str | None:
    """What about this producer bulk producing doesn't know; None: nothing."""
    missing = [name for name in _PRODUCER if not hasattr(producer, name)]
    if not missing:
        missing = [name for name in _ACCUMULATOR if not hasattr(producer._accumulator, name)]
    if missing:
        return f"kafka-python {__version__} has no {', '.join(missing)}"
    config = producer.config
    if type(config["partitioner"]) is not DefaultPartitioner:
        return f"the partitioner is {type(config['partitioner']).__name__}, not kafka-python's default"
    if config["key_serializer"] is not None or config["value_serializer"] is not None:
        return "the producer has serializers"
    if (version := producer._accumulator.config["message_version"]) != 2:
        return f"the broker takes records of format {version}, not 2"
    return None


def _trial() -> str | None:
    """Compare batches, and partitions, with kafka-python's own for rows of all kinds."""
    count = 150
    keys = [None if row % 5 == 0 else b"%d" % row * (row % 9) for row in range(count)]
    values = [b"v" * (row * 37 % 300) if row % 7 or keys[row] is None else None for row in range(count)]
    times = [1_700_000_000_000 + (row * 7919) % 1000 - row for row in range(count)]
    headers = [[("name", b"%d" % row), ("é", b"")][: row % 3] for row in range(count)]
    kinds: tuple[tuple[Rows, list[int], list[Any]], ...] = (
        (Rows(keys, values, times, [encode_headers(header) for header in headers]), times, headers),
        (Rows(keys, values, times[0], None), [times[0]] * count, [[]] * count),
    )
    for rows, row_times, row_headers in kinds:
        ours = _batches_by(lambda records, at, rows=rows: fill(records, rows, at)[0], count)
        theirs = _batches_by(
            lambda records, at, times=row_times, headers=row_headers: int(
                records.append(times[at], keys[at], values[at], headers[at]) is not None
            ),
            count,
        )
        if ours != theirs:
            return f"kafka-python {__version__} encodes a batch differently"
    named = [key for key in keys if key is not None] + [b"", b"k" * 1000]
    if murmur2_all(named) != [murmur2(key) for key in named]:
        return f"kafka-python {__version__} hashes keys differently"
    batch = ProducerBatch(TopicPartition("trial", 0), MemoryRecordsBuilder(2, 0, 100), now=0.0)
    if batch._record_futures != [] or not hasattr(batch.produce_future, "_latch") or batch.max_record_size:
        return f"kafka-python {__version__} keeps its batches differently"
    batch.abort(ValueError("trial"))
    if str(batch.produce_future.value[2](0)) != "trial":
        return f"kafka-python {__version__} tells of refusals differently"
    return None


def _batches_by(write: Any, count: int) -> list[bytes]:
    """The closed batches, of 4,000 bytes, that ``write(records, from row)`` fills, each with a sequence number."""
    done: list[bytes] = []
    at = 0
    while at < count:
        records = MemoryRecordsBuilder(2, 0, 4_000)
        first = at
        while at < count and (taken := write(records, at)):
            at += taken
        if at == first:
            raise RuntimeError(f"a batch took no row at {at}")
        records.set_producer_state(7, 1, first, False)
        records.close()
        done.append(bytes(records.buffer()) + b"|%d" % records.next_offset())
    return done
