"""What triggers on the source have written down: implements ports.ChangeLog.

The SQL and its reasons stand in `mover/sql/capture.sql`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, TypeVar

import psycopg
from psycopg import errors, sql

from mover.core.changes import Delete, Insert, Relation, RelationColumn, Row, RowChange, Seen, Truncated
from mover.core.copying import CopiedRanges
from mover.core.copytext import decode_row
from mover.core.errors import PlanOutdated, Where
from mover.core.ids import Lsn, MigrationId, Side, TableRef, TenantId
from mover.core.membership import Values
from mover.core.rowtext import parse_row
from mover.core.snapshot import Snapshot
from mover.core.tables import MovedTable, Shape
from mover.postgres import holdings, owner, ranges
from mover.postgres.capture import CAME, EMPTIED, GONE, KEY, log_of
from mover.postgres.connect import Database, Identity
from mover.postgres.errors import translate
from mover.postgres.points import Point, Points, reading, take_snapshot
from mover.sql import load

BATCH_ROWS, BATCH_BYTES = 5_000, 8 << 20
FORGET_ROWS = 2_000  # at a time: some milliseconds, for which a cutover may have to wait
VACUUM_ROWS = 20_000  # have been forgotten: some 3 MB
Connection = psycopg.AsyncConnection[tuple[Any, ...]]
Item = TypeVar("Item")


class PgChangeLog:
    """Keeps a connection for the steps beside those that `points` keeps; another one after an error, since
    nobody knows in the middle of what a step was interrupted."""

    def __init__(
        self,
        database: Database,
        points: Points,
        shape: Shape,
        tenant: TenantId,
        identity: Identity,
    ) -> None:
        self.label, self.tenant = database.label, tenant
        self._database = database
        self.tables = {table.source: table for table in shape.tables}
        self._identity, self._points = identity, points
        self._open = AsyncExitStack()
        self._conn: Connection | None = None
        self._relations: dict[int, Relation] = {}
        self._forgotten_before = 0  # the transaction id
        self._dead = 0
        self._numbers: dict[TableRef, int] = {}  # each table's oid, for as long as it is the planned one

    @classmethod
    @asynccontextmanager
    async def open(
        cls, database: Database, points: Points, shape: Shape, tenant: TenantId, identity: Identity
    ) -> AsyncIterator[PgChangeLog]:
        log = cls(database, points, shape, tenant, identity)
        async with log._open:
            async with log._connection() as conn:
                with translate(database.label):
                    for table in log.tables:
                        row = await (await conn.execute(_OID, (table.schema, table.name))).fetchone()
                        if row is None or row[0] is None:
                            raise _outdated(table)
                        log._numbers[table] = row[0]
            yield log

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        if self._conn is None:
            # Nothing that is written on it has to outlive a crash, or may wait for a standby.
            opened = self._database.connect("log", synchronous_commit="local")
            self._conn = await self._open.enter_async_context(opened)
        try:
            yield self._conn
        except BaseException:
            self._conn = None
            await self._open.aclose()
            raise

    @property
    def stream(self) -> MigrationId:
        return self._identity.stream

    @property
    def numbers(self) -> Mapping[TableRef, int]:
        return self._numbers

    @asynccontextmanager
    async def consistent_point(self) -> AsyncIterator[PgLoggedPoint]:
        async with self._points.consistent_point() as point:
            yield PgLoggedPoint(point.snapshot, point.snapshot_id, self.label, point.conn, self)

    @asynccontextmanager
    async def next_point(self) -> AsyncIterator[PgLoggedPoint]:
        async with self._connection() as conn, AsyncExitStack() as stack:
            with translate(self.label):
                await stack.enter_async_context(conn.transaction())
                snapshot, snapshot_id = await take_snapshot(conn)
            yield PgLoggedPoint(snapshot, snapshot_id, self.label, conn, self)
            with translate(self.label):
                await stack.aclose()

    async def mark(self, token: str) -> None:
        await self._points.mark(token)

    async def wal_lsn(self) -> Lsn:
        return await self._points.wal_lsn()

    async def forget(self, seen: Snapshot) -> bool:
        facts = {
            "relations": list(self._numbers.values()),
            "since": str(self._forgotten_before),
            "before": str(seen.xmin),
            "limit": FORGET_ROWS,
        }
        statement = sql.SQL(load("capture")["forget"]).format(log=log_of(self.stream))
        async with self._connection() as conn:
            with translate(self.label):
                async with conn.transaction():
                    await owner.hold(conn, self._identity)
                    deleted = (await conn.execute(statement, facts)).rowcount
        self._dead += deleted
        if deleted < FORGET_ROWS:
            self._forgotten_before = seen.xmin
        return deleted == FORGET_ROWS

    async def make_room(self) -> None:
        if self._dead >= VACUUM_ROWS:
            self._dead = 0
            statement = sql.SQL(load("capture")["make_room"]).format(log=log_of(self.stream))
            async with self._database.borrow("log") as conn:
                await conn.execute(statement)

    def relation(self, found: Relation) -> Relation:
        """The same object as long as nothing has changed, for those who keep something by it."""
        known = self._relations.get(found.oid)
        if known != found:
            known = self._relations[found.oid] = found
        return known


@dataclass(frozen=True, slots=True)
class PgLoggedPoint(Point):
    """Implements ports.LoggedPoint."""

    log: PgChangeLog = field(repr=False)

    async def changes_since(self, snapshot: Snapshot) -> PgChangesSince:
        is_new = _is_new(snapshot)
        query = sql.SQL(load("capture")["new_entries"]).format(log=log_of(self.log.stream), is_new=is_new)
        changes = PgChangesSince(self, is_new)
        facts = {"relations": list(self.log.numbers.values())}
        with translate(self.label):
            found = await (await self.conn.execute(query, facts)).fetchall()
            for oid, part, schema, name, names, types, modifiers in found:
                table = self._planned(oid, schema, name)
                columns = zip(names, types, modifiers, strict=True)
                relation = Relation(
                    oid,
                    table.source,
                    "d" if table.key else "f",  # with a key it is told by that, without one by all values
                    tuple(RelationColumn(n, n in table.key, type, mod) for n, type, mod in columns),
                )
                changes.relations[oid] = self.log.relation(relation)
                changes.parts.setdefault(oid, set()).add(part)
            await changes.read_truncated()
        return changes

    def _planned(self, oid: int, schema: str | None, name: str | None) -> MovedTable:
        table = self.log.tables.get(TableRef(schema, name)) if schema and name else None
        if table is None or self.log.numbers[table.source] != oid:
            raise _outdated(TableRef(schema or "?", name or f"(dropped, {oid})"))
        return table


@dataclass(slots=True)
class PgChangesSince:
    """Implements ports.ChangesSince."""

    point: PgLoggedPoint
    is_new: sql.Composed
    relations: dict[int, Relation] = field(default_factory=dict)
    parts: dict[int, set[int]] = field(default_factory=dict)
    truncated: list[Truncated] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not self.parts

    async def read_truncated(self) -> None:
        for oid, parts in self.parts.items():
            if EMPTIED in parts:
                ref = self.relations[oid].table
                query = self._query("emptied", relation=sql.Literal(oid))
                for (value,) in await (await self.point.conn.execute(query)).fetchall():
                    self.truncated.append(Truncated(ref, TableRef(*value) if value else None))

    async def rehomed(self) -> AsyncGenerator[Values]:
        for oid, parts in self.parts.items():
            if not any(part > 0 for part in parts):
                continue
            relation = self.relations[oid]
            table = self.point.log.tables[relation.table]
            with translate(self.point.label):
                async with self.point.conn.cursor(name=f"rehomed_{oid}") as cursor:
                    await cursor.execute(self._query("written_values", relation=sql.Literal(oid)))
                    while found := await cursor.fetchmany(BATCH_ROWS):
                        values: Values = {}
                        for part, value in found:
                            reference = (relation.table, table.referenced[part - 1])
                            values.setdefault(reference, set()).add(tuple(value))
                        yield values

    @property
    def tables(self) -> Collection[TableRef]:
        return {relation.table for relation in self.relations.values()}

    def rows(self, copied: Mapping[TableRef, CopiedRanges]) -> AsyncGenerator[list[Seen]]:
        return _batches(self._all_rows(copied))

    async def _all_rows(self, copied: Mapping[TableRef, CopiedRanges]) -> AsyncGenerator[tuple[Seen, int]]:
        for relation, there in self._among(copied, {KEY}):
            async with aclosing(self._rows_of(relation, there)) as found:
                async for seen in found:
                    yield seen

    def _among(
        self, copied: Mapping[TableRef, CopiedRanges], parts: set[int]
    ) -> Iterator[tuple[Relation, CopiedRanges]]:
        """The tables of which such is written down and rows are copied."""
        for oid, relation in self.relations.items():
            there = copied.get(relation.table)
            if there is not None and not there.nothing and self.parts[oid] & parts:
                yield relation, there

    async def _rows_of(self, relation: Relation, copied: CopiedRanges) -> AsyncGenerator[tuple[Seen, int]]:
        table = self.point.log.tables[relation.table]
        names = [column.name for column in relation.columns]
        if not set(table.key) <= set(names):
            raise _outdated(relation.table)
        key_at = [names.index(name) for name in table.key]
        query = self._changed_rows(relation, table, names, copied)
        with translate(self.point.label):
            try:
                async with reading(self.point.conn, query) as copy:
                    async for block in copy:
                        for line in bytes(block).splitlines():  # a row is never cut
                            yield _seen(relation, decode_row(line), len(table.key), key_at), len(line)
            except (errors.UndefinedColumn, errors.UndefinedTable) as error:
                raise _outdated(relation.table) from error

    def whole_rows(self, copied: Mapping[TableRef, CopiedRanges]) -> AsyncGenerator[list[RowChange]]:
        return _batches(self._all_net_changes(copied))

    async def _all_net_changes(
        self, copied: Mapping[TableRef, CopiedRanges]
    ) -> AsyncGenerator[tuple[RowChange, int]]:
        emptied = {truncated.table for truncated in self.truncated}  # what came before that counts no more
        for relation, _ in self._among(copied, {GONE, CAME}):
            if relation.table not in emptied:
                async with aclosing(self._net_changes(relation)) as found:
                    async for change in found:
                        yield change

    async def _net_changes(self, relation: Relation) -> AsyncGenerator[tuple[RowChange, int]]:
        table = self.point.log.tables[relation.table]
        tenant_at = [column.name == table.tenant_column for column in relation.columns].index(True)
        query = self._query("net_rows", relation=sql.Literal(relation.oid))
        with translate(self.point.label):
            async with reading(self.point.conn, query) as copy:
                async for block in copy:
                    for line in bytes(block).splitlines():  # a row is never cut
                        text, net = (value.decode() for value in decode_row(line) if isinstance(value, bytes))
                        row = self._parsed(relation, table, text)
                        if row[tenant_at] == str(self.point.log.tenant).encode():
                            change = Insert(relation, row) if int(net) > 0 else Delete(relation, row)
                            for each in repeat(change, abs(int(net))):
                                yield each, len(line)

    def _parsed(self, relation: Relation, table: MovedTable, text: str) -> Row:
        """A row's text does not say which columns it had: those that came since are NULL in it."""
        stored = table.columns
        values = parse_row(text)
        values += [None] * (len(stored) - len(values))
        row = [v for v, column in zip(values, stored, strict=False) if not column.generated]
        if len(values) != len(stored) or len(row) != len(relation.columns):
            raise _outdated(relation.table)
        return row

    def _changed_rows(
        self, relation: Relation, table: MovedTable, names: Sequence[str], copied: CopiedRanges
    ) -> sql.Composed:
        written = [
            # Under the column's collation, which tells what is the same key.
            sql.SQL("coalesce((l.value)[{}]::{}, (NULL::{}).{name}) AS {name}").format(
                sql.Literal(number),
                ranges.type_on(column, Side.SOURCE),
                holdings.named(table.source),
                name=sql.Identifier(column.name),
            )
            for number, column in enumerate(table.key_columns, start=1)
        ]
        return self._query(
            "changed_rows",
            relation=sql.Literal(relation.oid),
            written=sql.SQL(", ").join(written),
            keys=ranges.columns(table.key_columns, "k"),
            found_keys=ranges.columns(table.key_columns, "t"),
            values=sql.SQL(", ").join(sql.Identifier("t", name) for name in names),
            table=holdings.named(table.source),
            tenants=holdings.is_tenants(table.holding(Side.SOURCE), "t", self.point.log.tenant),
            copied=ranges.in_ranges(table, "t", copied, Side.SOURCE),
        )

    def _query(self, name: str, **parts: sql.Composable) -> sql.Composed:
        log = log_of(self.point.log.stream)
        return sql.SQL(load("capture")[name]).format(log=log, is_new=self.is_new, **parts)


