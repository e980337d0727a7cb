"""Who owns a migration on one database: the epoch that every transaction there must hold.

A plain SELECT of the epoch lets a suspended owner commit after a new one took over; the row is
therefore locked until the transaction ends.
"""

from __future__ import annotations

from typing import Any

import asyncpg
import psycopg

from mover.core.crash import reach
from mover.core.errors import LeaseLost
from mover.postgres.connect import Database, Identity

# For a transaction of the old owner that outlives its session's end; then the take-over is tried again.
TAKE_TIMEOUT = "5s"
_HOLD = "SELECT 1 FROM mover.owner WHERE migration = %s AND epoch = %s FOR SHARE"
_HOLD_BULK = "SELECT 1 FROM mover.owner WHERE migration = $1 AND epoch = $2 FOR SHARE"
# Waits for transactions of the old owner that hold the row; afterwards they find another epoch.
_TAKE = """
INSERT INTO mover.owner AS o (migration, epoch) VALUES (%s, %s)
ON CONFLICT (migration) DO UPDATE SET epoch = excluded.epoch WHERE o.epoch <= excluded.epoch
RETURNING epoch
"""
# Only those of older epochs: a zombie that comes here must not end its successor's.
_END_OLD_BACKENDS = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
 WHERE starts_with(application_name, %(prefix)s) AND pid <> pg_backend_pid()
   AND CASE WHEN split_part(application_name, '/', 3) ~ '^[0-9]+$'
            THEN split_part(application_name, '/', 3)::bigint < %(epoch)s END
"""


async def hold(conn: psycopg.AsyncConnection[Any], identity: Identity) -> None:
    """Lock the epoch until the current transaction ends. Raises LeaseLost."""
    row = await (await conn.execute(_HOLD, (identity.migration, identity.epoch))).fetchone()
    if row is None:
        raise LeaseLost("another daemon owns this migration now")


async def hold_bulk(conn: asyncpg.Connection[Any], identity: Identity) -> None:
    """The same on an asyncpg connection."""
    if await conn.fetchval(_HOLD_BULK, identity.migration, int(identity.epoch)) is None:
        raise LeaseLost("another daemon owns this migration now")


async def take(database: Database, identity: Identity) -> None:
    """End the old owner's backends and raise the epoch. Raises LeaseLost when a newer owner was here."""
    async with database.borrow("owner", lock_timeout=TAKE_TIMEOUT) as conn:
        await conn.execute(_END_OLD_BACKENDS, {"prefix": identity.prefix, "epoch": identity.epoch})
        reach("owner.ended")
        row = await (await conn.execute(_TAKE, (identity.migration, identity.epoch))).fetchone()
        if row is None:
            raise LeaseLost("another daemon owns this migration now")
