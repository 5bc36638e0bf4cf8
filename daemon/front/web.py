"""/metrics, /healthz, /readyz, page, operator actions, on a small threaded server: a busy loop makes no scrape wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from types import MappingProxyType
from typing import Protocol

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from daemon.errors import SettingsError
from daemon.front.port import Port, shake_hands
from daemon.operating.over_http import LARGEST, OperatorHttp
from daemon.streams.tls import Certificates

log = structlog.get_logger("homeostat.http")

PROBES = ("/healthz", "/readyz")
NEEDS_CERTIFICATE = b"a client certificate is needed here\n"
Probe = Callable[[], tuple[bool, str]]
"""Answers (fine, why)."""


def parse_address(text: str) -> tuple[str, int]:
    """``host:port``; raises SettingsError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65_535:
        raise SettingsError([f"HOMEOSTAT_HTTP={text}: not an address; right would be 127.0.0.1:9464, or off"])
    return host.strip("[]"), int(port)


def scrape(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """All metrics in the format that an Accept header asks for, and its content type."""
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):
        # prometheus_client compares whatever stands behind "version=" with numbers.
        encode, content_type = choose_encoder("")
    return encode(registry), content_type


class Pages(Protocol):
    """What answers the paths that a person looks at."""

    def answer(self, path: str) -> tuple[HTTPStatus, str, bytes, Mapping[str, str]] | None:
        """Status, content type, body and headers; None where it has no such path. From any thread."""


class Web:
    """The HTTP side. ``port`` is the one that was bound."""

    def __init__(
        self,
        address: str,
        registry: CollectorRegistry,
        alive: Probe,
        ready: Probe,
        *,
        operator: OperatorHttp | None = None,
        certificates: Certificates | None = None,
        page: Pages | None = None,
    ) -> None:
        host, port = parse_address(address)
        self.before_scrape: Callable[[], None] = lambda: None
        """Called before each scrape, to bring gauges up to date."""
        web = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10
            default_request_version = "HTTP/1.0"
            certified = True

            def setup(self) -> None:
                certified = shake_hands(self.request, self.timeout)
                self.certified = certified or certificates is None or certificates.files.cafile is None
                super().setup()

            def do_GET(self) -> None:
                self._try(self._get)

            def do_POST(self) -> None:
                self._try(self._post)

            def _try(self, work: Callable[[], None]) -> None:
                try:
                    work()
                except OSError:
                    raise
                except Exception:
                    log.exception("a request was not answered", path=self.path[:100])
                    self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, b"a fault of homeostat's; its log says more\n")

            def _get(self) -> None:
                path = self.path.partition("?")[0]
                if not self.certified and path not in PROBES:
                    self._answer(HTTPStatus.FORBIDDEN, NEEDS_CERTIFICATE)
                elif path == "/metrics":
                    web.before_scrape()
                    self._answer(HTTPStatus.OK, *scrape(registry, self.headers.get("Accept", "")))
                elif path in PROBES:
                    fine, why = (alive if path == "/healthz" else ready)()
                    status = HTTPStatus.OK if fine else HTTPStatus.SERVICE_UNAVAILABLE
                    self._answer(status, f"{why}\n".encode())
                elif path.startswith("/ctl"):
                    text = b"operator actions are asked for by POST /ctl/ACTION\n"
                    self._answer(HTTPStatus.METHOD_NOT_ALLOWED, text, headers={"Allow": "POST"})
                elif page is not None and (found := page.answer(path)) is not None:
                    status, content_type, body, headers = found
                    self._answer(status, body, content_type, headers)
                elif path == "/":
                    self._answer(HTTPStatus.OK, b"homeostat: /metrics /healthz /readyz\n")
                else:
                    self._answer(HTTPStatus.NOT_FOUND, b"not found: /, /metrics, /healthz, /readyz\n")

            def _post(self) -> None:
                path, length = self.path.partition("?")[0], self.headers.get("Content-Length", "0")
                self.close_connection = True
                if not self.certified:
                    self._answer(HTTPStatus.FORBIDDEN, NEEDS_CERTIFICATE)
                elif not path.startswith("/ctl/") or operator is None:
                    self._answer(HTTPStatus.NOT_FOUND, b"not found: POST /ctl/ACTION\n")
                elif not length.isdecimal() or self.headers.get("Transfer-Encoding"):
                    self._answer(HTTPStatus.LENGTH_REQUIRED, b"a body needs its Content-Length\n")
                elif int(length) > LARGEST:
                    self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, b"the body is too large\n")
                else:
                    body = self.rfile.read(int(length))
                    found = operator.answer(path.removeprefix("/ctl/"), self.headers, body, self.client_address[0])
                    self._answer(found.status, found.body(), "application/json", found.headers)

            def _answer(
                self,
                status: HTTPStatus,
                body: bytes,
                content_type: str = "text/plain; charset=utf-8",
                headers: Mapping[str, str] = MappingProxyType({}),
            ) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("X-Content-Type-Options", "nosniff")
                self.send_header("Cache-Control", "no-store")
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
                """What http.server itself refuses, in plain text; a method that is not known is no fault of ours."""
                known = code != HTTPStatus.NOT_IMPLEMENTED
                status = HTTPStatus(code) if known else HTTPStatus.METHOD_NOT_ALLOWED
                self.close_connection = True
                self.command = self.command or "GET"
                allowed = {} if known else {"Allow": "GET, HEAD, POST"}
                self._answer(status, f"{status.phrase.lower()}\n".encode(), headers=allowed)

            def version_string(self) -> str:
                return "homeostat"

            def log_message(self, format: str, *args: object) -> None:
                """Silent: a scrape every few seconds is no news."""

        try:
            self._server = Port((host, port), Handler, certificates)
        except OSError as error:
            raise SettingsError(
                [f"HOMEOSTAT_HTTP={address}: {error.strerror}; choose a free address, or port 0 for any, or off"]
            ) from None
        self.host, self.port = host, self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="web", daemon=True)

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=2)
