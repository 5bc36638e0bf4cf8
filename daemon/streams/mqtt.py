"""MQTT as a source: sensors speak it.

What is promised is at least once: a message is acknowledged after the checkpoint that holds what it did, and what is
not acknowledged is sent again by the broker, to this worker's session. Rows are numbered as they are handed out; after
a restart the numbers go on at the checkpoint's, and rows that come again get new ones. Messages that their sender
publishes with QoS 0 come at most once, whatever the subscription asks for.
"""

from __future__ import annotations

import time

from daemon.records import Positions, RawBatch
from daemon.stream_settings import Mqtt
from daemon.streams.mqtt_address import MqttAddress
from daemon.streams.mqtt_inbox import Inbox
from daemon.streams.mqtt_login import session_name
from daemon.streams.mqtt_visit import visit


class MqttSource:
    """Reads a topic filter. A record's key is its topic; an empty payload is a tombstone.

    Several workers share a stream by ``mqtt://host/$share/NAME/FILTER``: the broker deals the messages out.
    """

    ended = False

    def __init__(self, url: str, settings: Mqtt, *, variable: str = "HOMEOSTAT_SOURCE") -> None:
        self._address = MqttAddress.parse(url, variable, wildcards=True, tls=settings.tls)
        self._settings = settings
        self._inbox = Inbox(self._address, settings, session_name(settings))

    def check(self) -> None:
        """Reach the broker and log in; nothing is subscribed.

        Raises:
            StreamError: when that can't be done.
        """
        visit(self._address, self._settings)

    def open(self, positions: Positions | None) -> None:
        """Go on in this worker's session; rows count from ``positions``, which come from the newest checkpoint."""
        self._inbox.open((positions or {}).get(self._address.partition, 0))

    def poll(self, max_rows: int, timeout_s: float) -> RawBatch:
        """At most ``max_rows`` records; empty when none came within ``timeout_s``, or the broker is away.

        Raises:
            StreamError: the broker refuses us for good.
        """
        taken = self._inbox.take(max_rows, timeout_s)
        return RawBatch(
            values=[row.payload or None for row in taken],
            keys=[row.topic for row in taken],
            times_s=[row.time_s for row in taken],
            partitions=[self._address.partition] * len(taken),
            offsets=[row.offset for row in taken],
            headers={(self._address.partition, row.offset): row.headers for row in taken if row.headers},
            names_by_key=False,  # that is its topic: the same for all of a sensor
            arrived=time.monotonic(),
        )

    @property
    def keeps_context(self) -> bool:
        """Whether records keep the trace context that their messages have as user properties."""
        return self._inbox.keeps_context

    @keeps_context.setter
    def keeps_context(self, keeps: bool) -> None:
        self._inbox.keeps_context = keeps

    @property
    def wants_commit(self) -> bool:
        """Whether a checkpoint should come before its time, so that the broker may go on sending."""
        return self._inbox.wants_commit

    def can_fill(self, rows: int) -> bool:
        """Whether so many have come; what the broker still has is not known here."""
        return self._inbox.waiting >= rows

    def lag(self) -> int | None:
        """Not known: a broker doesn't tell."""
        return None

    def commit(self, positions: Positions, note: str) -> None:
        """Acknowledge what the checkpoint holds."""
        if (position := positions.get(self._address.partition)) is not None:
            self._inbox.commit(position)

    def ready(self) -> bool:
        """Whether the broker is there and the subscription stands."""
        return self._inbox.ready

    def close(self) -> None:
        """Send the acknowledgements that are due, and disconnect. The session stays, for its time."""
        self._inbox.close()
