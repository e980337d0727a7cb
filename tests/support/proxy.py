"""A server's address whose connections the test can break, in the ways in which networks and servers do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

PIECE_BYTES = 1 << 16


@dataclass
class Proxy:
    """Forwards to the server of `behind`; `url` is the same database through it.

    A fault lasts until `restore`; the lost answer is one."""

    behind: str
    url: str = ""
    is_cut: bool = False
    has_lost: bool = False  # the answer that `lose_answer` has asked for
    _delay_s: float = 0.0
    _lost_request: bytes | None = None
    _flowing: asyncio.Event = field(default_factory=asyncio.Event)
    _open: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._flowing.set()

    def cut(self) -> None:
        """Every connection ends without a word, and new ones at once."""
        self.is_cut = True
        for serving, writers in self._open.items():
            for writer in writers:
                writer.transport.abort()
            serving.cancel()

    def hold(self) -> None:
        """Nothing passes, and nothing ends: new connections are accepted and hear nothing."""
        self._flowing.clear()

    def slow_down(self, delay_s: float) -> None:
        """What passes is late by so much, each way and piece by piece."""
        self._delay_s = delay_s

    def lose_answer(self, to: bytes) -> None:
        """The next request with these bytes reaches the server; its connection ends when the answer comes."""
        self.has_lost, self._lost_request = False, to

    def restore(self) -> None:
        self.is_cut, self._delay_s, self._lost_request = False, 0.0, None
        self._flowing.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_cut:
            writer.transport.abort()
            return
        serving = asyncio.current_task()
        assert serving is not None
        self._open[serving] = [writer]
        try:
            await self._flowing.wait()
            await self._connected(reader, writer)
        except (OSError, asyncio.CancelledError):  # the server is away, or this connection was cut
            writer.transport.abort()
        finally:
            del self._open[serving]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server, serving = urlsplit(self.behind), asyncio.current_task()
        there_reader, there_writer = await asyncio.open_connection(server.hostname, server.port)
        assert serving is not None
        self._open[serving].append(there_writer)
        answered = asyncio.Event()  # set: the next answer is the one to be lost
        ways = [
            asyncio.create_task(self._pass_on(reader, there_writer, answered, is_request=True)),
            asyncio.create_task(self._pass_on(there_reader, writer, answered, is_request=False)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            writer.close()
            there_writer.close()

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answered: asyncio.Event,
        *,
        is_request: bool,
    ) -> None:
        with suppress(OSError):
            while piece := await reader.read(PIECE_BYTES):
                if is_request and self._lost_request is not None and self._lost_request in piece:
                    self._lost_request = None
                    answered.set()
                elif not is_request and answered.is_set():
                    self.has_lost = True
                    return
                await self._flowing.wait()
                await asyncio.sleep(self._delay_s)
                writer.write(piece)
                await writer.drain()


@asynccontextmanager
async def proxied(url: str) -> AsyncIterator[Proxy]:
    proxy = Proxy(url)
    async with await asyncio.start_server(proxy.serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        parts = urlsplit(url)
        account = parts.netloc.rpartition("@")[0]
        proxy.url = urlunsplit(parts._replace(netloc=f"{account}@127.0.0.1:{port}"))
        try:
            yield proxy
        finally:
            proxy.cut()
