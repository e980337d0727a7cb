"""`GET …/events`: a migration's past and then its present over a WebSocket, until it has ended.

The table is asked again at short intervals rather than listened to: ids of one migration commit in
order, so that nothing is missed, and nothing has to be re-established when a connection breaks.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from aiohttp import WSCloseCode, web

from mover.core.errors import MoverError
from mover.core.states import LIVE
from mover.ports import Desk
from mover.web.errors import error_object
from mover.web.views import dumps, event_view, progress_view

_BATCH = 500
_PING_SECONDS = 20


class EventFeed:
    """The open sockets of one application."""

    def __init__(self, desk: Desk, poll_seconds: float) -> None:
        self._desk = desk
        self._poll_seconds = poll_seconds
        self._open: set[web.WebSocketResponse] = set()

    async def serve(self, request: web.Request, migration_id: str) -> web.WebSocketResponse:
        """Raises NotFound before the upgrade."""
        await self._desk.get(migration_id)
        socket = web.WebSocketResponse(heartbeat=_PING_SECONDS, max_msg_size=1024)
        await socket.prepare(request)
        self._open.add(socket)
        gone = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._tail(socket, migration_id, gone), name="events.tail")
                group.create_task(_until_closed(socket, gone), name="events.client")
        finally:
            self._open.discard(socket)
        return socket

    async def close(self) -> None:
        """Send every client away: the daemon stops."""
        for socket in tuple(self._open):
            await socket.close(code=WSCloseCode.GOING_AWAY)

    async def _tail(self, socket: web.WebSocketResponse, migration_id: str, gone: asyncio.Event) -> None:
        try:
            await self._send_all(socket, migration_id, gone)
            await socket.close()
        except MoverError as error:
            await socket.send_json({"type": "error", "error": error_object(error)})
            await socket.close(code=WSCloseCode.INTERNAL_ERROR)
        except ConnectionError:  # the client went away in the middle of a message
            await socket.close()

    async def _send_all(self, socket: web.WebSocketResponse, migration_id: str, gone: asyncio.Event) -> None:
        last_event, last_progress = 0, None
        has_ended = False
        while not gone.is_set():
            migration, progress, steps = await self._desk.progress(migration_id)
            last_event = await self._send_events(socket, migration_id, last_event)
            view: dict[str, Any] = {"type": "progress", **progress_view(migration, progress, steps)}
            if view != last_progress:
                await socket.send_json(view, dumps=dumps)
                last_progress = view
            if has_ended:  # one round more, for the line that says so
                return
            has_ended = migration.status not in LIVE
            with suppress(TimeoutError):
                await asyncio.wait_for(gone.wait(), self._poll_seconds)

    async def _send_events(self, socket: web.WebSocketResponse, migration_id: str, after: int) -> int:
        while events := await self._desk.events(migration_id, after, _BATCH):
            for event in events:
                await socket.send_json(event_view(event), dumps=dumps)
            after = events[-1].id
        return after


async def _until_closed(socket: web.WebSocketResponse, gone: asyncio.Event) -> None:
    """Whatever a client says is dropped; when it leaves, nothing more is sent."""
    async for _ in socket:
        pass
    gone.set()
