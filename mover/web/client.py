"""The API as the command line sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import aiohttp

from mover.core.errors import MoverError, Unreachable
from mover.web.app import MIGRATIONS

ANSWER_SECONDS = 60  # a dry run looks at both databases
RECONNECT_SECONDS = 60  # how long a restarting daemon is waited for
_RETRY_SECONDS = 1.0

Json: TypeAlias = dict[str, Any]


@dataclass(eq=False)
class ApiError(MoverError):
    """The daemon said no; `status` and `kind` are HTTP's and the error object's, `reasons` has one
    sentence for each wrong field."""

    status: int = 0
    kind: str = ""
    reasons: tuple[str, ...] = ()

    code = "api"


class ApiClient:
    """Talks to one daemon; use `connect`."""

    def __init__(self, session: aiohttp.ClientSession, server: str) -> None:
        self._session = session
        self._server = server.rstrip("/")

    async def submit(self, body: Mapping[str, object]) -> Json:
        return await self._call("POST", MIGRATIONS, body)

    async def list(self, status: str | None, limit: int) -> list[Json]:
        query = {"limit": str(limit)} | ({"status": status} if status else {})
        answer = await self._call("GET", MIGRATIONS, query=query)
        migrations: list[Json] = answer["migrations"]
        return migrations

    async def get(self, migration_id: str) -> Json:
        return await self._call("GET", f"{MIGRATIONS}/{migration_id}")

    async def progress(self, migration_id: str) -> Json:
        return await self._call("GET", f"{MIGRATIONS}/{migration_id}/progress")

    async def act(self, migration_id: str, action: str) -> Json:
        """pause, resume, cancel, rollback or approve."""
        return await self._call("POST", f"{MIGRATIONS}/{migration_id}/{action}")

    async def events(self, migration_id: str) -> AsyncGenerator[Json, None]:
        """Event and progress messages until the migration has ended; a daemon that restarts meanwhile
        is waited for, and no event is given twice."""
        await self.get(migration_id)  # refusals are said here, as for any other call
        last_event, failing_since = 0, asyncio.get_running_loop().time()
        while True:
            try:
                async with aclosing(self._socket(f"{MIGRATIONS}/{migration_id}/events")) as messages:
                    async for message in messages:
                        failing_since = asyncio.get_running_loop().time()
                        if message["type"] == "event":
                            if message["id"] <= last_event:
                                continue
                            last_event = message["id"]
                        yield message
                return
            except Unreachable:
                if asyncio.get_running_loop().time() - failing_since > RECONNECT_SECONDS:
                    raise
            await asyncio.sleep(_RETRY_SECONDS)

    async def _socket(self, path: str) -> AsyncGenerator[Json, None]:
        """The messages of one connection; returns only when the daemon closed it because it is done."""
        try:
            async with self._session.ws_connect(f"{self._server}{path}") as socket:
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.TEXT:
                        content = json.loads(message.data)
                        if content["type"] == "error":
                            raise Unreachable(content["error"]["message"])
                        yield content
                if socket.close_code != aiohttp.WSCloseCode.OK:
                    raise self._unreachable()
        except aiohttp.ClientError as error:
            raise self._unreachable() from error

    async def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Json:
        try:
            async with self._session.request(
                method, f"{self._server}{path}", json=body, params=query
            ) as response:
                answer = await response.json()
                if response.status >= 400:
                    raise _refusal(response.status, answer)
        except (aiohttp.ContentTypeError, ValueError) as error:
            raise ApiError(f"{self._server} does not answer as a mover daemon does") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._unreachable() from error
        content: Json = answer
        return content

    def _unreachable(self) -> Unreachable:
        return Unreachable(
            f"no daemon answers at {self._server}",
            hint="Start it with `mover serve`, or name another one with --server or MOVER_SERVER.",
        )


@asynccontextmanager
async def connect(server: str, token: str) -> AsyncIterator[ApiClient]:
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    async with aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {token}"}, timeout=timeout
    ) as session:
        yield ApiClient(session, server)


def _refusal(status: int, answer: Json) -> ApiError:
    if "errors" in answer:
        reasons = tuple(f"{wrong['field']}: {wrong['message']}" for wrong in answer["errors"])
        return ApiError("the request is refused", status=status, reasons=reasons)
    error = answer["error"]
    return ApiError(error["message"], hint=error.get("hint"), status=status, kind=error["code"])
