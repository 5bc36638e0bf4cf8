"""MQTT as a sink: answers, dead letters and questions, a topic each, through one client with QoS 1."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import structlog

from daemon.errors import DeliveryError
from daemon.records import DeadLetter, RowHeaders
from daemon.stream_settings import Mqtt
from daemon.streams.dead_letters import to_kafka
from daemon.streams.mqtt_address import MqttAddress
from daemon.streams.mqtt_client import FAILED, Link
from daemon.streams.mqtt_handler import Handler
from daemon.streams.mqtt_login import session_name
from daemon.streams.mqtt_outbox import Letter, Outbox
from daemon.streams.mqtt_visit import visit

# After mqtt_client, which says what to install where paho is missing.
from paho.mqtt.packettypes import PacketTypes  # isort: skip
from paho.mqtt.properties import Properties  # isort: skip

log = structlog.get_logger("homeostat.mqtt")

_MAX_ROWS = 20_000
_MAX_BYTES = 32 << 20
_MAX_FLYING = 1_000
_WAIT_S = 1.0
"""Time without room after which it is said that the sink is waited for."""
_RETRY_S = 1.0
_BUSY = (0x80, 0x83, 0x91, 0x97)
"""Refusals that may pass: no reason, the broker's own, identifier in use, over quota."""
_TOO_LARGE = 0x95


