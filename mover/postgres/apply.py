"""One transaction on the target that makes changes of the source: implements ports.ApplyTransaction.

Many changes are staged and merged as sets, few are single statements in source order.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import psycopg
from psycopg import sql

from mover.core.changes import (
    Change,
    Delete,
    Insert,
    OwnerChange,
    Relation,
    Row,
    RowChange,
    Truncated,
    Update,
)
from mover.core.compaction import NeedsOrder, NetRows, NetTable, compact, net_rows
from mover.core.copying import Key
from mover.core.errors import ApplyConflict, SchemaChanged, Where
from mover.core.ids import Lsn, TableRef
from mover.core.membership import Membership, Values, questions
from mover.core.presence import Missing, keys_of, on_target
from mover.core.snapshot import Snapshot
from mover.ports import ConsistentPoint
from mover.postgres.connect import Identity
from mover.postgres.layout import groups_of, row_blocks, stage_blocks, touched
from mover.postgres.moved import MovedTables

# Up to here single statements in one network turn are quicker than staging.
SMALL_BATCH = 200
# What single statements may hold in libpq's buffers at a time.
TURN_CHANGES, TURN_BYTES = 500, 1 << 20
_CONFLICTS = ("23",)  # class 23: integrity constraint violation

Connection = psycopg.AsyncConnection[tuple[Any, ...]]


class Transaction:
    """Implements ports.ApplyTransaction."""

    def __init__(self, tables: MovedTables, conn: Connection, identity: Identity) -> None:
        self._tables, self._conn, self._identity = tables, conn, identity
        self._missing: Missing = {}
        self._rehomed: Values = {}
        self._awaited: Values = {}

    async def advance(self, applied: Lsn, snapshot: Snapshot | None) -> None:
        facts = {
            "migration": self._identity.stream,
            "lsn": str(applied),
            "snapshot": str(snapshot) if snapshot else None,
        }
        await self._conn.execute(_ADVANCE, facts)

    async def apply(self, changes: Sequence[Change], ends: Sequence[int] = ()) -> None:
        await self._apply(changes)

    async def _apply(self, changes: Sequence[Change]) -> None:
        for part in self._tables.in_parts(changes):
            if isinstance(part, Truncated):
                await self._truncate(part)
            else:
                await self._apply_wanted(self._tables.wanted(part))

    @property
    def is_missing_rows(self) -> bool:
        return any(self._missing.values()) or bool(self._rehomed)

    async def fetch_missing(self, point: ConsistentPoint) -> None:
        owned = self._tables.owned
        await owned.read_again(self._conn, point, self._rehomed)
        for ref in sorted(self._missing, key=self._tables.order):
            table, keys = self._tables.merge(ref).table, self._missing[ref]
            self._tables.touch(ref, keys)
            if self._rehomed and table.owners:
                await owned.remove(self._conn, table, table.key, keys)
            await owned.fetch(self._conn, point, table, table.key, keys)
        self._missing.clear()
        self._rehomed.clear()

    async def _apply_wanted(self, changes: list[RowChange | OwnerChange]) -> None:
        owned = self._tables.owned
        if not owned.tables:
            return await self._apply_part([c for c in changes if not isinstance(c, OwnerChange)])
        tenants, membership = await self._tenants(changes)
        await self._apply_part(tenants)
        for reference, found in (await owned.left_behind(self._conn, membership.left)).items():
            self._rehomed.setdefault(reference, set()).update(found)

    async def _tenants(self, changes: list[RowChange | OwnerChange]) -> tuple[list[RowChange], Membership]:
        """The changes as the tenant's rows see them, and what else was found about them."""
        owned = self._tables.owned
        keys, values = await owned.known(self._conn, questions(changes, owned.tables, self._key_of))
        membership = Membership(
            owned.tables, str(owned.tenant), self._key_of, keys, values, self._rehomed, self._awaited
        )
        tenants = list(membership.tenants(changes))
        self._rehomed = {r: found for r, found in self._rehomed.items() if owned.concerns(r)}
        return tenants, membership

    async def _truncate(self, truncated: Truncated) -> None:
        table = truncated.table
        if self._tables.copied(table).nothing:
            return
        self._tables.touch_everything()
        if truncated.partition is not None:
            return await self._truncate_partition(table, truncated.partition)
        for emptied in (*self._tables.owned.below(table), table):
            self._missing.pop(emptied, None)
            await self._conn.execute(self._tables.merge(emptied).delete_all)

    async def _truncate_partition(self, table: TableRef, partition: TableRef) -> None:
        """The tenant's rows of the target's partition of that name, which takes the same rows while the two
        sides' schemas are the same; rows that stood elsewhere on the source are found by verification."""
        merge = self._tables.merge(table)
        there = self._tables.mapped(partition)
        names = {"partition": _quoted(there), "table": _quoted(merge.table.target)}
        row = await (await self._conn.execute(_IS_PARTITION, names)).fetchone()
        if row is None or not row[0]:
            raise SchemaChanged(
                f"{partition} was truncated on the source, and is no partition of {table} on the target",
                where=Where(table=table),
                hint="Create the partition on the target and resume, or cancel and start again.",
            )
        await self._conn.execute(merge.delete_partition(there))

    async def _apply_part(self, changes: list[RowChange]) -> None:
        """The net effect on tables without a key is always known. Nothing refers to their rows: they go
        before their parents do, and come after them."""
        keyless = self._tables.keyless
        nets = [*net_rows(change for change in changes if change.relation.table in keyless)]
        last = {net.relation.table: net for net in nets}
        for net in nets:
            await self._delete_rows(net)
            if net is not last[net.relation.table]:
                await self._insert_rows(net)
        await self._apply_rows([change for change in changes if change.relation.table not in keyless])
        for net in last.values():
            await self._insert_rows(net)

    async def _delete_rows(self, net: NetRows) -> None:
        layout = self._tables.layout(net.relation)
        merge = layout.merge
        self._tables.touch(net.relation.table, [()])
        if net.deletes:
            await self._copy_lines(merge.copy_lines(layout.names, staged=True), net.deletes)
            cursor = await self._conn.execute(merge.delete_equal_staged)
            if cursor.rowcount != len(net.deletes) and (net.inserts or not self._tables.careful):
                raise _no_row(net.relation.table)
            await self._conn.execute(merge.clear_stage)

    async def _insert_rows(self, net: NetRows) -> None:
        layout = self._tables.layout(net.relation)
        if net.inserts:
            await self._copy_lines(layout.merge.copy_lines(layout.names, staged=False), net.inserts)

    async def _copy_lines(self, statement: sql.Composed, rows: list[Row]) -> None:
        async with self._conn.cursor() as cursor, cursor.copy(statement) as copy:
            for block in row_blocks(rows):
                await copy.write(block)

    async def _apply_rows(self, changes: list[RowChange]) -> None:
        """As sets where that is quicker and possible, otherwise in source order."""
        is_fitted = len(changes) <= SMALL_BATCH or self.is_missing_rows or not self._are_whole(changes)
        if is_fitted:
            changes = await self._fit(changes)
        if is_large := len(changes) > SMALL_BATCH:
            if await self._as_sets(changes):
                return
        if not is_fitted:
            changes = await self._fit(changes)
        if not self._tables.careful or len(changes) == 1:
            await self._replay(changes)
        elif not await self._tried(self._replay(changes)) and (is_large or not await self._as_sets(changes)):
            await self._replay_runs(changes)

    async def _replay(self, changes: list[RowChange]) -> None:
        for turn in _turns(changes):
            await self._in_order(turn)

    async def _replay_runs(self, changes: list[RowChange]) -> None:
        """In source order, but what one statement may have done to many rows in one statement: foreign keys
        are checked behind it."""
        for _, run in groupby(changes, lambda change: (change.relation.table, type(change))):
            rows = list(run)
            if len(rows) == 1 or not await self._as_sets(rows):
                await self._replay(rows)

    def _are_whole(self, changes: list[RowChange]) -> bool:
        relations = {id(change.relation): change.relation for change in changes}
        return all(self._tables.copied(relation.table).everything for relation in relations.values())

    async def _fit(self, changes: list[RowChange]) -> list[RowChange]:
        """The changes as this target has to make them, each exactly one row. Once per change only."""
        keys: dict[TableRef, set[Key]] = {}
        for change in changes:
            table = change.relation.table
            if not self._tables.copied(table).everything:
                keys.setdefault(table, set()).update(keys_of(change, self._key_of))
        copied = {table: await self._inside(table, list(found)) for table, found in keys.items()}
        fitted = on_target(changes, self._key_of, copied, self._missing, self._tables.moves_by_copy)
        return list(fitted)

    def _key_of(self, relation: Relation, row: Row) -> Key:
        return self._tables.layout(relation).key(row)

    async def _inside(self, table: TableRef, keys: list[Key]) -> set[Key]:
        """Those of `keys` that are in the copied ranges: only the server knows their order."""
        statement = self._tables.merge(table).inside(self._tables.copied(table))
        async with psycopg.AsyncRawCursor(self._conn) as cursor:
            await cursor.execute(statement, [list(column) for column in zip(*keys, strict=True)])
            return {keys[number - 1] for (number,) in await cursor.fetchall()}

    async def _as_sets(self, changes: list[RowChange]) -> bool:
        """False when the batch has to be replayed in source order; then nothing has happened."""
        try:
            net = compact(changes, lambda relation: self._tables.layout(relation).key_at)
        except NeedsOrder:
            return False
        if not all(self._tables.merge(table).can_stage for table in net):
            return False
        return await self._tried(self._merge_all(net))

    async def _tried(self, work: Coroutine[Any, Any, None]) -> bool:
        """False when the rows did not let it happen; then nothing has happened."""
        try:
            async with self._conn.transaction():  # a savepoint
                await work
        except (_Mismatch, ApplyConflict):
            return False
        except psycopg.Error as error:
            if not (error.sqlstate or "").startswith(_CONFLICTS):
                raise
            return False
        finally:
            work.close()  # it has not begun where the savepoint was cancelled
        return True

    async def _merge_all(self, net: Mapping[TableRef, NetTable]) -> None:
        order = self._tables.order
        tables = [net[table] for table in sorted(net, key=order)]
        merging = [await self._stage(table) for table in tables]
        # Deletes first: they free unique values. Where foreign keys are in force, parents come first and go
        # last, when nothing refers to them any more on which an action could act.
        if self._tables.careful:
            steps = [s for m in merging for s in m.inserts] + [s for m in merging for s in m.updates]
            gone = [s for m in reversed(merging) for s in m.deletes]
        else:
            steps, gone = [s for m in merging for s in (*m.deletes, *m.updates, *m.inserts)], []
        async with self._conn.cursor() as cursor:
            for statement, expected in steps:
                await cursor.execute(statement)
                if cursor.rowcount != expected:
                    raise _Mismatch
            for statement, _ in gone:  # a foreign key's action may have been here before
                await cursor.execute(statement)
            for table in tables:
                await cursor.execute(self._tables.merge(table.relation.table).clear_stage)

    async def _stage(self, net: NetTable) -> _Steps:
        layout = self._tables.layout(net.relation)
        merge = layout.merge
        if self._tables.collects_dirty:
            self._tables.touch(net.relation.table, touched(layout, net))
        groups = groups_of(net)
        async with self._conn.cursor() as cursor, cursor.copy(merge.copy_stage(layout.names)) as copy:
            for block in stage_blocks(net, groups):
                await copy.write(block)
        steps = _Steps()
        if net.deletes:
            steps.deletes.append((merge.delete_staged, len(net.deletes)))
        for number, (unsent, keys) in enumerate(groups.items()):
            sent = tuple(name for at, name in enumerate(layout.names) if at not in unsent)
            if merge.assigned(sent):
                steps.updates.append((merge.update_staged(sent, number), len(keys)))
        if net.inserts:
            steps.inserts.append((merge.insert_staged(layout.names), len(net.inserts)))
        return steps

    async def _in_order(self, changes: list[RowChange]) -> None:
        """Single statements, all sent before the last answers are read."""
        sent: list[tuple[RowChange, psycopg.AsyncRawCursor[tuple[Any, ...]]]] = []
        async with self._conn.pipeline():
            for change in changes:
                statement, parameters = self._statement(change)
                if statement is not None:
                    cursor = psycopg.AsyncRawCursor(self._conn)
                    await cursor.execute(statement, parameters)
                    sent.append((change, cursor))
        for change, cursor in sent:
            if cursor.rowcount != 1 and not (self._tables.careful and isinstance(change, Delete)):
                raise _no_row(change.relation.table)

    def _statement(self, change: RowChange) -> tuple[bytes | None, Sequence[str | None]]:
        layout = self._tables.layout(change.relation)
        merge = layout.merge
        if self._tables.collects_dirty:
            self._tables.touch(change.relation.table, keys_of(change, self._key_of))
        match change:
            case Insert(_, new):
                return merge.insert_one(layout.names), layout.values(new, layout.names)
            case Delete(_, old):
                return merge.delete_one, layout.key(old)
            case Update(_, old, new):
                names = layout.sent(new)
                if not merge.assigned(names):
                    return None, ()
                values = layout.values(new, merge.used_by_update(names))
                if old is not None and self._tables.careful:
                    return merge.update_moved(names), [*values, *layout.key(old), *layout.key(new)]
                return merge.update_one(names), [*values, *layout.key(new if old is None else old)]


