"""Brings the target's rows to what a point of the source sees of them, with capture by triggers.

All that is known of a row is how it is now, so that changes have no order of their own: any will do that the
target's constraints allow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from mover.core.changes import Delete, Insert, RowChange, Seen, Truncated, Update, kinds
from mover.core.copying import Key
from mover.core.ids import TableRef
from mover.core.membership import Values
from mover.ports import ChangesSince, ConsistentPoint
from mover.postgres import holdings
from mover.postgres.again import RowsToSettle
from mover.postgres.apply import Transaction


class Settling(Transaction):
    """Implements ports.ApplyTransaction; the whole of it where changes come from a log."""

    _is_there = staticmethod(holdings.is_tenants)

    async def settle(self, changes: ChangesSince, point: ConsistentPoint) -> Counter[str]:
        done = Counter[str]()
        anew = {t.table for t in changes.truncated if t.table in self._tables.keyless}
        # Children first, for where foreign keys are in force.
        for truncated in sorted(changes.truncated, key=lambda t: -self._tables.order(t.table)):
            await self._truncate(Truncated(truncated.table) if truncated.table in anew else truncated)
            done.update(kinds([truncated]))
        done += await self._settle_below(changes, point)
        for ref in anew:
            await self._copy_anew(ref, point)
        return done

    async def _copy_anew(self, ref: TableRef, point: ConsistentPoint) -> None:
        """Which changes came before a table was emptied nobody can tell where there is no key."""
        table, tenant = self._tables.merge(ref).table, self._tables.tenant
        assert table.tenant_column is not None  # owned tables have a key
        if not self._tables.copied(ref).nothing:
            await self._tables.owned.fetch(self._conn, point, table, (table.tenant_column,), {(str(tenant),)})

    async def _settle_below(self, changes: ChangesSince, point: ConsistentPoint) -> Counter[str]:
        """The changes, and what comes and goes with the rows that have changed."""
        owned = self._tables.owned
        removed: Values = {}
        async with aclosing(self._rehomed_by(changes)) as pieces:
            async for rehomed in pieces:
                for reference, values in (await owned.remove_below(self._conn, rehomed)).items():
                    removed.setdefault(reference, set()).update(values)
        done = await self._settle_rows(changes)
        async with aclosing(self._rehomed_by(changes)) as pieces:
            async for rehomed in pieces:
                await owned.fetch_below(self._conn, point, rehomed)
        await owned.fetch_below(self._conn, point, removed)  # by another owner they may be the tenant's
        return done

    async def _rehomed_by(self, changes: ChangesSince) -> AsyncGenerator[Values]:
        async with aclosing(changes.rehomed()) as pieces:
            async for found in pieces:
                yield {ref: values for ref, values in found.items() if self._tables.owned.concerns(ref)}

    async def _settle_rows(self, changes: RowsToSettle) -> Counter[str]:
        """As sets where the rows let it happen; else everything goes before anything comes, which needs no
        order."""
        done = Counter[str]()
        if not await self._tried(self._as_they_come(changes, done)):
            done.clear()
            await self._anew(changes, done)
        return done

    async def _as_they_come(self, changes: RowsToSettle, done: Counter[str]) -> None:
        async with aclosing(self._batches(changes)) as batches:
            async for batch in batches:
                await self._apply_counted(batch, done)

    async def _anew(self, changes: RowsToSettle, done: Counter[str]) -> None:
        """Values that are unique may have gone from one row to another, in a circle even."""
        async with aclosing(self._batches(changes)) as batches:
            async for batch in batches:
                there = [change for change in batch if not isinstance(change, Insert)]
                gone: list[RowChange] = [
                    c if isinstance(c, Delete) else Delete(c.relation, c.new) for c in there
                ]
                await self._apply_counted(gone, done)
        async with aclosing(self._batches(changes)) as batches:
            async for batch in batches:
                await self._apply_counted([c for c in batch if isinstance(c, (Insert, Update))], done)

    async def _apply_counted(self, changes: list[RowChange], done: Counter[str]) -> None:
        if changes:
            await self._apply_part(changes)
            done.update(kinds(changes))

    async def _batches(self, changes: RowsToSettle) -> AsyncGenerator[list[RowChange]]:
        async with aclosing(changes.whole_rows(self._tables.all_copied)) as wholes:
            async for whole in wholes:
                yield whole
        async with aclosing(changes.rows(self._tables.all_copied)) as found:
            async for seen in found:
                yield [change for change in await self._as_changes(seen) if change is not None]

    async def _as_changes(self, seen: Sequence[Seen]) -> list[RowChange | None]:
        """What has to happen for each row to be there as it was seen, or not to be there; None: nothing."""
        asked: dict[TableRef, list[Key]] = {}
        keys = [self._tables.layout(row.relation).key(row.key) for row in seen]
        for row, key in zip(seen, keys, strict=True):
            asked.setdefault(row.relation.table, []).append(key)
        there = {table: await self._there(table, found) for table, found in asked.items()}
        return [_change(row, key in there[row.relation.table]) for row, key in zip(seen, keys, strict=True)]

    async def _there(self, ref: TableRef, keys: list[Key]) -> set[Key]:
        """Those that are the tenant's on the target: what hangs on rows that are gone has been removed."""
        table = self._tables.merge(ref).table
        return await self._tables.owned.there(self._conn, table, table.key, keys, self._is_there)


def _change(seen: Seen, is_there: bool) -> RowChange | None:
    if seen.row is None:
        return Delete(seen.relation, seen.key) if is_there else None
    return Update(seen.relation, None, seen.row) if is_there else Insert(seen.relation, seen.row)