async def _batches(found: AsyncGenerator[tuple[Item, int]]) -> AsyncGenerator[list[Item]]:
    """What was found, each with its bytes, in pieces that memory holds."""
    batch: list[Item] = []
    size_bytes = 0
    async with aclosing(found):
        async for item, item_bytes in found:
            batch.append(item)
            size_bytes += item_bytes
            if len(batch) >= BATCH_ROWS or size_bytes >= BATCH_BYTES:
                yield batch
                batch, size_bytes = [], 0
    if batch:
        yield batch


def _seen(relation: Relation, values: Row, keys: int, key_at: Sequence[int]) -> Seen:
    key: Row = [None] * len(relation.columns)
    for at, value in zip(key_at, values[:keys], strict=True):
        key[at] = value
    row = values[keys:]
    return Seen(relation, key, None if row[key_at[0]] is None else row)


def _is_new(since: Snapshot) -> sql.Composed:
    """What `since` does not see, of what the reading transaction does: by ranges of the index, so that its
    cost is that of what is new, however much an old transaction keeps from being removed."""
    later = sql.SQL("l.xid >= {}::xid8").format(sql.Literal(str(since.xmax)))
    if not since.in_progress:
        return sql.SQL("({})").format(later)
    running = [str(xid) for xid in sorted(since.in_progress)]
    return sql.SQL("({} OR l.xid = ANY ({}::xid8[]))").format(later, sql.Literal(running))


def _outdated(table: TableRef) -> PlanOutdated:
    return PlanOutdated(
        f"{table} is another table now than when the migration was planned", where=Where(table=table)
    )


_OID = "SELECT to_regclass(format('%%I.%%I', %s::text, %s::text))::oid"
