"""Sequences of the moved schemas: the target's are set beyond every value the source has given out.

Not just beyond: other tenants go on drawing from the source's, and what the tenant draws on the target comes
to the source on the way back. So the target's begin a gap later, in which the others have room meanwhile.

Implements cutover.ports.Sequences. A sequence is read as it stands (`last_value`, `is_called`): one that
was set by `setval(…, false)` has given out everything before that value, though it was never called.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from mover.core.crash import reach
from mover.core.errors import first_error
from mover.core.ids import TableRef
from mover.core.tables import SequenceRef, Shape
from mover.postgres import owner
from mover.postgres.connect import Database, Identity
from mover.postgres.errors import translate

# How many values that is, and at most which part of what is left.
GAP = 1_000_000
GAP_SHARE = 100

Connection = psycopg.AsyncConnection[Any]


@dataclass(frozen=True, slots=True)
class Position:
    """Where a sequence stands, and where it may go."""

    last_value: int
    is_called: bool
    increment: int
    bound: int  # the last value that it may give out

    @property
    def next(self) -> int:
        return self.last_value + self.increment if self.is_called else self.last_value

    def is_behind(self, other: Position) -> bool:
        """Whether it could give out a value that `other` has given out."""
        return self.next < other.next if other.increment > 0 else self.next > other.next

    def ahead(self, part: int = 1) -> Position:
        """The same, a gap later, or one `part`-th of it; a smaller one where there is little room."""
        room = abs(self.bound - self.last_value) // abs(self.increment) // GAP_SHARE
        steps = self.increment * (min(GAP, room) // part)
        return Position(self.last_value + steps, self.is_called, self.increment, self.bound)


Positions = Mapping[SequenceRef, Position]


class PgSequences:
    """Carries sequence values from source to target; keeps its connections from `get_ready` to `close`."""

    def __init__(self, source: Database, target: Database, shape: Shape, identity: Identity) -> None:
        self._source, self._target, self._shape, self._identity = source, target, shape, identity
        self._open = AsyncExitStack()
        self._connections: tuple[Connection, Connection] | None = None

    async def get_ready(self) -> None:
        """Carries what there is so far, so that nothing is locked under the fence on a target with other
        tenants. What is read there is prepared by then."""
        await self.close()
        source = await self._open.enter_async_context(self._source.connect("sequences"))
        target = await self._open.enter_async_context(
            self._target.connect("sequences", lock_timeout="200ms", synchronous_commit="on")
        )
        self._connections = source, target
        await self._carry()

    async def close(self) -> None:
        self._connections = None
        await self._open.aclose()

    async def carry_over(self) -> None:
        await self._carry()
        reach("cutover.sequences")

    async def _carry(self) -> None:
        if not self._shape.sequences:
            return
        if self._connections is None:
            await self.get_ready()
        assert self._connections is not None
        source, target = self._connections
        with translate(self._target.label), first_error():
            async with asyncio.TaskGroup() as tasks:
                names = self._shape.sequences
                reading_given = tasks.create_task(_positions(source, {s: s.source for s in names}))
                reading_held = tasks.create_task(_positions(target, {s: s.target for s in names}))
            given, held = reading_given.result(), reading_held.result()
            if self._shape.fresh:
                wanted = {s: p.ahead() for s, p in given.items()}
                await self._set_all(target, {s: p for s, p in wanted.items() if held[s] != p})
                return
            for sequence, position in given.items():
                if held[sequence].is_behind(position.ahead(2)):
                    await self._raise_shared(target, sequence.target, position.ahead())

    async def _set_all(self, conn: Connection, positions: Positions) -> None:
        """On a target that only we write to. The owner's row first: a setval cannot be taken back."""
        if not positions:
            return
        values = {
            "schemas": [s.target.schema for s in positions],
            "names": [s.target.name for s in positions],
            "values": [p.last_value for p in positions.values()],
            "called": [p.is_called for p in positions.values()],
        }
        async with conn.transaction():
            await owner.hold(conn, self._identity)
            await conn.execute(_SET_ALL, values)

    async def _raise_shared(self, conn: Connection, sequence: TableRef, position: Position) -> None:
        """setval(greatest(…)) alone hands out duplicates beside other tenants' nextval: lock first.

        ALTER SEQUENCE with the increment it has changes nothing and holds SHARE ROW EXCLUSIVE, which
        makes nextval wait until the commit; it also makes other sessions forget the values they have
        cached."""
        name = sql.Identifier(sequence.schema, sequence.name)
        increment = sql.Literal(position.increment)
        extreme = sql.SQL("greatest" if position.increment > 0 else "least")
        async with conn.transaction():
            await owner.hold(conn, self._identity)
            await conn.execute(sql.SQL("ALTER SEQUENCE {} INCREMENT BY {}").format(name, increment))
            await conn.execute(
                sql.SQL("SELECT setval({}::regclass, {}(last_value, {}), is_called OR {}) FROM {}").format(
                    sql.Literal(name.as_string(None)),
                    extreme,
                    sql.Literal(position.last_value),
                    sql.Literal(position.is_called),
                    name,
                )
            )


async def _positions(conn: Connection, names: Mapping[SequenceRef, TableRef]) -> dict[SequenceRef, Position]:
    """One statement, however many sequences."""
    one = sql.SQL(
        "SELECT {number}, s.last_value, s.is_called, d.seqincrement,"
        " CASE WHEN d.seqincrement > 0 THEN d.seqmax ELSE d.seqmin END"
        " FROM {sequence} AS s JOIN pg_sequence AS d ON d.seqrelid = s.tableoid"
    )
    query = sql.SQL(" UNION ALL ").join(
        one.format(number=sql.Literal(number), sequence=sql.Identifier(name.schema, name.name))
        for number, name in enumerate(names.values())
    )
    found = await conn.execute(query, prepare=True)
    order = list(names)
    return {order[number]: Position(*rest) for number, *rest in await found.fetchall()}


_SET_ALL = """
SELECT setval(c.oid, wanted.value, wanted.called)
  FROM unnest(%(schemas)s::text[], %(names)s::text[], %(values)s::bigint[], %(called)s::boolean[])
       AS wanted (schema, name, value, called)
  JOIN pg_namespace n ON n.nspname = wanted.schema
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.name AND c.relkind = 'S'
"""
