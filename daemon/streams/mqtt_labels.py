"""Late labels from MQTT."""

from __future__ import annotations

from daemon.records import Labels, Positions
from daemon.stream_settings import Mqtt
from daemon.streams.answers import decode_label
from daemon.streams.mqtt_address import MqttAddress
from daemon.streams.mqtt_inbox import Inbox
from daemon.streams.mqtt_login import session_name
from daemon.streams.mqtt_visit import visit

_MAX_ROWS = 5_000


class MqttLabels:
    """Reads labels from a topic filter, in a session of its own; each worker sees all and keeps its own."""

    def __init__(self, url: str, settings: Mqtt, *, variable: str = "HOMEOSTAT_LABELS") -> None:
        self._address = MqttAddress.parse(url, variable, wildcards=True, tls=settings.tls)
        self._settings = settings
        self._inbox = Inbox(self._address, settings, f"{session_name(settings)}-labels")
        self._next = 0
        self.rejected: dict[str, int] = {}

    def check(self) -> None:
        """Reach the broker and log in; nothing is subscribed.

        Raises:
            StreamError: when that can't be done.
        """
        visit(self._address, self._settings)

    def open(self, positions: Positions | None) -> None:
        """Go on in this worker's session; labels count from ``positions``."""
        self._next = (positions or {}).get(self._address.partition, 0)
        self._inbox.open(self._next)

    def poll(self, timeout_s: float = 0.0) -> Labels:
        """Labels that came; those that can't be read are counted in ``rejected``.

        Raises:
            StreamError: the broker refuses us for good.
        """
        labels = Labels()
        for row in self._inbox.take(_MAX_ROWS, timeout_s):
            self._next = row.offset + 1
            try:
                name, y, time_s = decode_label(row.payload or None)
            except ValueError as error:
                self.rejected[str(error)] = self.rejected.get(str(error), 0) + 1
                continue
            labels.ids.append(name)
            labels.y.append(y)
            labels.times_s.append(row.time_s if time_s is None else time_s)
        return labels

    @property
    def wants_commit(self) -> bool:
        """Whether a checkpoint should come before its time, so that the broker may go on sending."""
        return self._inbox.wants_commit

    def at_end(self) -> bool:
        """Whether nothing more has come; what the broker still has is not known here."""
        return not self._inbox.waiting

    def positions(self) -> Positions:
        """Number of the next label."""
        return {self._address.partition: self._next}

    def commit(self, positions: Positions) -> None:
        """Acknowledge the labels that a checkpoint holds."""
        if (position := positions.get(self._address.partition)) is not None:
            self._inbox.commit(position)

    def close(self) -> None:
        """Send the acknowledgements that are due, and disconnect."""
        self._inbox.close()
