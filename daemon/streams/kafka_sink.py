"""Kafka as a sink: answers, dead letters and questions, a topic each, through one idempotent producer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import structlog
from kafka import KafkaAdminClient, KafkaProducer
from kafka import errors as kafka_errors
from kafka.admin import NewTopic

from daemon.errors import AwayError, DeliveryError, StreamError, TransactionError
from daemon.records import DeadLetter, RowHeaders
from daemon.stream_settings import KafkaClient
from daemon.streams.bulk.write import BulkProducer, usable
from daemon.streams.dead_letters import partition_of, to_kafka
from daemon.streams.kafka_client import Address, asking, connect
from daemon.streams.kafka_transactions import Transactions

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
        transactional_id: str = "",
    ) -> None:
        """``transactional_id``: name of this worker's transactions; empty: answers are visible as they are sent."""
        self._address = Address.parse(url, variable) if url else None
        self._dead = Address.parse(dead_letters_url, "HOMEOSTAT_DEAD_LETTERS") if dead_letters_url else None
        self._queries = Address.parse(queries_url, "HOMEOSTAT_LABEL_QUERIES") if queries_url else None
        self._settings = settings
        self._producer: Any = None
        self._bulk: Any = None
        self._pending: list[Any] = []
        self._transactional_id = transactional_id
        self._transactions: Transactions | None = None
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
        compression, name = self._settings.compression, self._transactional_id
        bulk, linger_ms = self._settings.bulk == "auto", self._settings.producer_linger_ms
        if linger_ms is None:
            linger_ms = 0 if bulk and usable() is None else 5
        more: dict[str, Any] = {}
        if name:
            # The default back-off of 100 ms between the requests that end a transaction is most of its time.
            timeout_ms = self._settings.transaction_timeout_ms
            more = {"transactional_id": name, "transaction_timeout_ms": timeout_ms, "retry_backoff_ms": 10}
        self._producer = connect(
            KafkaProducer,
            address,
            self._settings,
            metrics_enabled=False,
            linger_ms=int(linger_ms),
            compression_type=None if compression == "none" else compression,
            # The client's cost by request outweighs that by row.
            batch_size=262_144,
            delivery_timeout_ms=_FOREVER_MS,
            max_block_ms=1_000,
            acks="all",
            **more,
        )
        self._bulk = BulkProducer(self._producer, bulk=bulk)
        if self._bulk.reason is not None:
            log.info("answers are written one by one", reason=self._bulk.reason)
        if name:
            self._transactions = Transactions(self._producer, name)
            self._transactions.open(time.monotonic() + self._settings.bootstrap_timeout_s)

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
            with asking(address):
                known = set(admin.list_topics())
            for wanted in (self._address, self._dead, self._queries):
                if wanted is not None and wanted.topic not in known:
                    try:
                        admin.create_topics([NewTopic(wanted.topic)])
                    except kafka_errors.TopicAlreadyExistsError:
                        continue
                    except kafka_errors.KafkaError as error:
                        kind = AwayError if error.retriable else StreamError
                        raise wanted.error(f"topic does not exist and can't be created: {error}", kind) from None
                    log.info("topic created", topic=wanted.topic)
        finally:
            admin.close()

    @property
    def ending(self) -> bool:
        """Whether a transaction is being ended."""
        return self._transactions is not None and self._transactions.ending

    def end(self, offsets: dict[Any, Any], group: Any) -> None:
        """Begin to commit what was sent since the last time, and ``offsets`` for the member ``group``."""
        self._own_transactions.end(offsets, group, self.waiting)
        self._pending.clear()

    def verify(self) -> None:
        """Raise TransactionError when the last transaction was not committed."""
        self._own_transactions.verify()

    def settle(self, timeout_s: float) -> None:
        """Return when no transaction is being ended.

        Raises:
            TimeoutError: not yet; call again.
            TransactionError: it was not committed.
        """
        self._own_transactions.settle(timeout_s)

    def _begin(self) -> None:
        """What is sent next belongs to a transaction, where there are any."""
        if self._transactions is not None:
            self._transactions.begin(self.waiting)

    @property
    def _own_transactions(self) -> Transactions:
        if self._transactions is None:
            raise RuntimeError("this sink was opened without transactions")
        return self._transactions

    takes_headers = True

    def send(self, keys: list[bytes | None], values: list[bytes], headers: RowHeaders | None = None) -> None:
        """Hand the answers, with their headers, to the producer; they are not durable before `flush`."""
        if self._address is None or not values:
            return
        self._begin()
        self._pending += self._send_all(self._address.topic, keys, values, headers)
        if self._transactions is not None:
            self._pending.clear()  # what becomes of them is known when the transaction ends
        elif len(self._pending) > 1_000:
            self._collect()

    def send_dead(self, letter: DeadLetter) -> None:
        """Send one record that can't be answered (see daemon.streams.dead_letters).

        What comes from one partition goes to one partition, so that it can be sent again in its order.
        """
        if self._dead is None:
            return
        self._begin()
        key, value, headers = to_kafka(letter)
        self._pending.append(self._send_when_possible(self._dead.topic, value, key, headers, letter.partition))

    def send_queries(self, keys: list[bytes | None], values: list[bytes]) -> None:
        """Send questions; they are not durable before `flush`."""
        if self._queries is not None and values:
            self._begin()
            self._pending += self._send_all(self._queries.topic, keys, values)

    def _send_all(
        self, topic: str, keys: list[bytes | None], values: list[bytes], headers: RowHeaders | None = None
    ) -> list[Any]:
        """Hand rows over, waiting while there is no room for them; the futures of their batches."""
        futures: list[Any] = []
        while True:
            try:
                return [*futures, *self._bulk.send_many(topic, keys, values, headers=headers)]
            except kafka_errors.KafkaTimeoutError as error:
                futures += error.futures
                keys, values = keys[error.accepted :], values[error.accepted :]
                headers = None if headers is None else headers[error.accepted :]
                self.waiting(f"topic {topic}: {error}")
            except kafka_errors.KafkaError as error:
                raise self._refused(error) from None

    def _send_when_possible(
        self, topic: str, value: bytes, key: bytes | None, headers: Any, origin: str | None = None
    ) -> Any:
        while True:
            try:
                to = None if origin is None else partition_of(origin, self._producer.partitions_for(topic))
                rows = None if headers is None else [headers]
                return self._bulk.send_many(topic, [key], [value], headers=rows, partition=to)[0]
            except kafka_errors.KafkaTimeoutError as error:
                self.waiting(f"topic {topic}: {error}")
            except kafka_errors.KafkaError as error:
                raise self._refused(error) from None

    def _refused(self, error: Exception) -> DeliveryError:
        """What a send that fails at once means: with transactions, that the one under way is lost."""
        kind = DeliveryError if self._transactions is None else TransactionError
        return kind(f"an answer was refused: {type(error).__name__}: {error}; nothing is committed past it")

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
            self._bulk.flush(timeout_s)
        except kafka_errors.KafkaTimeoutError as error:
            self._collect()
            raise TimeoutError(f"answers not acknowledged within {timeout_s:g} s: {error}") from None
        self._collect()
        if self._pending:
            raise TimeoutError("answers not acknowledged")

    def close(self) -> None:
        """Stop the producer; what was not flushed is given up (it was never committed)."""
        if self._transactions is not None:
            self._transactions.close(2.0)
            self._transactions = None
        if self._producer is not None:
            # It flushes first and raises where the broker is away; whoever closes has flushed already, or gave up.
            with contextlib.suppress(kafka_errors.KafkaError):
                self._producer.close(timeout=2)
