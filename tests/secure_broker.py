"""A Kafka that asks who is there: one node with a listener for every way to log in, and certificates for both sides.

Certificates come from the ``openssl`` command, users from the format of the storage and from the listeners' settings.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from daemon.broker import TrialBroker, _free_ports

USER = "homeostat"
PASSWORD = "s3cr3t-of-the-plant"
"""Of SCRAM and PLAIN; the tests look for it in whatever the daemon says."""

LISTENERS = ("SASL_PLAINTEXT", "SASL_SSL", "SSL")


def openssl(*arguments: str, folder: Path) -> None:
    """Run openssl; skips where there is none."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    done = subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Pair(NamedTuple):
    """A certificate with its key."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates; ``cert`` is its own."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name = folder, name
        self.cert, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc")
        more = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
        openssl(
            *("req", "-x509", *curve, "-days", "30", "-subj", f"/CN={name}", *more),
            *("-keyout", self._key.name, "-out", self.cert.name),
            folder=folder,
        )

    def issue(self, name: str, *, hosts: str = "", password: str = "", days: int = 20) -> Pair:
        """A certificate for ``name``; ``hosts`` are its alternative names, negative ``days`` make it an expired one."""
        pair = Pair(self.folder / f"{self.name}-{name}.pem", self.folder / f"{self.name}-{name}.key")
        request = self.folder / f"{self.name}-{name}.csr"
        locked = ("-aes-256-cbc", "-pass", f"pass:{password}") if password else ()
        curve = ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
        openssl("genpkey", *curve, *locked, "-out", pair.key.name, folder=self.folder)
        unlock = ("-passin", f"pass:{password}") if password else ()
        openssl(
            *("req", "-new", "-key", pair.key.name, *unlock, "-subj", f"/CN={name}", "-out", request.name),
            folder=self.folder,
        )
        extensions = self.folder / f"{self.name}-{name}.ext"
        extensions.write_text(f"subjectAltName={hosts}\n" if hosts else "basicConstraints=CA:FALSE\n")
        openssl(
            *("x509", "-req", "-in", request.name, "-CA", self.cert.name, "-CAkey", self._key.name),
            *("-CAcreateserial", "-days", str(days), "-extfile", extensions.name, "-out", pair.cert.name),
            folder=self.folder,
        )
        return pair


def token(name: str = USER, lifetime_s: float = 3600) -> str:
    """An unsecured JSON web token, as Kafka's own trial handler takes them: not signed by anybody."""

    def part(content: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")

    now = time.time()
    return f"{part({'alg': 'none'})}.{part({'sub': name, 'iat': now - 5, 'exp': now + lifetime_s})}."


class SecureBroker(TrialBroker):
    """One node with PLAINTEXT for the tests themselves, SASL_PLAINTEXT, SASL_SSL, and SSL that asks for a certificate.

    ``authority`` signed the node's certificate and that of the clients it lets in; those of ``second`` it takes too.
    A login holds for ``session_ms`` milliseconds, after which a client has to log in anew; 0: for ever.
    """

    def __init__(self, folder: Path, *, session_ms: int = 0) -> None:
        certificates = folder / "certificates"
        self.authority = Authority(certificates, "authority")
        self.second = Authority(certificates, "second")
        self.stranger = Authority(certificates, "stranger")
        node = self.authority.issue("node", hosts="IP:127.0.0.1,DNS:localhost")
        self.client = self.authority.issue("worker")
        (folder / "node.pem").write_bytes(node.key.read_bytes() + node.cert.read_bytes())
        (folder / "trusted.pem").write_bytes(self.authority.cert.read_bytes() + self.second.cert.read_bytes())
        self.ports = dict(zip(LISTENERS, (*_free_ports("127.0.0.1"), _free_ports("127.0.0.1")[0]), strict=True))
        store = {"keystore.type": "PEM", "keystore.location": "node.pem"}
        store |= {"truststore.type": "PEM", "truststore.location": "trusted.pem"}
        properties = {
            "listener.security.protocol.map": ",".join(f"{name}:{name}" for name in ("PLAINTEXT", *LISTENERS))
            + ",CONTROLLER:PLAINTEXT",
            "listener.name.ssl.ssl.client.auth": "required",
            "connections.max.reauth.ms": str(session_ms),
        }
        properties |= {f"ssl.{name}": value for name, value in store.items()}
        mechanisms = {
            "plain": f'plain.PlainLoginModule required user_{USER}="{PASSWORD}"',
            "scram-sha-256": "scram.ScramLoginModule required",
            "scram-sha-512": "scram.ScramLoginModule required",
            "oauthbearer": 'oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="node"',
        }
        for listener in ("sasl_plaintext", "sasl_ssl"):
            prefix = f"listener.name.{listener}"
            properties[f"{prefix}.sasl.enabled.mechanisms"] = ",".join(name.upper() for name in mechanisms)
            for name, module in mechanisms.items():
                properties[f"{prefix}.{name}.sasl.jaas.config"] = f"org.apache.kafka.common.security.{module};"
        super().__init__(
            folder,
            port=0,
            properties=properties,
            format_arguments=[
                argument
                for name in ("SCRAM-SHA-256", "SCRAM-SHA-512")
                for argument in ("--add-scram", f"{name}=[name={USER},password={PASSWORD}]")
            ],
        )

    def at(self, listener: str) -> str:
        """``host:port`` of a listener."""
        return self.address if listener == "PLAINTEXT" else f"{self.host}:{self.ports[listener]}"

    def _configure(self) -> None:
        super()._configure()
        path = self.folder / "server.properties"
        lines = path.read_text().splitlines()
        # The controller's port is chosen by the parent; the last line of a name is the one that counts.
        more = [f"{name}://{self.host}:{port}" for name, port in self.ports.items()]
        given = [line for line in lines if line.startswith(("listeners=", "advertised.listeners="))]
        path.write_text("\n".join([*lines, *(",".join([line, *more]) for line in given), ""]))
