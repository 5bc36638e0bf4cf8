"""What the codecs with a schema registry share: the frame of each record, and the schemas that are known.

A value is Confluent's wire format: a zero byte, the schema's id (4 bytes, big-endian), the payload. The newer format,
with the schema's GUID in a header, begins with a one and is refused. Late labels and answers are JSON all the same.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import structlog

from daemon.stream_settings import SchemaRegistry
from daemon.streams.codec_base import MAX_BYTES, Codec
from daemon.streams.fields import RefusedError
from daemon.streams.registry import Registry, RegistryAwayError, Schema, SchemaError

log = structlog.get_logger("homeostat.registry")

FRAME = 5
"""Bytes before the payload."""
REFUSED_S = 60.0
"""How long an id without a usable schema is not asked for again: it may be registered meanwhile."""
KEPT = 1_000
"""Schemas kept; a topic has tens."""
KEPT_REFUSED = 10_000
"""Refused ids kept; beyond that the oldest are asked for again."""
SLOW_S = 1.0
BACKOFF_S = 2.0

Known = TypeVar("Known")


class RegistryCodec(Codec, Generic[Known]):
    """A codec whose records name their schema.

    A schema is asked for when its first record comes. While the registry does not answer, ``decode`` waits with that
    record in hand and calls ``waiting`` every few seconds at most, so that nothing is lost and nothing is answered out
    of order; where nobody set ``waiting``, it raises RegistryAwayError. Records whose schemas are known need no
    registry.
    """

    kind: str
    """The registry's name for its schemas: AVRO or JSON."""

    def __init__(
        self,
        input_shape: Sequence[int],
        settings: SchemaRegistry,
        *,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(input_shape, max_bytes=max_bytes)
        self._registry = Registry(settings)
        self._clock = clock
        self._sleep = sleep
        self._known: dict[int, Known] = {}
        self._refused: dict[int, tuple[float, str]] = {}
        self.waiting: Callable[[str], None] | None = None
        """Called again and again, with the reason, while the registry is away; may raise to give up."""

    def check(self) -> None:
        """Reach the registry.

        Raises:
            StreamError: it can't be reached, with what was tried.
        """
        self._registry.check()

    def schema_of(self, value: bytes) -> Known:
        """What ``compile`` made of the schema that the record names.

        Raises:
            RefusedError: the value has no frame, or there is no usable schema.
            RegistryAwayError: the registry does not say, and nobody waits for it.
        """
        if len(value) < FRAME or value[0]:
            raise RefusedError("undecodable", "not framed: no zero byte and four bytes of schema id at its beginning")
        number = int.from_bytes(value[1:FRAME])
        known = self._known.get(number)
        return self._find(number) if known is None else known

    @abstractmethod
    def compile(self, schema: Schema) -> Known:
        """What records of that schema are decoded with.

        Raises:
            SchemaError: the schema can't be used.
        """

    def _find(self, number: int) -> Known:
        until, problem = self._refused.get(number, (0.0, ""))
        if problem and self._clock() < until:
            raise RefusedError("schema", problem)
        self._refused.pop(number, None)  # so that it comes back as the newest
        try:
            schema = self._ask(number)
            if schema.kind != self.kind:
                raise SchemaError(f"it is of type {schema.kind}; HOMEOSTAT_CODEC={self.name} reads {self.kind}")
            known = self.compile(schema)
        except SchemaError as error:
            problem = f"schema {number}: {error}"
            while len(self._refused) >= KEPT_REFUSED:
                del self._refused[next(iter(self._refused))]
            self._refused[number] = self._clock() + REFUSED_S, problem
            raise RefusedError("schema", problem) from None
        while len(self._known) >= KEPT:
            del self._known[next(iter(self._known))]
        self._known[number] = known
        log.info("schema taken from the registry", id=number, type=schema.kind, bytes=len(schema.text))
        return known

    def _ask(self, number: int) -> Schema:
        if number >= 1 << 31:
            raise SchemaError("no registry gives an id beyond 31 bits")
        began, pause_s = self._clock(), 0.1
        while True:
            try:
                schema = self._registry.schema(number)
            except RegistryAwayError as error:
                if self.waiting is None:
                    raise
                self.waiting(f"schema {number}: {error}")
                self._sleep(pause_s)
                pause_s = min(2 * pause_s, BACKOFF_S)
                continue
            finally:
                # Many unknown ids at a slow registry: each is answered, and all together take longer than liveness.
                if self.waiting is not None and self._clock() - began > SLOW_S:
                    self.waiting(f"schema {number}: the registry is slow")
            return schema
