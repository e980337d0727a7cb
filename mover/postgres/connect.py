"""Connections to the two databases of a migration: named, bounded in number, with every setting
that could change a value's text pinned; kept open between short pieces of work.

Each connection's `application_name` is `mover/<migration>/<epoch>/<purpose>`, by which a new owner
finds and ends the backends of the old one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus

from mover.core.ids import Epoch, MigrationId, back_of
from mover.core.secret import Secret
from mover.postgres.cancelling import CancellingConnection
from mover.postgres.errors import translate
from mover.postgres.hanging_up import OpenConnections
from mover.postgres.idle import Connection, IdleConnections
from mover.postgres.urls import CONNECT_TIMEOUT_S, asyncpg_parameters, libpq_parameters, why_unreachable

# The text of a value must not depend on the role's or the server's defaults (floats lose digits under
# extra_float_digits=0), and no timeout of theirs may kill a snapshot holder.
PINNED: Mapping[str, str] = {
    "extra_float_digits": "1",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "bytea_output": "hex",
    "client_encoding": "UTF8",
    "lc_monetary": "C",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "default_transaction_isolation": "read committed",  # compare-and-swap waits and looks again
    "default_transaction_read_only": "off",
    "row_security": "off",  # raises where a policy would silently hide rows
    "search_path": "pg_catalog",
}
KEEPALIVES: Mapping[str, int] = {
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,  # ms: what we send to a vanished host must not be retried for minutes
}
# From PostgreSQL 17 on, and unknown before: it would end a wave or a comparison in the middle.
TRANSACTION_TIMEOUT_VERSION = 170000
NO_TRANSACTION_TIMEOUT = "SET transaction_timeout = 0"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a connection works for; `is_back`: where the tenant's rows flow from target to source."""

    migration: MigrationId
    epoch: Epoch
    is_back: bool = False

    @property
    def stream(self) -> MigrationId:
        """After which one direction's slot, publication, log and progress are named."""
        return back_of(self.migration) if self.is_back else self.migration

    @property
    def prefix(self) -> str:
        """Common to all connections of this migration, whatever the epoch."""
        return f"mover/{self.migration}/"

    def application_name(self, purpose: str) -> str:
        return f"{self.prefix}{self.epoch}/{purpose}"


