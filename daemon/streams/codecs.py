"""Wire formats of the data stream: records to batches, without ever raising for what is in a record.

A record is the map ``{"id": str|int, "x": numbers, "y"?: number, "ts"?: seconds or RFC 3339}``, as JSON or as
MessagePack (``x`` nested, flat, or, in MessagePack, a bin of little-endian float32); or it is nothing but the
little-endian float32 of the input (``raw``). Fields with other names are ignored. A record without an id is named by
its key, else by ``partition:offset``. ``avro`` and ``json-schema`` are such maps too, framed for a schema registry and
read with the schema that it gives; what they need is the extra `registry`, imported when one is asked for.

Each record ends as exactly one of three things: a valid row; an *invalid* row, which is answered as ``invalid_input``
because it is known whose it is; or a *dead letter*, which can't be answered.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from daemon.errors import SettingsError
from daemon.streams.answers import decode_label, encode_invalid, encode_predictions
from daemon.streams.codec_base import Codec, RawCodec, assemble
from daemon.streams.codec_maps import JsonCodec, MsgpackCodec
from daemon.streams.fields import REASONS

if TYPE_CHECKING:
    from daemon.stream_settings import SchemaRegistry

__all__ = [
    "CODECS",
    "REASONS",
    "Codec",
    "JsonCodec",
    "MsgpackCodec",
    "RawCodec",
    "assemble",
    "codec",
    "decode_label",
    "encode_invalid",
    "encode_predictions",
]

CODECS: dict[str, type[Codec]] = {kind.name: kind for kind in (JsonCodec, RawCodec, MsgpackCodec)}


_WITH_REGISTRY = {
    "avro": "daemon.streams.codec_avro:AvroCodec",
    "json-schema": "daemon.streams.codec_json_schema:JsonSchemaCodec",
}


def codec(name: str, input_shape: Sequence[int], registry: SchemaRegistry | None = None) -> Codec:
    """The codec of that name for inputs of ``input_shape`` (without the batch axis).

    Args:
        name: json, raw, msgpack, avro or json-schema.
        input_shape: of one input.
        registry: where the last two get their schemas; they are made but nothing is asked yet.

    Raises:
        ValueError: no such codec, or no such shape.
        SettingsError: there is no registry, or its extra is not installed.
        StreamError: the registry's address can't be one.
    """
    if name in _WITH_REGISTRY:
        return _with_registry(name, input_shape, registry)
    if name not in CODECS:
        raise ValueError(f"no codec {name!r}; there are {', '.join((*CODECS, *_WITH_REGISTRY))}")
    return CODECS[name](input_shape)


def _with_registry(name: str, input_shape: Sequence[int], registry: SchemaRegistry | None) -> Codec:
    variable = f"HOMEOSTAT_CODEC={name}"
    if registry is None or not registry.url:
        problem = f"HOMEOSTAT_REGISTRY__URL is empty: {variable} needs a schema registry, for example https://host:8081"
        raise SettingsError([problem])
    module, _, kind = _WITH_REGISTRY[name].partition(":")
    try:
        made: Codec = getattr(importlib.import_module(module), kind)(input_shape, registry)
    except ImportError as error:
        problem = f"{variable}: {error.name or error} can't be imported; run: pip install homeostat[registry]"
        raise SettingsError([problem]) from None
    return made
