"""Whether an MQTT broker lets this worker in."""

from __future__ import annotations

import random
from typing import Any

from daemon.stream_settings import Mqtt
from daemon.streams.mqtt_address import MqttAddress
from daemon.streams.mqtt_client import Link
from daemon.streams.mqtt_handler import Handler
from daemon.streams.mqtt_login import session_name


class _Visit(Handler):
    """Connects, and is content with that."""

    link: Link

    def up(self, client: Any, session: bool, limits: Any) -> None:
        self.link.granted()


def visit(address: MqttAddress, settings: Mqtt) -> None:
    """Reach the broker and log in, under a name that takes nobody's session.

    Raises:
        StreamError: when that can't be done.
    """
    handler = _Visit()
    name = f"{session_name(settings)}-check-{random.getrandbits(32):x}"
    handler.link = Link(address, settings, handler, client_id=name)
    try:
        handler.link.open()
    finally:
        handler.link.close()
