"""The listening socket of the HTTP side: so many connections at a time, none for longer than so long, TLS if wanted.

A connection costs a thread. Whoever opens many, or drips a request in byte by byte, or never shakes hands, takes none
from the loop and none for good from a scrape.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import structlog

from daemon.streams.tls import Certificates

log = structlog.get_logger("homeostat.http")

MOST = 32
"""Connections at a time; what comes beyond them is closed at once."""
LONGEST_S = 30.0
"""Age at which a connection is closed, whatever it does."""


class Port(ThreadingHTTPServer):
    """Bound when it is made; `serve_forever` answers."""

    daemon_threads = True
    request_queue_size = 64
    most, longest_s = MOST, LONGEST_S

    def __init__(
        self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], certificates: Certificates | None = None
    ) -> None:
        """Bind; raises OSError."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._certificates = certificates
        self._open: dict[Any, float] = {}
        self._lock = threading.Lock()
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind without asking a name server what this machine is called."""
        socket.socket.bind(self.socket, self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def get_request(self) -> tuple[Any, Any]:
        """Take a connection; its handshake is its own thread's."""
        connection, address = super().get_request()
        if self._certificates is not None:
            connection = self._certificates.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a thread for it, if there is one left."""
        with self._lock:
            full = len(self._open) >= self.most
            if not full:
                self._open[request] = time.monotonic()
        if full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """The end of a connection."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Twice a second: end what has been open for too long."""
        now = time.monotonic()
        with self._lock:
            late = [connection for connection, since in self._open.items() if now - since > self.longest_s]
        for connection in late:
            # Not its own method: that of TLS would take the session from under the thread that reads.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke off, or spoke no TLS, is no news; an error of ours is."""
        log.debug("a connection ended early", client=client_address[0], exc_info=True)


def shake_hands(connection: Any, timeout_s: float) -> bool:
    """TLS of a new connection, if it has any; whether it showed a certificate that its authority signed.

    Raises:
        OSError: it did not work out.
    """
    if not isinstance(connection, ssl.SSLSocket):
        return False
    connection.settimeout(timeout_s)
    connection.do_handshake()
    return bool(connection.getpeercert())
