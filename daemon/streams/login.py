"""Tries a broker's door before a client is made, because the client can't say why it stays shut.

kafka-python 3 gives every refusal as a bootstrap that timed out, and it drops the broker's reason: the answer to a
refused login and the end of the connection come in one read, of which only the end is kept. So one connection is made
here as the client would make it, TLS, versions, login, and whatever goes wrong is told by name. The messages are those
of Kafka's protocol guide (ApiVersions, SaslHandshake, SaslAuthenticate), in the versions that every broker since 1.0
knows.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from typing import Any

from kafka import errors as kafka_errors
from kafka.net.sasl import get_sasl_mechanism

from daemon.errors import StreamError
from daemon.streams.security import PREFIX, TokenFile

_API_VERSIONS, _SASL_HANDSHAKE, _SASL_AUTHENTICATE = 18, 17, 36
_LONGEST_ANSWER = 1 << 20
_TLS_ALERT = b"\x15\x03"
"""How TLS answers what is none (RFC 8446 section 5.1); as a length it would be 350 MB."""
_MOST_ROUNDS = 8
"""Messages of one login; the longest mechanism needs two."""
_SAID = 300
"""Most characters of a broker's own words in a message."""


class LoginFault(Exception):
    """Why a broker does not let this client in.

    ``final``: it said so, and asking again would not help. ``absent``: nothing is there that could have said anything.
    """

    def __init__(self, text: str, *, final: bool, absent: bool = False) -> None:
        super().__init__(text)
        self.final, self.absent = final, absent


def try_login(server: str, config: dict[str, Any], timeout_s: float) -> None:
    """Connect to ``host:port``, log in, hang up.

    Args:
        server: ``host:port``; an IPv6 host in brackets.
        config: kafka-python's options, with ``security_protocol`` and what `login_config` gives.
        timeout_s: time for all of it.

    Raises:
        LoginFault: what was wrong, and which variable may be the one to correct.
    """
    host, _, port = server.rpartition(":")
    host = host.strip("[]")
    deadline = time.monotonic() + timeout_s
    try:
        sock: Any = socket.create_connection((host, int(port)), timeout_s)
    except (OSError, ValueError, OverflowError) as error:
        raise LoginFault(f"no connection ({_cause(error)})", final=False, absent=True) from None
    try:
        if config["security_protocol"].endswith("SSL"):
            sock = _encrypt(sock, host, config)
        _Door(sock, host, config, deadline).enter()
    except TimeoutError:
        raise LoginFault(f"it accepts connections and did not answer within {timeout_s:g} s", final=False) from None
    except StreamError as error:
        raise LoginFault(str(error), final=True) from None
    except ssl.SSLError as error:
        raise _tls_fault(error, config) from None
    except (OSError, EOFError) as error:
        raise LoginFault(_hung_up(config, error), final=False) from None
    except (ValueError, KeyError, IndexError, struct.error, kafka_errors.KafkaError):
        # SCRAM proves both sides: a broker that does not know the password ends here, and so does no broker at all.
        raise LoginFault(
            "its answer can't be understood: is it a Kafka broker, and the right one?", final=True
        ) from None
    finally:
        sock.close()


def _encrypt(sock: Any, host: str, config: dict[str, Any]) -> Any:
    try:
        return config["ssl_context"].wrap_socket(sock, server_hostname=host.rstrip("."))
    except ssl.SSLCertVerificationError as error:
        name = "SSL_CHECK_HOSTNAME" if "mismatch" in error.verify_message else "SSL_CAFILE"
        raise LoginFault(
            f"the broker's certificate is not accepted: {error.verify_message}; check {PREFIX}{name}", final=True
        ) from None
    except ssl.SSLError as error:
        raise _tls_fault(error, config) from None
    except TimeoutError:
        raise
    except (OSError, EOFError) as error:
        raise LoginFault(_no_tls(error), final=False) from None


def _no_tls(error: Exception) -> str:
    return f"no TLS is spoken there ({_cause(error)}); check {PREFIX}SECURITY_PROTOCOL and the port"


def _tls_fault(error: ssl.SSLError, config: dict[str, Any]) -> LoginFault:
    """TLS 1.3 tells of a refused client only after the handshake, with the first answer."""
    reason = error.reason or ""
    if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason or "HANDSHAKE_FAILURE" in reason):
        said = reason.rpartition("ALERT_")[2].replace("_", " ").lower()
        files = config["ssl_context"].files
        if files.certfile is None:
            advice = f"the broker asks for a certificate: set {PREFIX}SSL_CERTFILE and {PREFIX}SSL_KEYFILE"
        else:
            advice = f"the broker does not accept the certificate of {files.variable('certfile')}"
        return LoginFault(f"{advice} ({said})", final=True)
    return LoginFault(_no_tls(error), final="WRONG_VERSION" in reason)


