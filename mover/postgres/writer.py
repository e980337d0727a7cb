"""Applies changes to the target: implements ports.ApplyTarget.

> Outside a running transaction the target is the source at some commit, exactly, restricted to the
> copied ranges.

Every transaction locks the owner row first, so that a daemon that lost its lease commits nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from mover.core.changes import UNCHANGED, Delete, Insert, Relation, Row, RowChange, Truncated, Update
from mover.core.compaction import NeedsOrder, NetTable, compact
from mover.core.copying import CopiedRanges, Key
from mover.core.copytext import encode_row
from mover.core.errors import ApplyConflict, SchemaChanged, Where
from mover.core.ids import Lsn, TableRef, TenantId
from mover.core.snapshot import Snapshot
from mover.core.tables import Shape
from mover.postgres import owner
from mover.postgres.connect import Database, Identity
from mover.postgres.errors import translate
from mover.postgres.merge import DELETE, INSERT, UPDATE, Merge

# Up to here single statements in one network turn are quicker than staging.
SMALL_BATCH = 200
ORDERED_PER_TURN = 500
MAX_DIRTY_KEYS = 300_000
_CONFLICTS = ("23",)  # class 23: integrity constraint violation

Connection = psycopg.AsyncConnection[tuple[Any, ...]]


class Writer:
    """One connection to the target that applies what the follower gives it."""

    def __init__(
        self, database: Database, shape: Shape, tenant: TenantId, identity: Identity, conn: Connection
    ) -> None:
        self._database, self._identity, self._conn = database, identity, conn
        self._tenant_text = str(tenant).encode()
        self._merges = {t.source: Merge(t, n, tenant) for n, t in enumerate(shape.tables)}
        self._layouts: dict[int, Layout] = {}
        self._copied: Mapping[TableRef, CopiedRanges] = {}
        self._dirty: dict[TableRef, set[Key]] | None = None
        self._dirty_count = 0

    @classmethod
    @asynccontextmanager
    async def open(
        cls, database: Database, shape: Shape, tenant: TenantId, identity: Identity
    ) -> AsyncIterator[Writer]:
        """Connect and make the staging tables."""
        settings = {
            "session_replication_role": "replica",  # no user triggers, no foreign-key order
            "synchronous_commit": "on",  # what we confirm to the slot must survive a crash here
            "client_min_messages": "warning",
            "mover.tenant": str(tenant),
        }
        async with database.connect("apply", **settings) as conn:
            writer = cls(database, shape, tenant, identity, conn)
            for merge in writer._merges.values():
                await conn.execute(merge.create_stage)
            yield writer

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        async with AsyncExitStack() as stack:
            stack.enter_context(translate(self._database.label))
            await stack.enter_async_context(self._conn.transaction())
            await owner.hold(self._conn, self._identity)
            yield Transaction(self, self._conn)

    async def progress(self) -> tuple[Lsn, Snapshot | None]:
        with translate(self._database.label):
            cursor = await self._conn.execute(_READ_PROGRESS, (self._identity.migration,))
            row = await cursor.fetchone()
        if row is None:
            return Lsn(0), None
        return Lsn.parse(row[0]), Snapshot.parse(row[1]) if row[1] else None

    def set_copied(self, ranges: Mapping[TableRef, CopiedRanges]) -> None:
        self._copied = ranges

    def collect_dirty(self) -> None:
        self._dirty, self._dirty_count = {}, 0

    def dirty(self) -> Mapping[TableRef, frozenset[Key]] | None:
        if self._dirty is None:
            return None
        return {table: frozenset(keys) for table, keys in self._dirty.items()}

    def layout(self, relation: Relation) -> Layout:
        """How the stream's rows of `relation` map to the planned table. Raises SchemaChanged."""
        found = self._layouts.get(id(relation))
        if found is None or found.relation is not relation:
            found = self._layouts[id(relation)] = self._new_layout(relation)
        return found

    def _new_layout(self, relation: Relation) -> Layout:
        merge = self._merges.get(relation.table)
        names = [c.name for c in relation.columns]
        if merge is None or sorted(names) != sorted(c.name for c in merge.table.copied):
            raise SchemaChanged(
                f"{relation.table} has other columns now than when the migration was planned",
                where=Where(table=relation.table),
                hint="Align the target's table and cancel the migration, then start it again.",
            )
        return Layout(relation, merge, names)

    def copied(self, table: TableRef) -> CopiedRanges:
        return self._copied.get(table, _NOTHING)

    def is_ours(self, layout: Layout, row: Row) -> bool:
        """The publication's filter should have seen to this; another tenant's row must not pass."""
        return row[layout.tenant_at] == self._tenant_text

    def touch(self, table: TableRef, keys: set[Key]) -> None:
        if self._dirty is None:
            return
        known = self._dirty.setdefault(table, set())
        self._dirty_count -= len(known)
        known |= keys
        self._dirty_count += len(known)
        if self._dirty_count > MAX_DIRTY_KEYS:
            self._dirty = None


