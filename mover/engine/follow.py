"""Keeps the target at the source while the application writes: what every way of following promises.

> Between two of its transactions the target is the source as some snapshot sees it, exactly (restricted to
> the rows copied so far).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Protocol

from mover.core.migration import Progress
from mover.engine.follow_log import LogFollower
from mover.engine.follow_stream import StreamFollower
from mover.engine.site import Link, Stream
from mover.ports import ConsistentPoint


class Follower(Protocol):
    """`run` is its background task."""

    async def start(self) -> None:
        """Go on from the progress that the target has stored."""
        ...

    async def run(self) -> None:
        """Apply what the application writes, for ever; ends with the error that ended it."""
        ...

    async def reached(self, mark: str) -> None:
        """Until everything that committed before `mark` is applied and durable."""
        ...

    async def catch_up_once(self) -> None:
        """Until everything that has committed by now is applied."""
        ...

    async def lag_bytes(self) -> int:
        """How far the target is behind the end of the source's WAL."""
        ...

    def hold(self, lifetime: AsyncExitStack) -> AbstractAsyncContextManager[ConsistentPoint]:
        """Stop where the target is exactly what the point's snapshot sees; go on when the context ends.

        The snapshot itself lives as long as `lifetime`."""
        ...

    def paused(self) -> AbstractAsyncContextManager[None]:
        """Apply nothing meanwhile."""
        ...

    async def close(self) -> None: ...


def follower_of(link: Link, progress: Progress, on_applied: Callable[[Mapping[str, int]], None]) -> Follower:
    """The way in which the link's source is followed; `on_applied` hears how many changes of each kind."""
    if isinstance(link.changes, Stream):
        stream = link.changes
        return StreamFollower(stream.reader, stream.source, link.target, progress, on_applied)
    return LogFollower(link.changes, link.target, progress, on_applied)
