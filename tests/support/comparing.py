"""The engine's comparison over a rig."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from uuid import uuid4

from mover.core.ids import Epoch, MigrationId, Side
from mover.core.secret import Secret
from mover.engine.verify import Verification
from mover.postgres.connect import Database, Identity
from mover.postgres.digests import open_readers
from tests.support.rig import ITEM, TENANT, Rig


@asynccontextmanager
async def verifying(r: Rig) -> AsyncIterator[Verification]:
    identity = Identity(MigrationId(uuid4()), Epoch(1))
    async with AsyncExitStack() as stack:
        source, target = [
            await stack.enter_async_context(open_readers(Database(Secret(url), side, identity), side))
            for url, side in ((r.source_url, Side.SOURCE), (r.target_url, Side.TARGET))
        ]
        yield Verification(
            tenant=TENANT,
            tables=[ITEM],
            follower=r.follower,
            target=r.writer,
            source_readers=source,
            target_readers=target,
            on_rows=lambda rows: None,
            on_mismatch=lambda rows: None,
            check_schemas=unchanged,
            hint="",
        )


async def unchanged() -> None:
    pass
