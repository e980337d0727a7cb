"""Connections between two short pieces of work: kept open for a few seconds, so that the next one need
not wait for a new session. One that was handed out is nobody's until it is given back."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg

Connection = psycopg.AsyncConnection[tuple[Any, ...]]

# Shorter than any gateway's patience with a silent connection, longer than the time between two looks.
KEPT_S = 5.0


class IdleConnections:
    """At most `most` connections that nobody works on; 0 keeps none."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._timers: dict[Connection, asyncio.TimerHandle] = {}  # the longest idle one comes first

    def __len__(self) -> int:
        return len(self._timers)

    def take(self) -> Connection | None:
        """The one that was given back last: its caches are the warmest."""
        if not self._timers:
            return None
        conn, timer = self._timers.popitem()
        timer.cancel()
        return conn

    def give_back(self, conn: Connection) -> bool:
        """Whether there is room for it."""
        if len(self._timers) >= self._most:
            return False
        self._timers[conn] = asyncio.get_running_loop().call_later(KEPT_S, self._close, conn)
        return True

    def shrink(self, most: int) -> None:
        """Close those that were idle for longest, down to `most`."""
        while len(self._timers) > max(most, 0):
            self._close(next(iter(self._timers)))

    def end(self) -> None:
        """Close all, and keep none any more."""
        self._most = 0
        self.shrink(0)

    def _close(self, conn: Connection) -> None:
        self._timers.pop(conn).cancel()
        conn.pgconn.finish()
