"""What the change stream carries: decoded pgoutput messages, and pieces of transactions.

Values are the column's text output as bytes, None for NULL, or UNCHANGED for a TOASTed value that the
source did not send because the update left it alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias

from mover.core.ids import Lsn, TableRef


class Unchanged(Enum):
    UNCHANGED = "unchanged"


UNCHANGED: Final = Unchanged.UNCHANGED
Value: TypeAlias = bytes | Unchanged | None
Row: TypeAlias = list[Value]


@dataclass(frozen=True, slots=True)
class RelationColumn:
    name: str
    is_key: bool  # part of the replica identity
    type_oid: int
    type_modifier: int


@dataclass(frozen=True, slots=True)
class Relation:
    """A table as the source described it when the following changes were made."""

    oid: int
    table: TableRef
    identity: str  # relreplident: d, n, f, i
    columns: tuple[RelationColumn, ...]


@dataclass(slots=True)
class Begin:
    final_lsn: Lsn  # the commit record's position
    xid: int  # 32 bits, of the top-level transaction


@dataclass(slots=True)
class Commit:
    commit_lsn: Lsn
    end_lsn: Lsn


@dataclass(slots=True)
class Insert:
    relation: Relation
    new: Row


@dataclass(slots=True)
class Update:
    relation: Relation
    old: Row | None  # only when the replica identity changed; only its columns are filled
    new: Row


@dataclass(slots=True)
class Delete:
    relation: Relation
    old: Row


@dataclass(slots=True)
class Truncated:
    """The application truncated a whole table, or one partition of it (told by our statement trigger, not by
    pgoutput)."""

    table: TableRef
    partition: TableRef | None = None


@dataclass(slots=True)
class OwnerChange:
    """Of a row to which owned rows may refer, told by our row trigger."""

    table: TableRef
    rows: tuple[Mapping[str, str | None], ...]  # the columns referred to


class Rehomed(OwnerChange):
    """It changed its tenant, from or to ours: as it was and as it is. Those that refer to it do not change
    themselves."""


class Vacated(OwnerChange):
    """Another tenant's was deleted, or changed the columns by which others refer to it: as it was."""


@dataclass(slots=True)
class Seen:
    """What became of a row that has changed, as a snapshot of the source sees it."""

    relation: Relation
    key: Row  # only the key's columns are filled
    row: Row | None  # None: it is not there, or not the tenant's


@dataclass(slots=True)
class Message:
    transactional: bool
    lsn: Lsn
    prefix: str
    content: bytes


RowChange: TypeAlias = Insert | Update | Delete
Change: TypeAlias = RowChange | Truncated | OwnerChange
Decoded: TypeAlias = Begin | Commit | Insert | Update | Delete | Message | Relation


@dataclass(slots=True)
class Piece:
    """Consecutive changes of one source transaction; a huge one comes in several pieces."""

    xid: int
    final_lsn: Lsn
    changes: list[Change]
    size_bytes: int  # of memory, about
    marks: tuple[str, ...] = ()  # tokens of our own messages inside it
    end_lsn: Lsn | None = None  # set on the last piece: the position after the commit


def kinds(changes: Iterable[Change]) -> Counter[str]:
    """How many there are of each, for people."""
    return Counter(type(change).__name__.lower() for change in changes)
