"""The schema registry: what schema the id of a record stands for, asked over HTTP.

Three GETs of Confluent's REST interface are all that reading needs, and Python's own HTTP client makes them. Of the
libraries, confluent-kafka (2.16) imports librdkafka, a second Kafka client in C, before its registry's client, and
brings 13 packages for it; python-schema-registry-client (2.6.1) had no release for more than half a year.
"""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import structlog

from daemon.errors import StreamError
from daemon.stream_settings import SchemaRegistry

log = structlog.get_logger("homeostat.registry")

MAX_ANSWER = 4 << 20
"""Bytes of one answer; a longer one is no schema."""
MAX_REFERENCES = 100

# 40401 and 40402: no such subject or version, 40403: no such schema. Others say a bare 404 in their JSON.
_UNKNOWN = range(404, 405), range(40_400, 40_500)


class RegistryAwayError(StreamError):
    """The registry neither gives a schema nor says that there is none.

    ``refused``: somebody has to change something first, so that a start fails at once. While records come it is asked
    again all the same, for that may be done meanwhile.
    """

    def __init__(self, text: str, *, refused: bool = False) -> None:
        super().__init__(text)
        self.refused = refused


class SchemaError(ValueError):
    """There is no such schema, or it can't be used."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A schema that another one names."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Schema:
    """A schema as the registry has it."""

    kind: str
    """AVRO, JSON or PROTOBUF."""
    text: str
    references: tuple[Reference, ...] = ()
    """What it is built on, each after what it is built on itself."""


class Registry:
    """Asks the registry at ``HOMEOSTAT_REGISTRY__URL``, one connection a question: each schema is asked for once.

    Password and authorities are read from their files at each question, so that new ones hold at once.

    Raises:
        StreamError: the address can't be one.
    """

    def __init__(self, settings: SchemaRegistry) -> None:
        self._settings = settings
        self._where = f"HOMEOSTAT_REGISTRY__URL={settings.url}"
        parts = urlsplit(settings.url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query or parts.fragment:
            raise StreamError(f"{self._where}: not a registry's address; right would be https://host:8081")
        if "@" in parts.netloc:
            raise StreamError(
                f"{self._where}: holds a login; put it into HOMEOSTAT_REGISTRY__USERNAME and __PASSWORD_FILE"
            )
        self._tls = parts.scheme == "https"
        self._host, self._port, self._path = parts.hostname, port, parts.path.rstrip("/")
        if settings.username and not self._tls:
            log.warning("the registry's password travels in the clear: use https://", url=settings.url)

    def check(self) -> None:
        """Reach the registry, and log in where it asks for that.

        Raises:
            RegistryAwayError: it does not answer as a registry within ``timeout_s`` seconds.
        """
        until = time.monotonic() + self._settings.timeout_s
        while True:
            try:
                kinds = self._ask("/schemas/types", max(until - time.monotonic(), 0.5))
            except SchemaError as error:
                raise self._away(f"answers, but not as a schema registry does: {error}", refused=True) from None
            except RegistryAwayError as error:
                if error.refused or time.monotonic() + 0.2 > until:
                    raise
                time.sleep(0.2)
                continue
            if not isinstance(kinds, list):
                raise self._away("answers, but not as a schema registry does", refused=True)
            return

    def schema(self, number: int) -> Schema:
        """The schema with that id.

        Raises:
            SchemaError: there is none.
            RegistryAwayError: the registry does not say.
        """
        answer = self._ask(f"/schemas/ids/{number}")
        text = answer.get("schema") if isinstance(answer, dict) else None
        if not isinstance(text, str):
            raise self._away(f"gives no schema for id {number}")
        found: dict[tuple[str, str, int], Reference | None] = {}
        self._collect(answer.get("references"), found)
        references = tuple(item for item in found.values() if item is not None)
        return Schema(str(answer.get("schemaType") or "AVRO"), text, references)

    def _collect(self, named: Any, found: dict[tuple[str, str, int], Reference | None]) -> None:
        """Fetch what ``named`` lists, and what that is built on, into ``found``: deepest first."""
        for item in named if isinstance(named, list) else ():
            try:
                name, subject, version = str(item["name"]), str(item["subject"]), int(item["version"])
            except (TypeError, KeyError, ValueError):
                raise SchemaError("its list of references can't be read") from None
            at = name, subject, version
            if at in found:
                continue
            if len(found) == MAX_REFERENCES:
                raise SchemaError(f"more than {MAX_REFERENCES} references")
            found[at] = None
            answer = self._ask(f"/subjects/{quote(subject, safe='')}/versions/{version}")
            text = answer.get("schema") if isinstance(answer, dict) else None
            if not isinstance(text, str):
                raise self._away(f"gives no schema for version {version} of subject {subject!r}")
            self._collect(answer.get("references"), found)
            del found[at]  # to come after what it is built on
            found[at] = Reference(name, text)

    def _ask(self, path: str, timeout_s: float | None = None) -> Any:
        status, body = self._get(path, self._settings.timeout_s if timeout_s is None else timeout_s)
        if status in (401, 403):
            user = self._settings.username
            login = f"the login of {user!r}" if user else "a visitor without login: set HOMEOSTAT_REGISTRY__USERNAME"
            raise self._away(f"refuses {login} (HTTP {status} to {path})", refused=True)
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        if status == 200 and answer is not None:
            return answer
        if status == 404 and isinstance(answer, dict):
            code = answer.get("error_code")
            if isinstance(code, int) and any(code in known for known in _UNKNOWN):
                raise SchemaError(f"the registry has none: {str(answer.get('message', ''))[:100]}")
        what = "but not with JSON" if status == 200 else f"with HTTP {status}"
        raise self._away(f"answers {path} {what}")

    def _get(self, path: str, timeout_s: float) -> tuple[int, bytes]:
        """Status and body, all within ``timeout_s`` seconds."""
        connection = self._connection(timeout_s)
        late = threading.Event()

        def give_up() -> None:
            # A socket's timeout begins anew with every byte; this one does not.
            late.set()
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(timeout_s, give_up)
        timer.daemon = True
        timer.start()
        try:
            connection.request("GET", self._path + path, headers=self._headers())
            answer = connection.getresponse()
            body = answer.read(MAX_ANSWER + 1)
            if late.is_set():
                raise TimeoutError
        except (OSError, http.client.HTTPException) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise self._away(f"does not answer {path} within {timeout_s:.3g} s") from None
            distrusted = isinstance(error, ssl.SSLCertVerificationError)
            raise self._away(f"can't be reached: {error or type(error).__name__}", refused=distrusted) from None
        finally:
            timer.cancel()
            connection.close()
        if len(body) > MAX_ANSWER:
            raise self._away(f"answers {path} with more than {MAX_ANSWER} bytes")
        return answer.status, body

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        if not self._tls:
            return http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        authorities = self._settings.ssl_cafile
        try:
            context = ssl.create_default_context(cafile=None if authorities is None else str(authorities))
        except OSError as error:
            problem = f"HOMEOSTAT_REGISTRY__SSL_CAFILE={authorities}: {error.strerror or error}"
            raise RegistryAwayError(problem, refused=True) from None
        return http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=context)

    def _headers(self) -> dict[str, str]:
        headers = {"Accept": "application/vnd.schemaregistry.v1+json, application/json", "User-Agent": "homeostat"}
        if self._settings.username:
            login = f"{self._settings.username}:{self._password()}".encode()
            headers["Authorization"] = f"Basic {base64.b64encode(login).decode()}"
        return headers

    def _password(self) -> str:
        path = self._settings.password_file
        try:
            return "" if path is None else path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            problem = f"HOMEOSTAT_REGISTRY__PASSWORD_FILE={path}: {reason}"
            raise RegistryAwayError(problem, refused=True) from None

    def _away(self, text: str, *, refused: bool = False) -> RegistryAwayError:
        return RegistryAwayError(f"{self._where}: the schema registry {text}", refused=refused)
