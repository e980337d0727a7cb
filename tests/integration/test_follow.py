"""The follower's invariant: at a consistent point the target is what the source's snapshot sees."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import psycopg
import pytest

from mover.core.copying import CopiedRanges
from mover.core.errors import ApplyConflict, Unreachable
from mover.core.ids import Capture, new_mark
from mover.core.migration import Progress
from mover.core.snapshot import Snapshot
from mover.engine import follow_stream
from mover.engine.follow_stream import StreamFollower
from tests.conftest import every_combination
from tests.support.rig import ITEM, OTHER, TENANT, Rig, execute, hammering, rig
from tests.support.waiting import until


@every_combination
async def test_the_target_is_the_source_at_every_consistent_point(pair, capture):
    async with rig(pair.source, pair.target, capture=capture) as r, r.following():
        async with hammering(pair.source):
            await r.copy().run()
            for _ in range(30):
                assert await differences_at_a_point(r) == []
        await expect_equal(r)


async def test_comparing_positions_instead_of_xids_would_lose_rows(pair):
    """The snapshot's set is not always a prefix of the stream: this is what the xid rule is for."""

    class ByPosition(Snapshot):
        def sees(self, xid: int) -> bool:
            return True  # everything that stands before the mark

    async with rig(pair.source, pair.target) as r, r.following():
        await r.copy().run()
        source = r.follower.source
        r.follower.source = Belated(source, pair.source, Snapshot)
        assert await differences_at_a_point(r) == []
        r.follower.source = Belated(source, pair.source, ByPosition)
        assert await differences_at_a_point(r) != [], "the weakened rule went unnoticed"


async def test_copying_in_many_small_waves_under_writes_ends_equal(pair, capture):
    async with rig(pair.source, pair.target, rows=6000, capture=capture) as r, r.following():
        async with hammering(pair.source, clients=3):
            await r.copy(wave_seconds=0).run()  # one chunk each worker and wave
            assert await differences_at_a_point(r) == []
        await expect_equal(r)


async def test_a_follower_that_starts_again_applies_nothing_twice(pair, capture):
    async with rig(pair.source, pair.target, capture=capture) as r:
        async with hammering(pair.source):
            async with r.following():
                await r.copy().run()
            for _ in range(5):
                async with r.following():
                    assert await differences_at_a_point(r) == []
        async with r.following():
            await expect_equal(r)


async def test_no_point_passes_over_a_batch_that_could_not_be_applied(pair, capture):
    """Its changes were taken from the stream: whoever waited for a turn meanwhile must not go on without."""
    async with rig(pair.source, pair.target, capture=capture) as r:
        async with r.following() as task:
            await r.copy().run()
            execute(pair.target, "insert into app.item (tenant_id, id) values (%s, 8000001)", OTHER)
            execute(pair.source, "insert into app.item (tenant_id, id) values (%s, 8000001)", TENANT)
            await asyncio.wait([task])
            with pytest.raises(ApplyConflict):
                await differences_at_a_point(r)
        execute(pair.target, "delete from app.item where id = 8000001")
        async with r.following():
            assert await differences_at_a_point(r) == []
            await expect_equal(r)


async def test_nothing_is_applied_after_a_point_that_could_not_be_reached(pair, capture):
    """Whoever holds takes from the stream, too."""
    async with rig(pair.source, pair.target, capture=capture) as r:
        async with r.following():
            await r.copy().run()
        await r.follower.start()
        execute(pair.target, "insert into app.item (tenant_id, id) values (%s, 8000001)", OTHER)
        execute(pair.source, "insert into app.item (tenant_id, id) values (%s, 8000001)", TENANT)
        with pytest.raises(ApplyConflict):
            await differences_at_a_point(r)
        execute(pair.target, "delete from app.item where id = 8000001")
        execute(pair.source, "insert into app.item (tenant_id, id) values (%s, 8000002)", TENANT)
        if capture is Capture.WAL:
            with pytest.raises(ApplyConflict):
                await r.follower.catch_up_once()
        async with r.following():
            await expect_equal(r)


async def test_a_row_that_enters_the_tenant_brings_the_values_that_were_not_sent(pair, capture):
    """Its large values did not change, so the stream leaves them out, even of the INSERT it makes of it."""
    async with rig(pair.source, pair.target, capture=capture) as r, r.following():
        await r.copy().run()
        execute(pair.source, "UPDATE app.item SET tenant_id = %s WHERE tenant_id = %s", TENANT, OTHER)
        execute(pair.source, "UPDATE app.item SET name = 'late' WHERE id = 10000007")
        execute(pair.source, "UPDATE app.item SET id = 9 + 10000000000 WHERE id = 10000009")
        await expect_equal(r)
        assert len(r.target_rows()) == 1000


