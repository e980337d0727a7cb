"""Connections to the platform database: few, bounded in time, and durable at every commit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeAlias

import psycopg
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from mover.core.secret import Secret
from mover.postgres.cancelling import CancellingConnection
from mover.postgres.connect import KEEPALIVES
from mover.postgres.errors import translate
from mover.postgres.hanging_up import hang_up
from mover.postgres.urls import libpq_parameters
from mover.sql import load

LABEL = "platform database"
CONNECT_TIMEOUT_S = 5
CHECK_S = 1
MAX_CONNECTIONS = 8
_QUERIES = load("platform")

Connection: TypeAlias = psycopg.AsyncConnection[dict[str, Any]]


class PlatformPool:
    """Hands out connections; what is done with one takes at most `answer_seconds`.

    Driver errors leave as MoverError, a silent server as Unreachable."""

    def __init__(self, url: Secret, answer_seconds: float) -> None:
        self._answer_seconds = answer_seconds
        self._pool = AsyncConnectionPool(
            connection_class=CancellingConnection[dict[str, Any]],
            kwargs=conninfo(url, "platform") | {"autocommit": True, "row_factory": dict_row},
            min_size=1,
            max_size=MAX_CONNECTIONS,
            configure=_make_durable,
            check=_check,  # the server may have restarted meanwhile
            open=False,
            name="platform",
        )

    async def open(self) -> None:
        await self._pool.open()

    async def close(self) -> None:
        await self._pool.close()

    @asynccontextmanager
    async def connection(self, seconds: float | None = None) -> AsyncIterator[Connection]:
        """Every statement is a transaction of its own; `seconds` instead of `answer_seconds`."""
        seconds = seconds or self._answer_seconds
        with translate(LABEL):
            async with self._pool.connection(timeout=seconds) as conn:
                with bounded(conn, seconds):
                    yield conn

    @asynccontextmanager
    async def transaction(self, seconds: float | None = None) -> AsyncIterator[Connection]:
        """One transaction; commits when the block ends without an error."""
        async with self.connection(seconds) as conn, conn.transaction():
            yield conn


@contextmanager
def bounded(conn: Connection, seconds: float) -> Iterator[None]:
    """Hang up when the block is not done in time: a tenant's writers may be waiting for us."""
    timer = asyncio.get_running_loop().call_later(seconds, hang_up, conn)
    try:
        yield
    finally:
        timer.cancel()


def conninfo(url: Secret, purpose: str) -> dict[str, Any]:
    """libpq's parameters with bounds: a frozen server must not freeze its callers."""
    return {
        **KEEPALIVES,
        "tcp_user_timeout": 10_000,
        **libpq_parameters(url, LABEL),
        "connect_timeout": CONNECT_TIMEOUT_S,
        "application_name": f"mover/{purpose}",
        "client_encoding": "UTF8",
        # A daemon that freezes inside a transaction keeps others from its migration's row for so long.
        "options": "-c statement_timeout=30s -c lock_timeout=10s -c idle_in_transaction_session_timeout=5s",
    }


async def _make_durable(conn: Connection) -> None:
    await conn.execute(_QUERIES["durable_session"])


async def _check(conn: Connection) -> None:
    with bounded(conn, CHECK_S):
        await AsyncConnectionPool.check_connection(conn)
