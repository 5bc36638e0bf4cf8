"""A schema registry on loopback for the tests: the GETs of Confluent's REST interface, and what can go wrong."""

from __future__ import annotations

import base64
import json
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote

import pytest

Reference = tuple[str, str, int]
"""Name, subject, version."""


class RegistryServer:
    """Serves what ``add`` gave it; as a context manager it is stopped at the end.

    Args:
        login: "user:password" that it asks for; empty: none.
        tls: certificate and key; None: plain HTTP.
        port: 0: any free one.
    """

    def __init__(self, *, login: str = "", tls: tuple[Path, Path] | None = None, port: int = 0) -> None:
        self.login = login
        self.asked: list[str] = []
        """Paths, in order."""
        self.answers: list[tuple[int, bytes]] = []
        """Given, first to last, in place of the right answers."""
        self.silent = threading.Event()
        """While it is set, requests are taken and not answered."""
        self._schemas: dict[int, dict[str, Any]] = {}
        self._subjects: dict[str, list[int]] = {}
        self._stop = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port: int = self._server.server_address[1]
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if not self._stop.is_set():
            self._stop.set()
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def add(
        self,
        schema: Any,
        kind: str = "AVRO",
        *,
        subject: str = "t-value",
        references: tuple[Reference, ...] = (),
        number: int | None = None,
    ) -> int:
        """Register a schema (JSON, or text as it is) as the subject's next version; its id."""
        number = len(self._schemas) + 1 if number is None else number
        entry: dict[str, Any] = {"schema": schema if isinstance(schema, str) else json.dumps(schema)}
        if kind != "AVRO":  # as the real one: the default is not said
            entry["schemaType"] = kind
        if references:
            names = ("name", "subject", "version")
            entry["references"] = [dict(zip(names, each, strict=True)) for each in references]
        self._schemas[number] = entry
        self._subjects.setdefault(subject, []).append(number)
        return number

    def _answer(self, path: str) -> tuple[int, Any]:
        match path.strip("/").split("/"):
            case ["schemas", "types"]:
                return 200, ["JSON", "PROTOBUF", "AVRO"]
            case ["schemas", "ids", number]:
                found = self._schemas.get(int(number))
                missing = {"error_code": 40403, "message": f"Schema {number} not found"}
                return (404, missing) if found is None else (200, found)
            case ["subjects", subject, "versions", version]:
                numbers = self._subjects.get(unquote(subject), [])
                if not 1 <= int(version) <= len(numbers):
                    return 404, {"error_code": 40401, "message": f"Subject '{subject}' not found."}
                number = numbers[int(version) - 1]
                return 200, self._schemas[number] | {"id": number, "subject": subject, "version": int(version)}
        return 404, {"error_code": 404, "message": "HTTP 404 Not Found"}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        registry = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 30

            def do_GET(self) -> None:
                registry.asked.append(self.path)
                while registry.silent.is_set() and not registry._stop.wait(0.02):
                    pass
                wanted = "Basic " + base64.b64encode(registry.login.encode()).decode()
                if registry.login and self.headers.get("Authorization") != wanted:
                    status, body = 401, b'{"error_code":401,"message":"Unauthorized"}'
                elif registry.answers:
                    status, body = registry.answers.pop(0)
                else:
                    status, answer = registry._answer(self.path)
                    body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, and its key; skips where there is no openssl."""
    cert, key = folder / "registry.crt", folder / "registry.key"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=registry"
    given = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    try:
        subprocess.run([*command.split(), *given], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no certificate without openssl 1.1.1 or newer: {error}")
    return cert, key


def framed(number: int, payload: bytes) -> bytes:
    """The registry's wire format."""
    return b"\0" + number.to_bytes(4, "big") + payload