async def test_a_half_copied_table_takes_what_crosses_its_boundary(pair, capture):
    async with rig(pair.source, pair.target, rows=4000, capture=capture) as r, r.following():
        await copy_chunks(r, {2, 3})
        execute(
            pair.source, "UPDATE app.item SET id = id + 20000 WHERE mod(id, 3) = 0 AND tenant_id = %s", TENANT
        )
        execute(pair.source, "UPDATE app.item SET id = 1002 + (id - 1) / 2 WHERE mod(id, 6) = 1 AND id < 900")
        execute(pair.source, "UPDATE app.item SET name = 'changed' WHERE id BETWEEN 900 AND 1100")
        execute(pair.source, "DELETE FROM app.item WHERE id BETWEEN 2900 AND 3100")
        execute(pair.source, "UPDATE app.item SET id = 1500 WHERE id = 20003 AND tenant_id = %s", TENANT)
        await r.follower.catch_up_once()
        inside = [row for row in r.source_rows() if 1000 < row[0] <= 3000]
        assert r.target_rows() == inside
        await copy_chunks(r, {1, 4, 5})
        await expect_equal(r)


async def test_a_truncation_empties_the_tenants_rows_only_and_in_its_place(pair, capture):
    async with rig(pair.source, pair.target, capture=capture) as r, r.following():
        await r.copy().run()
        execute(pair.target, "INSERT INTO app.item VALUES (%s, 99000000, 'of another tenant')", OTHER)
        truncate(pair.source, before="UPDATE app.item SET name = 'x'", after=INSERT_AGAIN)
        await expect_equal(r)
        assert len(r.target_rows()) == 300
        assert execute(pair.target, "SELECT count(*) FROM app.item WHERE tenant_id = %s", OTHER) == [(1,)]


async def test_a_half_copied_table_can_be_truncated(pair, capture):
    async with rig(pair.source, pair.target, rows=3000, capture=capture) as r, r.following():
        await copy_chunks(r, {1, 3})
        truncate(pair.source, before="DELETE FROM app.item WHERE id = 5", after=INSERT_AGAIN)
        await r.follower.catch_up_once()
        assert r.target_rows() == [row for row in r.source_rows() if not 1000 < row[0] <= 2000]
        await copy_chunks(r, {2})
        await expect_equal(r)


async def test_a_transaction_too_large_for_memory_makes_a_point_in_parts(pair, monkeypatch):
    monkeypatch.setattr(follow_stream, "BATCH_BYTES", 200_000)
    async with rig(pair.source, pair.target, rows=2000) as r, r.following():
        await r.copy().run()
        async with r.follower.paused():
            execute(pair.source, "UPDATE app.item SET big = big || 'x'")
        assert await differences_at_a_point(r) == []


async def test_a_mark_that_cannot_be_emitted_leaves_no_snapshot_behind(pair):
    async with rig(pair.source, pair.target) as r, r.following() as running:
        execute(
            pair.source,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name ~ 'marks$'",
        )
        with pytest.raises(Unreachable):
            await differences_at_a_point(r)
        holders = execute(
            pair.source, "SELECT count(*) FROM pg_stat_activity WHERE application_name ~ '/point$'"
        )
        assert holders == [(0,)]
        assert not running.done()


async def test_a_point_whose_mark_is_lost_is_given_up(pair):
    """The snapshot is there, its mark is not: nothing was applied for it, and following goes on."""
    async with rig(pair.source, pair.target) as r, r.following():
        await r.copy().run()
        source = r.follower.source
        r.follower.source = Markless(source)
        with pytest.raises(Unreachable):
            await differences_at_a_point(r)
        r.follower.source = source
        execute(pair.source, "UPDATE app.item SET name = 'after'")
        assert await differences_at_a_point(r) == []


async def differences_at_a_point(r: Rig) -> list:
    async with AsyncExitStack() as lifetime:
        async with r.follower.hold(lifetime) as point:
            source, target = await asyncio.gather(
                asyncio.to_thread(r.source_rows, point.snapshot_id), asyncio.to_thread(r.target_rows)
            )
    return sorted(set(source) ^ set(target), key=str)


async def expect_equal(r: Rig) -> None:
    await r.follower.catch_up_once()
    assert r.target_rows() == r.source_rows()


async def copy_chunks(r: Rig, numbers: Collection[int]) -> None:
    """One wave, of these chunks."""
    async with AsyncExitStack() as lifetime, r.follower.hold(lifetime) as point:
        chunks = (await r.copier.chunks()).get(ITEM.source)
        chunks = chunks or await r.copier.plan_chunks(ITEM, point.snapshot_id)
        async with r.copier.worker(point.snapshot_id) as worker:
            for chunk in chunks:
                if chunk.number in numbers:
                    await worker.copy(ITEM, chunk)
        recorded = await r.copier.chunks()
        r.writer.set_copied({ITEM.source: CopiedRanges.of(recorded[ITEM.source])})


