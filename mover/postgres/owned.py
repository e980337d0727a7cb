"""Rows that are the tenant's by foreign keys, on the target: which are there, and reading them again.

Locks: ROW EXCLUSIVE on the tables and the rows themselves. Part of an apply transaction, and safe to
repeat as that is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from mover.core.copying import CopiedRanges, Key
from mover.core.copytext import decode_row
from mover.core.ids import Side, TableRef, TenantId
from mover.core.membership import Questions, Reference, Values, owned_through
from mover.core.presence import Missing
from mover.core.tables import Holding, MovedTable
from mover.ports import ConsistentPoint
from mover.postgres import holdings, ranges

VALUES_PER_QUERY = 5_000
Connection = psycopg.AsyncConnection[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class OwnedRows:
    """`tables` are the owned ones and those that own them; `copied` says what is there of each."""

    tables: Mapping[TableRef, MovedTable]
    tenant: TenantId
    copied: Callable[[TableRef], CopiedRanges]
    touch: Callable[[TableRef, Collection[Key]], None]

    async def known(self, conn: Connection, asked: Questions) -> tuple[dict[TableRef, set[Key]], Values]:
        """Of the keys and values asked for, those that rows of the tenant have."""
        keys = {
            table: await self.there(
                conn, self.tables[table], self.tables[table].key, list(found), holdings.is_not_others
            )
            for table, found in asked.keys.items()
        }
        values = {
            (table, names): await self.there(
                conn, self.tables[table], names, list(found), holdings.is_tenants
            )
            for (table, names), found in asked.values.items()
        }
        return keys, values

    def concerns(self, reference: Reference) -> bool:
        """Whether any rows that refer to these columns are there."""
        return any(
            not self.copied(t.source).nothing for t, _ in owned_through(self.tables.values(), reference)
        )

    def below(self, table: TableRef) -> list[TableRef]:
        """The tables whose rows are the tenant's by those of `table`, the furthest first."""
        below: list[TableRef] = []
        for child in self.tables.values():
            if any(owner.source == table for owner in child.owners):
                below += [*self.below(child.source), child.source]
        return list(dict.fromkeys(below))

    async def read_again(self, conn: Connection, point: ConsistentPoint, rehomed: Values) -> None:
        """All that refers to the given rows, and what refers to that: as the point sees it."""
        removed = await self.remove_below(conn, rehomed)
        for wanted in (rehomed, removed):  # of what was removed, some may be the tenant's by another owner
            await self.fetch_below(conn, point, wanted)

    async def remove_below(self, conn: Connection, rehomed: Values) -> Values:
        """All that refers to the given rows, and what refers to that; to which of these rows was referred."""
        removed: Values = {}
        await self._remove(conn, rehomed, removed)
        return removed

    async def keys_below(self, conn: Connection, point: ConsistentPoint, rehomed: Values) -> Missing:
        """The keys of all that refers to the given rows, and what refers to that: here or at the point."""
        keys: Missing = {}
        known: Values = {}
        while rehomed:
            further: Values = {}
            for table, names, values in self._there_through(rehomed):
                rows = await self._found(conn, table, names, values)
                rows |= await self._found_at(point, table, names, values)
                keys.setdefault(table.source, set()).update(_keys(table, rows))
                for reference, found in _referenced(table, rows).items():
                    further.setdefault(reference, set()).update(found)
            for reference, values in rehomed.items():
                known.setdefault(reference, set()).update(values)
            new = {reference: found - known.get(reference, set()) for reference, found in further.items()}
            rehomed = {reference: found for reference, found in new.items() if found}
        return keys

    async def left_behind(self, conn: Connection, left: Values) -> Values:
        """Those of the values to which rows refer that went with a row of the tenant, which may be another
        tenant's by now."""
        found: Values = {}
        for reference, values in left.items():
            for table, names, _ in self._there_through({reference: values}):
                if await self._found(conn, table, names, values):
                    found.setdefault(reference, set()).update(values)
        return found

    async def _remove(self, conn: Connection, rehomed: Values, removed: Values) -> None:
        """The furthest first, so that no row is left that refers to nothing; notes what was referred to."""
        for table, names, values in self._there_through(rehomed):
            rows = await self._found(conn, table, names, values)
            below = _referenced(table, rows)
            for reference, found in below.items():
                removed.setdefault(reference, set()).update(found)
            await self._remove(conn, below, removed)
            await self.remove(conn, table, names, values)
            self.touch(table.source, _keys(table, rows))

    async def fetch_below(self, conn: Connection, point: ConsistentPoint, rehomed: Values) -> None:
        """The same as the point sees it."""
        for table, names, values in self._there_through(rehomed):
            came = await self._found(conn, table, names, values)  # by another of its owners
            await self._remove(conn, _referenced(table, came), {})
            await self.remove(conn, table, names, values)
            await self.fetch(conn, point, table, names, values)
            rows = await self._found(conn, table, names, values)
            self.touch(table.source, _keys(table, rows))
            await self.fetch_below(conn, point, _referenced(table, rows))

    def _there_through(self, rehomed: Values) -> Iterator[tuple[MovedTable, Sequence[str], set[Key]]]:
        """The tables that refer to the given rows, the columns by which, and what stands in them."""
        for reference, values in rehomed.items():
            for table, owner in owned_through(self.tables.values(), reference):
                if values and not self.copied(table.source).nothing:
                    yield table, owner.columns, values

    async def fetch(
        self,
        conn: Connection,
        point: ConsistentPoint,
        table: MovedTable,
        names: Sequence[str],
        values: Collection[Key],
    ) -> None:
        """Copy the rows that have these values from the point; they must not be there."""
        statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
            holdings.named(table.target), ranges.columns(table.copied)
        )
        copied = self.copied(table.source)
        async with (
            aclosing(point.rows(table, self.tenant, names, values, copied)) as blocks,
            conn.cursor() as cursor,
            cursor.copy(statement) as copy,
        ):
            async for block in blocks:
                await copy.write(block)

    async def remove(
        self, conn: Connection, table: MovedTable, names: Sequence[str], values: Collection[Key]
    ) -> None:
        """The tenant's rows that have these values."""
        await self._each(conn, _DELETE, table, names, values)

    async def there(
        self,
        conn: Connection,
        table: MovedTable,
        names: tuple[str, ...],
        values: list[Key],
        condition: Callable[[Holding, str, TenantId], sql.Composed],
    ) -> set[Key]:
        """Those of `values` that rows which meet the condition have in the columns `names`."""
        columns = table.named(names)
        statement = sql.SQL(
            "SELECT {n} FROM (SELECT n AS {n}, {} FROM {}) AS s JOIN {} AS t ON ({}) = ({}) WHERE {}"
        ).format(
            ranges.unnested(columns, Side.TARGET),
            ranges.unnest([sql.SQL("${}").format(sql.Literal(n)) for n, _ in enumerate(names, start=1)]),
            holdings.named(table.target),
            ranges.columns(columns, "s"),
            ranges.columns(columns, "t"),
            condition(table.holding(Side.TARGET), "t", self.tenant),
            n=sql.Identifier(table.spare("mover_n")),
        )
        async with psycopg.AsyncRawCursor(conn) as cursor:
            await cursor.execute(statement, [list(column) for column in zip(*values, strict=True)])
            return {values[number - 1] for (number,) in await cursor.fetchall()}

    async def _found(
        self, conn: Connection, table: MovedTable, names: Sequence[str], values: Collection[Key]
    ) -> set[Key]:
        """The keys of rows that have these values, each with the values by which others refer to it."""
        return set(await self._each(conn, _FIND, table, names, values))

    async def _found_at(
        self, point: ConsistentPoint, table: MovedTable, names: Sequence[str], values: Collection[Key]
    ) -> set[Key]:
        """The same of the rows that the point sees."""
        places = {column.name: at for at, column in enumerate(table.copied)}
        shown = [places[name] for name in table.shown]
        found: set[Key] = set()
        copied = self.copied(table.source)
        async for block in point.rows(table, self.tenant, names, values, copied):
            for line in block.splitlines():  # a row is never cut
                row = decode_row(line)
                values_shown = [row[at] for at in shown]  # never NULL
                found.add(tuple(value.decode() for value in values_shown if isinstance(value, bytes)))
        return found

    async def _each(
        self,
        conn: Connection,
        statement: sql.SQL,
        table: MovedTable,
        names: Sequence[str],
        values: Collection[Key],
    ) -> list[Key]:
        ordered, found = sorted(values), list[Key]()
        parts = {
            "table": holdings.named(table.target),
            "tenants": holdings.is_not_others(table.holding(Side.TARGET), "t", self.tenant),
            "shown": sql.SQL(", ").join(
                sql.SQL("{}::text").format(sql.Identifier("t", n)) for n in table.shown
            ),
        }
        for start in range(0, len(ordered), VALUES_PER_QUERY):
            some = ordered[start : start + VALUES_PER_QUERY]
            chosen = ranges.in_values("t", table.named(names), some, Side.TARGET)
            cursor = await conn.execute(statement.format(chosen=chosen, **parts))
            if cursor.description is not None:
                found += await cursor.fetchall()
        return found


def _keys(table: MovedTable, rows: Iterable[Key]) -> list[Key]:
    return [row[: len(table.key)] for row in rows]


def _referenced(table: MovedTable, rows: Collection[Key]) -> Values:
    at, values = len(table.key), Values()
    for names in table.referenced:
        values[table.source, names] = {row[at : at + len(names)] for row in rows}
        at += len(names)
    return values


_DELETE = sql.SQL("DELETE FROM {table} AS t WHERE {chosen} AND {tenants}")
_FIND = sql.SQL("SELECT {shown} FROM {table} AS t WHERE {chosen} AND {tenants}")
