"""The loops that traces are made with: one that passes trace context on, one that also tells spans of what it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from daemon.loop import Loop
from daemon.records import Batch, RawBatch
from daemon.streams.base import HeaderSink
from daemon.tracing.context import context_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from daemon.predicted import Predicted
    from daemon.tracing.spans import BatchTrace, Spans

Contexts = dict[tuple[str, int], dict[str, bytes]]
"""Headers of the answer by partition and offset of its record, for those that have any."""
_NONE: Contexts = {}


class PassingLoop(Loop):
    """Passes the trace context in a record's headers on with its answer."""

    _contexts: Contexts = _NONE

    def process(self, raw: RawBatch) -> None:
        """Answer one raw batch and learn from it."""
        self._contexts = contexts_of(raw) if raw.headers else _NONE
        super().process(raw)

    def _send(self, raw: RawBatch, rows: list[int], keys: list[bytes | None], values: list[bytes]) -> None:
        if self._contexts and isinstance(self.sink, HeaderSink) and self.sink.takes_headers:
            found = [self._contexts.get((raw.partitions[row], raw.offsets[row])) for row in rows]
            self.sink.send(keys, values, [None if context is None else tuple(context.items()) for context in found])
        else:
            super()._send(raw, rows, keys, values)


class TracedLoop(PassingLoop):
    """Tells a span of each batch, of its steps, and of those records whose senders sampled them."""

    spans: Spans
    _trace: BatchTrace
    _invalid: Mapping[int, str] = {}

    def process(self, raw: RawBatch) -> None:
        """Answer one raw batch and learn from it."""
        self._contexts = contexts_of(raw) if raw.headers else _NONE
        self._trace = trace = self.spans.batch(raw, self._contexts)
        self.exemplar = trace.exemplar
        before = self._standing() if trace.recording else None
        try:
            Loop.process(self, raw)
        except BaseException as error:
            trace.failed(error)
            raise
        finally:
            trace.end(before, self._standing() if trace.recording else None)

    def _standing(self) -> dict[str, int | str]:
        """What a batch may change, as events and attributes of its span tell it."""
        tally = self.tally
        return {
            "homeostat.drifts": tally.drifts,
            "homeostat.guard_trips": tally.guard_trips,
            "homeostat.version": self.resident.current.number,
            "homeostat.state": self.regulator.state.value,
            "homeostat.shift": self.monitor.watch.shift.kind.value,
        }

    def _decode(self, raw: RawBatch) -> Batch:
        with self._trace.step("decode"):
            return super()._decode(raw)

    def _predict(self, x: np.ndarray, slots: NDArray[np.int64] | None, given: bool) -> Predicted:
        with self._trace.step("predict"):
            return super()._predict(x, slots, given)

    def _answer(self, raw: RawBatch, batch: Batch, predicted: Predicted | None, clean: bool) -> None:
        self._trace.decoded(batch)
        self._invalid = {batch.rows[row]: reason for row, reason in batch.invalid.items()}
        with self._trace.sending(len(batch)):
            super()._answer(raw, batch, predicted, clean)

    def _send(self, raw: RawBatch, rows: list[int], keys: list[bytes | None], values: list[bytes]) -> None:
        if not self._contexts:
            return super()._send(raw, rows, keys, values)
        # The answers' headers name the records' own spans from here on.
        with self._trace.records(raw, rows, self._invalid):
            super()._send(raw, rows, keys, values)

    def _learn(self, rows: int, given: bool) -> None:
        with self._trace.step("learn"):
            super()._learn(rows, given)


def contexts_of(raw: RawBatch) -> Contexts:
    """The well-formed trace context of each record that has one."""
    return {origin: found for origin, headers in raw.headers.items() if (found := context_of(headers))}
