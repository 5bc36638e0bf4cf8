"""Records in JSON, each held against the JSON Schema that it names, as the registry has it.

The payload is what the codec json reads. One that breaks its schema is a dead letter, even where the model could use
it; NaN and Infinity are no numbers to a schema. The validator is jsonschema-rs: compiled, without dependencies, and
with a limit on what a pattern may cost. jsonschema (4.26), in Python, has had no release for more than half a year and
leaves patterns to `re`, which one hostile text keeps busy for years. References lead to what the registry lists for
the schema and nowhere else: no file is opened and no address is asked. Without ``$schema`` it is draft 7, as for the
registry's own clients.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any
from urllib.parse import urljoin

import jsonschema_rs
import msgspec

from daemon.errors import SettingsError
from daemon.stream_settings import SchemaRegistry
from daemon.streams.codec_base import FAILURES, Row
from daemon.streams.codec_maps import JsonCodec
from daemon.streams.codec_registry import FRAME, RegistryCodec
from daemon.streams.fields import RefusedError
from daemon.streams.registry import Schema, SchemaError

MAX_DEPTH = 500
"""Lists within lists of a record: the validator goes down with it in C."""
_DRAFT_7 = "http://json-schema.org/draft-07/schema#"
_PATTERNS = jsonschema_rs.FancyRegexOptions(backtrack_limit=10_000, size_limit=1 << 20, dfa_size_limit=1 << 20)


class JsonSchemaCodec(RegistryCodec[Any], JsonCodec):
    """Records in JSON behind the registry's five bytes, which have to keep to their schema."""

    name = "json-schema"
    kind = "JSON"

    def __init__(self, input_shape: Sequence[int], settings: SchemaRegistry, **more: Any) -> None:
        super().__init__(input_shape, settings, **more)
        try:
            # The validator's interface may change with any 0.x release, and records would be blamed for that.
            self.compile(Schema(self.kind, "{}")).is_valid({})
        except (SchemaError, AttributeError) as error:
            release = version("jsonschema-rs")
            problem = f"HOMEOSTAT_CODEC={self.name}: jsonschema-rs {release} can't be used: {error}"
            raise SettingsError([f"{problem}; run: pip install --upgrade homeostat[registry]"]) from None

    def compile(self, schema: Schema) -> Any:
        """Its validator; raises SchemaError for a schema that is none."""
        try:
            root = _parsed(schema.text)
            base = str(root.get("$id", "")) if isinstance(root, dict) else ""
            named = [(each.name, _parsed(each.text)) for each in schema.references]
            # A name is looked for as it stands, or as it reads from where the schema says that it lives.
            named += [(urljoin(base, name), text) for name, text in named if base and urljoin(base, name) != name]
            known = jsonschema_rs.Registry(named) if named else None
            return jsonschema_rs.validator_for(root, registry=known, offline=True, pattern_options=_PATTERNS)
        except BaseException as error:
            _pass_on(error)
            first = (str(error).splitlines() or [""])[0]
            raise SchemaError(f"not a JSON Schema: {type(error).__name__}: {first[:120]}") from None

    def _read(self, value: bytes) -> Row:
        validator, payload = self.schema_of(value), value[FRAME:]
        if _problem(validator, msgspec.json.decode(payload), payload):
            raise ValueError("breaks its schema")
        return super()._read(payload)

    def _open(self, value: bytes) -> tuple[str | None, Any]:
        validator, payload = self.schema_of(value), value[FRAME:]
        try:
            fields = self._untyped(payload)
        except FAILURES as error:
            raise RefusedError("undecodable", f"not {self.name}: {error}") from None
        if problem := _problem(validator, fields, payload):
            raise RefusedError("schema", f"schema {int.from_bytes(value[1:FRAME])}: {problem}")
        return super()._open(payload)


def _parsed(text: str) -> Any:
    schema = json.loads(text)
    if isinstance(schema, dict):
        schema.setdefault("$schema", _DRAFT_7)
    return schema


def _problem(validator: Any, record: Any, payload: bytes) -> str:
    """What is wrong with a record, as far as its schema goes; empty: nothing."""
    # Where there are few brackets there can't be many within each other.
    if payload.count(b"[") + payload.count(b"{") > MAX_DEPTH and _deeper(record, MAX_DEPTH):
        return f"more than {MAX_DEPTH} lists within lists"
    try:
        if validator.is_valid(record):
            return ""
        validator.validate(record)
    except jsonschema_rs.ValidationError as error:
        at = "/".join(map(str, error.instance_path))
        return f"/{at} breaks its `{error.kind.name}`"
    except BaseException as error:
        _pass_on(error)
        return f"can't be held against its schema: {type(error).__name__}: {error}"
    return ""


def _deeper(value: Any, limit: int) -> bool:
    """Whether there are more than ``limit`` lists or maps within each other."""
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(limit):
        within = (item for each in level for item in (each.values() if isinstance(each, dict) else each))
        level = [item for item in within if isinstance(item, list | dict)]
    return bool(level)


def _pass_on(error: BaseException) -> None:
    """Raise what is not about a schema. A fault within the validator, written in Rust, is no Exception to Python."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
        raise error
