"""One transaction on a target where foreign keys, and their actions, are in force on what we write.

> Outside a transaction the target is the source at some snapshot, and no foreign key's action on the target
> has an effect that the source did not have.

In source order an action does here what it did there. Rows that come to the tenant, or leave it, without
being made or deleted have no such order: they are read at a consistent point, with what hangs on them, and so
is all that changes behind them. What is the same on both sides is never removed; parents come first, and what
goes does so last, when no row that stays refers to it any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from itertools import groupby, pairwise
from typing import TypeVar

import psycopg
from psycopg import sql

from mover.core.changes import (
    Change,
    Delete,
    Insert,
    OwnerChange,
    RowChange,
    Seen,
    Truncated,
    Update,
    Value,
    kinds,
)
from mover.core.copying import Key
from mover.core.errors import ApplyConflict, Where
from mover.core.ids import Side, TableRef
from mover.core.membership import Membership, referred_to
from mover.core.presence import Missing, keys_of
from mover.ports import ChangesSince, ConsistentPoint
from mover.postgres import holdings, ranges, roles
from mover.postgres.again import ReadAgain, RowsToSettle
from mover.postgres.apply import Connection
from mover.postgres.connect import Identity
from mover.postgres.moved import MovedTables
from mover.postgres.settle import Settling

Kind = TypeVar("Kind", Delete, Insert)


class Checked(Settling):
    """Implements ports.ApplyTransaction."""

    # What hangs on rows that change or go stays, until it is its turn.
    _is_there = staticmethod(holdings.is_tenants_or_left)

    def __init__(
        self, tables: MovedTables, conn: Connection, identity: Identity, forces: roles.Forces
    ) -> None:
        super().__init__(tables, conn, identity)
        self._forces = forces
        self._acting: dict[TableRef, list[roles.ActingKey]] = {}
        self._left: list[RowChange] = []  # to the point, of tables without a key

    async def apply(self, changes: Sequence[Change], ends: Sequence[int] = ()) -> None:
        await self._forces.leave_out(self._tables.target_tables(changes))
        if len(ends) > 1 and await self._tried(self._apply(changes)):
            return
        # What each transaction of the source needs to get past the foreign keys may not fit the others.
        for begin, end in pairwise([0, *ends] if ends else [0, len(changes)]):
            part = changes[begin:end]
            if not await self._tried(self._apply(part)):
                await self._forces.postpone_checks()
                await self._apply_or_leave(part)

    async def _apply_or_leave(self, changes: Sequence[Change]) -> None:
        """A row may give its values up to another tenant's in the same statement: what refers to them stays
        there, and goes from here only when it is known whose it is."""
        try:
            async with self._conn.transaction():  # a savepoint
                await self._apply(changes)
        except psycopg.errors.ForeignKeyViolation:
            await self._leave(changes)

    async def _apply(self, changes: Sequence[Change]) -> None:
        if not self.is_missing_rows:
            try:
                # A savepoint: all of it is left to the point, or nothing.
                async with self._conn.transaction():
                    await super()._apply(changes)
                    if not self.is_missing_rows:
                        return
                    # What was left behind could not be told from nobody's rows any more.
                    raise _AtThePoint
            except _AtThePoint:
                pass
        await self._leave(changes)

    async def _tenants(self, changes: list[RowChange | OwnerChange]) -> tuple[list[RowChange], Membership]:
        tenants, membership = await super()._tenants(changes)
        if self.is_missing_rows or membership.has_crossed:
            raise _AtThePoint
        return tenants, membership

    async def _fit(self, changes: list[RowChange]) -> list[RowChange]:
        fitted = await super()._fit(changes)
        if self.is_missing_rows:
            raise _AtThePoint
        return fitted

    async def _leave(self, changes: Sequence[Change]) -> None:
        """To the point: only which rows change is noted, and by what others may refer to them."""
        for part in self._tables.in_parts(changes):
            if isinstance(part, Truncated):
                await self._truncate(part)
                emptied = {part.table, *self._tables.owned.below(part.table)}
                self._left = [c for c in self._left if c.relation.table not in emptied]
                continue
            tenants, membership = await super()._tenants(self._tables.wanted(part))
            for reference, values in membership.left.items():
                self._rehomed.setdefault(reference, set()).update(values)
            for change in tenants:
                self._note(change)

    def _note(self, change: RowChange) -> None:
        ref = change.relation.table
        if ref in self._tables.keyless:
            self._left.append(change)
            return
        self._missing.setdefault(ref, set()).update(keys_of(change, self._key_of))
        for reference, value in referred_to(self._tables.merge(ref).table, change):
            self._rehomed.setdefault(reference, set()).add(value)

    async def fetch_missing(self, point: ConsistentPoint) -> None:
        keys = await self._tables.owned.keys_below(self._conn, point, self._rehomed)
        for ref, found in self._missing.items():
            keys.setdefault(ref, set()).update(found)
        again = ReadAgain(point, self._tables, keys, left=self._left)
        self._missing, self._rehomed, self._left = {}, {}, []
        await self._settle_rows(again)

    async def settle(self, changes: ChangesSince, point: ConsistentPoint) -> Counter[str]:
        await self._forces.leave_out(self._tables.reached(changes.tables))
        return await super().settle(changes, point)

    async def _settle_below(self, changes: ChangesSince, point: ConsistentPoint) -> Counter[str]:
        keys: Missing = {}
        async with aclosing(self._rehomed_by(changes)) as pieces:
            async for rehomed in pieces:
                for ref, found in (await self._tables.owned.keys_below(self._conn, point, rehomed)).items():
                    keys.setdefault(ref, set()).update(found)
        return await self._settle_rows(ReadAgain(point, self._tables, keys, changes))

    async def _settle_rows(self, changes: RowsToSettle) -> Counter[str]:
        """As sets where the rows let it happen; else in whatever order is found."""
        done = Counter[str]()
        if not await self._tried(self._as_they_come(changes, done)):
            done.clear()
            await self._forces.postpone_checks()
            await self._by_trying(changes, done)
        return done

    async def _as_they_come(self, changes: RowsToSettle, done: Counter[str]) -> None:
        gone: list[RowChange] = []
        async with aclosing(self._batches(changes)) as batches:
            async for batch in batches:
                gone += [change for change in batch if isinstance(change, Delete)]
                await self._apply_counted(
                    [change for change in batch if not isinstance(change, Delete)], done
                )
        await self._go(gone, done)

    async def _go(self, gone: Sequence[RowChange], done: Counter[str]) -> None:
        """All at once, children first. The foreign keys' actions must not reach a row that stays."""
        keyless = self._tables.keyless
        await self._apply_counted([c for c in gone if c.relation.table in keyless], done)
        keyed = [change for change in gone if change.relation.table not in keyless]
        for table, keys in (going := self._keys(keyed)).items():
            if await self._is_acted_upon(table, keys, going):
                raise ApplyConflict(f"rows refer to such of {table} as go", where=Where(table=table))
        keyed.sort(key=lambda change: -self._tables.order(change.relation.table))
        await self._apply_counted(keyed, done)

    async def _by_trying(self, changes: RowsToSettle, done: Counter[str]) -> None:
        """Table by table, and less at a time where that does not do; what cannot happen yet again behind the
        others, until none is left.

        What goes waits until all else has happened. Only what nothing hangs on may go before, to make room:
        a foreign key's action would take rows that are to move elsewhere, and with these others, which did
        not change and would not come back."""
        whole: list[RowChange] = []
        async with aclosing(changes.whole_rows(self._tables.all_copied)) as wholes:
            async for batch in wholes:
                whole += batch
        left: list[Seen] = []
        async with aclosing(changes.rows(self._tables.all_copied)) as found:
            async for rows in found:
                left = await self._try_each([*left, *rows], done, going=False)
        while left or whole:
            before = len(left) + len(whole)
            whole = [c for c in whole if not await self._tried(self._apply_counted([c], done))]
            left = await self._try_each(left, done, going=False)
            if len(left) + len(whole) == before:
                left = await self._try_each(left, done, going=True)
            if len(left) + len(whole) == before:
                left = await self._try_in_place(left, done)
            if len(left) + len(whole) == before:
                left = await self._try_together(left, done)
            if len(left) + len(whole) == before and not await self._make_room(left):
                table = left[0].relation.table if left else whole[0].relation.table
                raise ApplyConflict(
                    f"{before} changes, the first of {table}, fit in no order: values that are unique"
                    " changed places between rows, or rows refer to other tenants' rows",
                    where=Where(table=table),
                    hint="Correct such references, and resume to try again; where it comes back, let the role"
                    " set session_replication_role on the target.",
                )

    async def _try_each(self, rows: list[Seen], done: Counter[str], *, going: bool) -> list[Seen]:
        """Those that are left: of those that go, children first, or of the others."""
        left: list[Seen] = []
        found = list(zip(rows, await self._as_changes(rows), strict=True))
        found.sort(key=lambda pair: self._tables.order(pair[0].relation.table), reverse=going)
        for _, group in groupby(found, lambda pair: pair[0].relation.table):
            waiting = [(seen, change) for seen, change in group if change is not None]
            left += [seen for seen, change in waiting if isinstance(change, Delete) is not going]
            turn = [(seen, change) for seen, change in waiting if isinstance(change, Delete) is going]
            left += await self._try_turn(turn, done)
        return left

    async def _try_turn(self, turn: list[tuple[Seen, RowChange]], done: Counter[str]) -> list[Seen]:
        """All at once, or else each half in the same way, down to what cannot happen by itself."""
        if not turn or await self._happen([change for _, change in turn], done):
            return []
        if len(turn) == 1:
            return [turn[0][0]]
        if await self._exchange([change for _, change in turn], done):
            return []
        middle = len(turn) // 2
        first = await self._try_turn(turn[:middle], done)
        return first + await self._try_turn(turn[middle:], done)

    async def _exchange(self, changes: list[RowChange], done: Counter[str]) -> bool:
        """Rows on which nothing hangs may pass unique values on among themselves, in circles even: they all
        go, and come as they were seen."""
        updates = [change for change in changes if isinstance(change, Update)]
        gone: list[RowChange] = [Delete(change.relation, change.new) for change in updates]
        for table, keys in self._keys(gone).items():
            if await self._is_acted_upon(table, keys, {}):
                return False
        come: list[RowChange] = [Insert(c.relation, c.new) if isinstance(c, Update) else c for c in changes]

        async def go_and_come() -> None:
            await self._apply_part(gone)
            await self._apply_part(come)

        if not updates or not await self._tried(go_and_come()):
            return False
        done.update(kinds(changes))
        return True

    async def _try_together(self, rows: list[Seen], done: Counter[str]) -> list[Seen]:
        """All that go, as they may refer to each other; those that are left."""
        changes = await self._as_changes(rows)
        if not await self._tried(self._go(_of(Delete, changes), done)):
            return rows
        return [seen for seen, change in zip(rows, changes, strict=True) if not isinstance(change, Delete)]

    async def _happen(self, changes: list[RowChange], done: Counter[str]) -> bool:
        """Changes of one table, that go or that do not, all of them; otherwise none."""
        for table, keys in (going := self._keys(_of(Delete, changes))).items():
            if await self._is_acted_upon(table, keys, going):
                return False
        return await self._tried(self._apply_counted(changes, done))

    async def _try_in_place(self, rows: list[Seen], done: Counter[str]) -> list[Seen]:
        """A row that comes may need unique values of one that goes, on which others hang until it is there:
        it takes its place, and they stay or follow as their foreign keys say. Those that are left."""
        changes = await self._as_changes(rows)
        going = {(c.relation.table, self._key_of(c.relation, c.old)): c for c in _of(Delete, changes)}
        for new in _of(Insert, changes):
            ref = new.relation.table
            if ref in self._tables.moves_by_copy:
                continue
            for key in await self._in_the_way(new, {key for table, key in going if table == ref}):
                change = Update(new.relation, going[ref, key].old, new.new)
                if await self._tried(self._take_place(change, rows, _surplus(changes), done)):
                    return [seen for seen, c in zip(rows, changes, strict=True) if c is not new]
        return rows

    async def _in_the_way(self, new: Insert, going: set[Key]) -> list[Key]:
        """Those that are `going` and have unique values of the new row."""
        ref, table = new.relation.table, self._tables.merge(new.relation.table).table
        values = dict(zip(self._tables.layout(new.relation).names, new.new, strict=True))
        same = [
            sql.SQL("({})").format(ranges.in_values("t", table.named(names), [value], Side.TARGET))
            for names in await roles.unique_columns(self._conn, table.target)
            if len(value := _texts(values.get(name) for name in names)) == len(names)
        ]
        if not going or not same:
            return []
        query = sql.SQL("SELECT {} FROM {} AS t WHERE {} AND ({})").format(
            sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier("t", name)) for name in table.key),
            sql.Identifier(table.target.schema, table.target.name),
            self._are_among("t", ref, going),
            sql.SQL(" OR ").join(same),
        )
        return await (await self._conn.execute(query)).fetchall()

    async def _take_place(
        self, change: Update, rows: list[Seen], surplus: Counter[TableRef], done: Counter[str]
    ) -> None:
        """No row that goes may follow under a key by which nobody knows that it does."""
        await self._apply_part([change])
        if _surplus(await self._as_changes(rows)) != surplus:
            raise ApplyConflict("rows would follow that have to go", where=Where(table=change.relation.table))
        done.update(kinds([change]))

    async def _make_room(self, rows: list[Seen]) -> bool:
        """Rows pass unique values on in a circle: one on which nothing hangs goes, until the others are as
        they were seen."""
        for change in await self._as_changes(rows):
            if isinstance(change, Update):
                gone, ref = Delete(change.relation, change.new), change.relation.table
                if await self._is_acted_upon(ref, self._keys([gone])[ref], {}):
                    continue
                if await self._tried(self._apply_part([gone])):
                    return True
        return False

    def _keys(self, changes: Sequence[RowChange]) -> Missing:
        keys: Missing = {}
        for change in changes:
            keys.setdefault(change.relation.table, set()).update(keys_of(change, self._key_of))
        return keys

    async def _is_acted_upon(self, ref: TableRef, keys: set[Key], going: Mapping[TableRef, set[Key]]) -> bool:
        """Whether foreign keys would act on other rows, but those `going`, if the rows with `keys` went."""
        target = self._tables.merge(ref).table.target
        if ref not in self._acting:
            self._acting[ref] = await roles.acting_keys(self._conn, target)
        spared = {
            self._tables.merge(table).table.target: self._are_among("c", table, also)
            for table, also in going.items()
        }
        chosen = self._are_among("t", ref, keys)
        return await roles.acted_upon(self._conn, target, self._acting[ref], chosen, spared)

    def _are_among(self, alias: str, ref: TableRef, keys: set[Key]) -> sql.Composed:
        return ranges.in_values(alias, self._tables.merge(ref).table.key_columns, keys, Side.TARGET)


def _surplus(changes: Sequence[RowChange | None]) -> Counter[TableRef]:
    """How many more rows of each table go than come."""
    surplus = Counter[TableRef]()
    for change in changes:
        if change is not None and not isinstance(change, Update):
            surplus[change.relation.table] += 1 if isinstance(change, Delete) else -1
    return surplus


def _of(kind: type[Kind], changes: Sequence[RowChange | None]) -> list[Kind]:
    return [change for change in changes if isinstance(change, kind)]


def _texts(values: Iterable[Value]) -> Key:
    return tuple(value.decode() for value in values if isinstance(value, bytes))


class _AtThePoint(Exception):
    """What the changes mean here is known only at a consistent point."""