@dataclass(slots=True)
class Layout:
    """Where the stream's values go."""

    relation: Relation
    merge: Merge
    names: list[str]
    key_at: tuple[int, ...] = field(init=False)
    tenant_at: int = field(init=False)

    def __post_init__(self) -> None:
        self.key_at = tuple(self.names.index(name) for name in self.merge.table.key)
        self.tenant_at = self.names.index(self.merge.table.tenant_column)

    def key(self, row: Row) -> Key:
        return tuple(_text(row[at]) for at in self.key_at)


class Transaction:
    """Implements ports.ApplyTransaction."""

    def __init__(self, writer: Writer, conn: Connection) -> None:
        self._writer, self._conn = writer, conn

    async def advance(self, applied: Lsn, snapshot: Snapshot | None) -> None:
        await self._conn.execute(
            _ADVANCE,
            {
                "migration": self._writer._identity.migration,
                "lsn": str(applied),
                "snapshot": str(snapshot) if snapshot else None,
            },
        )

    async def apply(self, changes: Sequence[RowChange]) -> None:
        wanted = [change for change in changes if self._wants(change)]
        if not wanted:
            return
        if len(wanted) <= SMALL_BATCH and all(self._is_whole(change) for change in wanted):
            await self._in_order(wanted)
        else:
            await self._as_sets(wanted)

    def _wants(self, change: RowChange) -> bool:
        """Whether any of the table is here yet; also where a foreign row would be caught."""
        if isinstance(change, Truncated):
            return not self._writer.copied(change.table).nothing
        layout = self._writer.layout(change.relation)
        if isinstance(change, Insert | Update) and not self._writer.is_ours(layout, change.new):
            raise ApplyConflict(
                f"the stream carried a row of {change.relation.table} that is not the tenant's",
                where=Where(table=change.relation.table),
                hint="Look for other publications or a changed row filter on the source.",
            )
        return not self._writer.copied(change.relation.table).nothing

    def _is_whole(self, change: RowChange) -> bool:
        table = change.table if isinstance(change, Truncated) else change.relation.table
        return self._writer.copied(table).everything

    async def _as_sets(self, changes: list[RowChange]) -> None:
        try:
            net = compact(changes, lambda relation: self._writer.layout(relation).key_at)
            async with self._conn.transaction():  # a savepoint: the way back to source order
                for table in net.values():
                    await self._merge(table)
            return
        except (NeedsOrder, _Mismatch):
            pass
        except psycopg.Error as error:
            if not (error.sqlstate or "").startswith(_CONFLICTS):
                raise
        if not all(self._is_whole(change) for change in changes):
            raise ApplyConflict(
                "a change of a half-copied table needs source order",
                hint="Raise engine.wave_seconds so that the table is copied in one wave.",
            )
        await self._in_order(changes)

    async def _merge(self, net: NetTable) -> None:
        layout = self._writer.layout(net.relation)
        merge = layout.merge
        if net.truncated:
            await self._conn.execute(merge.delete_all)
        groups = _groups(net)
        self._writer.touch(net.relation.table, _touched(layout, net))
        async with self._conn.cursor() as cursor:
            async with cursor.copy(merge.copy_stage(layout.names)) as copy:
                for block in _stage_rows(net, groups):
                    await copy.write(block)
            copied = self._writer.copied(net.relation.table)
            if not copied.everything:
                await cursor.execute(merge.drop_uncopied(copied))
            # Deletes first: they free unique values; no cascade fires in replica mode.
            steps = [(merge.delete_staged, len(net.deletes))] if net.deletes else []
            for number, (unsent, keys) in enumerate(groups.items()):
                sent = [name for at, name in enumerate(layout.names) if at not in unsent]
                if merge.assigned(sent):
                    steps.append((merge.update_staged(sent, number), len(keys)))
            if net.inserts:
                steps.append((merge.insert_staged(layout.names), len(net.inserts)))
            for statement, expected in steps:
                await cursor.execute(statement)
                if copied.everything and cursor.rowcount != expected:
                    raise _Mismatch
            await cursor.execute(merge.clear_stage)

    async def _in_order(self, changes: list[RowChange]) -> None:
        for start in range(0, len(changes), ORDERED_PER_TURN):
            await self._turn(changes[start : start + ORDERED_PER_TURN])

    async def _turn(self, changes: list[RowChange]) -> None:
        """Single statements, all sent before the first answer is read."""
        sent: list[tuple[TableRef, psycopg.AsyncCursor[tuple[Any, ...]]]] = []
        async with self._conn.pipeline():
            for change in changes:
                if isinstance(change, Truncated):
                    await self._conn.execute(self._writer._merges[change.table].delete_all)
                    self._writer._dirty = None
                    continue
                for statement, parameters in self._statements(change):
                    cursor = await self._conn.execute(statement, parameters)
                    sent.append((change.relation.table, cursor))
        for table, cursor in sent:
            if cursor.rowcount != 1:
                raise ApplyConflict(
                    f"a change of {table} found no row of the tenant on the target",
                    where=Where(table=table),
                    hint="Somebody wrote to the tenant's rows on the target; cancel and start again.",
                )

    def _statements(self, change: Insert | Update | Delete) -> list[tuple[sql.Composed, list[str | None]]]:
        layout = self._writer.layout(change.relation)
        merge, table = layout.merge, change.relation.table
        match change:
            case Insert(_, new):
                if UNCHANGED in new:
                    raise ApplyConflict(
                        f"a row of {table} entered the tenant without its large values",
                        where=Where(table=table),
                    )
                self._writer.touch(table, {layout.key(new)})
                return [(merge.insert_one(layout.names), _texts(new))]
            case Delete(_, old):
                self._writer.touch(table, {layout.key(old)})
                return [(merge.delete_one, list(layout.key(old)))]
            case Update(_, old, new):
                old_key = layout.key(old if old is not None else new)
                self._writer.touch(table, {old_key, layout.key(new)})
                names = [n for n, v in zip(layout.names, new, strict=True) if v is not UNCHANGED]
                by_name = dict(zip(layout.names, new, strict=True))
                assigned = merge.assigned(names)
                if not assigned:
                    return []
                values = [_text_or_null(by_name[name]) for name in assigned]
                return [(merge.update_one(names), [*values, *old_key])]


