"""Gathers everything that preflight judges, from both servers. Changes nothing but temporary tables.

Each count over rows is bounded by a statement timeout: what could not be counted in time is reported as
unknown, never waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from psycopg import errors, sql

from mover.core.errors import first_error
from mover.core.facts import (
    Collision,
    Dangling,
    Facts,
    ForeignKey,
    IndexFacts,
    Relation,
    Rows,
    SideFacts,
    Tenancy,
)
from mover.core.ids import TableRef, TenantId
from mover.core.migration import Place
from mover.postgres import catalog
from mover.postgres.catalog import Connection
from mover.postgres.connect import Database
from mover.postgres.errors import translate
from mover.postgres.fingerprint import differences, fingerprint

COUNT_TIMEOUT_S = 3.0  # the tenant's rows of one table; then the statistics must do
EXISTS_TIMEOUT_S = 10.0
CROSS_CHECK_TIMEOUT_S = 60.0  # one unique index or foreign key


async def gather(
    source: Database,
    target: Database,
    source_place: Place,
    target_place: Place,
    tenancy: Tenancy,
    tenant: TenantId,
) -> Facts:
    """Raises Unreachable or Refused when a server cannot be read at all."""
    schemas = dict(zip(source_place.schemas, target_place.schemas, strict=True))
    async with source.connect("preflight") as ours, target.connect("preflight") as theirs:
        with first_error():
            async with asyncio.TaskGroup() as group:
                reading = [
                    group.create_task(_read(ours, schemas.keys(), source.label)),
                    group.create_task(_read(theirs, schemas.values(), target.label)),
                ]
        sides = [task.result() for task in reading]
        wanted = max(source.limit, target.limit)
        base = Facts(tenant, tenancy, schemas, sides[0], sides[1], connections_wanted=wanted)
        return await _Gathering(_Server(ours, source.label), _Server(theirs, target.label), base).run()


async def _read(conn: Connection, schemas: Collection[str], label: str) -> SideFacts:
    with translate(label):
        return await catalog.read_side(conn, schemas, label)


@dataclass(frozen=True, slots=True)
class _Server:
    conn: Connection
    label: str

    async def bounded(self, seconds: float, query: sql.Composed) -> int | None:
        """The single value that `query` answers, or None when it took too long."""
        with translate(self.label):
            async with _statement_timeout(self.conn, seconds):
                try:
                    row = await (await self.conn.execute(query)).fetchone()
                except errors.QueryCanceled:
                    return None
        return row[0] if row is not None else None


@dataclass
class _Gathering:
    """The checks that read rows, on one connection a side."""

    source: _Server
    target: _Server
    base: Facts

    async def run(self) -> Facts:
        outside = await self._parents_outside()
        return replace(
            self.base,
            rows={r.ref: await self._rows(r.ref) for r in self._tenant_tables(self.base.source)},
            target_tenant_tables=await self._target_tenant_tables(),
            parents_outside=outside,
            differences=await self._differences(),
            missing_references=await self._missing_references(outside),
            foreign_children=await self._across_tenants(of_child=False),
            foreign_parents=await self._across_tenants(of_child=True),
            collisions=await self._collisions(),
        )

    def _tenant_tables(self, side: SideFacts) -> list[Relation]:
        """Those whose rows can be looked at."""
        column = self.base.tenancy.column
        elsewhere = {r.root for r in side.relations if r.kind == "f"}  # another server would be asked
        return [
            r
            for r in side.relations
            if self.base.is_tenant_table(r)
            and r.ref not in elsewhere
            and "SELECT" in r.privileges
            and not r.row_security
            and any(c.can_name_tenants for c in r.columns if c.name == column)
        ]

    def _is_tenants(self, column: str) -> sql.Composed:
        """The tenant's literal takes the column's type."""
        return sql.SQL("{} = {}").format(sql.Identifier(column), sql.Literal(str(self.base.tenant)))

    async def _rows(self, table: TableRef) -> Rows:
        column = self.base.tenancy.column
        (size,) = await catalog.rows(
            self.source.conn,
            "table_size",
            schema=table.schema,
            name=table.name,
            column=column,
            value=str(self.base.tenant),
        )
        where = sql.SQL("FROM {} WHERE {}").format(
            sql.Identifier(table.schema, table.name), self._is_tenants(column)
        )
        counted = await self.source.bounded(COUNT_TIMEOUT_S, sql.SQL("SELECT count(*) {}").format(where))
        estimate = round(size["tuples"] * size["share"]) if size["share"] is not None else 0
        number = counted if counted is not None else estimate
        exists = bool(number)
        if counted is None:
            query = sql.SQL("SELECT (SELECT true {} LIMIT 1) IS NOT NULL").format(where)
            answer = await self.source.bounded(EXISTS_TIMEOUT_S, query)
            exists = bool(answer) if answer is not None else True
        tuples = max(size["tuples"], number, 1)
        return Rows(number, round(size["bytes"] * number / tuples), counted is not None, exists)

    async def _target_tenant_tables(self) -> tuple[TableRef, ...]:
        found = []
        moved = {self.base.mapped(r.ref) for r in self._tenant_tables(self.base.source)}
        for relation in self._tenant_tables(self.base.target):
            if relation.ref not in moved:
                continue
            query = sql.SQL("SELECT (SELECT true FROM {} WHERE {} LIMIT 1) IS NOT NULL").format(
                sql.Identifier(relation.ref.schema, relation.ref.name),
                self._is_tenants(self.base.tenancy.column),
            )
            if await self.target.bounded(EXISTS_TIMEOUT_S, query):
                found.append(relation.ref)
        return tuple(found)

    async def _differences(self) -> tuple[str, ...]:
        if self.base.fresh:
            return ()
        mine = await fingerprint(self.source.conn, self.base.schemas)
        theirs = await fingerprint(self.target.conn, {name: name for name in self.base.schemas.values()})
        return tuple(map(str, differences(mine, theirs)))

    def _references(self) -> list[ForeignKey]:
        """Foreign keys from moved tables to tables that are not moved."""
        moved = {r.ref for r in self._tenant_tables(self.base.source)}
        return [k for k in self.base.source.foreign_keys if k.child in moved and k.parent not in moved]

    async def _parents_outside(self) -> Mapping[TableRef, frozenset[str]]:
        """Of every tenant table, also of one that our role may not read."""
        moved = {r.ref for r in self.base.source.relations if self.base.is_tenant_table(r)}
        keys = [k for k in self.base.source.foreign_keys if k.child in moved and k.parent not in moved]
        parents = sorted({self.base.mapped(key.parent) for key in keys})
        return await catalog.existing_tables(self.target.conn, parents)

    async def _missing_references(self, there: Mapping[TableRef, frozenset[str]]) -> tuple[Dangling, ...]:
        found = []
        for key in self._references():
            parent = self.base.mapped(key.parent)
            if parent in there and "SELECT" not in there[parent]:
                continue  # refused by that name
            check = self._missing_in if parent in there else self._referenced
            count = await check(key)
            if count != 0:
                found.append(Dangling(key, count))
        return tuple(found)

    def _referenced_values(self, key: ForeignKey) -> sql.Composed:
        columns = [sql.Identifier(c) for c in key.child_columns]
        given = [sql.SQL("{} IS NOT NULL").format(c) for c in columns]
        return sql.SQL("SELECT DISTINCT {} FROM {} WHERE {}").format(
            sql.SQL(", ").join(columns),
            sql.Identifier(key.child.schema, key.child.name),
            sql.SQL(" AND ").join([self._is_tenants(self.base.tenancy.column), *given]),
        )

    async def _referenced(self, key: ForeignKey) -> int | None:
        query = sql.SQL("SELECT count(*) FROM ({}) AS referenced").format(self._referenced_values(key))
        return await self.source.bounded(CROSS_CHECK_TIMEOUT_S, query)

    async def _missing_in(self, key: ForeignKey) -> int | None:
        parent = self.base.mapped(key.parent)
        table = sql.Identifier(parent.schema, parent.name)
        columns = [sql.Identifier(c) for c in key.parent_columns]
        like = sql.SQL("SELECT {} FROM {}").format(_named(columns), table)
        match = [sql.SQL("p.{} = k.{}").format(c, _name(i)) for i, c in enumerate(columns)]
        query = sql.SQL(
            "SELECT count(*) FROM pg_temp.mover_keys k WHERE NOT EXISTS (SELECT FROM {} p WHERE {})"
        ).format(table, sql.SQL(" AND ").join(match))
        return await self._against(self._referenced_values(key), like, query)

    async def _across_tenants(self, *, of_child: bool) -> tuple[Dangling, ...]:
        """Rows that refer across tenants: the tenant's own (`of_child`), or others' to the tenant's."""
        column = self.base.tenancy.column
        moved = {r.ref for r in self._tenant_tables(self.base.source)}
        found = []
        for key in self.base.source.foreign_keys:
            pairs = zip(key.child_columns, key.parent_columns, strict=True)
            if key.child not in moved or key.parent not in moved or (column, column) in pairs:
                continue
            query = _across_query(key, column, self.base.tenant, of_child)
            count = await self.source.bounded(CROSS_CHECK_TIMEOUT_S, query)
            if count != 0:
                found.append(Dangling(key, count))
        return tuple(found)

    async def _collisions(self) -> tuple[Collision, ...]:
        """Unique values of the tenant that other tenants' rows on the target already have."""
        if self.base.fresh or self._same_tables():
            return ()
        found = []
        tables = self._tenant_tables(self.base.source)
        roots = {r.ref: r for r in tables}
        partitions = [
            r
            for r in self.base.source.relations
            if r.root in roots and "SELECT" in r.privileges and not r.row_security
        ]
        for relation in [*tables, *partitions]:
            target = self.base.target.relation(self.base.mapped(relation.ref))
            root = roots.get(relation.root) if relation.root else None
            for index in relation.indexes:
                if root is not None and _has_alike(root, index):
                    continue
                twin = next((i for i in target.indexes if i.name == index.name), None) if target else None
                if target is None or twin is None or self.base.tenancy.column in index.columns:
                    continue
                check = _Unique(relation.ref, target.ref, index, twin)
                count = await self._colliding(check)
                if count != 0:
                    found.append(Collision(target.ref, index.name, count))
        return tuple(found)

    def _same_tables(self) -> bool:
        mine, theirs = self.base.source.server, self.base.target.server
        same = (mine.system_identifier, mine.database) == (theirs.system_identifier, theirs.database)
        return same and all(name == mapped for name, mapped in self.base.schemas.items())

    async def _colliding(self, check: _Unique) -> int | None:
        column = self.base.tenancy.column
        values = _unique_values(check.source, check.index, self._is_tenants(column))
        others = sql.SQL("NOT ({})").format(self._is_tenants(column))
        theirs = _unique_values(check.target, check.twin, others)
        equal = sql.SQL("IS NOT DISTINCT FROM" if check.index.nulls_equal else "=")
        width = range(len(check.index.expressions))
        match = [sql.SQL("t.{0} {1} k.{0}").format(_name(i), equal) for i in width]
        query = sql.SQL("SELECT count(*) FROM ({}) t JOIN pg_temp.mover_keys k ON {}").format(
            theirs, sql.SQL(" AND ").join(match)
        )
        return await self._against(values, theirs, query)

    async def _against(self, values: sql.Composed, like: sql.Composed, query: sql.Composed) -> int | None:
        """Carry `values` from the source into a temporary table made `like` a query, and ask `query`."""
        source, target = self.source.conn, self.target.conn
        with translate(self.target.label):
            await target.execute("DROP TABLE IF EXISTS pg_temp.mover_keys")
            await target.execute(sql.SQL("CREATE TEMPORARY TABLE mover_keys AS {} LIMIT 0").format(like))
        out = sql.SQL("COPY ({}) TO STDOUT").format(values)
        async with _statement_timeout(source, CROSS_CHECK_TIMEOUT_S):
            try:
                async with (
                    source.cursor().copy(out) as reading,
                    target.cursor().copy("COPY pg_temp.mover_keys FROM STDIN") as writing,
                ):
                    async for data in reading:
                        await writing.write(data)
            except errors.QueryCanceled:
                return None
        with translate(self.target.label):
            await target.execute("ANALYZE pg_temp.mover_keys")
        return await self.target.bounded(CROSS_CHECK_TIMEOUT_S, query)


