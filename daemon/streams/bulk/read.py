"""Fetched partitions as columns: kafka-python's ``PartitionRecords`` with whole record batches decoded at once.

With `install.install`, ``consumer.poll`` returns ``{partition: [Chunk, ...]}`` where ``max_records`` still counts rows.
Which rows there are, what is in them, when the position moves and which error comes after which row is as the public
path has it: every step below mirrors ``PartitionRecords._unpack_records`` of kafka-python 3.0.12. Batches that are not
plainly well formed, of the formats before 2, or of so few rows that it does not pay go through the public decoder.

One thing is better: after an error the public path keeps a finished generator, and the next ``poll`` spins for ever.
Here what is left of the fetch is dropped, so that the next poll fetches again and says the same, or goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from kafka import TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.errors import CorruptRecordError
from kafka.protocol.consumer import IsolationLevel
from kafka.record.default_records import DefaultRecordBase, DefaultRecordBatch
from kafka.record.memory_records import MemoryRecords
from kafka.record.util import calc_crc32c

from daemon.streams.bulk.chunk import Block, Chunk, Taken
from daemon.streams.bulk.columns import LEAST_BYTES, Span, decode

_HEADER = DefaultRecordBase.HEADER_STRUCT
_MAGIC_AT = MemoryRecords.MAGIC_OFFSET
_CRC_FROM = DefaultRecordBase.ATTRIBUTES_OFFSET
_CODEC, _APPEND_TIME = DefaultRecordBase.CODEC_MASK, DefaultRecordBase.TIMESTAMP_TYPE_MASK
_TRANSACTIONAL, _CONTROL = DefaultRecordBase.TRANSACTIONAL_MASK, DefaultRecordBase.CONTROL_MASK
_NO_PRODUCER = DefaultRecordBase.NO_PRODUCER_ID
_AHEAD_BYTES = 1 << 20
"""Records decoded at once: enough to make the cost of a call small, little beside a fetch (1 MiB a partition)."""


class _Batch(NamedTuple):
    """A batch whose records are wanted."""

    source: Any
    """Its bytes, header and all; where there was a need to make it already, kafka-python's batch object."""
    span: Span | None
    """None: only the public decoder reads it."""
    epoch: int
    skipped_to: int | None
    """Where batches that were left out between the last one and this one have moved the position."""