@dataclass(slots=True)
class _Steps:
    """Set statements, each with the number of rows that it has to touch."""

    deletes: list[tuple[sql.Composed, int]] = field(default_factory=list)
    updates: list[tuple[sql.Composed, int]] = field(default_factory=list)
    inserts: list[tuple[sql.Composed, int]] = field(default_factory=list)


class _Mismatch(Exception):
    """A set statement did not touch as many rows as were staged."""


def _no_row(table: TableRef) -> ApplyConflict:
    return ApplyConflict(
        f"a change of {table} found no row of the tenant on the target",
        where=Where(table=table),
        hint="Somebody wrote to the tenant's rows on the target; cancel and start again.",
    )


def _turns(changes: list[RowChange]) -> Iterator[list[RowChange]]:
    """The changes cut so that a turn's statements stay small enough to be sent at once."""
    turn: list[RowChange] = []
    size = 0
    for change in changes:
        turn.append(change)
        row = change.old if isinstance(change, Delete) else change.new
        size += sum(len(value) for value in row if isinstance(value, bytes))
        if len(turn) >= TURN_CHANGES or size >= TURN_BYTES:
            yield turn
            turn, size = [], 0
    if turn:
        yield turn


def _quoted(table: TableRef) -> str:
    return sql.Identifier(table.schema, table.name).as_string(None)


_IS_PARTITION = "SELECT pg_partition_root(to_regclass(%(partition)s)) = to_regclass(%(table)s)"
# Never moves backwards: a replayed batch leaves the row as it was.
_ADVANCE = """
INSERT INTO mover.progress AS p (migration, applied_lsn, snapshot)
VALUES (%(migration)s, %(lsn)s, %(snapshot)s)
ON CONFLICT (migration) DO UPDATE
   SET applied_lsn = greatest(p.applied_lsn, excluded.applied_lsn), snapshot = excluded.snapshot
"""
