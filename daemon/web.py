"""/metrics, /healthz and /readyz on a small threaded server of its own: a busy loop never makes a scrape wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from daemon.errors import SettingsError

Probe = Callable[[], tuple[bool, str]]
"""Answers (fine, why)."""


def parse_address(text: str) -> tuple[str, int]:
    """``host:port``; raises SettingsError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65_535:
        raise SettingsError([f"HOMEOSTAT_HTTP={text}: not an address; right would be 127.0.0.1:9464, or off"])
    return host.strip("[]"), int(port)


class Web:
    """The HTTP side. ``port`` is the one that was bound."""

    def __init__(self, address: str, registry: CollectorRegistry, alive: Probe, ready: Probe) -> None:
        host, port = parse_address(address)
        self.before_scrape: Callable[[], None] = lambda: None
        """Called before each scrape, to bring gauges up to date."""
        web = self

        class Handler(BaseHTTPRequestHandler):
            server_version = "homeostat"
            sys_version = ""
            timeout = 10

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    web.before_scrape()
                    encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                    self._answer(HTTPStatus.OK, encode(registry), content_type)
                elif path in ("/healthz", "/readyz"):
                    fine, why = (alive if path == "/healthz" else ready)()
                    status = HTTPStatus.OK if fine else HTTPStatus.SERVICE_UNAVAILABLE
                    self._answer(status, f"{why}\n".encode())
                elif path == "/":
                    self._answer(HTTPStatus.OK, b"homeostat: /metrics /healthz /readyz\n")
                else:
                    self._answer(HTTPStatus.NOT_FOUND, b"not found: /metrics, /healthz, /readyz\n")

            def _answer(self, status: HTTPStatus, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None:
                """Silent: a scrape every few seconds is no news."""

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise SettingsError(
                [f"HOMEOSTAT_HTTP={address}: {error.strerror}; choose a free address, or port 0 for any, or off"]
            ) from None
        self._server.daemon_threads = True
        self.host, self.port = host, self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="web", daemon=True)

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=2)
