"""Gathers everything that preflight judges, from both servers. Changes nothing but temporary tables.

Each count over rows is bounded by a statement timeout: what could not be counted in time is reported as
unknown, never waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cached_property

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
from mover.core.ids import Capture, Side, TableRef, TenantId
from mover.core.migration import Place
from mover.core.ownership import Ownership, find_ownership
from mover.core.tables import Holding, ties
from mover.postgres import catalog, holdings
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
    capture: Capture | None = None,
) -> Facts:
    """`capture` is how an operator wants changes to be followed.

    Raises Unreachable or Refused when a server cannot be read at all."""
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
        base = Facts(tenant, tenancy, schemas, sides[0], sides[1], wanted, capture)
        return await _Gathering(_Server(ours, source.label), base, _Server(theirs, target.label)).run()


async def gather_references(source: Database, base: Facts, *, of_tenant: bool = True) -> Facts:
    """`base` with the rows that refer across tenants now; the tenant's own only if `of_tenant`."""
    async with source.connect("references") as conn:
        reading = _Reading(_Server(conn, source.label), base)
        return replace(
            base,
            foreign_children=await reading.across_tenants(of_child=False),
            foreign_parents=await reading.across_tenants(of_child=True) if of_tenant else (),
        )


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
class _Reading:
    """The checks that read rows of the source only."""

    source: _Server
    base: Facts

    @cached_property
    def _ownership(self) -> Ownership:
        return find_ownership(self.base)

    @cached_property
    def _readable(self) -> list[Relation]:
        """The source's tables whose rows move and can be looked at."""
        readable = {r.ref: r for r in self.base.source.relations if self._is_readable(r)}
        for table, keys in self._ownership.keys.items():  # owners come first
            if not all(key.parent in readable for key in keys):
                readable.pop(table, None)
        return list(readable.values())

    def _is_readable(self, relation: Relation) -> bool:
        column = relation.column(self.base.tenancy.column)
        elsewhere = {r.root for r in self.base.source.relations if r.kind == "f"}  # another server's
        is_tenants = self.base.is_tenant_table(relation) and column is not None and column.can_name_tenants
        return (
            (is_tenants or relation.ref in self._ownership.keys)
            and relation.ref not in elsewhere
            and "SELECT" in relation.privileges
            and not relation.row_security
        )

    def _is_tenants(self, table: TableRef, alias: str, side: Side = Side.SOURCE) -> sql.Composed:
        """The condition for rows of the source's `table`, or its twin on the target."""
        column = self.base.tenancy.column
        owners = self._ownership.owners(table, self.base.mapped, column)
        there = table if side is Side.SOURCE else self.base.mapped(table)
        holding = Holding(there, None if owners else column, ties(owners, side))
        return holdings.is_tenants(holding, alias, self.base.tenant)

    async def across_tenants(self, *, of_child: bool) -> tuple[Dangling, ...]:
        """Rows that refer across tenants: the tenant's own (`of_child`), or others' to the tenant's."""
        column = self.base.tenancy.column
        readable = {r.ref for r in self._readable}
        found = []
        for key in self.base.source.foreign_keys:
            pairs = zip(key.child_columns, key.parent_columns, strict=True)
            is_owner = self._ownership.keys.get(key.child) == (key,)
            if not {key.child, key.parent} <= readable or (column, column) in pairs or is_owner:
                continue
            mine, others = ("c", "p") if of_child else ("p", "c")
            tables = {"c": key.child, "p": key.parent}
            query = _across_query(
                self._joined(key),
                key,
                self._is_tenants(tables[mine], mine),
                self._is_tenants(tables[others], others),
            )
            count = await self.source.bounded(CROSS_CHECK_TIMEOUT_S, query)
            if count != 0:
                found.append(Dangling(key, count))
        return tuple(found)

    def _joined(self, key: ForeignKey) -> sql.Composed:
        """The rows `c` that refer to the rows `p`."""
        relations = (self.base.source.relation(key.child), self.base.source.relation(key.parent))
        equal = []
        for child, parent in zip(key.child_columns, key.parent_columns, strict=True):
            mine, theirs = (r and r.column(name) for r, name in zip(relations, (child, parent), strict=True))
            apart = mine and theirs and mine.is_collated_apart(theirs)
            by = (
                sql.SQL("COLLATE {} ").format(_deparsed(theirs.collation))
                if apart and theirs
                else sql.SQL("")
            )
            equal.append(sql.SQL("c.{} {}= p.{}").format(sql.Identifier(child), by, sql.Identifier(parent)))
        return sql.SQL(" AND ").join(equal)


