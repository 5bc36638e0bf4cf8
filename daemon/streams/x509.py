"""The dates of a certificate (ITU-T X.509, RFC 5280 section 4.1), which the standard library tells of peers alone."""

from __future__ import annotations

import binascii
import calendar
import re
import ssl
import time

_BEGIN = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)

_SEQUENCE, _INTEGER, _UTC_TIME, _GENERALIZED_TIME, _VERSION = 0x30, 0x02, 0x17, 0x18, 0xA0


def validity(pem: bytes) -> tuple[float, float]:
    """First and last moment (Unix time) of the first certificate in the text.

    Raises:
        ValueError: with one line that says what it is instead.
    """
    found = _BEGIN.search(pem.decode("ascii", "replace"))
    if found is None:
        raise ValueError("holds no certificate in PEM form")
    try:
        der = ssl.PEM_cert_to_DER_cert(found.group())
        _, certificate, _ = _element(der, _SEQUENCE)
        _, rest, _ = _element(certificate, _SEQUENCE)
        if rest[:1] == bytes([_VERSION]):
            rest = _element(rest, _VERSION)[2]
        for kind in (_INTEGER, _SEQUENCE, _SEQUENCE):  # serial number, signature's algorithm, issuer
            rest = _element(rest, kind)[2]
        _, dates, _ = _element(rest, _SEQUENCE)
        kind, begins, dates = _element(dates)
        last_kind, ends, _ = _element(dates)
        return _moment(kind, begins), _moment(last_kind, ends)
    except (ValueError, binascii.Error, IndexError):
        raise ValueError("holds a damaged certificate") from None


def _element(data: bytes, expected: int | None = None) -> tuple[int, bytes, bytes]:
    """The first DER element: its tag, its content, and what follows it."""
    kind, length, at = data[0], data[1], 2
    if length & 0x80:
        size = length & 0x7F
        length, at = int.from_bytes(data[2 : 2 + size], "big"), 2 + size
    if at + length > len(data) or (expected is not None and kind != expected):
        raise ValueError("not the element that belongs here")
    return kind, data[at : at + length], data[at + length :]


def _moment(kind: int, content: bytes) -> float:
    text = content.decode("ascii")
    if kind == _UTC_TIME:
        # RFC 5280: 50 to 99 are of the last century.
        text = ("19" if text[:2] >= "50" else "20") + text
    elif kind != _GENERALIZED_TIME:
        raise ValueError("not a time")
    return float(calendar.timegm(time.strptime(text, "%Y%m%d%H%M%SZ")))
