"""Kafka as a sink: answers, dead letters and questions, a topic each, through one idempotent producer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import structlog
from kafka import KafkaAdminClient, KafkaProducer
from kafka import errors as kafka_errors
from kafka.admin import NewTopic

from daemon.errors import DeliveryError
from daemon.records import DeadLetter
from daemon.settings import KafkaClient
from daemon.streams.kafka_client import Address, connect

log = structlog.get_logger("homeostat.kafka")

_FOREVER_MS = 2**31 - 1


class KafkaSink:
    """Writes answers, dead letters and questions; `flush` returns when all are acknowledged by all in-sync replicas.

    While the broker is away the producer keeps trying for ever and its buffer (32 MB) is the bound: then `send` waits,
    calling ``waiting`` meanwhile, so that the process stays alive and can be stopped.
    """

    def __init__(
        self,
        url: str,
        settings: KafkaClient,
        *,
        dead_letters_url: str = "",
        queries_url: str = "",
        variable: str = "HOMEOSTAT_SINK",
    ) -> None:
        self._address = Address.parse(url, variable) if url else None
        self._dead = Address.parse(dead_letters_url, "HOMEOSTAT_DEAD_LETTERS") if dead_letters_url else None
        self._queries = Address.parse(queries_url, "HOMEOSTAT_LABEL_QUERIES") if queries_url else None
        self._settings = settings
        self._producer: Any = None
        self._pending: list[Any] = []
        self.waiting: Callable[[str], None] = lambda reason: None

    def open(self) -> None:
        """Connect, and create the topics that are missing.

        Raises:
            StreamError: when the broker can't be reached or refuses a topic.
        """
        address = self._address or self._dead or self._queries
        if address is None:
            raise ValueError("a Kafka sink needs a topic for answers, for dead letters or for questions")
        self._create_missing(address)
        compression = self._settings.compression
        self._producer = connect(
            KafkaProducer,
            address,
            self._settings,
            metrics_enabled=False,
            linger_ms=int(self._settings.producer_linger_ms),
            compression_type=None if compression == "none" else compression,
            batch_size=65_536,
            delivery_timeout_ms=_FOREVER_MS,
            max_block_ms=1_000,
            acks="all",
        )

    def check(self) -> None:
        """Reach the broker; nothing is created.

        Raises:
            StreamError: when it can't be reached.
        """
        address = self._address or self._dead or self._queries
        if address is not None:
            connect(KafkaAdminClient, address, self._settings).close()

    def _create_missing(self, address: Address) -> None:
        admin = connect(KafkaAdminClient, address, self._settings)
        try:
            known = set(admin.list_topics())
            for wanted in (self._address, self._dead, self._queries):
                if wanted is not None and wanted.topic not in known:
                    try:
                        admin.create_topics([NewTopic(wanted.topic)])
                    except kafka_errors.TopicAlreadyExistsError:
                        continue
                    except kafka_errors.KafkaError as error:
                        raise wanted.error(f"topic does not exist and can't be created: {error}") from None
                    log.info("topic created", topic=wanted.topic)
        finally:
            admin.close()

    def send(self, keys: list[bytes | None], values: list[bytes]) -> None:
        """Hand the answers to the producer; they are not durable before `flush`."""
        if self._address is None:
            return
        topic, send, pending = self._address.topic, self._producer.send, self._pending
        for key, value in zip(keys, values, strict=True):
            try:
                pending.append(send(topic, value, key))
            except kafka_errors.KafkaTimeoutError:
                pending.append(self._send_when_possible(topic, value, key, None))
        if len(pending) > 20_000:
            self._collect()

    def send_dead(self, letter: DeadLetter) -> None:
        """Send one record that can't be answered, with its origin and the reason in the headers."""
        if self._dead is None:
            return
        headers = [
            ("homeostat.partition", letter.partition.encode()),
            ("homeostat.offset", str(letter.offset).encode()),
            ("homeostat.reason", letter.reason.encode()),
            ("homeostat.detail", letter.detail.encode("utf-8", "replace")[:1024]),
        ]
        # A value of None would be a tombstone and is refused without a key: the reason in the headers tells them apart.
        value = b"" if letter.value is None else letter.value
        self._pending.append(self._send_when_possible(self._dead.topic, value, letter.key, headers))

    def send_queries(self, keys: list[bytes | None], values: list[bytes]) -> None:
        """Send questions; they are not durable before `flush`."""
        if self._queries is not None:
            topic = self._queries.topic
            pairs = zip(keys, values, strict=True)
            self._pending += [self._send_when_possible(topic, value, key, None) for key, value in pairs]

    def _send_when_possible(self, topic: str, value: bytes, key: bytes | None, headers: Any) -> Any:
        while True:
            try:
                return self._producer.send(topic, value, key, headers=headers)
            except kafka_errors.KafkaTimeoutError as error:
                self.waiting(f"topic {topic}: {error}")

    def _collect(self) -> None:
        """Forget what was acknowledged; raise for what was refused."""
        refused = next((item for item in self._pending if item.failed()), None)
        if refused is not None:
            raise DeliveryError(
                f"an answer was refused by the broker: {refused.exception!r}; nothing is committed past it"
            )
        self._pending = [item for item in self._pending if not item.is_done]

    def flush(self, timeout_s: float) -> None:
        """Wait until every answer is acknowledged.

        Raises:
            TimeoutError: not yet; nothing is lost, call again.
            DeliveryError: the broker refused one for good.
        """
        try:
            self._producer.flush(timeout=timeout_s)
        except kafka_errors.KafkaTimeoutError as error:
            self._collect()
            raise TimeoutError(f"answers not acknowledged within {timeout_s:g} s: {error}") from None
        self._collect()
        if self._pending:
            raise TimeoutError("answers not acknowledged")

    def close(self) -> None:
        """Stop the producer; what was not flushed is given up (it was never committed)."""
        if self._producer is not None:
            # It flushes first and raises where the broker is away; whoever closes has flushed already, or gave up.
            with contextlib.suppress(kafka_errors.KafkaError):
                self._producer.close(timeout=2)
