"""A batch of changes -> its net effect per key, so that it can be applied by set statements.

The result is exact only if every change of the batch is applied together. Where the net effect cannot
be known without the row itself, `NeedsOrder` says so and the batch is replayed change by change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, TypeAlias

from mover.core.changes import (
    UNCHANGED,
    Change,
    Delete,
    Insert,
    OwnerChange,
    Relation,
    Row,
    RowChange,
    Truncated,
    Update,
    Value,
)
from mover.core.ids import TableRef

Key: TypeAlias = Any  # one value, or a tuple of values for a composite key


class NeedsOrder(Exception):
    """The net effect is not known: the batch has to be replayed in source order."""


@dataclass(slots=True)
class NetTable:
    """What a batch did to one table. Each key stands in at most one of the three."""

    relation: Relation
    key_at: tuple[int, ...]  # where the key's columns stand in a row
    inserts: dict[Key, Row] = field(default_factory=dict)  # the key was absent before the batch
    updates: dict[Key, Row] = field(default_factory=dict)  # present before and after; may hold UNCHANGED
    deletes: dict[Key, Row] = field(default_factory=dict)  # present before; only the key's columns count


def parts(changes: Iterable[Change]) -> Iterator[Truncated | list[RowChange | OwnerChange]]:
    """The changes in order, cut where a table was truncated: its tenant's rows go between two parts."""
    part: list[RowChange | OwnerChange] = []
    for change in changes:
        if isinstance(change, Truncated):
            if part:
                yield part
            part = []
            yield change
        else:
            part.append(change)
    if part:
        yield part


def compact(
    changes: Iterable[RowChange], key_positions: Callable[[Relation], tuple[int, ...]]
) -> dict[TableRef, NetTable]:
    """The net effect of `changes`, by source table. Raises NeedsOrder where it cannot be known."""
    tables: dict[TableRef, NetTable] = {}
    relation: Relation | None = None
    for change in changes:
        if change.relation is not relation:
            relation = change.relation
            table = _table(tables, relation, key_positions)
            key_of = itemgetter(*table.key_at)
        match change:
            case Insert(_, new):
                _insert(table, key_of(new), new)
            case Update(_, None, new):
                _update(table, key_of(new), new)
            case Update(_, old, new) if old is not None:
                _update_key(table, key_of(old), key_of(new), old, new)
            case Delete(_, old):
                _delete(table, key_of(old), old)
    return tables


def _table(
    tables: dict[TableRef, NetTable],
    relation: Relation,
    key_positions: Callable[[Relation], tuple[int, ...]],
) -> NetTable:
    table = tables.get(relation.table)
    if table is None:
        table = tables[relation.table] = NetTable(relation, key_positions(relation))
    elif table.relation is not relation:
        raise NeedsOrder(f"{relation.table} changed its shape within the batch")
    return table


def _insert(table: NetTable, key: Key, new: Row) -> None:
    if UNCHANGED in new:
        raise NeedsOrder("a row entered the tenant without its TOASTed values")
    if table.deletes.pop(key, None) is not None:
        table.updates[key] = new  # the whole row replaces the old one
    elif key in table.inserts or key in table.updates:
        raise NeedsOrder("a key was inserted twice")
    else:
        table.inserts[key] = new


def _update(table: NetTable, key: Key, new: Row) -> None:
    if key in table.deletes:
        raise NeedsOrder("a deleted key was updated")
    for pending in (table.inserts, table.updates):
        earlier = pending.get(key)
        if earlier is not None:
            pending[key] = _inherit(new, earlier)
            return
    table.updates[key] = new


def _delete(table: NetTable, key: Key, old: Row) -> None:
    if table.inserts.pop(key, None) is None:
        table.updates.pop(key, None)
        table.deletes[key] = old


def _update_key(table: NetTable, old_key: Key, new_key: Key, old: Row, new: Row) -> None:
    if old_key == new_key:  # another column of the replica identity changed
        _update(table, new_key, new)
        return
    earlier = table.inserts.get(old_key) or table.updates.get(old_key)
    if earlier is not None:
        new = _inherit(new, earlier)
    if UNCHANGED in new:
        raise NeedsOrder("a key changed beside TOASTed values that were not sent")
    _delete(table, old_key, old)
    _insert(table, new_key, new)


def _inherit(new: Row, earlier: Row) -> Row:
    """`new` with the values that the update left alone taken from the change before it."""
    if UNCHANGED not in new:
        return new
    return [old if value is UNCHANGED else value for value, old in zip(new, earlier, strict=True)]


@dataclass(slots=True)
class NetRows:
    """What changes did to a table in which only whole rows can be told apart; a row may stand in it twice.

    Deletions first: what is left is part of the result, so that no unique value collides on the way."""

    relation: Relation
    deletes: list[Row]
    inserts: list[Row]


def net_rows(changes: Iterable[RowChange]) -> Iterator[NetRows]:
    """The net effect of changes that carry whole rows; by table, in order where one changed its shape."""
    counts: dict[int, tuple[Relation, Counter[tuple[Value, ...]]]] = {}
    for change in changes:
        relation, rows = counts.setdefault(id(change.relation), (change.relation, Counter()))
        if not isinstance(change, Insert):
            assert change.old is not None, f"{relation.table} is not under REPLICA IDENTITY FULL"
            rows[tuple(change.old)] -= 1
        if not isinstance(change, Delete):
            assert UNCHANGED not in change.new  # the old row has it, and the decoder took it from there
            rows[tuple(change.new)] += 1
    for relation, rows in counts.values():
        deletes, inserts = (-rows).elements(), (+rows).elements()
        yield NetRows(relation, [list(row) for row in deletes], [list(row) for row in inserts])