async def test_after_a_wave_that_broke_off_nothing_is_applied_before_a_new_start(pair, capture):
    """Which chunks that wave has put on the target, nobody has told the applier."""
    async with rig(pair.source, pair.target, capture=capture) as r:
        async with hammering(pair.source) as committed:
            async with r.following() as following:
                with pytest.raises(Unreachable):
                    async with AsyncExitStack() as lifetime, r.follower.hold(lifetime) as point:
                        (chunk,) = await r.copier.plan_chunks(ITEM, point.snapshot_id)
                        async with r.copier.worker(point.snapshot_id) as worker:
                            await worker.copy(ITEM, chunk)
                        raise Unreachable("the connection to the next chunk broke")
                enough = committed[0] + 50
                await until(lambda: committed[0] > enough)
                await asyncio.wait([following], timeout=5)
        recorded = await r.copier.chunks()
        r.writer.set_copied({ITEM.source: CopiedRanges.of(recorded[ITEM.source])})
        async with r.following():
            await expect_equal(r)


INSERT_AGAIN = (
    "INSERT INTO app.item SELECT '00000000-0000-0000-0000-000000000001', g * 10, 'again', 1, 'b'"
    " FROM generate_series(1, 300) g"
)


def truncate(url: str, before: str, after: str) -> None:
    """As the guard's trigger tells of it."""
    with psycopg.connect(url) as conn:
        conn.execute(before)
        conn.execute("TRUNCATE app.item")
        conn.execute("""SELECT pg_logical_emit_message(true, 'mover.truncate', '["app", "item"]')""")
        conn.execute(after)


