"""Runs a timeline's actions in sessions, as an application would."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import psycopg

from tests.support.checks import TEXT_OPTIONS
from tests.support.drafts import TENANT
from tests.support.places import Place
from tests.support.timelines import Action

# What an application expects and rolls back for: constraints, serialisation, deadlocks, lock timeouts.
EXPECTED = ("23", "40001", "40P01", "55006", "55P03")
HAS_MOVED = "25006"


@dataclass
class Writers:
    """Runs actions in sessions, as an application would; the tenant's where the tenant lives."""

    source: Place
    target: Place
    switched: bool = False
    committed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    _sessions: dict[str, _Session] = field(default_factory=dict)

    @property
    def is_busy(self) -> bool:
        return any(session.is_open for session in self._sessions.values())

    async def act(self, action: Action) -> None:
        session = self._sessions.setdefault(action.session, _Session())
        if action.sql.startswith("BEGIN"):
            await session.end()
            is_moved = self.switched and action.tenant == TENANT
            place = self.target if is_moved else self.source
            await session.begin(place, action.sql, alone=not self.is_busy)
        elif session.is_open and not (self.switched and action.before_switch_only):
            await self._run(session, action)

    async def _run(self, session: _Session, action: Action) -> None:
        try:
            await session.execute(action)
        except psycopg.Error as error:
            state = error.sqlstate or ""
            self.refused[state] += 1
            await session.end()
            is_tenant = action.tenant == TENANT or action.before_switch_only
            if not state.startswith(EXPECTED) and not (state == HAS_MOVED and is_tenant):
                error.add_note(f"in {action}")
                raise

    async def end_all(self) -> None:
        for session in self._sessions.values():
            await session.end()

    @asynccontextmanager
    async def closing(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            for session in self._sessions.values():
                await session.close()


@dataclass
class _Session:
    """A connection, and whether a transaction is open on it."""

    conn: psycopg.AsyncConnection | None = None
    place: Place | None = None
    is_open: bool = False
    prepared: str | None = None  # the open transaction's name, with its quotes

    async def begin(self, place: Place, statement: str, *, alone: bool) -> None:
        if self.conn is None or self.place != place:
            await self.close()
            self.conn = await psycopg.AsyncConnection.connect(
                place.url, autocommit=True, options=TEXT_OPTIONS
            )
            self.place = place
        await self.conn.execute(statement)
        # Beside others of our own that hold locks, waiting is in vain.
        await self.conn.execute(f"SET LOCAL lock_timeout = '{'5s' if alone else '150ms'}'")
        self.is_open, self.prepared = True, None

    async def execute(self, action: Action) -> None:
        assert self.conn is not None and self.place is not None
        statement = self.place.text(action.sql)
        if action.copied:
            lines = [await self._lines(query) for query in action.copied]
            async with self.conn.cursor() as cursor, cursor.copy(statement) as copy:
                for line in lines:
                    await copy.write(line)
            return
        await self.conn.execute(statement)
        if statement.startswith("PREPARE"):
            self.prepared = statement.removeprefix("PREPARE TRANSACTION ")
        elif statement.startswith("COMMIT") or (statement.startswith("ROLLBACK") and " TO " not in statement):
            self.is_open, self.prepared = False, None

    async def _lines(self, query: str) -> bytes:
        assert self.conn is not None and self.place is not None
        async with self.conn.cursor() as cursor, cursor.copy(self.place.text(query)) as copy:
            return b"".join([bytes(block) async for block in copy])

    async def end(self) -> None:
        """Roll back, or commit what is prepared."""
        if self.conn is not None and self.is_open:
            await self.conn.execute(f"COMMIT PREPARED {self.prepared}" if self.prepared else "ROLLBACK")
        self.is_open, self.prepared = False, None

    async def close(self) -> None:
        conn, self.conn = self.conn, None
        if conn is not None:
            await conn.close()
