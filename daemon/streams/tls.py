"""TLS from files that change while the program runs: a new connection gets the newest files that could be loaded."""

from __future__ import annotations

import hashlib
import ssl
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from daemon.errors import StreamError
from daemon.streams.x509 import validity

log = structlog.get_logger("homeostat.tls")

SOON_S = 14 * 86_400.0
"""A certificate that ends within this time is warned of, once a day."""
_DAY_S = 86_400.0


def read_file(path: Path, variable: str) -> bytes:
    """The file's bytes.

    Raises:
        StreamError: naming variable and file: it is missing, can't be read, or is empty.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StreamError(f"{variable}={path}: {error.strerror}") from None
    if not content.strip():
        raise StreamError(f"{variable}={path}: the file is empty")
    return content


def read_secret(path: Path, variable: str) -> str:
    """The one line of a secret's file, without the end of line that editors add.

    Raises:
        StreamError: naming variable and file, never what is in it.
    """
    try:
        text = read_file(path, variable).decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise StreamError(f"{variable}={path}: not UTF-8 text") from None
    if any(letter in text for letter in "\r\n\0"):
        raise StreamError(f"{variable}={path}: more than one line; the file holds the secret and nothing else")
    return text


@dataclass(frozen=True)
class TlsFiles:
    """Where the certificates are; ``prefix`` is that of the variables, ``HOMEOSTAT_KAFKA__``."""

    prefix: str
    cafile: Path | None = None
    certfile: Path | None = None
    keyfile: Path | None = None
    password_file: Path | None = None
    check_hostname: bool = True

    def variable(self, field: str) -> str:
        """``HOMEOSTAT_KAFKA__SSL_CAFILE=ca.pem``: how a file is called in messages."""
        return f"{self.prefix}SSL_{field.upper()}={getattr(self, field)}"

    def state(self) -> tuple[str, ...]:
        """What the files hold now, as hashes: two states are equal exactly when nothing changed."""
        found = []
        for path in (self.cafile, self.certfile, self.keyfile, self.password_file):
            try:
                found.append("" if path is None else hashlib.sha256(path.read_bytes()).hexdigest())
            except OSError as error:
                found.append(f"{error.strerror}")
        return tuple(found)


def build(files: TlsFiles) -> tuple[ssl.SSLContext, float | None]:
    """A client's context, and when its own certificate ends (Unix time; None where it has none).

    Raises:
        StreamError: one line that names the variable and the file that can't be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = files.check_hostname
    if files.cafile is None:
        context.load_default_certs()
    else:
        authorities = read_file(files.cafile, f"{files.prefix}SSL_CAFILE")
        try:
            context.load_verify_locations(cadata=authorities.decode("ascii", "replace"))
        except (ssl.SSLError, ValueError):
            raise StreamError(f"{files.variable('cafile')}: holds no certificate in PEM form") from None
    if files.certfile is None:
        return context, None
    return context, own_certificate(context, files)


def own_certificate(context: ssl.SSLContext, files: TlsFiles) -> float:
    """Load what this side shows of itself into ``context``; returns when it ends (Unix time).

    Raises:
        StreamError: one line that names the variable and the file that can't be used.
    """
    assert files.certfile is not None
    name = files.variable("certfile")
    content = read_file(files.certfile, f"{files.prefix}SSL_CERTFILE")
    try:
        begins, ends = validity(content)
    except ValueError as error:
        raise StreamError(f"{name}: {error}") from None
    now = time.time()
    if not begins <= now <= ends:
        problem = (
            f"the certificate expired on {_date(ends)}" if now > ends else f"it is not valid before {_date(begins)}"
        )
        raise StreamError(f"{name}: {problem}; get a new one, or correct this machine's clock ({_date(now)})")
    if files.keyfile is not None:
        read_file(files.keyfile, f"{files.prefix}SSL_KEYFILE")
    locked = ""
    if files.password_file is not None:
        locked = read_secret(files.password_file, f"{files.prefix}SSL_PASSWORD_FILE")
    asked = []

    def password() -> str:
        # Without this OpenSSL would ask at the terminal, and wait.
        asked.append(True)
        return locked

    try:
        context.load_cert_chain(files.certfile, files.keyfile, password)
    except ssl.SSLError as error:
        key = files.variable("keyfile") if files.keyfile is not None else name
        if "MISMATCH" in (error.reason or ""):
            raise StreamError(f"{key}: the key does not fit the certificate in {name}") from None
        if asked and not locked:
            raise StreamError(f"{key}: the key is locked; set {files.prefix}SSL_PASSWORD_FILE") from None
        if asked:
            raise StreamError(f"{key}: not opened by the password in {files.variable('password_file')}") from None
        raise StreamError(f"{key}: holds no private key in PEM form that fits {name}") from None
    except (OSError, ValueError) as error:
        raise StreamError(f"{name}: {error}") from None
    return ends


