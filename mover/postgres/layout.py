"""How the stream's rows of one table map to the plan's columns, and to lines of the staging table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from mover.core.changes import UNCHANGED, Relation, Row
from mover.core.compaction import NetTable
from mover.core.copying import Key
from mover.core.copytext import encode_row
from mover.postgres.merge import DELETE, INSERT, UPDATE, Merge, Names

ROWS_PER_BLOCK = 500
Groups = Mapping[frozenset[int], list[Any]]


@dataclass(slots=True)
class Layout:
    """Where the stream's values go."""

    relation: Relation
    merge: Merge
    names: Names = field(init=False)
    key_at: tuple[int, ...] = field(init=False)
    tenant_at: int | None = field(init=False)  # None where everybody's rows are sent

    def __post_init__(self) -> None:
        self.names = tuple(c.name for c in self.relation.columns)
        self.key_at = tuple(self.names.index(name) for name in self.merge.table.key)
        column = self.merge.table.filter_column
        self.tenant_at = self.names.index(column) if column else None

    def key(self, row: Row) -> Key:
        return tuple([_text(row[at]) for at in self.key_at])

    def row_of(self, key: Key) -> Row:
        """A row of which only the key is known."""
        row: Row = [None] * len(self.names)
        for at, value in zip(self.key_at, key, strict=True):
            row[at] = value.encode()
        return row

    def identifies(self, old: Row) -> bool:
        """Whether an old row holds its key, which never is NULL."""
        return all([old[at] is not None for at in self.key_at])

    def sent(self, row: Row) -> Names:
        """The columns whose values came with the row."""
        return tuple(name for name, value in zip(self.names, row, strict=True) if value is not UNCHANGED)

    def values(self, row: Row, names: Names) -> list[str | None]:
        by_name = dict(zip(self.names, row, strict=True))
        return [None if by_name[name] is None else _text(by_name[name]) for name in names]


def groups_of(net: NetTable) -> Groups:
    """The updates' keys by the columns that were not sent; the position is the group's number."""
    groups: dict[frozenset[int], list[Any]] = {}
    whole: list[Any] = []
    for key, row in net.updates.items():
        if UNCHANGED in row:
            unsent = frozenset(at for at, value in enumerate(row) if value is UNCHANGED)
            groups.setdefault(unsent, []).append(key)
        else:
            whole.append(key)
    return {**groups, frozenset(): whole} if whole else groups


def stage_blocks(net: NetTable, groups: Groups) -> Iterator[bytes]:
    """What the net effect stages, as blocks of COPY text."""
    return _blocks(_stage_lines(net, groups))


def _stage_lines(net: NetTable, groups: Groups) -> Iterator[bytes]:
    for number, keys in enumerate(groups.values()):
        op = b"%d" % (UPDATE + number)
        for key in keys:
            yield encode_row([op, *net.updates[key]])
    insert, delete = b"%d" % INSERT, b"%d" % DELETE
    for row in net.inserts.values():
        yield encode_row([insert, *row])
    for row in net.deletes.values():
        yield encode_row([delete, *(v if at in net.key_at else None for at, v in enumerate(row))])


def row_blocks(rows: Iterable[Row]) -> Iterator[bytes]:
    """Whole rows as blocks of COPY text."""
    return _blocks(map(encode_row, rows))


def _blocks(lines: Iterator[bytes]) -> Iterator[bytes]:
    while block := b"".join(islice(lines, ROWS_PER_BLOCK)):
        yield block


def touched(layout: Layout, net: NetTable) -> set[Key]:
    rows = (*net.inserts.values(), *net.updates.values(), *net.deletes.values())
    return {layout.key(row) for row in rows}


def _text(value: object) -> str:
    assert isinstance(value, bytes)  # a key's columns are NOT NULL and always sent
    return value.decode()
