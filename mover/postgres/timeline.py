"""What a promoted server has of the timeline that it left, and what it never got."""

from __future__ import annotations

from mover.core.errors import MoverError, Remedy
from mover.core.ids import Lsn
from mover.postgres.connect import Database

# "system identifier/timeline", the latter as in WAL files' names: they change with a restore or a promotion.
IDENTITY = """
SELECT system_identifier || '/' || left(pg_walfile_name(pg_current_wal_lsn()), 8) FROM pg_control_system()
"""


async def identity(database: Database) -> str:
    async with database.borrow("identity") as conn:
        row = await (await conn.execute(IDENTITY)).fetchone()
    assert row is not None
    return str(row[0])


async def left_at(database: Database, known: str) -> Lsn | None:
    """Up to where the server has what was written while it was `known`; None where it does not tell: another
    system, a history without that timeline, or a role without REPLICATION.

    TIMELINE_HISTORY: https://www.postgresql.org/docs/current/protocol-replication.html"""
    known_system, known_timeline = known.split("/")
    system, timeline = (await identity(database)).split("/")
    if system != known_system:
        return None
    try:
        async with database.connect_replication("timeline") as conn:
            # A number of our own: replication commands take no parameters.
            row = await (await conn.execute(f"TIMELINE_HISTORY {int(timeline, 16)}".encode())).fetchone()
    except MoverError as error:
        if error.remedy is Remedy.RETRY:
            raise
        return None
    return None if row is None else _end_of(int(known_timeline, 16), row[1])


def _end_of(timeline: int, history: bytes | str) -> Lsn | None:
    """A history file's lines: the timeline, where it was left, and why."""
    text = history.decode() if isinstance(history, bytes) else history
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 2 and fields[0] == str(timeline):
            return Lsn.parse(fields[1])
    return None
