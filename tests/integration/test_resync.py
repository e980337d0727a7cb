"""After changes were lost, only ranges that differ are copied anew, and at every consistent point what counts
as there is what the source has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from mover.core.errors import CannotResynchronise
from mover.core.ids import Side
from mover.engine import resync
from mover.engine.resync import Resync
from mover.postgres import publication
from mover.postgres.digests import open_readers
from tests.integration.test_follow import differences_at_a_point, expect_equal
from tests.support.rig import TENANT, RealClock, Rig, Subject, execute, hammering, rig

ROWS, CHUNKS = 6000, 7  # of 1,000 rows, the last one with those that come behind it
# On the target, by nobody who tells us: a row is gone, one is too many, one is another one.
DAMAGE = (
    "delete from app.item where id = 2500",
    "insert into app.item (tenant_id, id) values ('{tenant}', 3999999)",
    "update app.item set name = 'other' where id = 1500",
)


@asynccontextmanager
async def resynchronising(r: Rig, shape: object, wave_seconds: float) -> AsyncIterator[Resync]:
    async def unchanged() -> None:
        pass

    async def say(text: str) -> None:
        pass

    async with open_readers(r.source, Side.SOURCE) as ours, open_readers(r.target, Side.TARGET) as theirs:
        flow = SimpleNamespace(
            shape=shape,
            link=SimpleNamespace(
                copier=r.copier, target=r.writer, source_readers=ours, target_readers=theirs
            ),
            follower=r.follower,
            verification=SimpleNamespace(on_rows=lambda rows: None),
            check_schemas=unchanged,
        )
        yield Resync(flow, TENANT, RealClock(), wave_seconds, say)


async def lose_everything(r: Rig) -> None:
    """The slot, or what was written down, and the progress."""
    start = None
    if r.stream is not None:
        await publication.drop_slot(r.source, r.migration)
        start = await publication.create_slot(r.source, r.migration, _say)
    await publication.store_new_start(r.source, r.target, r.copier._identity, start)
    r.writer.set_copied({})


async def _say(text: str) -> None:
    pass


@pytest.mark.parametrize("wave_seconds", [0, 600], ids=["many waves", "one wave"])
async def test_only_what_differs_is_copied_anew(pair, capture, wave_seconds, monkeypatch):
    monkeypatch.setattr(resync, "CHUNKS_AT_ONCE", 2)
    async with rig(pair.source, pair.target, rows=ROWS, capture=capture) as r:
        async with r.following():
            await r.copy().run()
        others = "select count(*), sum(hashtext(t::text)) from app.item t where tenant_id <> %s"
        before = execute(pair.target, others, TENANT)
        async with hammering(pair.source):
            for statement in DAMAGE:
                execute(pair.target, statement.format(tenant=TENANT))
            execute(pair.source, "update app.item set amount = -1 where id = 4500")
            await lose_everything(r)
            copied: list[int] = []
            async with resynchronising(r, r.subject.shape, wave_seconds) as again, r.following():
                await again.run(everything=False)
                copy = r.copy()
                copy.on_chunk = lambda rows, size: copied.append(rows)
                await copy.run()
                assert await differences_at_a_point(r) == []
                assert 4 <= len(copied) < CHUNKS
        assert execute(pair.target, others, TENANT) == before
        async with r.following():
            await expect_equal(r)


async def test_what_nobody_has_copied_is_compared_by_ranges_too(pair, capture):
    """As on the way back, whose rows were there before it began."""
    async with rig(pair.source, pair.target, rows=ROWS, capture=capture) as r:
        async with r.following():
            await r.copy().run()
        execute(pair.target, "delete from mover.chunk")
        for statement in DAMAGE:
            execute(pair.target, statement.format(tenant=TENANT))
        await lose_everything(r)
        copied: list[int] = []
        async with resynchronising(r, r.subject.shape, 600) as again, r.following():
            await again.run(everything=True)
            copy = r.copy()
            copy.on_chunk = lambda rows, size: copied.append(rows)
            await copy.run()
            await expect_equal(r)
        assert len(copied) == len(DAMAGE)


async def test_where_foreign_keys_act_nothing_is_taken_back(pair):
    async with rig(pair.source, pair.target, rows=10) as r:
        async with r.following():
            await r.copy().run()
        execute(pair.target, "delete from app.item where id = 1")
        await lose_everything(r)
        async with resynchronising(r, Subject(careful=True).shape, 600) as again, r.following():
            with pytest.raises(CannotResynchronise, match=r"app\.item \(1 of its ranges\)"):
                await again.run(everything=False)
    assert execute(pair.target, "select count(*) from app.item where tenant_id = %s", TENANT) == [(9,)]
