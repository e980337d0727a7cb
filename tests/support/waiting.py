"""Waiting for what other processes do, without guessing how long it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Raises TimeoutError when `condition` does not become true in time."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110, nobody tells us: the world is asked
            await asyncio.sleep(0.01)


async def until_asked(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """The same where `condition` asks a server, and who answers may need this event loop."""
    async with asyncio.timeout(timeout_s):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110, as above
            await asyncio.sleep(0.1)
