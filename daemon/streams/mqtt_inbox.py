"""A subscription: messages in order, acknowledged only when they are committed."""

from __future__ import annotations

import threading
import time
from typing import Any

import structlog

from daemon.stream_settings import Mqtt
from daemon.streams.mqtt_address import MqttAddress
from daemon.streams.mqtt_client import FAILED, Link
from daemon.streams.mqtt_handler import Handler
from daemon.streams.mqtt_window import Pace, Row, Taken, Window
from daemon.tracing.context import NAMES

# After mqtt_client, which says what to install where paho is missing.
from paho.mqtt.packettypes import PacketTypes  # isort: skip
from paho.mqtt.properties import Properties  # isort: skip
from paho.mqtt.subscribeoptions import SubscribeOptions  # isort: skip

log = structlog.get_logger("homeostat.mqtt")

_QOS0_ROWS = 65_536
_QUEUE_BYTES = 64 << 20
_SAY_AGAIN_S = 60.0
"""Least time between two warnings of one kind."""


class Inbox(Handler):
    """Reads a topic filter with QoS 1 in a session that outlives connections and restarts.

    Safe for two threads: the connection's fills it, the caller's empties it.
    """

    def __init__(self, address: MqttAddress, settings: Mqtt, client_id: str) -> None:
        self._address = address
        self._settings = settings
        self._changed = threading.Condition()
        self._window = Window(0, max_rows=_QOS0_ROWS, max_bytes=_QUEUE_BYTES)
        self._pace = Pace(settings.in_flight)
        self._arrived_at = self._committed_at = 0.0
        self._first_since_commit = False
        self._dropped_said = 0
        self._warned_at: dict[str, float] = {}
        self.keeps_context = False
        """Whether rows have headers: their messages' user properties with the names of a trace context."""
        self._link = Link(address, settings, self, client_id=client_id, expiry_s=settings.session_expiry_s)

    def open(self, first: int) -> None:
        """Connect and subscribe; rows count from ``first``.

        Raises:
            StreamError: when that can't be done.
        """
        self._window = Window(first, max_rows=_QOS0_ROWS, max_bytes=_QUEUE_BYTES)
        if not self._settings.session_expiry_s:
            log.warning("no session: the broker keeps nothing while this worker is away", topic=self._address.topic)
        self._link.open()

    @property
    def next(self) -> int:
        """Number of the next row."""
        return self._window.next

    @property
    def ready(self) -> bool:
        """Whether the subscription stands."""
        return self._link.ready

    @property
    def waiting(self) -> int:
        """Rows that wait to be handed out."""
        return len(self._window)

    @property
    def wants_commit(self) -> bool:
        """Whether a checkpoint should come before its time, so that the broker may go on sending."""
        with self._changed:
            quiet_s = 0.0 if len(self._window) else time.monotonic() - self._arrived_at
            return self._pace.wanted(self._window.unsettled, quiet_s)

    def take(self, max_rows: int, timeout_s: float) -> list[Taken]:
        """At most ``max_rows`` rows; waits up to ``timeout_s`` seconds for the first.

        Raises:
            StreamError: the broker refuses us for good.
        """
        with self._changed:
            if not len(self._window) and self._link.fatal is None:
                self._changed.wait_for(lambda: len(self._window) or self._link.fatal is not None, timeout_s)
            was_full = self._window.full
            taken = self._window.take(max_rows)
            dropped = self._window.dropped
        if was_full:
            self._link.wake()
        if not taken and self._link.fatal is not None:
            raise self._link.fatal
        if dropped > self._dropped_said and self._may_say("dropped"):
            log.error("messages of QoS 0 came faster than they were read: dropped", count=dropped - self._dropped_said)
            self._dropped_said = dropped
        return taken

    def commit(self, position: int) -> None:
        """Acknowledge every row below ``position``."""
        with self._changed:
            self._window.commit(position)
            self._committed_at, self._first_since_commit = time.monotonic(), True
        self._link.wake()

    def close(self) -> None:
        """Send what is to be acknowledged, and disconnect; the session stays."""
        self._link.close()

    def _may_say(self, kind: str) -> bool:
        now = time.monotonic()
        if kind in self._warned_at and now - self._warned_at[kind] < _SAY_AGAIN_S:
            return False
        self._warned_at[kind] = now
        return True

    # From here on: called by the link, in its thread.

    def up(self, client: Any, session: bool, limits: Any) -> None:
        """Subscribe, each time: a session that was lost is made up for, one that lives does not mind."""
        with self._changed:
            self._window.connected(session)
        expiry_s = getattr(limits, "SessionExpiryInterval", self._settings.session_expiry_s)
        if expiry_s < self._settings.session_expiry_s:
            log.warning("the broker keeps sessions for less time than asked for", seconds=expiry_s)
        if getattr(limits, "SharedSubscriptionAvailable", 1) == 0 and self._address.topic.startswith("$share/"):
            self._link.fail(f"{self._address.broker} has no shared subscriptions")
            return
        # Retained messages come when the subscription is new, and not again with every connection.
        properties = Properties(PacketTypes.SUBSCRIBE)  # type: ignore[no-untyped-call]
        options = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_SEND_IF_NEW_SUB)
        client.subscribe(self._address.topic, options=options, properties=properties)
        log.info("connected", broker=self._address.broker, topic=self._address.topic, session=session)

    def subscribed(self, code: int) -> None:
        """The broker's answer: the QoS that it grants, or a refusal."""
        if code >= FAILED:
            self._link.fail(f"the broker refuses the subscription to {self._address.topic!r} (reason {code})")
        elif code < 1:
            self._link.fail(f"the broker grants QoS 0 only for {self._address.topic!r}, where nothing is acknowledged")
        else:
            self._link.granted()
        with self._changed:
            self._changed.notify_all()

    def received(self, message: Any) -> None:
        """Keep one message."""
        try:
            topic = message.topic
        except UnicodeDecodeError:  # of a broker that lets through what the standard forbids
            topic = "\ufffd"
        row = Row(message.mid, message.qos, topic.encode(), message.payload, time.time())
        if self.keeps_context:
            said = getattr(message.properties, "UserProperty", ())
            row.headers = tuple((name, text.encode()) for name, text in said if name in NAMES)
        with self._changed:
            now = time.monotonic()
            if self._first_since_commit:
                self._pace.resumed(now - self._committed_at)
                self._first_since_commit = False
            self._arrived_at = now
            if topic == "\ufffd" or self._address.takes(topic):
                self._window.arrived(row, again=message.dup)
                self._changed.notify_all()
                return
            self._window.refuse(row)
        if self._may_say("strange"):
            log.error(
                "messages of another subscription come in this session, and are passed over: give this worker "
                "another HOMEOSTAT_MQTT__CLIENT_ID, or end the old session on the broker",
                topic=topic,
                expected=self._address.topic,
            )

    def work(self, client: Any) -> None:
        """Acknowledge what was committed, in the order in which it came."""
        with self._changed:
            mids = self._window.acknowledgements()
        for mid in mids:
            client.ack(mid, 1)

    def full(self) -> bool:
        """Whether more would take too much memory."""
        return self._window.full

    def down(self) -> None:
        """The next connection sorts out what it means."""
        with self._changed:
            self._changed.notify_all()
