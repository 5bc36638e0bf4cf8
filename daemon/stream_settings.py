"""Settings of brokers: Kafka, MQTT, the schema registry."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, SecretStr, field_validator

from daemon.section import Section


class KafkaClient(Section):
    """Kafka clients: source, sink, labels and dead letters share these."""

    group: str = "homeostat"
    """Consumer group of the source."""
    instance_id: str = "auto"
    """Static member id, so that a restart brings no rebalance; auto: from the host name and STATE_DIR; empty: none."""
    start: Literal["earliest", "latest"] = "earliest"
    """Where a group without a committed offset begins."""
    out_of_range: Literal["fail", "earliest", "latest"] = "fail"
    """When the wanted offset is no longer on the broker: stop, or jump and count."""
    max_rebuild: int = Field(100_000, ge=0)
    """Longest run of records replayed without output to bring the state up to the group's offset."""
    session_timeout_ms: int = Field(30_000, ge=6_000)
    """Time without a heartbeat after which the broker gives the partitions to another worker."""
    bootstrap_timeout_s: PositiveFloat = 8.0
    """Time to reach the broker at the start; later losses are retried for ever."""
    transaction_ms: PositiveFloat = 100.0
    """Longest time that answers wait for their transaction's end, with exactly-once."""
    transaction_timeout_ms: int = Field(60_000, ge=1_000)
    """Time after which the broker itself ends a transaction whose worker is gone."""
    metadata_max_age_ms: int = Field(30_000, ge=1_000)
    """How often the clients ask for new partitions and brokers."""
    bulk: Literal["auto", "off"] = "auto"
    """Decode and encode whole record batches at once where a self-test finds that safe; off: record by record."""
    producer_linger_ms: float | None = Field(None, ge=0)
    """Time the producer waits to fill a batch; by default 0 where answers are written in bulk, as they come in batches
    already, else 5."""
    compression: Literal["none", "gzip", "lz4", "snappy", "zstd"] = "none"
    """Compression of what is produced."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """How to talk to the broker."""
    sasl_mechanism: Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = ""
    """Login mechanism with SASL_*."""
    username: str = ""
    """Login name."""
    password: SecretStr = SecretStr("")
    """Login password; better in a file."""
    password_file: Path | None = None
    """File that holds the login password."""
    token_file: Path | None = None
    """File that holds the token of OAUTHBEARER; read again at every login."""
    ssl_cafile: Path | None = None
    """Authorities that sign the brokers' certificates."""
    ssl_certfile: Path | None = None
    """Own certificate, where the broker asks for one."""
    ssl_keyfile: Path | None = None
    """Key of the own certificate."""
    ssl_password_file: Path | None = None
    """File that holds the password of that key."""
    ssl_check_hostname: bool = True
    """Whether the broker's certificate has to name the host that was asked for."""
    ssl_reload_s: PositiveFloat = 10.0
    """How often certificate files are looked at; new ones hold for every new connection."""


class Mqtt(Section):
    """MQTT clients: source and sink share these."""

    client_id: str = "auto"
    """Name of the session on the broker; auto: from the host name and STATE_DIR, so that it outlives a restart."""
    in_flight: int = Field(1_000, ge=1, le=65_535)
    """Most records taken from the broker and not yet acknowledged; a checkpoint acknowledges them."""
    session_expiry_s: int = Field(86_400, ge=0, le=4_294_967_295)
    """How long the broker keeps records for a worker that is away."""
    keepalive_s: PositiveInt = 30
    """Time without a word after which a side takes the other for gone."""
    connect_timeout_s: PositiveFloat = 8.0
    """Time to reach the broker at the start; later losses are retried for ever."""
    tls: bool = False
    """Whether to speak TLS; also switched on by an mqtts:// address."""
    username: str = ""
    """Login name."""
    password_file: Path | None = None
    """File that holds the login password."""
    ssl_cafile: Path | None = None
    """Authorities that sign the broker's certificate."""
    ssl_certfile: Path | None = None
    """Own certificate, where the broker asks for one."""
    ssl_keyfile: Path | None = None
    """Key of the own certificate."""


class SchemaRegistry(Section):
    """Where the codecs avro and json-schema get their schemas."""

    url: str = ""
    """Address of the registry: https://host:port, with a path where it has one."""
    username: str = ""
    """Login name."""
    password_file: Path | None = None
    """File that holds the login password."""
    ssl_cafile: Path | None = None
    """Authorities that sign the registry's certificate; unset: the machine's own."""
    timeout_s: float = Field(8.0, gt=0, le=30)
    """Time for one answer of the registry, and to reach it at the start; later losses are retried for ever."""

    @field_validator("url")
    @classmethod
    def _without_login(cls, url: str) -> str:
        # Settings are printed and logged, so a login never gets further than this; the registry's client refuses it.
        return re.sub(r"//[^/@]*@", "//***@", url)
