"""The follower's invariant: at a consistent point the target is what the source's snapshot sees."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from mover.core.snapshot import Snapshot
from tests.support.rig import Rig, hammering, rig


async def test_the_target_is_the_source_at_every_consistent_point(pair):
    async with rig(pair.source, pair.target) as r, asyncio.TaskGroup() as tasks:
        await r.follower.start()
        following = tasks.create_task(r.follower.run())
        async with hammering(pair.source):
            await r.copy().run()
            for _ in range(25):
                assert await differences_at_a_point(r) == []
        await r.follower.catch_up_once()
        assert r.target_rows() == r.source_rows()
        following.cancel()


async def test_comparing_positions_instead_of_xids_would_lose_rows(pair):
    """The snapshot's set is often not a prefix of the stream: this is what the xid rule is for."""

    class ByPosition(Snapshot):
        def sees(self, xid: int) -> bool:
            return True  # everything that stands before the mark

    async with rig(pair.source, pair.target) as r, asyncio.TaskGroup() as tasks:
        await r.follower.start()
        following = tasks.create_task(r.follower.run())
        async with hammering(pair.source, clients=8):
            await r.copy().run()
            r.follower.source = Blindfolded(r.follower.source, ByPosition)
            wrong = False
            for _ in range(200):
                wrong = wrong or await differences_at_a_point(r) != []
                if wrong:
                    break
        following.cancel()
        assert wrong, "the weakened rule went unnoticed: this test proves nothing"


async def test_copying_in_many_small_waves_under_writes_ends_equal(pair):
    async with rig(pair.source, pair.target, rows=6000) as r, asyncio.TaskGroup() as tasks:
        await r.follower.start()
        following = tasks.create_task(r.follower.run())
        async with hammering(pair.source, clients=3):
            copy = r.copy(wave_seconds=0.05)
            await copy.run()
            assert await differences_at_a_point(r) == []
        await r.follower.catch_up_once()
        assert r.target_rows() == r.source_rows()
        following.cancel()


async def test_a_follower_that_starts_again_applies_nothing_twice(pair):
    async with rig(pair.source, pair.target) as r:
        await r.follower.start()
        async with asyncio.TaskGroup() as tasks:
            following = tasks.create_task(r.follower.run())
            async with hammering(pair.source):
                await r.copy().run()
                following.cancel()
                await asyncio.wait([following])
                for _ in range(5):
                    await r.follower.start()
                    again = tasks.create_task(r.follower.run())
                    assert await differences_at_a_point(r) == []
                    again.cancel()
                    await asyncio.wait([again])
            await r.follower.start()
            last = tasks.create_task(r.follower.run())
            await r.follower.catch_up_once()
            assert r.target_rows() == r.source_rows()
            last.cancel()


async def differences_at_a_point(r: Rig) -> list:
    async with AsyncExitStack() as lifetime:
        async with r.follower.hold(lifetime) as point:
            source, target = await asyncio.gather(
                asyncio.to_thread(r.source_rows, point.snapshot_id), asyncio.to_thread(r.target_rows)
            )
    return sorted(set(source) ^ set(target), key=str)


class Blindfolded:
    """A source whose points claim to see what their snapshot does not."""

    def __init__(self, source, kind) -> None:
        self._source, self._kind = source, kind

    def __getattr__(self, name):
        return getattr(self._source, name)

    def consistent_point(self):
        from contextlib import asynccontextmanager
        from dataclasses import replace

        @asynccontextmanager
        async def point():
            async with self._source.consistent_point() as true:
                s = true.snapshot
                yield replace(true, snapshot=self._kind(s.xmin, s.xmax, s.in_progress))

        return point()
