"""Settings of the traces."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from daemon.section import Section

PATH = "/v1/traces"


class Traces(Section):
    """OpenTelemetry traces, and the trace context of records."""

    mode: Literal["off", "pass", "on"] = "off"
    """off; pass: a record's traceparent, tracestate and baggage go on with its answer; on: spans too (extra `otel`)."""
    endpoint: str = ""
    """Collector that takes OTLP over HTTP: http://host:4318; empty: as OTEL_EXPORTER_OTLP_ENDPOINT says."""
    sample_ratio: float | None = Field(None, ge=0, le=1)
    """Share of the batches that are traced; unset: as OTEL_TRACES_SAMPLER says, by default all."""
    record_spans: int = Field(32, ge=0, le=1_024)
    """Most records of a batch that get a span of their own: the first of those whose senders sampled them."""

    @field_validator("endpoint")
    @classmethod
    def _is_base_url(cls, given: str) -> str:
        if not given:
            return given
        try:
            parts = urlsplit(given)
            fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            fine = False
        if not fine:
            raise ValueError("not a collector's address; right would be one like http://127.0.0.1:4318")
        if "@" in parts.netloc:
            raise ValueError("a login has no place in an address; set OTEL_EXPORTER_OTLP_HEADERS")
        if parts.query or parts.fragment:
            raise ValueError("what stands behind ? or # has no place here")
        return given

    @property
    def url(self) -> str | None:
        """Where spans are sent; None: where the variables of OpenTelemetry say.

        As with OTEL_EXPORTER_OTLP_ENDPOINT the path is added; an address that has it already is left as it is.
        """
        base = self.endpoint.rstrip("/")
        return None if not base else base if base.endswith(PATH) else base + PATH
