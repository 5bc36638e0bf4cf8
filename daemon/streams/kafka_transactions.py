"""Transactions of one Kafka producer, one after the other, ended in a thread.

kafka-python's calls that end a transaction wait for the broker without a limit, so they can't be made in the loop: a
broker that is away would stop its heart. A transaction that fails is not mended here: its answers are void, and the
worker goes back to its checkpoint, whose opening fences and aborts whatever was left (KIP-98, KIP-447).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import structlog
from kafka import errors as kafka_errors

from daemon.errors import AwayError, StreamError, TransactionError
from daemon.streams.kafka_mending import mend_producer

log = structlog.get_logger("homeostat.kafka")

_WAIT_S = 1.0


class Transactions:
    """Begins one when something is sent, ends it when told, and keeps order between the two.

    They are over when one was not committed: its error is raised from then on, whoever asks, and what was sent since
    the one before it is void. A new producer has to be opened.
    """

    def __init__(self, producer: Any, name: str) -> None:
        """``name`` is the transactional id of ``producer``."""
        self._producer = producer
        mend_producer(producer)
        self._name = name
        self._open = False
        self._thread: threading.Thread | None = None
        """Ends the last one."""
        self._error: BaseException | None = None

    def open(self, deadline: float) -> None:
        """Fence whoever had this name before, and have what it left aborted.

        Args:
            deadline: by the monotonic clock.

        Raises:
            StreamError: refused.
            AwayError: not done in time.
        """
        while True:
            try:
                return self._producer.init_transactions()  # type: ignore[no-any-return]
            except kafka_errors.KafkaTimeoutError:
                if time.monotonic() > deadline:
                    raise AwayError(
                        f"transactional id {self._name!r}: the broker did not open it in time; are transactions "
                        "allowed there (transaction.state.log.replication.factor fits the number of brokers)?"
                    ) from None
            except kafka_errors.KafkaError as error:
                raise StreamError(f"transactional id {self._name!r}: {type(error).__name__}: {error}") from None

    def begin(self, waiting: Callable[[str], None]) -> None:
        """Have a transaction open; while the last one is being ended, ``waiting`` is called again and again.

        Raises:
            TransactionError: the last one was not committed.
        """
        while True:
            try:
                self.settle(_WAIT_S)
                break
            except TimeoutError as error:
                waiting(str(error))
        if not self._open:
            try:
                self._producer.begin_transaction()
            except kafka_errors.KafkaError as error:
                self._error = error
                self.verify()
            self._open = True

    @property
    def ending(self) -> bool:
        """Whether the commit is under way."""
        return self._thread is not None and self._thread.is_alive()

    def end(self, offsets: dict[Any, Any], group: Any, waiting: Callable[[str], None]) -> None:
        """Commit what was sent together with ``offsets``, beside the caller."""
        self.begin(waiting)
        self._open = False
        self._thread = threading.Thread(target=self._end, args=(offsets, group), name="transaction", daemon=True)
        self._thread.start()

    def _end(self, offsets: dict[Any, Any], group: Any) -> None:
        try:
            if offsets:
                self._producer.send_offsets_to_transaction(offsets, group)
            self._producer.commit_transaction()
        except Exception as error:  # whatever it is, the loop has to hear of it
            self._error = error

    def verify(self) -> None:
        """Raise TransactionError when one was not committed."""
        if not self.ending and self._error is not None:
            error = self._error
            raise TransactionError(f"transaction of {self._name!r} not committed: {type(error).__name__}: {error}")

    def settle(self, timeout_s: float) -> None:
        """Return when no commit is under way; TimeoutError when it still is after ``timeout_s`` seconds."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise TimeoutError(f"transaction {self._name} not committed yet")
        self.verify()

    def close(self, timeout_s: float) -> None:
        """Abort what is open, or readers of committed answers wait for it until the broker's time-out."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        if self._open or self._error is not None:
            aborting = threading.Thread(target=self._abort, name="transaction-abort", daemon=True)
            aborting.start()
            aborting.join(timeout_s)

    def _abort(self) -> None:
        try:
            self._producer.abort_transaction()
        except kafka_errors.KafkaError as error:
            log.info("transaction not aborted, the broker will", name=self._name, error=str(error))
