"""The tenant's changes among everybody's, in tables whose rows are the tenant's by foreign keys, or by a
column that is not in the replica identity.

The server cannot filter such a table's changes, so they are all in the stream. Whether a row is the
tenant's after a change is known from itself, or from the row that it then refers to; whether it was before,
from its being on the target: outside a batch the target is the source at some commit, and inside it every
change so far is accounted for here, in order.

Where a row comes to the tenant, or leaves, those that refer to it do so too, without a change of their own:
it is noted in `rehomed`, and they are read again at the next consistent point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import TypeAlias

from mover.core.changes import (
    UNCHANGED,
    Delete,
    Insert,
    OwnerChange,
    Rehomed,
    Relation,
    Row,
    RowChange,
    Unchanged,
    Update,
    Vacated,
)
from mover.core.copying import Key
from mover.core.ids import TableRef
from mover.core.presence import keys_of
from mover.core.tables import MovedTable, Owner

KeyOf: TypeAlias = Callable[[Relation, Row], Key]
# The columns of a table by which rows are referred to, and which of their values are the tenant's.
Reference: TypeAlias = tuple[TableRef, tuple[str, ...]]
Values: TypeAlias = dict[Reference, set[Key]]


@dataclass(slots=True)
class Questions:
    """What has to be known of the target before the changes."""

    keys: dict[TableRef, set[Key]] = field(default_factory=dict)  # of owned rows: are they there?
    values: Values = field(default_factory=dict)  # is there a row of the tenant that has them?


@dataclass(slots=True)
class Membership:
    """Whose the rows are, change by change. `keys` and `values` begin as what the target has of those that
    `questions` asked for."""

    tables: Mapping[TableRef, MovedTable]  # those of which everybody's changes are sent, and their owners
    tenant: str
    key_of: KeyOf
    keys: dict[TableRef, set[Key]]
    values: Values
    rehomed: Values = field(default_factory=dict)  # with those noted earlier in the transaction
    # Rows may be there before the one that they refer to, as long as the statement runs, or the transaction
    # where the foreign key is DEFERRABLE: what was not the tenant's when rows referred to it, or other
    # tenants' rows gave up. The tenant's may take it later.
    awaited: Values = field(default_factory=dict)
    # What the tenant's rows gave up there: another tenant's may have taken it, with those that refer to it.
    left: Values = field(default_factory=dict)
    has_crossed: bool = False  # whether a row came to the tenant, or left, without being made or deleted
    waiting: set[tuple[Reference, str]] = field(init=False)

    def __post_init__(self) -> None:
        owners = (owner for table in self.tables.values() for owner in table.owners)
        self.waiting = {((o.source, o.referenced), event) for o in owners for event in o.waits}

    def tenants(self, changes: Iterable[RowChange | OwnerChange]) -> Iterator[RowChange]:
        """The changes as the tenant's rows see them, in order."""
        for change in changes:
            if isinstance(change, OwnerChange):
                self._hear(change)
                continue
            table = self.tables.get(change.relation.table)
            if table is None:
                yield change
            elif table.is_filtered:
                self._account(table, change)
                yield change
            else:
                yield from self._of_everybody(table, change)

    def _of_everybody(self, table: MovedTable, change: RowChange) -> Iterator[RowChange]:
        old_key, new_key = keys_of(change, self.key_of)
        there = self.keys.setdefault(table.source, set())
        was_ours = old_key in there
        is_ours = not isinstance(change, Delete) and self._is_ours(
            table, change.relation, change.new, was_ours
        )
        there.discard(old_key)
        if is_ours:
            there.add(new_key)
        if not was_ours:
            self._give_up(table, change)
        if isinstance(change, Update) and was_ours != is_ours:
            change = self._crossing(table, change, is_ours)
        elif not (was_ours or is_ours):
            return
        self._account(table, change)
        yield change

    def _crossing(self, table: MovedTable, change: Update, is_ours: bool) -> RowChange:
        """The row comes to the tenant or leaves, and with it those that refer to it."""
        self.has_crossed = True
        before = change.new if change.old is None else change.old
        row = change.new if is_ours else before
        for names in table.referenced:
            self._note((table.source, names), _given(change.relation, row, names))
        return Insert(change.relation, row) if is_ours else Delete(change.relation, row)

    def _is_ours(self, table: MovedTable, relation: Relation, row: Row, was_ours: bool) -> bool:
        """Whether the row says so, or one of its owners is the tenant's."""
        if table.tenant_column is not None:
            value = _values(relation, row, (table.tenant_column,))
            return was_ours if value is UNCHANGED else value == (self.tenant,)
        is_ours = False
        for owner in table.owners:
            value = _values(relation, row, owner.columns)
            if value is UNCHANGED:
                is_ours |= was_ours
            elif value is not None:
                reference = (owner.source, owner.referenced)
                if value in self.values.get(reference, ()):
                    is_ours = True
                else:
                    self._await(reference, value)
        return is_ours

    def _account(self, table: MovedTable, change: RowChange) -> None:
        """Whether others may now refer to the tenant's row."""
        for names in table.referenced:
            reference, before, is_noted = (table.source, names), None, False
            if not isinstance(change, Insert) and change.old is not None:
                before = _given(change.relation, change.old, names)
                is_noted = before in self.rehomed.get(reference, ())
                self._vacate(reference, before, "delete" if isinstance(change, Delete) else "update")
            if isinstance(change, Delete) or (isinstance(change, Update) and change.old is None):
                continue
            value = _given(change.relation, change.new, names)
            self.values.setdefault(reference, set()).add(value)
            self.left.get(reference, set()).discard(value)
            # A row that was not sent whole may have to be read: until then nothing is seen to refer to it.
            is_unread = value != before and UNCHANGED in change.new
            if is_noted or is_unread or value in self.awaited.get(reference, ()):
                self._note(reference, value)

    def _vacate(self, reference: Reference, value: Key, event: str) -> None:
        self.values.setdefault(reference, set()).discard(value)
        if (reference, event) in self.waiting:
            self.left.setdefault(reference, set()).add(value)

    def _give_up(self, table: MovedTable, change: RowChange) -> None:
        """Another tenant's row may have given its values up."""
        if isinstance(change, Insert) or change.old is None:
            return
        for names in table.referenced:
            self._await((table.source, names), _given(change.relation, change.old, names))

    def _hear(self, change: OwnerChange) -> None:
        for reference, value in _told(change, self.tables):
            # A trigger tells when the statement has ended: the tenant's may have taken the values by then.
            if isinstance(change, Rehomed) or value in self.values.get(reference, ()):
                self._note(reference, value)
            else:
                self._await(reference, value)

    def _await(self, reference: Reference, value: Key) -> None:
        self.awaited.setdefault(reference, set()).add(value)

    def _note(self, reference: Reference, value: Key) -> None:
        self.rehomed.setdefault(reference, set()).add(value)