@dataclass(frozen=True, slots=True)
class _Unique:
    """A unique index on both sides."""

    source: TableRef
    target: TableRef
    index: IndexFacts
    twin: IndexFacts


def _has_alike(root: Relation, index: IndexFacts) -> bool:
    """Whether a partition's index is one of the whole table's, most likely."""
    values = (index.expressions, index.predicate)
    return values in [(whole.expressions, whole.predicate) for whole in root.indexes]


def _name(position: int) -> sql.Identifier:
    return sql.Identifier(f"k{position}")


def _named(values: list[sql.Identifier] | list[sql.SQL]) -> sql.Composed:
    return sql.SQL(", ").join(sql.SQL("{} AS {}").format(v, _name(i)) for i, v in enumerate(values))


def _deparsed(text: str) -> sql.SQL:
    """An expression as the server itself wrote it."""
    return sql.SQL(text)


def _unique_values(table: TableRef, index: IndexFacts, condition: sql.Composed) -> sql.Composed:
    where: list[sql.Composable] = [condition]
    if index.predicate is not None:
        where.append(sql.SQL("({})").format(_deparsed(index.predicate)))
    return sql.SQL("SELECT {} FROM {} WHERE {}").format(
        _named([_deparsed(e) for e in index.expressions]),
        sql.Identifier(table.schema, table.name),
        sql.SQL(" AND ").join(where),
    )


def _across_query(key: ForeignKey, column: str, tenant: TenantId, of_child: bool) -> sql.Composed:
    match = [
        sql.SQL("c.{} = p.{}").format(sql.Identifier(child), sql.Identifier(parent))
        for child, parent in zip(key.child_columns, key.parent_columns, strict=True)
    ]
    mine, others = ("c", "p") if of_child else ("p", "c")
    return sql.SQL("SELECT count(*) FROM {} c JOIN {} p ON {} WHERE {} = {tenant} AND {} <> {tenant}").format(
        sql.Identifier(key.child.schema, key.child.name),
        sql.Identifier(key.parent.schema, key.parent.name),
        sql.SQL(" AND ").join(match),
        sql.Identifier(mine, column),
        sql.Identifier(others, column),
        tenant=sql.Literal(str(tenant)),
    )


@asynccontextmanager
async def _statement_timeout(conn: Connection, seconds: float) -> AsyncIterator[None]:
    await conn.execute("SELECT set_config('statement_timeout', %s, false)", (f"{seconds * 1000:.0f}ms",))
    try:
        yield
    finally:
        await conn.execute("SELECT set_config('statement_timeout', '0', false)")