def _date(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


Build = Callable[[TlsFiles], tuple[ssl.SSLContext, float | None]]
"""Makes a context of the files, and says when their certificate ends."""


class Certificates:
    """Stands in for an ``ssl.SSLContext``: wraps each new connection in a context of the newest usable files.

    A context as a whole is replaced rather than loaded into: loading adds authorities and never takes one away, and a
    certificate whose key does not fit would leave it broken. A new file that can't be used is logged by name and what
    was loaded before stays. The files are looked at every ``reload_s`` seconds, by their content.

    Raises:
        StreamError: at the start, when a file can't be used.
    """

    def __init__(self, files: TlsFiles, reload_s: float, build: Build = build) -> None:
        self.files = files
        self._build = build
        # Before loading: what changes meanwhile is seen at the first look.
        self._state = files.state()
        self._context, self._ends = build(files)
        self._suspect: tuple[str, ...] | None = None
        self._told: tuple[str, ...] | None = None
        self._warned = 0.0
        self._warn()
        threading.Thread(target=_watch, args=(weakref.ref(self), reload_s), name="certificates", daemon=True).start()

    @property
    def check_hostname(self) -> bool:
        """Whether the broker's certificate has to name the host."""
        return self.files.check_hostname

    def wrap_socket(self, sock: Any, **options: Any) -> ssl.SSLSocket:
        """A TLS socket over ``sock``; options as of ``ssl.SSLContext.wrap_socket``."""
        return self._context.wrap_socket(sock, **options)

    def look(self) -> bool:
        """Load the files if they changed; returns whether that was done. Raises nothing."""
        state = self.files.state()
        if state == self._state:
            self._suspect = None
            self._warn()
            return False
        try:
            self._context, self._ends = self._build(self.files)
        except StreamError as error:
            # Certificate and key are two files, and may be looked at between the writing of the one and the other:
            # what is wrong at two looks is wrong.
            if state == self._suspect and state != self._told:
                self._told = state
                log.error("new certificate files can't be used, the ones loaded before stay", problem=str(error))
            self._suspect = state
            return False
        self._state, self._suspect, self._told, self._warned = state, None, None, 0.0
        until = "" if self._ends is None else _date(self._ends)
        log.info("certificate files loaded, for new connections", until=until, variables=f"{self.files.prefix}SSL_*")
        self._warn()
        return True

    def _warn(self) -> None:
        now = time.time()
        if self._ends is not None and self._ends - now < SOON_S and now - self._warned > _DAY_S:
            self._warned = now
            log.warning("certificate ends soon", certificate=self.files.variable("certfile"), ends=_date(self._ends))


def _watch(watched: weakref.ref[Certificates], reload_s: float) -> None:
    """Look again and again, until nobody uses the certificates any more."""
    while True:
        time.sleep(reload_s)
        certificates = watched()
        if certificates is None:
            return
        certificates.look()
        del certificates


_shared: weakref.WeakValueDictionary[tuple[TlsFiles, float], Certificates] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def certificates(files: TlsFiles, reload_s: float) -> Certificates:
    """The certificates of these files; all clients of the process share one, and it is up to date when it is given.

    Raises:
        StreamError: one line that names the variable and the file that can't be used.
    """
    with _lock:
        known = _shared.get((files, reload_s))
        if known is None:
            known = _shared[files, reload_s] = Certificates(files, reload_s)
        return known
