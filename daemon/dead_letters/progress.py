"""How far a store of dead letters was worked through, small enough for the metadata of a commit."""

from __future__ import annotations

import zlib
from base64 import b85decode, b85encode

MOST_CHARS = 3_900
"""Brokers take 4,096 bytes of metadata unless told otherwise (offset.metadata.max.bytes)."""
MOST_LETTERS = 1 << 23
"""Longest stretch over which it is noted which letters were left."""

_MARK = "replay:"


class Progress:
    """Letters are told apart by their offset: those before ``next`` were sent, but for the ones that were ``left``.

    A letter is left when it was not asked for, or can't be sent; a later call with other options may send it.
    """

    def __init__(self, at: int = 0) -> None:
        self.next = at
        self.left: set[int] = set()

    @property
    def first(self) -> int:
        """Where reading goes on."""
        return min(self.left, default=self.next)

    def wants(self, offset: int) -> bool:
        """Whether the letter was not sent yet."""
        return offset >= self.next or offset in self.left

    def sent(self, offset: int) -> None:
        """It was sent. Offsets between this and ``next`` don't exist."""
        self.left.discard(offset)
        self.next = max(self.next, offset + 1)

    def leave(self, offset: int) -> None:
        """It was not sent."""
        self.left.add(offset)
        self.next = max(self.next, offset + 1)

    def begin_at(self, first: int) -> None:
        """Forget letters before ``first``: they are no longer there."""
        self.left = {offset for offset in self.left if offset >= first}
        self.next = max(self.next, first)

    def note(self, most: int = MOST_CHARS) -> str:
        """What ``read`` needs beside ``first``, at most ``most`` characters; empty when nothing was left.

        Raises:
            ValueError: what was left is too scattered for so little room.
        """
        if not self.left:
            return ""
        first = self.first
        if self.next - first > MOST_LETTERS:
            raise ValueError(f"letters were left over a stretch of {self.next - first}")
        bits = bytearray((self.next - first + 7) // 8)
        for offset in self.left:
            bits[(offset - first) // 8] |= 1 << (offset - first) % 8
        text = f"{_MARK}{self.next}:{b85encode(zlib.compress(bits, 9)).decode()}"
        if len(text) > most:
            raise ValueError(f"{len(self.left)} letters were left, here one and there one")
        return text

    @classmethod
    def read(cls, first: int, note: str) -> Progress:
        """From a committed offset and its metadata; anything but a note of ours means that nothing was left."""
        progress = cls(first)
        end, _, packed = note.removeprefix(_MARK).partition(":")
        if not note.startswith(_MARK) or not end.isascii() or not end.isdecimal() or len(end) > 19:
            return progress
        try:
            unpack = zlib.decompressobj()
            bits = unpack.decompress(b85decode(packed), MOST_LETTERS // 8 + 1)
        except (ValueError, zlib.error):
            return progress
        if not first <= int(end) <= first + 8 * len(bits):
            return progress
        progress.next = int(end)
        progress.left = {
            first + 8 * at + bit
            for at, byte in enumerate(bits)
            if byte
            for bit in range(8)
            if byte >> bit & 1 and first + 8 * at + bit < progress.next
        }
        return progress