def questions(
    changes: Iterable[RowChange | OwnerChange], tables: Mapping[TableRef, MovedTable], key_of: KeyOf
) -> Questions:
    """What `Membership` has to know of the target before `changes`."""
    asked = Questions()
    for change in changes:
        if isinstance(change, OwnerChange):
            for reference, told in _told(change, tables) if isinstance(change, Vacated) else ():
                asked.values.setdefault(reference, set()).add(told)
            continue
        table = tables.get(change.relation.table)
        if table is None or table.is_filtered:
            continue
        asked.keys.setdefault(table.source, set()).update(keys_of(change, key_of))
        if isinstance(change, Delete):
            continue
        for owner in table.owners:
            value = _values(change.relation, change.new, owner.columns)
            if value is not None and value is not UNCHANGED:
                asked.values.setdefault((owner.source, owner.referenced), set()).add(value)
    return asked


def referred_to(table: MovedTable, change: RowChange) -> Iterator[tuple[Reference, Key]]:
    """By what others may come to refer to the row, or may have."""
    rows = [change.old] if isinstance(change, Update) and change.old is not None else []
    if isinstance(change, Delete):
        rows.append(change.old)
    elif isinstance(change, Insert) or rows:
        rows.append(change.new)
    for names, row in product(table.referenced, rows):
        yield (table.source, names), _given(change.relation, row, names)


def followed(tables: Iterable[MovedTable]) -> dict[TableRef, MovedTable]:
    """Those of which everybody's changes are sent, and those that own some of them."""
    return {table.source: table for table in tables if not table.is_filtered or table.referenced}


def owned_through(tables: Iterable[MovedTable], reference: Reference) -> Iterator[tuple[MovedTable, Owner]]:
    """The tables whose rows refer to these columns, and by what."""
    for table in tables:
        for owner in table.owners:
            if (owner.source, owner.referenced) == reference:
                yield table, owner


def _told(change: OwnerChange, tables: Mapping[TableRef, MovedTable]) -> Iterator[tuple[Reference, Key]]:
    """The values that the row has, or had, in the columns referred to."""
    table = tables.get(change.table)
    for names, row in product(table.referenced if table else (), change.rows):
        value = tuple(value for name in names if (value := row.get(name)) is not None)
        if len(value) == len(names):
            yield (change.table, names), value


def _given(relation: Relation, row: Row, names: tuple[str, ...]) -> Key:
    """Columns that allow no NULL and are a part of the replica identity, so that they are always sent."""
    values = _values(relation, row, names)
    assert isinstance(values, tuple)
    return values


def _values(relation: Relation, row: Row, names: tuple[str, ...]) -> Key | Unchanged | None:
    """None where one is NULL: then the row refers to nothing."""
    by_name = {column.name: value for column, value in zip(relation.columns, row, strict=True)}
    values = [by_name[name] for name in names]
    if any(value is None for value in values):
        return None
    texts = tuple(value.decode() for value in values if isinstance(value, bytes))
    return texts if len(texts) == len(values) else UNCHANGED