@dataclass
class Database:
    """Opens connections to one database, never more than `limit` at a time, idle ones included.

    `label` is what messages call it ("source", "target", "verticals.core"): never the URL. Where `kept` is
    not 0, so many may stay open between two pieces of work, until `end_idle`.
    """

    url: Secret
    label: str
    identity: Identity | None = None
    limit: int = 12
    kept: int = 0
    _slots: asyncio.Semaphore = field(init=False, repr=False)
    _in_use: int = field(init=False, repr=False, default=0)
    _idle: IdleConnections = field(init=False, repr=False)
    open_connections: OpenConnections = field(init=False, repr=False, default_factory=OpenConnections)

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.limit)
        self._idle = IdleConnections(self.kept)

    def _application_name(self, purpose: str) -> str:
        return self.identity.application_name(purpose) if self.identity else f"mover/-/{purpose}"

    def conninfo(self, purpose: str, **overrides: str) -> dict[str, Any]:
        """libpq parameters with everything pinned; `overrides` are server settings."""
        return self._parameters(purpose, {**PINNED, **overrides})

    def _parameters(self, purpose: str, settings: Mapping[str, str]) -> dict[str, Any]:
        options = " ".join(f"-c {name}={_escape(value)}" for name, value in settings.items())
        params: dict[str, Any] = {**KEEPALIVES, **libpq_parameters(self.url, self.label)}
        params |= {
            "options": options,
            "application_name": self._application_name(purpose),
            "connect_timeout": CONNECT_TIMEOUT_S,
        }
        return params

    @asynccontextmanager
    async def connect(self, purpose: str, **settings: str) -> AsyncIterator[Connection]:
        """A psycopg connection in autocommit; `settings` are server settings for its whole life.

        Driver errors, also those raised inside the block, leave as MoverError (see `errors.translate`).
        """
        async with self._opened(self.conninfo(purpose, **settings)) as conn:
            yield conn

    @asynccontextmanager
    async def connect_plainly(self, purpose: str, **settings: str) -> AsyncIterator[Connection]:
        """As an application would: under the role's and the database's own settings, but for `settings`."""
        async with self._opened(self._parameters(purpose, settings)) as conn:
            yield conn

    @asynccontextmanager
    async def connect_replication(self, purpose: str) -> AsyncIterator[Connection]:
        """To a walsender, which knows replication commands; for a role with REPLICATION."""
        async with self._opened({**self.conninfo(purpose), "replication": "database"}) as conn:
            yield conn

    @asynccontextmanager
    async def _opened(self, parameters: dict[str, Any]) -> AsyncIterator[Connection]:
        async with self._slot():
            with translate(self.label):
                conn = await self._connected(parameters)
                try:
                    yield conn
                finally:
                    await conn.close()

    @asynccontextmanager
    async def borrow(self, purpose: str, **settings: str) -> AsyncIterator[Connection]:
        """The same for short work, on a connection that may have been open and may stay so.

        Whatever lasts longer than a transaction, but for settings, is not for a borrowed one: temporary
        tables, session locks, LISTEN. After an error it is closed."""
        async with self._slot():
            with translate(self.label):
                conn = await self._borrowed(purpose, settings)
                try:
                    yield conn
                except BaseException:
                    await conn.close()
                    raise
                is_idle = conn.info.transaction_status is TransactionStatus.IDLE
                if not (is_idle and self._idle.give_back(conn)):
                    await conn.close()

    def end_idle(self) -> None:
        """Close what is idle; from now on nothing stays open."""
        self._idle.end()

    def hang_up(self) -> None:
        """The server does not answer: whoever waits for it sees his connection end."""
        self.open_connections.hang_up()

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        async with self._slots:
            self._in_use += 1
            self._idle.shrink(self.limit - self._in_use)
            try:
                yield
            finally:
                self._in_use -= 1

    async def _borrowed(self, purpose: str, settings: Mapping[str, str]) -> Connection:
        while (conn := self._idle.take()) is not None:
            try:
                return await self._dressed(conn, purpose, settings)
            except psycopg.OperationalError:
                continue  # it ended while it was idle: the next one, or a new one, tells how things are
        conn = await self._connected(self.conninfo(purpose))
        conn.prepare_threshold = None  # what one borrower prepares may not fit the schemas that another sees
        return await self._dressed(conn, purpose, settings) if settings else conn

    async def _dressed(self, conn: Connection, purpose: str, settings: Mapping[str, str]) -> Connection:
        """As if it were new, in one round trip, which also shows whether it still lives."""
        wanted = {**settings, "application_name": self._application_name(purpose)}
        if conn.info.server_version >= TRANSACTION_TIMEOUT_VERSION:
            wanted["transaction_timeout"] = "0"
        changes = (
            sql.SQL("SET {} = {}").format(sql.Identifier(name), sql.Literal(value))
            for name, value in wanted.items()
        )
        try:
            await conn.execute(sql.SQL("; ").join([sql.SQL("RESET ALL"), *changes]), prepare=False)
        except BaseException:
            await conn.close()
            raise
        return conn

    async def _connected(self, parameters: dict[str, Any]) -> Connection:
        try:
            conn = await CancellingConnection.connect(**parameters, autocommit=True)
        except psycopg.OperationalError as error:
            raise await why_unreachable(self.url, self.label, error) from error
        self.open_connections.add(conn)
        try:
            if conn.info.server_version >= TRANSACTION_TIMEOUT_VERSION:
                await conn.execute(NO_TRANSACTION_TIMEOUT)
        except BaseException:
            await conn.close()
            raise
        return conn

    @asynccontextmanager
    async def external(self, purpose: str) -> AsyncIterator[dict[str, str]]:
        """libpq's parameters for a program that opens one connection; it counts as one of ours."""
        async with self._slot():
            yield {name: str(value) for name, value in self.conninfo(purpose).items()}

    @asynccontextmanager
    async def connect_bulk(self, purpose: str, **settings: str) -> AsyncIterator[asyncpg.Connection[Any]]:
        """An asyncpg connection, for COPY pass-through."""
        async with self._slot():
            with translate(self.label):
                conn = await asyncpg.connect(
                    **asyncpg_parameters(self.url),
                    timeout=CONNECT_TIMEOUT_S,
                    statement_cache_size=0,
                    server_settings={
                        **PINNED,
                        **settings,
                        "application_name": self._application_name(purpose),
                    },
                )
                self.open_connections.add(conn)
                try:
                    if conn.get_server_version().major >= TRANSACTION_TIMEOUT_VERSION // 10_000:
                        await conn.execute(NO_TRANSACTION_TIMEOUT)
                    yield conn
                finally:
                    if conn.is_in_transaction():
                        conn.terminate()  # a COPY may still be running; the server rolls back
                    else:
                        await conn.close()


def _escape(value: str) -> str:
    """A server setting's value as `options` wants it: blanks and backslashes escaped."""
    return value.replace("\\", "\\\\").replace(" ", "\\ ")
