"""The partition of many keys at once: kafka-python's default partitioner, which is the Java client's for keyed rows."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from kafka.partitioner.default import murmur2

_FEW = 12
"""Below this many keys the arrays cost more than they save (measured at 8 and 32 bytes a key)."""

_LONG = 256
"""Longer keys are hashed one by one: the array is as wide as the longest key in it."""

_M = np.uint32(0x5BD1E995)
_SEED = np.uint32(0x9747B28C)


def murmur2_all(keys: Sequence[bytes]) -> list[int]:
    """The 32-bit MurmurHash2 of each key, as ``org.apache.kafka.common.utils.Utils.murmur2`` computes it (unsigned)."""
    if len(keys) < _FEW:
        return [murmur2(key) for key in keys]
    lengths = np.fromiter(map(len, keys), np.uint32, len(keys))
    width = int(lengths.max())
    if width > _LONG:
        short = [at for at, key in enumerate(keys) if len(key) <= _LONG]
        hashes = [0 if len(key) <= _LONG else murmur2(key) for key in keys]
        for at, value in zip(short, murmur2_all([keys[at] for at in short]), strict=True):
            hashes[at] = value
        return hashes
    width += 4 - width % 4  # at least one byte of padding, so that every tail has a word to stand in
    joined = b"".join([key.ljust(width, b"\x00") for key in keys])
    words_WN = np.frombuffer(joined, "<u4").reshape(len(keys), width // 4).T.astype(np.uint32)
    whole = lengths // 4
    h = _SEED ^ lengths
    for index, word in enumerate(words_WN[:-1]):
        k = word * _M
        k ^= k >> 24
        k *= _M
        h = np.where(index < whole, h * _M ^ k, h)
    # The last one to three bytes are mixed in as they stand; the padding beyond them is zero.
    tail = words_WN[whole, np.arange(len(keys))]
    h = np.where(lengths % 4 > 0, (h ^ tail) * _M, h)
    h ^= h >> 13
    h *= _M
    h ^= h >> 15
    hashes_N: list[int] = h.tolist()
    return hashes_N


def choose(keys: Sequence[bytes | None], every: Sequence[int], available: Sequence[int]) -> list[int]:
    """A partition for each key: by its hash over all partitions; without a key, any of those that have a leader.

    Args:
        keys: one a row.
        every: all partitions of the topic, in order.
        available: those with a leader; may be empty.
    """
    if len(every) == 1:
        return [every[0]] * len(keys)
    pool = available or every
    named = [key for key in keys if key is not None]
    chosen = [every[(value & 0x7FFFFFFF) % len(every)] for value in murmur2_all(named)]
    if len(named) == len(keys):
        return chosen
    with_key, without = iter(chosen), iter(random.choices(pool, k=len(keys) - len(named)))
    return [next(without) if key is None else next(with_key) for key in keys]
