"""One direction in which a tenant's rows flow: its connections, its follower, and the proof that both sides
are equal."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from cutover.ports import Sequences
from mover.core.ids import TenantId
from mover.core.migration import Progress
from mover.core.tables import Shape
from mover.engine.follow import Follower, follower_of
from mover.engine.observer import Observer
from mover.engine.site import Link, Site
from mover.engine.verify import Verification

ReadStamp = Callable[[], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Flow:
    """From the site's source to its target, while it is open."""

    site: Site
    shape: Shape
    link: Link
    follower: Follower
    verification: Verification
    sequences: Sequences
    check_schemas: Callable[[], Coroutine[None, None, None]]


@asynccontextmanager
async def open_flow(
    site: Site,
    shape: Shape,
    tenant: TenantId,
    progress: Progress,
    observer: Observer,
    check_schemas: Callable[[ReadStamp], Coroutine[None, None, None]],
    if_they_differ: str,
) -> AsyncIterator[Flow]:
    """Nothing moves yet. `check_schemas` raises when the stamp that it reads is not the planned one;
    `if_they_differ` is the hint then."""

    def on_rows(rows: int) -> None:
        progress.rows_compared += rows
        observer.rows_verified(rows)

    async with site.link(shape) as link, AsyncExitStack() as closing:
        follower = follower_of(link, progress, observer.changes_applied)
        closing.push_async_callback(follower.close)
        check = functools.partial(check_schemas, link.schema_stamp)
        verification = Verification(
            tenant=tenant,
            tables=shape.tables,
            follower=follower,
            target=link.target,
            source_readers=link.source_readers,
            target_readers=link.target_readers,
            on_rows=on_rows,
            check_schemas=check,
            on_mismatch=observer.integrity_failed,
            hint=if_they_differ,
        )
        closing.push_async_callback(verification.close)
        sequences = await closing.enter_async_context(site.sequences(shape))
        yield Flow(site, shape, link, follower, verification, sequences, check)