class BulkRecords(Fetcher.PartitionRecords):  # type: ignore[misc]
    """One partition's part of a fetch, taken in chunks of columns."""

    few = 12
    """Rows up to which the public decoder is as fast."""

    def __init__(self, fetch_offset: int, tp: TopicPartition, records: Any, *args: Any, **options: Any) -> None:
        self._block: Block | None = None
        self._row = 0
        self._group: list[_Batch] = []
        self._data: list[bytearray] = []
        """Decompressed records of the group; empty: its spans lie in the fetched bytes."""
        self._data_size = 0
        self._epoch = -1
        self._skipped_to: int | None = None
        self._next_offset: int | None = None
        """One past the last batch, also where compaction took its last records."""
        super().__init__(fetch_offset, tp, records, *args, **options)

    def take(self, n: int | None = None) -> Taken:
        """The next rows, at most ``n``; an error that lies behind some of them comes with the next call.

        Raises:
            CorruptRecordError: a batch fails its checksum or can't be read; what is left of the fetch is dropped.
            UnsupportedCodecError: it is compressed with a codec whose package is missing.
        """
        chunks: list[Chunk] = []
        try:
            self._maybe_raise_next_inline_exception()
            while n is None or n > 0:
                if self._block is None:
                    self._block = next(self.record_iterator, None)
                    if self._block is None:
                        break
                    self._row = self._block.first
                block, start = self._block, self._row
                stop = len(block) if n is None else min(len(block), start + n)
                chunks.append(Chunk(self.topic_partition, block, start, stop))
                self._passed(block, start, stop)
                self._row = stop
                if stop == len(block):
                    self._block = None
                n = None if n is None else n - (stop - start)
        except Exception as error:
            if not chunks:
                self.drain()
                raise
            self._next_inline_exception = error
        return Taken(chunks)

    def drain(self) -> None:
        """Forget what is left."""
        self._block = None
        self._group, self._data = [], []
        super().drain()

    def _maybe_skip_record(self, block: Block) -> bool:
        """Mark where the rows begin that were asked for: a batch is fetched whole, also from its middle."""
        if block.offsets[0] >= self.fetch_offset:
            return False
        asked = block.offsets >= self.fetch_offset
        block.first = int(asked.argmax()) if asked.any() else len(block)
        self._passed(block, 0, block.first)
        return block.first == len(block)

    def _passed(self, block: Block, start: int, stop: int) -> None:
        if stop > start:
            self.records_read += stop - start
            self.bytes_read += int(block.sizes[start:stop].sum())
            self.next_fetch_offset = int(block.offsets[stop - 1]) + 1
            self.leader_epoch = block.epoch(stop - 1)

    def _unpack_records(self, tp: TopicPartition, records: Any, *_deserializers: Any) -> Iterator[Block]:
        """Blocks of rows, each asked for only when the one before it was taken whole."""
        more = True
        while more:
            failure: Exception | None = None
            try:
                more = self._look_ahead(records)
            except StopIteration:
                # As the public path has it: the error would end this generator without a word.
                failure = RuntimeError("StopIteration raised unpacking messageset")
            except Exception as error:
                failure = error
            yield from self._blocks(records)
            self.leader_epoch = self._epoch
            if self._skipped_to is not None:
                self.next_fetch_offset = self._skipped_to
            if failure is not None:
                raise failure
        if self._next_offset is not None:
            self.next_fetch_offset = self._next_offset
        self.drain()

    def _look_ahead(self, records: Any) -> bool:
        """Collect batches to decode together; False when there are no more.

        Raises whatever the public path raises for the batch after those collected.
        """
        self._group, self._data, self._data_size = [], [], 0
        while (view := records._next_slice) is not None:
            if self._data_size >= _AHEAD_BYTES:
                return True
            if len(view) < _HEADER.size or view[_MAGIC_AT] != 2:
                if not self._group:
                    self._old(records.next_batch())
                return True
            (base, _, epoch, _, crc, attributes, last_delta, first_ms, max_ms, producer, _, _, count) = (
                _HEADER.unpack_from(view)
            )
            packed = bool(attributes & _CODEC)
            if self._group and packed != bool(self._data):
                return True
            start = records._pos - len(view) + _HEADER.size
            records._cache_next()
            if self.check_crcs and calc_crc32c(view[_CRC_FROM:]) != crc:
                raise self._corrupt("Record batch", base)
            self._epoch = epoch
            self._next_offset = base + last_delta + 1
            if (producer > _NO_PRODUCER or attributes & _CONTROL) and self._left_out(
                view, attributes, producer, base + last_delta
            ):
                self._skipped_to = self._next_offset
                continue
            source, size = view, len(view) - _HEADER.size
            if packed:
                source = DefaultRecordBatch(view)
                source._maybe_uncompress()
                start, size = self._data_size, len(source._buffer)
                self._data.append(source._buffer)
            elif not count and not size:
                continue
            self._data_size += size
            span = None
            if 0 < count <= size // LEAST_BYTES:
                append_ms = max_ms if attributes & _APPEND_TIME else None
                span = Span(start, start + size, count, base, first_ms, append_ms, epoch)
            self._group.append(_Batch(source, span, epoch, self._skipped_to))
            self._skipped_to = None
        return False

    def _left_out(self, view: Any, attributes: int, producer: int, last_offset: int) -> bool:
        """Whether a batch is no consumer's: a transaction's end, or, with read_committed, of an aborted transaction."""
        if self.isolation_level == IsolationLevel.READ_COMMITTED and producer > _NO_PRODUCER:
            self._consume_aborted_transactions_up_to(last_offset)
            if attributes & _CONTROL and self._contains_abort_marker(DefaultRecordBatch(view)):
                self.aborted_producer_ids.discard(producer)
            elif attributes & _TRANSACTIONAL and producer in self.aborted_producer_ids:
                return True
        return bool(attributes & _CONTROL)

    def _old(self, batch: Any) -> None:
        """Collect a batch that only the public decoder reads."""
        if self.check_crcs and not batch.validate_crc():
            raise self._corrupt("Record batch", batch.base_offset)
        self._next_offset = None
        self._group.append(_Batch(batch, None, self._epoch, self._skipped_to))
        self._skipped_to = None

    def _blocks(self, records: Any) -> Iterator[Block]:
        """The rows of the batches collected, at once, or batch by batch through the public decoder."""
        group, spans = self._group, [batch.span for batch in self._group if batch.span is not None]
        if len(spans) == len(group) and sum(span.rows for span in spans) > self.few:
            data = b"".join(self._data) if self._data else records._buffer
            block = decode(data if isinstance(data, bytes) else bytes(data), spans)
            if block is not None:
                self._group, self._data = [], []
                yield block
                return
        self._data = []
        for batch in group:
            if batch.skipped_to is not None:
                self.next_fetch_offset = batch.skipped_to
            self.leader_epoch = batch.epoch
            plain = isinstance(batch.source, memoryview)
            yield from self._one_batch(DefaultRecordBatch(batch.source) if plain else batch.source, batch.epoch)

    def _one_batch(self, batch: Any, epoch: int) -> Iterator[Block]:
        """A batch's rows by the public decoder: those before an error, then the error."""
        rows: list[Any] = []
        failure: Exception | None = None
        try:
            for record in batch:
                if self.check_crcs and not record.validate_crc():
                    raise self._corrupt("Record", record.offset)
                rows.append(record)
        except Exception as error:
            failure = error
        if rows:
            yield Block.of(rows, epoch)
        if failure is not None:
            raise failure

    def _corrupt(self, what: str, offset: int) -> CorruptRecordError:
        return CorruptRecordError(f"{what} for partition {self.topic_partition} at offset {offset} failed crc check")
