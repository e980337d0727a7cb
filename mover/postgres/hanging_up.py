"""Hanging up on a server: the driver sees the connection end, as if the server had closed it.

Not a cancellation: the driver answers one by asking the server to cancel and waiting for it, which a frozen
server draws out for ever."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Any, TypeAlias
from weakref import WeakSet

import asyncpg
import psycopg
from psycopg import pq

AnyConnection: TypeAlias = "psycopg.AsyncConnection[Any] | pq.abc.PGconn | asyncpg.Connection[Any]"


class OpenConnections:
    """To one database; those that are gone are forgotten by themselves."""

    def __init__(self) -> None:
        self._connections = WeakSet[Any]()

    def add(self, conn: AnyConnection) -> None:
        self._connections.add(conn)

    def hang_up(self) -> None:
        """Whoever waits for this server sees his connection end."""
        for conn in tuple(self._connections):
            hang_up(conn)


def hang_up(conn: AnyConnection) -> None:
    """Nothing happens when it has ended."""
    if isinstance(conn, asyncpg.Connection):
        # Not `terminate`: whoever is working with the connection would stumble over what it has taken away.
        conn._transport.abort()
        return
    pgconn = conn.pgconn if isinstance(conn, psycopg.AsyncConnection) else conn
    if pgconn.status == pq.ConnStatus.OK:
        with socket.socket(fileno=os.dup(pgconn.socket)) as same, suppress(OSError):
            same.shutdown(socket.SHUT_RDWR)
