"""Who we are to Kafka: logins and certificates out of settings and secret files, and what in them does not fit."""

from __future__ import annotations

import base64
import binascii
import json
import time
from pathlib import Path
from typing import Any

import structlog
from kafka.net.sasl import get_sasl_mechanism, register_sasl_mechanism
from kafka.net.sasl.oauth import AbstractTokenProvider

from daemon.errors import StreamError
from daemon.stream_settings import KafkaClient
from daemon.streams.tls import TlsFiles, certificates, read_secret

log = structlog.get_logger("homeostat.kafka")

PREFIX = "HOMEOSTAT_KAFKA__"
_WITH_PASSWORD = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")


def check_security(settings: KafkaClient, prefix: str = PREFIX) -> list[str]:
    """One line for each setting that contradicts another; no file is opened and no broker asked."""
    protocol, mechanism = settings.security_protocol, settings.sasl_mechanism
    has_password = bool(settings.password.get_secret_value())
    given = {
        "USERNAME": bool(settings.username),
        "PASSWORD": has_password,
        "PASSWORD_FILE": settings.password_file is not None,
        "TOKEN_FILE": settings.token_file is not None,
    }
    problems = []
    if mechanism and not protocol.startswith("SASL"):
        problems.append(
            f"{prefix}SASL_MECHANISM={mechanism}: {prefix}SECURITY_PROTOCOL={protocol} has no login; "
            "set it to SASL_SSL (or SASL_PLAINTEXT), or take the mechanism away"
        )
    if protocol.startswith("SASL") and not mechanism:
        right = ", ".join((*_WITH_PASSWORD, "OAUTHBEARER"))
        problems.append(
            f"{prefix}SECURITY_PROTOCOL={protocol}: {prefix}SASL_MECHANISM is empty; right would be {right}"
        )
    used = {"": (), "OAUTHBEARER": ("TOKEN_FILE",)}.get(mechanism, ("USERNAME", "PASSWORD", "PASSWORD_FILE"))
    why = f"is not used with {prefix}SASL_MECHANISM={mechanism}" if mechanism else f"needs a {prefix}SASL_MECHANISM"
    problems += [f"{prefix}{name}: {why}" for name, is_given in given.items() if is_given and name not in used]
    if mechanism == "OAUTHBEARER" and not given["TOKEN_FILE"]:
        problems.append(f"{prefix}TOKEN_FILE is empty: OAUTHBEARER logs in with the token in that file")
    if mechanism in _WITH_PASSWORD:
        if not settings.username:
            problems.append(f"{prefix}USERNAME is empty: {mechanism} logs in with a name and a password")
        if has_password and settings.password_file is not None:
            problems.append(f"{prefix}PASSWORD and {prefix}PASSWORD_FILE are both set: keep the file")
        if not has_password and settings.password_file is None:
            problems.append(f"{prefix}PASSWORD_FILE is empty: {mechanism} logs in with a name and a password")
    return problems + _check_files(settings, prefix)


def _check_files(settings: KafkaClient, prefix: str) -> list[str]:
    problems = []
    names = ("ssl_cafile", "ssl_certfile", "ssl_keyfile", "ssl_password_file")
    if not settings.security_protocol.endswith("SSL"):
        why = f"{prefix}SECURITY_PROTOCOL={settings.security_protocol} has no TLS; set it to SSL or SASL_SSL"
        problems += [f"{prefix}{name.upper()}: {why}" for name in names if getattr(settings, name) is not None]
    if settings.ssl_certfile is not None and settings.ssl_keyfile is None:
        problems.append(f"{prefix}SSL_CERTFILE={settings.ssl_certfile}: {prefix}SSL_KEYFILE, its key, is empty")
    if settings.ssl_keyfile is not None and settings.ssl_certfile is None:
        problems.append(f"{prefix}SSL_KEYFILE={settings.ssl_keyfile}: {prefix}SSL_CERTFILE, its certificate, is empty")
    if settings.ssl_password_file is not None and settings.ssl_keyfile is None:
        problems.append(
            f"{prefix}SSL_PASSWORD_FILE={settings.ssl_password_file}: there is no {prefix}SSL_KEYFILE to open"
        )
    return problems