@dataclass
class _Gathering(_Reading):
    """The checks that read rows, on one connection a side."""

    target: _Server

    async def run(self) -> Facts:
        outside = await self._parents_outside()
        return replace(
            self.base,
            rows={r.ref: await self._rows(r.ref) for r in self._readable},
            target_tenant_tables=await self._target_tenant_tables(),
            parents_outside=outside,
            differences=await self._differences(),
            missing_references=await self._missing_references(outside),
            foreign_children=await self.across_tenants(of_child=False),
            foreign_parents=await self.across_tenants(of_child=True),
            collisions=await self._collisions(),
            orphans=await self._orphans(),
        )

    @cached_property
    def _moved(self) -> frozenset[TableRef]:
        """Also those that our role may not read."""
        tenants = {r.ref for r in self.base.source.relations if self.base.is_tenant_table(r)}
        return frozenset(tenants | self._ownership.keys.keys())

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
        where = sql.SQL("FROM {} AS t WHERE {}").format(holdings.named(table), self._is_tenants(table, "t"))
        counted = await self.source.bounded(COUNT_TIMEOUT_S, sql.SQL("SELECT count(*) {}").format(where))
        number = counted
        if number is None and table in self._ownership.keys:
            number = await self._planned_rows(where)
        elif number is None:
            number = round(size["tuples"] * size["share"]) if size["share"] is not None else 0
        exists = bool(number)
        if counted is None:
            query = sql.SQL("SELECT (SELECT true {} LIMIT 1) IS NOT NULL").format(where)
            answer = await self.source.bounded(EXISTS_TIMEOUT_S, query)
            exists = bool(answer) if answer is not None else True
        tuples = max(size["tuples"], number, 1)
        return Rows(number, round(size["bytes"] * number / tuples), counted is not None, exists)

    async def _planned_rows(self, where: sql.Composed) -> int:
        """What the source's planner expects."""
        with translate(self.source.label):
            cursor = await self.source.conn.execute(sql.SQL("EXPLAIN (FORMAT JSON) SELECT {}").format(where))
            row = await cursor.fetchone()
        assert row is not None
        return int(row[0][0]["Plan"]["Plan Rows"])

    async def _target_tenant_tables(self) -> tuple[TableRef, ...]:
        """Rows of an owned table are nobody's without those of its owners."""
        found = []
        for ref in (r.ref for r in self._readable if r.ref not in self._ownership.keys):
            relation = self.base.target.relation(self.base.mapped(ref))
            if relation is None or "SELECT" not in relation.privileges or relation.row_security:
                continue
            query = sql.SQL("SELECT (SELECT true FROM {} AS t WHERE {} LIMIT 1) IS NOT NULL").format(
                holdings.named(relation.ref), self._is_tenants(ref, "t", Side.TARGET)
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
        readable = {r.ref for r in self._readable}
        keys = self.base.source.foreign_keys
        return [k for k in keys if k.child in readable and k.parent not in self._moved]

    async def _parents_outside(self) -> Mapping[TableRef, frozenset[str]]:
        """Of every moved table, also of one that our role may not read."""
        moved = self._moved
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
        return sql.SQL("SELECT DISTINCT {} FROM {} AS t WHERE {}").format(
            sql.SQL(", ").join(columns),
            holdings.named(key.child),
            sql.SQL(" AND ").join([self._is_tenants(key.child, "t"), *given]),
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

    async def _orphans(self) -> Mapping[TableRef, int | None]:
        """Rows of owned tables that refer to none of their owners."""
        found = {}
        readable = {r.ref: r for r in self._readable}
        for table, keys in self._ownership.keys.items():
            relation = readable.get(table)
            if relation is None or set(keys[0].child_columns) <= relation.not_null:
                continue
            nothing = (
                sql.SQL("({}) IS NOT TRUE").format(
                    sql.SQL(" AND ").join(
                        sql.SQL("{} IS NOT NULL").format(sql.Identifier(c)) for c in key.child_columns
                    )
                )
                for key in keys
            )
            query = sql.SQL("SELECT count(*) FROM {} WHERE {}").format(
                holdings.named(table), sql.SQL(" AND ").join(nothing)
            )
            count = await self.source.bounded(CROSS_CHECK_TIMEOUT_S, query)
            if count != 0:
                found[table] = count
        return found

    async def _collisions(self) -> tuple[Collision, ...]:
        """Unique values of the tenant that other tenants' rows on the target already have."""
        if self.base.fresh or self._same_tables():
            return ()
        found = []
        roots = {r.ref: r for r in self._readable}
        partitions = [
            r
            for r in self.base.source.relations
            if r.root in roots and "SELECT" in r.privileges and not r.row_security
        ]
        for relation in [*self._readable, *partitions]:
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
        values = _unique_values(check.source, check.index, self._is_tenants(check.source, "t"))
        others = sql.SQL("NOT ({})").format(self._is_tenants(check.source, "t", Side.TARGET))
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
    return sql.SQL("SELECT {} FROM {} AS t WHERE {}").format(
        _named([_deparsed(e) for e in index.expressions]),
        sql.Identifier(table.schema, table.name),
        sql.SQL(" AND ").join(where),
    )


def _across_query(
    joined: sql.Composed, key: ForeignKey, mine: sql.Composed, others: sql.Composed
) -> sql.Composed:
    return sql.SQL("SELECT count(*) FROM {} c JOIN {} p ON {} WHERE {} AND NOT ({})").format(
        holdings.named(key.child), holdings.named(key.parent), joined, mine, others
    )


@asynccontextmanager
async def _statement_timeout(conn: Connection, seconds: float) -> AsyncIterator[None]:
    await conn.execute("SELECT set_config('statement_timeout', %s, false)", (f"{seconds * 1000:.0f}ms",))
    try:
        yield
    finally:
        await conn.execute("SELECT set_config('statement_timeout', '0', false)")