class _Mismatch(Exception):
    """A set statement did not touch as many rows as were staged."""


def _groups(net: NetTable) -> dict[frozenset[int], list[Any]]:
    """The updates' keys by the columns that were not sent; the position is the group's number."""
    groups: dict[frozenset[int], list[Any]] = {}
    for key, row in net.updates.items():
        unsent = frozenset(at for at, v in enumerate(row) if v is UNCHANGED) if UNCHANGED in row else _ALL
        groups.setdefault(unsent, []).append(key)
    return groups


def _stage_rows(net: NetTable, groups: Mapping[frozenset[int], list[Any]]) -> list[bytes]:
    """COPY text blocks of all staged rows."""
    lines: list[bytes] = []
    for number, keys in enumerate(groups.values()):
        op = b"%d" % (UPDATE + number)
        lines += [encode_row([op, *net.updates[key]]) for key in keys]
    lines += [encode_row([b"%d" % INSERT, *row]) for row in net.inserts.values()]
    for row in net.deletes.values():
        keep = [value if at in net.key_at else None for at, value in enumerate(row)]
        lines.append(encode_row([b"%d" % DELETE, *keep]))
    return [b"".join(lines[start : start + 1000]) for start in range(0, len(lines), 1000)]


def _touched(layout: Layout, net: NetTable) -> set[Key]:
    rows = (*net.inserts.values(), *net.updates.values(), *net.deletes.values())
    return {layout.key(row) for row in rows}


def _text(value: object) -> str:
    assert isinstance(value, bytes)  # a key's columns are NOT NULL and always sent
    return value.decode()


def _text_or_null(value: object) -> str | None:
    return None if value is None else _text(value)


def _texts(row: Row) -> list[str | None]:
    return [_text_or_null(value) for value in row]


_ALL: frozenset[int] = frozenset()
_NOTHING = CopiedRanges(())
_READ_PROGRESS = "SELECT applied_lsn::text, snapshot FROM mover.progress WHERE migration = %s"
# Never moves backwards: a replayed batch leaves the row as it was.
_ADVANCE = """
INSERT INTO mover.progress AS p (migration, applied_lsn, snapshot)
VALUES (%(migration)s, %(lsn)s, %(snapshot)s)
ON CONFLICT (migration) DO UPDATE
   SET applied_lsn = greatest(p.applied_lsn, excluded.applied_lsn), snapshot = excluded.snapshot
"""
