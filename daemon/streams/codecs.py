"""Wire formats of the data stream: records to batches, without ever raising for what is in a record.

A record is the map ``{"id": str|int, "x": numbers, "y"?: number, "ts"?: seconds or RFC 3339}``, as JSON or as
MessagePack (``x`` nested, flat, or, in MessagePack, a bin of little-endian float32); or it is nothing but the
little-endian float32 of the input (``raw``). Fields with other names are ignored. A record without an id is named by
its key, else by ``partition:offset``.

Each record ends as exactly one of three things: a valid row; an *invalid* row, which is answered as ``invalid_input``
because it is known whose it is; or a *dead letter*, which can't be answered.
"""

from __future__ import annotations

from collections.abc import Sequence

from daemon.streams.answers import decode_label, encode_invalid, encode_predictions
from daemon.streams.codec_base import Codec, RawCodec, assemble
from daemon.streams.codec_maps import JsonCodec, MsgpackCodec
from daemon.streams.fields import REASONS

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


def codec(name: str, input_shape: Sequence[int]) -> Codec:
    """The codec of that name (json, raw, msgpack) for inputs of ``input_shape`` (without the batch axis).

    Raises:
        ValueError: no such codec, or no such shape.
    """
    if name not in CODECS:
        raise ValueError(f"no codec {name!r}; there are {', '.join(CODECS)}")
    return CODECS[name](input_shape)
