"""Locks on shared tables: taken with a short timeout and retried, so that nobody queues behind us for
longer than it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import psycopg
from psycopg import errors

from mover.core.errors import LockNotAvailable

LOCK_TIMEOUT_MS = 200
TRIES = 30
# Between two tries the queue behind the lock drains; the spread keeps several of us apart.
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0

Result = TypeVar("Result")
OnWait = Callable[[int], Awaitable[None]]


async def with_lock_timeout(
    conn: psycopg.AsyncConnection[Any],
    attempt: Callable[[], Awaitable[Result]],
    *,
    lock_timeout_ms: int = LOCK_TIMEOUT_MS,
    tries: int = TRIES,
    on_wait: OnWait | None = None,
) -> Result:
    """Run `attempt` until it gets its locks; each failed one must leave nothing behind.

    `conn` is in autocommit. `on_wait` hears the number of the try that failed. Raises LockNotAvailable."""
    before = await _set_timeout(conn, f"{lock_timeout_ms}ms")
    try:
        for number in range(1, tries + 1):
            try:
                return await attempt()
            except (errors.LockNotAvailable, errors.DeadlockDetected):
                if on_wait is not None:
                    await on_wait(number)
                if number < tries:
                    await asyncio.sleep(_pause_s(number))
    finally:
        if not conn.closed:
            await _set_timeout(conn, before)
    raise LockNotAvailable(
        f"a lock was not free within {lock_timeout_ms} ms in {tries} tries",
        hint="Look for long transactions on the moved tables; it is tried again later.",
    )


def _pause_s(number: int) -> float:
    return float(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (number - 1)) * random.uniform(0.5, 1.5))


async def _set_timeout(conn: psycopg.AsyncConnection[Any], value: str) -> str:
    """Says what it was before."""
    row = await (
        await conn.execute(
            "SELECT before, set_config('lock_timeout', %s, false)"
            " FROM (SELECT current_setting('lock_timeout') AS before OFFSET 0) AS settings",
            (value,),
        )
    ).fetchone()
    return str(row[0]) if row is not None else "0"