@asynccontextmanager
async def a_commit_that_no_snapshot_sees_yet(url: str) -> AsyncIterator[None]:
    """It stands in the WAL, and in every snapshot as in progress: it waits for a standby that nobody is."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    configure(url, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    try:
        while True:  # until the server has noticed that there is somebody to wait for
            change = "UPDATE app.item SET amount = amount + 1 WHERE id = 7"
            committing = asyncio.create_task(asyncio.to_thread(execute, url, change))
            await until(lambda: committing.done() or execute(url, waiting) == [(1,)])  # noqa: B023
            if not committing.done():
                break
        yield
    finally:
        configure(url, "ALTER SYSTEM RESET synchronous_standby_names")
    await committing


def configure(url: str, statement: str) -> None:
    execute(url, statement)
    execute(url, "SELECT pg_reload_conf()")


class Wrapped:
    def __init__(self, source) -> None:
        self._source = source

    def __getattr__(self, name):
        return getattr(self._source, name)


class Belated(Wrapped):
    """A source at whose points a transaction has committed before the mark that the snapshot does not see;
    what it does see is for `kind` to say."""

    def __init__(self, source, url, kind) -> None:
        super().__init__(source)
        self._url, self._kind = url, kind

    @asynccontextmanager
    async def consistent_point(self):
        async with a_commit_that_no_snapshot_sees_yet(self._url), self._source.consistent_point() as true:
            s = true.snapshot
            yield replace(true, snapshot=self._kind(s.xmin, s.xmax, s.in_progress))


class Counting(Wrapped):
    points = 0

    @asynccontextmanager
    async def consistent_point(self):
        async with self._source.consistent_point() as point:
            self.points += 1
            yield point


async def test_a_point_sees_all_that_is_applied(pair):
    """Else a row is copied as it was before a change that the follower has passed."""
    async with rig(pair.source, pair.target) as r, r.following():
        source = r.follower.source = Counting(r.follower.source)
        async with a_commit_that_no_snapshot_sees_yet(pair.source):
            await r.follower.catch_up_once()
            copying = asyncio.create_task(r.copy().run())
            await until(lambda: r.follower.progress.waiting_for or copying.done())
            assert not copying.done()
            assert source.points <= 1, "a wait must not cost a connection each time it looks"
        await copying
        await expect_equal(r)


async def test_a_point_sees_all_that_was_applied_before_a_new_start(pair):
    """Another daemon knows nothing of it but what the slot sends again."""
    async with rig(pair.source, pair.target) as r:
        async with a_commit_that_no_snapshot_sees_yet(pair.source):
            async with r.following():
                await r.follower.catch_up_once()
                await r.follower.catch_up_once()  # what is confirmed by now must not hold it
            before = r.follower
            r.follower = StreamFollower(before.stream, before.source, r.writer, Progress())
            async with r.following():
                source = r.follower.source = Counting(r.follower.source)
                copying = asyncio.create_task(r.copy().run())
                await until(lambda: r.follower.progress.waiting_for or copying.done())
                assert not copying.done()
                assert "standby" in r.follower.progress.waiting_for
                assert source.points <= 1, "a wait must not cost a connection each time it looks"
                configure(pair.source, "ALTER SYSTEM RESET synchronous_standby_names")
                await copying
                assert r.follower.progress.waiting_for is None
                await expect_equal(r)


async def test_what_the_slot_sends_again_takes_the_progress_nowhere(pair, monkeypatch):
    monkeypatch.setattr(follow_stream, "LOOK_INTERVAL_S", 3600.0)
    monkeypatch.setattr(follow_stream, "BATCH_BYTES", 1)  # each transaction by itself
    async with rig(pair.source, pair.target) as r:
        async with r.following():
            await r.copy().run()
            for number in range(5):
                execute(
                    pair.source, "insert into app.item (tenant_id, id) values (%s, %s)", TENANT, 9000 + number
                )
            await r.follower.catch_up_once()
        reached, _ = await r.writer.progress()
        for _ in range(2):
            async with r.following():
                await until(lambda: r.follower._unseen)
            assert (await r.writer.progress())[0] == reached
        async with r.following():
            assert await differences_at_a_point(r) == []
            await expect_equal(r)


async def test_what_is_applied_is_not_remembered_for_ever(pair, monkeypatch):
    monkeypatch.setattr("mover.engine.follow_stream.APPLIED_XIDS", 3)
    async with rig(pair.source, pair.target) as r, r.following():
        await r.copy().run()
        for number in range(10):
            execute(pair.source, "UPDATE app.item SET amount = %s WHERE id = 7", number)
            await r.follower.catch_up_once()
            assert len(r.follower._unseen) <= 3
        await expect_equal(r)


async def test_a_point_is_found_behind_any_number_of_other_migrations_marks(pair, monkeypatch):
    monkeypatch.setattr(follow_stream, "SEEN_MARKS", 3)
    async with rig(pair.source, pair.target) as r, r.following():
        await r.copy().run()
        others = (
            "SELECT count(pg_logical_emit_message(true, 'mover.mark', md5(g::text)))"
            " FROM generate_series(1, 10) g"
        )

        class Outnumbered(Wrapped):
            async def mark(self, token: str) -> None:
                await self._source.mark(token)
                await asyncio.to_thread(execute, pair.source, others)
                await until(lambda: len(r.follower._seen) == 3 or len(marks_of(r)) > 10)

        r.follower.source = Outnumbered(r.follower.source)
        async with asyncio.timeout(20):
            assert await differences_at_a_point(r) == []
            await r.follower.catch_up_once()


def marks_of(r: Rig) -> list[str]:
    return [mark for piece in r.stream._queue for mark in piece.marks]


async def test_messages_that_are_not_our_marks_take_no_memory(pair):
    async with rig(pair.source, pair.target) as r, r.following():
        await r.copy().run()
        async with r.follower.paused():
            execute(
                pair.source,
                "SELECT count(pg_logical_emit_message(true, 'mover.mark', repeat('x', 1000)))"
                " FROM generate_series(1, 1000)",
            )
            mark = new_mark()
            passing = asyncio.create_task(r.follower.reached(mark))
            execute(pair.source, "SELECT pg_logical_emit_message(true, 'mover.mark', %s)", mark)
            await until(lambda: mark in marks_of(r))
            assert marks_of(r) == [mark]
        await passing


async def test_nobody_is_cancelled_with_another_who_waits_for_the_same(pair):
    async with rig(pair.source, pair.target) as r, r.following():
        await r.copy().run()
        mark = new_mark()
        first, second = (asyncio.create_task(r.follower.reached(mark)) for _ in range(2))
        await until(lambda: len(r.follower._awaited.get(mark, ())) == 2)
        first.cancel()
        await asyncio.wait([first])
        execute(pair.source, "SELECT pg_logical_emit_message(true, 'mover.mark', %s)", mark)
        await second


async def test_who_comes_after_a_cancelled_hold_is_not_cancelled(pair, capture):
    async with rig(pair.source, pair.target, capture=capture) as r, r.following() as following:
        await r.copy().run()
        inside = asyncio.Event()

        async def hold() -> None:
            async with AsyncExitStack() as lifetime, r.follower.hold(lifetime):
                inside.set()
                await asyncio.get_running_loop().create_future()

        holding = asyncio.create_task(hold())
        await inside.wait()
        holding.cancel()
        await asyncio.wait([holding])
        with pytest.raises(Unreachable):
            await differences_at_a_point(r)
        with pytest.raises(Unreachable):
            await following


class Markless(Wrapped):
    """A source that breaks between a point's snapshot and its mark."""

    @asynccontextmanager
    async def consistent_point(self):
        async with self._source.consistent_point():
            raise Unreachable("source: the connection broke")
            yield