def _hung_up(config: dict[str, Any], error: Exception) -> str:
    protocol = config["security_protocol"]
    wants = "a login or TLS" if protocol == "PLAINTEXT" else "TLS" if protocol == "SASL_PLAINTEXT" else "another login"
    return f"it hung up ({_cause(error)}): the port may want {wants}; check {PREFIX}SECURITY_PROTOCOL and the port"


def _cause(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "TLS error").replace("_", " ").lower()
    strerror = getattr(error, "strerror", None)
    return str(strerror or error or type(error).__name__)


class _Door:
    """One connection, up to the point where a client could ask for topics."""

    def __init__(self, sock: Any, host: str, config: dict[str, Any], deadline: float) -> None:
        self._sock, self._host, self._config, self._deadline = sock, host, config, deadline

    def enter(self) -> None:
        self._ask(_API_VERSIONS, 0, b"")
        if not self._config["security_protocol"].startswith("SASL"):
            # A listener that wants a login answers the first of these and hangs up at the second.
            self._ask(_API_VERSIONS, 0, b"")
            return
        self._choose_mechanism()
        self._log_in()

    def _choose_mechanism(self) -> None:
        name = self._config["sasl_mechanism"]
        answer = _Fields(self._ask(_SASL_HANDSHAKE, 1, _text(name)))
        code = answer.int16()
        enabled = [answer.text() for _ in range(min(answer.int32(), 50))]
        if code == kafka_errors.UnsupportedSaslMechanismError.errno:
            known = ", ".join(enabled) or "none"
            raise LoginFault(f"it does not take {name}; {PREFIX}SASL_MECHANISM can be: {_one_line(known)}", final=True)
        if code == kafka_errors.IllegalSaslStateError.errno:
            raise LoginFault(f"the port takes no login; check {PREFIX}SECURITY_PROTOCOL and the port", final=True)
        if code:
            raise LoginFault(f"it refused the login's begin with {_name_of(code)}", final=False)

    def _log_in(self) -> None:
        mechanism = get_sasl_mechanism(self._config["sasl_mechanism"])(host=self._host, **self._config)
        for _ in range(_MOST_ROUNDS):
            if mechanism.is_done():
                return
            answer = _Fields(self._ask(_SASL_AUTHENTICATE, 0, _sized(mechanism.auth_bytes())))
            if code := answer.int16():
                raise LoginFault(self._refusal(code, answer.text()), final=code != kafka_errors.UnknownError.errno)
            answer.text()
            mechanism.receive(answer.sized())
        raise LoginFault("the login came to no end", final=True)

    def _refusal(self, code: int, said: str) -> str:
        said = _one_line(said)
        if password := "".join(self._config.get("sasl_plain_password", "")):
            said = said.replace(password, "***")
        hint = f"check {PREFIX}USERNAME and {PREFIX}PASSWORD_FILE"
        if isinstance(provider := self._config.get("sasl_oauth_token_provider"), TokenFile):
            hint = provider.expired() or f"check {PREFIX}TOKEN_FILE"
        return f"login refused: {said or _name_of(code)}; {hint}"

    def _ask(self, key: int, version: int, body: bytes) -> bytes:
        """Send one request; the answer's body."""
        request = struct.pack(">hhi", key, version, 1) + _text("homeostat") + body
        self._wait()
        self._sock.sendall(_sized(request))
        begin = self._read(4)
        if begin.startswith(_TLS_ALERT):
            raise LoginFault(f"the port speaks TLS; check {PREFIX}SECURITY_PROTOCOL and the port", final=True)
        (length,) = struct.unpack(">i", begin)
        if not 4 <= length <= _LONGEST_ANSWER:
            raise LoginFault(
                f"it does not speak Kafka's protocol; check {PREFIX}SECURITY_PROTOCOL and the port", final=True
            )
        return self._read(length)[4:]

    def _read(self, size: int) -> bytes:
        content = b""
        while len(content) < size:
            self._wait()
            more = self._sock.recv(size - len(content))
            if not more:
                raise EOFError("without an answer")
            content += more
        return content

    def _wait(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)


class _Fields:
    """Reads an answer from its beginning; one that is too short is a ValueError or struct.error."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def _take(self, size: int) -> bytes:
        taken = self._content[self._at : self._at + size]
        if size < 0 or len(taken) < size:
            raise ValueError("answer too short")
        self._at += size
        return taken

    def int16(self) -> int:
        found: int = struct.unpack(">h", self._take(2))[0]
        return found

    def int32(self) -> int:
        found: int = struct.unpack(">i", self._take(4))[0]
        return found

    def text(self) -> str:
        return self._take(max(self.int16(), 0)).decode("utf-8", "replace")

    def sized(self) -> bytes:
        return self._take(max(self.int32(), 0))


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack(">h", len(content)) + content


def _sized(content: bytes) -> bytes:
    return struct.pack(">i", len(content)) + content


def _name_of(code: int) -> str:
    return str(kafka_errors.for_code(code).__name__)


def _one_line(said: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in said)[:_SAID].strip()
