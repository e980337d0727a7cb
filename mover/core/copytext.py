"""Rows as COPY's text format (PostgreSQL documentation, COPY, "Text Format").

NULL is written as the single byte 0x01, and a value is escaped whenever it could be mistaken for
anything: so that the usual row needs one join and four scans, in C, and no work per value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from mover.core.changes import Row, Value

NULL_MARK: Final = b"\x01"
NULL_OPTION: Final = "\x01"  # for COPY … WITH (NULL …)
_ESCAPES: Final = (
    (b"\\", b"\\\\"),
    (b"\t", b"\\t"),
    (b"\n", b"\\n"),
    (b"\r", b"\\r"),
    (NULL_MARK, b"\\x01"),
)


def encode_row(values: Sequence[Value]) -> bytes:
    """One line, with its newline. A value that was not sent is written as NULL, too."""
    fields = [v if isinstance(v, bytes) else NULL_MARK for v in values]
    line = b"\t".join(fields)
    nulls = sum(not isinstance(v, bytes) for v in values)
    if (
        line.count(b"\t") == len(values) - 1
        and line.count(NULL_MARK) == nulls
        and b"\\" not in line
        and b"\n" not in line
        and b"\r" not in line
    ):
        return line + b"\n"
    return b"\t".join([_escape(v) if isinstance(v, bytes) else NULL_MARK for v in values]) + b"\n"


def _escape(value: bytes) -> bytes:
    for raw, escaped in _ESCAPES:
        value = value.replace(raw, escaped)
    return value


def decode_row(line: bytes) -> Row:
    """The values of one line that a server has written, without its newline: text, and NULL as `\\N`."""
    fields = line.split(b"\t")
    if b"\\" not in line:
        return list(fields)
    return [None if field == b"\\N" else _ESCAPED.sub(_unescaped, field) for field in fields]


def _unescaped(found: re.Match[bytes]) -> bytes:
    letter = found[1]
    return _CONTROLS.get(letter, letter)


# All that COPY TO writes behind a backslash, which otherwise stands for the character itself.
_CONTROLS: Final = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}
_ESCAPED: Final = re.compile(rb"\\(.)", re.DOTALL)