class MqttSink(Handler):
    """Publishes with QoS 1; `flush` returns when the broker has acknowledged all of it.

    A record's key, and what is said of a dead letter, go in user properties. While the broker is away the queue is the
    bound: then `send` waits, calling ``waiting`` meanwhile, so that the process stays alive and can be stopped.
    """

    def __init__(
        self,
        url: str,
        settings: Mqtt,
        *,
        dead_letters_url: str = "",
        queries_url: str = "",
        variable: str = "HOMEOSTAT_SINK",
    ) -> None:
        def parse(given: str, name: str) -> MqttAddress | None:
            return MqttAddress.parse(given, name, tls=settings.tls) if given else None

        self._answers = parse(url, variable)
        self._dead = parse(dead_letters_url, "HOMEOSTAT_DEAD_LETTERS")
        self._queries = parse(queries_url, "HOMEOSTAT_LABEL_QUERIES")
        address = self._answers or self._dead or self._queries
        if address is None:
            raise ValueError("an MQTT sink needs a topic for answers, for dead letters or for questions")
        self._address = address
        self._settings = settings
        self._changed = threading.Condition()
        self._outbox = Outbox(_MAX_ROWS, _MAX_BYTES)
        self._window = 1
        self._largest = 1 << 28
        self._not_before = 0.0
        self._refusal: str | None = None
        self._link = Link(address, settings, self, client_id=f"{session_name(settings)}-sink")
        self.waiting: Callable[[str], None] = lambda reason: None

    def open(self) -> None:
        """Connect.

        Raises:
            StreamError: the broker can't be reached, or refuses us.
        """
        self._link.open()

    def check(self) -> None:
        """Reach the broker and log in; nothing is written.

        Raises:
            StreamError: when that can't be done.
        """
        visit(self._address, self._settings)

    takes_headers = True

    def send(self, keys: list[bytes | None], values: list[bytes], headers: RowHeaders | None = None) -> None:
        """Queue the answers; they are not durable before `flush`. Headers become user properties.

        Raises:
            DeliveryError: the broker refused an answer for good.
        """
        if self._answers is not None:
            self._send(self._answers.topic, keys, values, headers)

    def send_queries(self, keys: list[bytes | None], values: list[bytes]) -> None:
        """Queue questions; they are not durable before `flush`.

        Raises:
            DeliveryError: the broker refused something for good.
        """
        if self._queries is not None:
            self._send(self._queries.topic, keys, values)

    def send_dead(self, letter: DeadLetter) -> None:
        """Queue a record that can't be answered, with its origin and the reason as user properties.

        Raises:
            DeliveryError: the broker refused something for good.
        """
        if self._dead is not None:
            key, value, headers = to_kafka(letter)
            said = tuple((_plain(name.encode("utf-8", "replace")), _plain(text)) for name, text in headers)
            named = (("key", _plain(key)), *said) if key else said
            self._put([Letter(self._dead.topic, value, named, dead=True)])

    def _send(
        self, topic: str, keys: list[bytes | None], values: list[bytes], headers: RowHeaders | None = None
    ) -> None:
        rows = zip(keys, values, strict=True)
        letters = [Letter(topic, value, (("key", _plain(key)),) if key else ()) for key, value in rows]
        for row, found in enumerate(headers or ()):
            if found:
                letters[row] = replace(letters[row], carried=tuple((name, text.decode()) for name, text in found))
        self._put(letters)

    def _put(self, letters: list[Letter]) -> None:
        for letter in letters:
            while not self._has_room():
                self.waiting(f"{self._address.broker}: {self._link.problem or 'the broker takes no more for now'}")
            with self._changed:
                self._outbox.put(letter)
        self._link.wake()

    def _has_room(self) -> bool:
        with self._changed:
            self._raise_refusal()
            if not self._outbox.room:
                self._link.wake()
                self._changed.wait_for(lambda: self._outbox.room or self._refusal is not None, _WAIT_S)
            return self._outbox.room

    def flush(self, timeout_s: float) -> None:
        """Wait until everything is acknowledged.

        Raises:
            TimeoutError: not yet; nothing is lost, call again.
            DeliveryError: the broker refused something for good.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: not len(self._outbox) or self._stuck, timeout_s)
            self._raise_refusal()
            if not done:
                why = self._link.problem or "the broker is slow"
                left = f"{len(self._outbox)} messages not acknowledged by {self._address.broker}"
                raise TimeoutError(f"{left} within {timeout_s:g} s: {why}")

    @property
    def _stuck(self) -> bool:
        return self._refusal is not None or self._link.fatal is not None

    def _raise_refusal(self) -> None:
        if self._stuck:
            raise DeliveryError(f"{self._refusal or self._link.fatal}; nothing is committed past it")

    def close(self) -> None:
        """Disconnect; what was not flushed is given up (it was never committed)."""
        self._link.close()

    # From here on: called by the link, in its thread.

    def up(self, client: Any, session: bool, limits: Any) -> None:
        """Go on; the broker says how much it takes at a time."""
        with self._changed:
            self._window = min(getattr(limits, "ReceiveMaximum", 65_535), _MAX_FLYING)
            self._largest = getattr(limits, "MaximumPacketSize", 1 << 28)
            self._not_before = 0.0
        self._link.granted()

    def down(self) -> None:
        """What was in flight is sent again on the next connection."""
        with self._changed:
            self._outbox.back()
            self._changed.notify_all()

    def work(self, client: Any) -> None:
        """Publish as much as the broker takes."""
        with self._changed:
            if time.monotonic() < self._not_before:
                return
            while self._refusal is None and self._outbox.flying < self._window:
                letter = self._outbox.peek()
                if letter is None:
                    return
                if letter.size > self._largest:
                    self._shorten(letter, f"{letter.size} bytes; the broker takes {self._largest}")
                    continue
                info = client.publish(letter.topic, letter.payload, qos=1, properties=_properties(letter))
                self._outbox.sent(info.mid)

    def acknowledged(self, mid: int, code: int) -> None:
        """One is through, or was refused."""
        with self._changed:
            letter = self._outbox.landed(mid)
            if letter is not None and code >= FAILED:
                if code in _BUSY:
                    self._outbox.put(letter)
                    self._not_before = time.monotonic() + _RETRY_S
                elif code == _TOO_LARGE and letter.carried:
                    self._outbox.put(replace(letter, carried=()))
                elif code == _TOO_LARGE and letter.dead and letter.payload:
                    self._outbox.put(_without_value(letter))
                else:
                    self._refuse(letter, f"reason {code}")
            if not len(self._outbox) or self._outbox.room or self._refusal is not None:
                self._changed.notify_all()

    def _shorten(self, letter: Letter, why: str) -> None:
        if letter.carried:
            self._outbox.replace(replace(letter, carried=()))
        elif letter.dead and letter.payload:
            log.error("dead letter sent without its value", topic=letter.topic, reason=why)
            self._outbox.replace(_without_value(letter))
        else:
            self._refuse(letter, why)

    def _refuse(self, letter: Letter, why: str) -> None:
        self._refusal = f"{self._address.broker} refuses a message on {letter.topic!r}: {why}"
        self._changed.notify_all()


def _without_value(letter: Letter) -> Letter:
    said = (*letter.properties, ("homeostat.cut", str(len(letter.payload))))
    return Letter(letter.topic, b"", said, dead=True)


@lru_cache(maxsize=4096)
def _plain(text: bytes) -> str:
    """As text that MQTT allows: no control characters, no surrogates; at most 4096 characters."""
    read = text[:4096].decode("utf-8", "backslashreplace")
    return "".join(
        f"\\x{ord(letter):02x}" if letter < " " or "\x7f" <= letter <= "\x9f" else letter for letter in read
    )[:4096]


def _properties(letter: Letter) -> Any:
    # What is carried is another with every message: in the cache it would only push the keys out.
    return _packed.__wrapped__(letter.properties + letter.carried) if letter.carried else _packed(letter.properties)


@lru_cache(maxsize=4096)
def _packed(said: tuple[tuple[str, str], ...]) -> Any:
    """Properties of a PUBLISH; answers of one sensor share theirs."""
    if not said:
        return None
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.UserProperty = list(said)
    return properties
