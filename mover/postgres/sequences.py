"""Sequences of the moved schemas: the target's are set beyond every value the source has given out.

Implements cutover.ports.Sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import psycopg
from psycopg import sql

from mover.core.ids import TableRef
from mover.core.tables import SequenceRef, Shape
from mover.postgres.connect import Database
from mover.postgres.errors import translate

# Room on a shared target for the values that the source gives out until the switch.
GAP = 10_000

Connection = psycopg.AsyncConnection[Any]


class PgSequences:
    """Carries sequence values from source to target; keeps its connections from `get_ready` to `close`."""

    def __init__(self, source: Database, target: Database, shape: Shape) -> None:
        self._source, self._target, self._shape = source, target, shape
        self._open = AsyncExitStack()
        self._connections: tuple[Connection, Connection] | None = None

    async def get_ready(self) -> None:
        await self.close()
        source = await self._open.enter_async_context(self._source.connect("sequences"))
        target = await self._open.enter_async_context(self._target.connect("sequences", lock_timeout="200ms"))
        self._connections = source, target

    async def close(self) -> None:
        self._connections = None
        await self._open.aclose()

    async def reserve(self) -> None:
        """Before the fence, on a target with other tenants: a gap, so that the fence need not lock."""
        if not self._shape.fresh:
            await self._carry(GAP)

    async def carry_over(self) -> None:
        await self._carry(0)

    async def _carry(self, gap: int) -> None:
        if not self._shape.sequences:
            return
        if self._connections is None:
            await self.get_ready()
        assert self._connections is not None
        source, target = self._connections
        with translate(self._target.label):
            given = await _positions(source, [s.source for s in self._shape.sequences])
            held = await _positions(target, [s.target for s in self._shape.sequences])
            behind = [
                (sequence, position[0] + gap * position[1], position[1])
                for sequence in self._shape.sequences
                if (position := given.get(sequence.source))
                and _is_behind(held.get(sequence.target), position)
            ]
            if self._shape.fresh and behind:
                await _set_all(target, behind)
            for sequence, value, increment in [] if self._shape.fresh else behind:
                await _raise_shared(target, sequence, value, increment)


def _is_behind(held: tuple[int, int] | None, given: tuple[int, int]) -> bool:
    """Whether the target could give out a value that the source has given."""
    if held is None:
        return True
    return held[0] < given[0] if given[1] > 0 else held[0] > given[0]


async def _positions(conn: Connection, sequences: Sequence[TableRef]) -> dict[TableRef, tuple[int, int]]:
    """(last value given out, increment) by name; none for a sequence that was never used."""
    names = {"schemas": [s.schema for s in sequences], "names": [s.name for s in sequences]}
    rows = await (await conn.execute(_POSITIONS, names)).fetchall()
    return {TableRef(schema, name): (int(last), int(step)) for schema, name, last, step in rows}


async def _set_all(conn: Connection, values: Sequence[tuple[SequenceRef, int, int]]) -> None:
    """On a target that only we write to: one statement."""
    await conn.execute(
        _SET_ALL,
        {
            "schemas": [s.target.schema for s, _, _ in values],
            "names": [s.target.name for s, _, _ in values],
            "values": [value for _, value, _ in values],
        },
    )


async def _raise_shared(conn: Connection, sequence: SequenceRef, value: int, increment: int) -> None:
    """setval(greatest(…)) alone hands out duplicates beside other tenants' nextval: lock first.

    ALTER SEQUENCE with the increment it has changes nothing and holds SHARE ROW EXCLUSIVE, which
    makes nextval wait until the commit."""
    name = sql.Identifier(sequence.target.schema, sequence.target.name)
    extreme = sql.SQL("greatest" if increment > 0 else "least")
    async with conn.transaction():
        await conn.execute(sql.SQL("ALTER SEQUENCE {} INCREMENT BY {}").format(name, sql.Literal(increment)))
        await conn.execute(
            sql.SQL("SELECT setval({}::regclass, {}(last_value, {})) FROM {}").format(
                sql.Literal(name.as_string(None)), extreme, sql.Literal(value), name
            )
        )


_POSITIONS = """
SELECT n.nspname, c.relname, pg_sequence_last_value(s.seqrelid), s.seqincrement
  FROM unnest(%(schemas)s::text[], %(names)s::text[]) AS wanted (schema, name)
  JOIN pg_namespace n ON n.nspname = wanted.schema
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.name AND c.relkind = 'S'
  JOIN pg_sequence s ON s.seqrelid = c.oid
 WHERE pg_sequence_last_value(s.seqrelid) IS NOT NULL
"""
_SET_ALL = """
SELECT setval(c.oid, wanted.value)
  FROM unnest(%(schemas)s::text[], %(names)s::text[], %(values)s::bigint[]) AS wanted (schema, name, value)
  JOIN pg_namespace n ON n.nspname = wanted.schema
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.name AND c.relkind = 'S'
"""
