"""Whether a server answers. Most of what it is asked has no bound: a COPY or an index takes as long as it
takes. Beside that it is asked what takes no time; where that is not answered either, we hang up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mover.core.errors import MoverError, Unreachable
from mover.postgres.connect import Database
from mover.postgres.errors import translate
from mover.postgres.hanging_up import hang_up
from mover.postgres.idle import Connection

INTERVAL_S = 1.0
SILENT_S = 5.0


async def watch_pulse(database: Database, say: Callable[[str | None], None]) -> None:
    """For ever; `say` is told why nobody gets an answer there, or None."""
    while True:
        try:
            async with database.connect("pulse") as conn:
                while True:
                    await _ask(database, conn)
                    say(None)
                    await asyncio.sleep(INTERVAL_S)
        except MoverError as error:
            say(str(error))
        await asyncio.sleep(INTERVAL_S)


async def _ask(database: Database, conn: Connection) -> None:
    asking = asyncio.ensure_future(conn.execute("SELECT 1"))
    try:
        for _ in range(2):  # a process that was frozen itself finds its time over and the answer there
            await asyncio.wait([asking], timeout=SILENT_S / 2)
        if not asking.done():
            database.hang_up()
            await asyncio.wait([asking])
            raise Unreachable(f"{database.label}: the server does not answer") from asking.exception()
        with translate(database.label):
            asking.result()
    finally:
        if not asking.done():
            hang_up(conn)
            asking.cancel()
