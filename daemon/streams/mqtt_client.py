"""A connection to an MQTT broker that is made again for ever, in a thread of its own.

paho-mqtt is used for MQTT's packets alone. Each connection has a client object of its own, so that an acknowledgement
can't reach another connection than its message came by, and certificates and passwords are read again each time. All
of its methods are called in that one thread; others leave their work with the handler and call ``wake``.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import ssl
import threading
import time
from typing import Any

import structlog

from daemon.errors import StreamError
from daemon.stream_settings import Mqtt
from daemon.streams.mqtt_address import MqttAddress
from daemon.streams.mqtt_handler import Handler
from daemon.streams.mqtt_login import password, tls_context, tried

try:
    from paho.mqtt.client import Client, MQTTv5
    from paho.mqtt.enums import CallbackAPIVersion
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties
except ModuleNotFoundError as error:
    raise StreamError("mqtt:// needs the package paho-mqtt: pip install 'homeostat[mqtt]'") from error

log = structlog.get_logger("homeostat.mqtt")

FAILED = 0x80
"""Reason codes from here on are refusals."""
_TAKEN_OVER = 0x8E
_WRONG_LOGIN = (0x84, 0x85, 0x86, 0x87, 0x8A, 0x8C)
"""Reasons that trying again does not change: protocol, client id, name or password, rights, banned, login method."""
_MAX_BACKOFF_S = 10.0
_SETTLED_S = 10.0
"""A connection that lasted for this long was a good one."""
_READS = 64
"""Packets read before anything else is looked at."""


class Link:
    """Keeps one client connected.

    Args:
        address: of the broker.
        settings: how to reach it.
        handler: what to do with the connection.
        client_id: name of the session.
        expiry_s: how long the broker keeps the session without a connection; 0: a new one each time.
    """

    def __init__(
        self, address: MqttAddress, settings: Mqtt, handler: Handler, *, client_id: str, expiry_s: int = 0
    ) -> None:
        self._address = address
        self._settings = settings
        self._handler = handler
        self._client_id = client_id
        self._expiry_s = expiry_s
        self._tried = tried(settings, address, client_id)
        self.ready = False
        """Connected, and what was asked for granted."""
        self.problem = "no answer"
        """Why it is not ready."""
        self.fatal: StreamError | None = None
        """Trying again would not help; nothing is tried any more."""
        self._changed = threading.Condition()
        self._opening, self._granted = True, False
        self._closing = False
        self._connected = False
        self._up_at = self._close_until = 0.0
        self._reads = 0
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Return once the handler has called `granted`; from then on a loss is retried for ever.

        Raises:
            StreamError: not within ``connect_timeout_s``, or refused for good.
        """
        tls_context(self._settings, self._address)
        password(self._settings)
        self._here, self._there = socket.socketpair()
        self._here.setblocking(False)
        self._there.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{self._client_id}", daemon=True)
        self._thread.start()
        timeout_s = self._settings.connect_timeout_s
        with self._changed:
            self._changed.wait_for(lambda: self._granted or self.fatal is not None, timeout_s)
            self._opening = False
        if self.fatal is not None or not self._granted:
            self.close(0.0)
        if self.fatal is not None:
            raise self.fatal
        if not self._granted:
            raise self._address.error(f"{self._tried}: {self.problem} (tried for {timeout_s:g} s)")

    def granted(self) -> None:
        """All is as it should be."""
        with self._changed:
            self.ready = self._granted = True
            self.problem = ""
            self._changed.notify_all()

    def fail(self, text: str) -> None:
        """Give up: trying again would not help."""
        with self._changed:
            self.ready = False
            self.fatal = self._address.error(text)
            self._changed.notify_all()

    def wake(self) -> None:
        """Have the handler's ``work`` called soon; from any thread."""
        if self._thread is not None:
            with contextlib.suppress(OSError):  # full: it is awake; closed: it is over
                self._there.send(b"\0")

    def close(self, timeout_s: float = 2.0) -> None:
        """Send what is left to be sent, take leave, and stop; closing twice is allowed."""
        self._close_until = time.monotonic() + timeout_s  # before the thread can see that it has to end
        self._closing = True
        self.wake()
        if self._thread is not None:
            # One that is inside of a connection attempt ends with that, or with the process.
            self._thread.join(timeout_s + 0.5)

    def _run(self) -> None:
        backoff_s, short = 0.1, 0
        while not self._closing and self.fatal is None:
            self._connected = False
            client = self._client()
            try:
                reason = self._live(client)
            except (StreamError, OSError) as error:
                reason = str(error) or type(error).__name__
            except Exception as error:  # a packet that paho stumbles over must not end the reading for ever
                log.exception("MQTT connection given up", broker=self._address.broker)
                reason = repr(error)
            with contextlib.suppress(OSError):
                if (left := client.socket()) is not None:
                    left.close()
            with self._changed:
                lost, self.ready = self.ready, False
                self.problem = self._reason or reason
            self._handler.down()
            if self._closing or self.fatal is not None:
                break
            if self._connected and time.monotonic() - self._up_at >= _SETTLED_S:
                backoff_s, short = 0.1, 0
            elif lost and (short := short + 1) >= 3:
                # Two that take one session from each other; not every broker says so.
                self.problem += f" (again and again: does another client go by the name {self._client_id!r}?)"
            say = log.warning if lost else log.info
            say("MQTT broker not reached, trying again", broker=self._address.broker, reason=self.problem)
            # Never all at once, when a broker comes back to many workers.
            self._sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
        self._here.close()
        self._there.close()

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        poller = select.poll()  # select() knows no file above number 1023
        poller.register(self._here, select.POLLIN)
        while not self._closing and (left := until - time.monotonic()) > 0:
            poller.poll(1000 * left)
            self._drain()

    def _drain(self) -> None:
        with contextlib.suppress(OSError):
            while self._here.recv(4096):
                pass

    def _client(self) -> Any:
        """A client for one connection."""
        self._reason = ""
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            protocol=MQTTv5,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        client.connect_timeout = self._settings.connect_timeout_s
        client.max_inflight_messages_set(0)  # the handlers keep to what the broker's answer allows; paho does not
        # Without this callback paho writes to the socket in whichever thread has something to send.
        client.on_socket_register_write = lambda *_: None
        client.on_socket_open = _send_at_once
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = lambda c, u, mid, codes, properties: self._handler.subscribed(codes[0].value)
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        return client

    def _live(self, client: Any) -> str:
        """One connection from its beginning to its end; returns why it ended."""
        settings, address = self._settings, self._address
        if (context := tls_context(settings, address)) is not None:
            client.tls_set_context(context)
        if settings.username:
            client.username_pw_set(settings.username, password(settings))
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = self._expiry_s
        properties.ReceiveMaximum = settings.in_flight
        clean = self._expiry_s == 0
        client.connect(address.host, address.port, settings.keepalive_s, clean_start=clean, properties=properties)
        answer_by = time.monotonic() + settings.connect_timeout_s
        poller = select.poll()
        poller.register(self._here, select.POLLIN)
        while (connection := client.socket()) is not None and self.fatal is None:
            if not self._connected and time.monotonic() > answer_by:
                return "it accepts connections and says nothing: is it an MQTT broker?"
            if self._connected:
                self._handler.work(client)
            if self._closing and (not client.want_write() or time.monotonic() > self._close_until):
                return self._leave(client)
            reading = not (self._connected and self._handler.full())
            events = (select.POLLIN if reading else 0) | (select.POLLOUT if client.want_write() else 0)
            number = connection.fileno()
            poller.register(number, events)
            pending = reading and isinstance(connection, ssl.SSLSocket) and connection.pending()
            happened = dict(poller.poll(0 if pending else 1000))
            self._drain()
            found = happened.get(number, 0)
            if pending or found & ~select.POLLOUT:
                self._read(client)
            if found & select.POLLOUT:
                client.loop_write()
            client.loop_misc()
        return self._reason

    def _read(self, client: Any) -> None:
        for _ in range(_READS):
            before = self._reads
            if client.loop_read() or client.socket() is None or self._reads == before:
                return

    def _leave(self, client: Any) -> str:
        """Say goodbye, and wait until the broker hangs up: the session stays, for its time.

        A broker drops what it has not read of a connection once the next one takes its session over, and a socket that
        is closed with something unread drops what it has not sent: both would cost acknowledgements.
        """
        # paho closes its own as soon as the farewell is written.
        with socket.socket(fileno=os.dup(client.socket().fileno())) as other:
            client.disconnect()
            while (connection := client.socket()) is not None and time.monotonic() <= self._close_until:
                poller = select.poll()
                poller.register(connection, select.POLLOUT)
                poller.poll(100)
                client.loop_write()
            while (left := self._close_until - time.monotonic()) > 0:
                other.settimeout(left)
                if not other.recv(65_536):
                    break
        return "closed"

    def _on_connect(self, client: Any, userdata: Any, flags: Any, reason: Any, limits: Any) -> None:
        if reason.value >= FAILED:
            self._reason = f"refused: {reason}"
            if reason.value in _WRONG_LOGIN and self._opening:
                self.fail(f"{self._tried}: refused: {reason}")
            return
        self._connected, self._up_at = True, time.monotonic()
        if getattr(limits, "MaximumQoS", 2) < 1:
            self.fail(f"{self._address.broker} knows QoS 0 only, where nothing is acknowledged; QoS 1 is needed")
            return
        self._handler.up(client, bool(flags.session_present), limits)

    def _on_disconnect(self, client: Any, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        self._reason = self._reason or f"disconnected: {reason}"
        if flags.is_disconnect_packet_from_server and reason.value == _TAKEN_OVER:
            self.fail(
                f"another client took over the session {self._client_id!r}: two workers have one name; "
                "give each its own HOMEOSTAT_MQTT__CLIENT_ID"
            )

    def _on_message(self, client: Any, userdata: Any, message: Any) -> None:
        self._reads += 1
        self._handler.received(message)

    def _on_publish(self, client: Any, userdata: Any, mid: int, reason: Any, properties: Any) -> None:
        self._reads += 1
        self._handler.acknowledged(mid, reason.value)


def _send_at_once(client: Any, userdata: Any, made: Any) -> None:
    # Else a small packet waits for the acknowledgement of the one before it.
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
