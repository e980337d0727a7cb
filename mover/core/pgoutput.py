"""pgoutput messages -> changes. A function of bytes that remembers relations; knows no socket.

Protocol version 1, text values. Source: PostgreSQL documentation, "Logical Replication Message
Formats" (15 to 18).
"""

from __future__ import annotations

import struct
from typing import Final

from mover.core.changes import (
    UNCHANGED,
    Begin,
    Commit,
    Decoded,
    Delete,
    Insert,
    Message,
    Relation,
    RelationColumn,
    Row,
    Update,
)
from mover.core.ids import Lsn, TableRef
from mover.core.walsender import ProtocolViolation

_BEGIN: Final = struct.Struct(">QqI")
_COMMIT: Final = struct.Struct(">BQQq")
_MESSAGE: Final = struct.Struct(">BQ")
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_TEXT, _NULL, _TOAST = ord("t"), ord("n"), ord("u")
_OLD_KEY, _OLD_ROW, _NEW = ord("K"), ord("O"), ord("N")


class Decoder:
    """Decodes one connection's messages in order. Relations live as long as the connection."""

    def __init__(self) -> None:
        self._relations: dict[int, Relation] = {}

    def decode(self, message: bytes) -> Decoded | None:
        """One message, or None for one that carries nothing for us (Origin, Type).

        Raises ProtocolViolation when the bytes do not follow the format."""
        try:
            return self._decode(message)
        except (struct.error, IndexError, UnicodeDecodeError) as error:
            raise ProtocolViolation(f"malformed {message[:1]!r} message") from error

    def _decode(self, message: bytes) -> Decoded | None:
        match message[0]:
            case 73:  # I
                relation = self._relation(message)
                new, _ = _row(message, 6, relation)
                return Insert(relation, new)
            case 85:  # U
                return self._update(message)
            case 68:  # D
                relation = self._relation(message)
                old, _ = _row(message, 6, relation)
                return Delete(relation, old)
            case 66:  # B
                final_lsn, _, xid = _BEGIN.unpack_from(message, 1)
                return Begin(Lsn(final_lsn), xid)
            case 67:  # C
                _, commit_lsn, end_lsn, _ = _COMMIT.unpack_from(message, 1)
                return Commit(Lsn(commit_lsn), Lsn(end_lsn))
            case 82:  # R
                return self._describe(_parse_relation(message))
            case 77:  # M
                return _message(message)
            case 79 | 89:  # O, Y
                return None
            case kind:
                raise ProtocolViolation(f"unexpected message {chr(kind)!r}")

    def _describe(self, relation: Relation) -> Relation:
        """An unchanged description, as after ANALYZE, stays the same object."""
        known = self._relations.get(relation.oid)
        if known == relation:
            return known
        self._relations[relation.oid] = relation
        return relation

    def _relation(self, message: bytes) -> Relation:
        (oid,) = _U32.unpack_from(message, 1)
        try:
            return self._relations[oid]
        except KeyError:
            raise ProtocolViolation(f"a change for relation {oid}, which was not described") from None

    def _update(self, message: bytes) -> Update:
        relation = self._relation(message)
        old, at = None, 5
        if message[at] in (_OLD_KEY, _OLD_ROW):
            old, at = _row(message, at + 1, relation)
        if message[at] != _NEW:
            raise ProtocolViolation("an update without a new row")
        new, _ = _row(message, at + 1, relation)
        if old is not None and UNCHANGED in new:  # a TOASTed key is always sent with the old row
            new = [
                o if n is UNCHANGED and column.is_key else n
                for o, n, column in zip(old, new, relation.columns, strict=True)
            ]
        return Update(relation, old, new)


def _row(message: bytes, at: int, relation: Relation) -> tuple[Row, int]:
    """The tuple at offset `at`, and the offset after it."""
    width = (message[at] << 8) | message[at + 1]
    if width != len(relation.columns):  # 15.0 and 15.1 did this with column lists
        raise ProtocolViolation(f"{relation.table}: {width} values for {len(relation.columns)} columns")
    at += 2
    row: Row = []
    append, length_at = row.append, _U32.unpack_from
    for _ in range(width):
        kind = message[at]
        if kind == _TEXT:
            (length,) = length_at(message, at + 1)
            start = at + 5
            at = start + length
            append(message[start:at])
        elif kind == _NULL:
            append(None)
            at += 1
        elif kind == _TOAST:
            append(UNCHANGED)
            at += 1
        else:
            raise ProtocolViolation(f"{relation.table}: a value of kind {chr(kind)!r}")
    if at > len(message):
        raise ProtocolViolation(f"{relation.table}: a value longer than its message")
    return row, at


def _parse_relation(message: bytes) -> Relation:
    (oid,) = _U32.unpack_from(message, 1)
    schema, at = _string(message, 5)
    name, at = _string(message, at)
    identity = chr(message[at])
    (count,) = _U16.unpack_from(message, at + 1)
    at += 3
    columns = []
    for _ in range(count):
        is_key = message[at] & 1 == 1
        column, at = _string(message, at + 1)
        type_oid, type_modifier = struct.unpack_from(">Ii", message, at)
        at += 8
        columns.append(RelationColumn(column, is_key, type_oid, type_modifier))
    return Relation(oid, TableRef(schema or "pg_catalog", name), identity, tuple(columns))


def _message(message: bytes) -> Message:
    flags, lsn = _MESSAGE.unpack_from(message, 1)
    prefix, at = _string(message, 10)
    (length,) = _U32.unpack_from(message, at)
    content = message[at + 4 : at + 4 + length]
    if len(content) != length:
        raise ProtocolViolation("a logical message longer than its frame")
    return Message(flags & 1 == 1, Lsn(lsn), prefix, content)


def _string(message: bytes, at: int) -> tuple[str, int]:
    """A NUL-terminated text at `at`, and the offset after it."""
    end = message.find(b"\0", at)
    if end < 0:
        raise ProtocolViolation("an unterminated text")
    return message[at:end].decode(), end + 1