class Secret(str):
    """Text that shows itself to nobody: printed, formatted, in a traceback it is ``***``; its bytes are the secret."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"

    def __str__(self) -> str:
        return "***"

    def __format__(self, form: str) -> str:
        return "***"


class FileSecret(Secret):
    """A password that is read from its file again at every login, so that a new one needs no restart."""

    __slots__ = ("path", "variable")

    path: Path
    variable: str

    @classmethod
    def of(cls, path: Path, variable: str) -> FileSecret:
        """The file's password. Raises StreamError, naming variable and file, when there is none."""
        secret = cls(read_secret(path, variable))
        secret.path, secret.variable = path, variable
        return secret

    def now(self) -> Secret:
        """What the file holds now; while it can't be read, what it held."""
        try:
            return Secret(read_secret(self.path, self.variable))
        except StreamError as error:
            log.warning("password file not readable, logging in with what it held", problem=str(error))
            return self


class TokenFile(AbstractTokenProvider):  # type: ignore[misc]
    """OAUTHBEARER's token out of a file that somebody else renews; read at every login."""

    def __init__(self, path: Path, variable: str = f"{PREFIX}TOKEN_FILE") -> None:
        self._path, self._variable = path, variable
        self.token()

    def token(self) -> str:
        """The token.

        Raises:
            StreamError: naming variable and file, when it holds none.
        """
        text = read_secret(self._path, self._variable).strip()
        # RFC 6750 section 2.1; anything else would end the message's field.
        if not text.isascii() or not text.isprintable() or " " in text:
            raise StreamError(f"{self._variable}={self._path}: not a token: it has characters that no token has")
        return text

    def expired(self) -> str:
        """A sentence for a web token (RFC 7519) whose time is over; empty for one that is not, or can't be read."""
        try:
            body = self.token().split(".")[1]
            ends = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))["exp"]
            over = time.time() - float(ends)
        except (StreamError, IndexError, KeyError, TypeError, ValueError, RecursionError, binascii.Error):
            return ""
        return f"the token in {self._variable}={self._path} expired {over:.0f} s ago" if over > 0 else ""


def login_config(settings: KafkaClient) -> dict[str, Any]:
    """kafka-python's options of protocol, login and certificates; all files are read.

    Raises:
        StreamError: one line that names the variable and the file that can't be used.
    """
    config: dict[str, Any] = {"security_protocol": settings.security_protocol}
    if settings.security_protocol.endswith("SSL"):
        files = TlsFiles(
            PREFIX,
            cafile=settings.ssl_cafile,
            certfile=settings.ssl_certfile,
            keyfile=settings.ssl_keyfile,
            password_file=settings.ssl_password_file,
            check_hostname=settings.ssl_check_hostname,
        )
        config["ssl_context"] = certificates(files, settings.ssl_reload_s)
    if settings.sasl_mechanism:
        config["sasl_mechanism"] = settings.sasl_mechanism
    if settings.sasl_mechanism == "OAUTHBEARER" and settings.token_file is not None:
        config["sasl_oauth_token_provider"] = TokenFile(settings.token_file)
    elif settings.sasl_mechanism:
        password: Secret = Secret(settings.password.get_secret_value())
        if settings.password_file is not None:
            password = FileSecret.of(settings.password_file, f"{PREFIX}PASSWORD_FILE")
        config |= {"sasl_plain_username": settings.username, "sasl_plain_password": password}
    return config


def _reading_again(mechanism: Any) -> Any:
    """kafka-python makes a mechanism for every login, out of options that it copied once: here the file is read."""

    class Reading(mechanism):  # type: ignore[misc]
        def __init__(self, **config: Any) -> None:
            if isinstance(password := config.get("sasl_plain_password"), FileSecret):
                config["sasl_plain_password"] = password.now()
            super().__init__(**config)

    return Reading


for _name in _WITH_PASSWORD:
    register_sasl_mechanism(_name, _reading_again(get_sasl_mechanism(_name)), overwrite=True)
