"""The stream from a slot to the target: breaks, positions, back pressure, memory."""

from __future__ import annotations

import asyncio
import os
import threading

import psutil
import pytest

from mover.core.errors import SlotLost, Unreachable
from mover.core.ids import Lsn, TableRef
from mover.core.tables import Column, MovedTable
from mover.demo.servers import PostgresServer
from mover.postgres import replication
from mover.postgres.points import Points
from tests.conftest import Pair
from tests.support.rig import OTHER, TENANT, Subject, execute, rig
from tests.support.waiting import until


@pytest.fixture
def one_pair(make_database, pg16, pg18) -> Pair:
    """For what takes long and does not depend on the version."""
    return Pair(make_database(pg16), make_database(pg18), pg16, pg18)


IDENTITY_INDEX = (
    "CREATE UNIQUE INDEX item_identity ON app.item (tenant_id, id);"
    "ALTER TABLE app.item REPLICA IDENTITY USING INDEX item_identity"
)


async def test_a_large_value_that_did_not_change_stays(pair):
    async with rig(pair.source, pair.target, rows=400) as r, r.following():
        execute(pair.source, "UPDATE app.item SET big = repeat(md5(id::text), 32768) WHERE id <= 2")  # 1 MB
        await r.copy().run()
        execute(pair.source, "UPDATE app.item SET name = 'one by one' WHERE id <= 2")
        execute(pair.source, "UPDATE app.item SET name = 'as sets', amount = NULL WHERE id <= 400")
        await r.follower.catch_up_once()
        assert r.target_rows() == r.source_rows()
        large = execute(pair.target, "SELECT length(big), name FROM app.item WHERE id <= 2")
        assert large == [(1 << 20, "as sets")] * 2


async def test_a_large_text_key_that_did_not_change_is_known(pair):
    """A key of 2 kB is TOASTed like any value; the stream then sends it with the old row only."""
    table = MovedTable(
        TableRef("app", "item"),
        TableRef("app", "item"),
        (
            Column("tenant_id", "uuid", "uuid", not_null=True),
            Column("id", "text", "text", not_null=True, collatable=True),
            Column("other", "text", "text", collatable=True),
            Column("n", "integer", "integer"),
        ),
        ("id",),
        "tenant_id",
    )
    ddl = (
        "CREATE SCHEMA app; CREATE TABLE app.item (tenant_id uuid NOT NULL, id text PRIMARY KEY, other text,"
        " n integer); ALTER TABLE app.item ALTER id SET STORAGE EXTERNAL, ALTER other SET STORAGE EXTERNAL"
    )
    subject = Subject((table,), ddl, IDENTITY_INDEX)
    async with rig(pair.source, pair.target, subject=subject) as r, r.following():
        execute(
            pair.source,
            "INSERT INTO app.item SELECT %s, g || repeat('k', 2400), repeat('o', 3000), g"
            " FROM generate_series(1, 300) g",
            TENANT,
        )
        await r.copy().run()
        execute(pair.source, "UPDATE app.item SET n = n + 1 WHERE n <= 5")
        execute(pair.source, "UPDATE app.item SET n = n + 1")
        await r.follower.catch_up_once()
        query = 'SELECT n, md5(id), md5(other) FROM app.item ORDER BY id COLLATE "C"'
        assert execute(pair.target, query) == execute(pair.source, query)


async def test_a_huge_transaction_flows_through_in_one_target_transaction(one_pair):
    rows = 300_000
    async with rig(one_pair.source, one_pair.target, rows=1) as r, r.following():
        await r.copy().run()
        with Peak() as peak:
            seen = set()
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(watch_count(one_pair.target, seen), name="watch the target")
                await asyncio.to_thread(
                    execute,
                    one_pair.source,
                    "INSERT INTO app.item SELECT %s, g, 'name ' || g, g, repeat('x', 100)"
                    " FROM generate_series(2, %s) g",
                    TENANT,
                    rows,
                )
                await r.follower.catch_up_once()
                watching.cancel()
        seen.add(await asyncio.to_thread(count, one_pair.target))
        assert seen == {1, rows}
        assert peak.growth_bytes < 150 << 20  # 300,000 decoded rows would take three times as much
        assert r.target_rows() == r.source_rows()


async def test_after_a_broken_connection_it_goes_on_exactly_where_the_target_stands(pair):
    async with rig(pair.source, pair.target) as r:
        async with r.following() as running:
            await r.copy().run()
            execute(pair.source, "UPDATE app.item SET amount = amount + 1")
            end_stream(pair.source, r.slot)
            with pytest.raises(Unreachable):
                await running
            with pytest.raises(Unreachable):
                await r.follower.catch_up_once()
        execute(pair.source, "UPDATE app.item SET amount = amount + 1")
        async with r.following():
            await r.follower.catch_up_once()
            assert r.target_rows() == r.source_rows()


async def test_a_break_within_a_huge_transaction_leaves_nothing_of_it(pair, monkeypatch):
    monkeypatch.setattr(replication, "QUEUE_LIMIT_BYTES", 1 << 20)
    monkeypatch.setattr(replication, "PIECE_BYTES", 1 << 18)
    async with rig(pair.source, pair.target) as r:
        async with r.following() as running:
            await r.copy().run()
            before = r.target_rows()
            async with r.follower.paused():  # the queue fills, the rest of the transaction waits
                execute(
                    pair.source,
                    "INSERT INTO app.item SELECT %s, g, 'x', g, repeat('x', 900)"
                    " FROM generate_series(1000, 21000) g",
                    TENANT,
                )
                await until(lambda: r.stream._queued_bytes >= 1 << 20)
                end_stream(pair.source, r.slot)
            with pytest.raises(Unreachable):
                await running
            assert r.target_rows() == before
        async with r.following():
            await r.follower.catch_up_once()
            assert r.target_rows() == r.source_rows()


@pytest.mark.parametrize("end", ["restart", "kill9"])
async def test_a_restart_of_the_source_is_a_break_like_any_other(end, make_database, pg18):
    """After a crash the slot's position is that of the last checkpoint: changes come again."""
    with PostgresServer(16, fsync=False, settings={"shared_buffers": "16MB"}) as server:
        source_url, target_url = server.create_database("test_source"), make_database(pg18)
        async with rig(source_url, target_url) as r:
            async with r.following() as running:
                await r.copy().run()
                execute(source_url, "CHECKPOINT")
                execute(source_url, "UPDATE app.item SET amount = amount + 1")
                await r.follower.catch_up_once()
                await asyncio.to_thread(getattr(server, end))
                if end == "kill9":
                    await asyncio.to_thread(server.come_back)
                with pytest.raises(Unreachable):
                    await running
            execute(source_url, "UPDATE app.item SET amount = amount + 1, id = id + 1000")
            async with Points.open(r.source) as points:
                r.follower.source = points
                async with r.following():
                    await r.follower.catch_up_once()
                    assert r.target_rows() == r.source_rows()


async def test_what_is_told_counts_as_much_as_rows(pair):
    """Other tenants' owners may go by the million in one transaction."""
    tell = """SELECT count(pg_logical_emit_message(true, 'mover.vacate', json_build_array(
        'app', 'item', json_build_object('id', g::text, 'x', repeat('y', 1000)), json_build_object())::text))
        FROM generate_series(1, 20000) g"""
    async with rig(pair.source, pair.target) as r:
        await r.follower.start()
        execute(pair.source, tell)
        await r.stream.wait()
        (piece,) = r.stream.take(0)
        assert 0 < len(piece.changes) * 1000 < replication.PIECE_BYTES
        assert piece.end_lsn is None


async def test_a_slot_ahead_of_the_progress_is_lost(pair):
    async with rig(pair.source, pair.target) as r:
        execute(pair.source, "UPDATE app.item SET amount = 0")
        execute(pair.source, "SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", r.slot)
        with pytest.raises(SlotLost):
            await r.follower.start()


async def test_a_dropped_slot_is_lost(pair):
    async with rig(pair.source, pair.target) as r:
        execute(pair.source, "SELECT pg_drop_replication_slot(%s)", r.slot)
        with pytest.raises(SlotLost):
            await r.follower.start()


async def test_a_slot_that_the_server_gave_up_is_lost(make_database, pg18):
    settings = {"max_slot_wal_keep_size": "1MB", "max_wal_size": "32MB", "shared_buffers": "16MB"}
    with PostgresServer(16, fsync=False, settings=settings) as server:
        source_url = server.create_database("test_source")
        async with rig(source_url, make_database(pg18)) as r:
            async with r.following() as running:
                async with r.follower.paused():
                    while not is_lost(source_url, r.slot):
                        execute(
                            source_url, "SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000000))"
                        )
                        execute(source_url, "SELECT pg_switch_wal()")
                        execute(source_url, "CHECKPOINT")
                with pytest.raises(Unreachable):
                    await running
            with pytest.raises(SlotLost):
                await r.follower.start()


async def test_a_dropped_publication_ends_the_stream_for_good(pair):
    """PostgreSQL 18 only warns, and would leave out the changes."""
    async with rig(pair.source, pair.target) as r, r.following() as running:
        await r.copy().run()
        execute(pair.source, f"DROP PUBLICATION {r.slot}")
        execute(pair.source, "UPDATE app.item SET amount = 0")
        with pytest.raises(SlotLost):
            await running


async def test_an_idle_tenant_does_not_hold_back_the_others_wal(pair):
    """The slot moves on while only others write, and never ahead of what the target has stored."""
    async with rig(pair.source, pair.target) as r, r.following():
        await r.copy().run()
        start = confirmed(pair.source, r.slot)
        filler = "UPDATE app.item SET big = big || 'x' WHERE tenant_id = %s"
        while confirmed(pair.source, r.slot) < start + (2 << 20):
            await asyncio.to_thread(execute, pair.source, filler, OTHER)
            slot = await asyncio.to_thread(confirmed, pair.source, r.slot)
            stored, _ = await r.writer.progress()
            assert slot <= stored
        assert r.target_rows() == r.source_rows()


async def test_a_reader_that_takes_nothing_is_not_cut_off(one_pair, monkeypatch):
    monkeypatch.setattr(replication, "WAL_SENDER_TIMEOUT", "1s")
    monkeypatch.setattr(replication, "STATUS_INTERVAL_S", 0.2)
    monkeypatch.setattr(replication, "QUEUE_LIMIT_BYTES", 1 << 20)
    async with rig(one_pair.source, one_pair.target, rows=4000) as r, r.following():
        await r.copy().run()
        async with r.follower.paused():
            more_than_fits = "UPDATE app.item SET big = big || 'x'"
            await asyncio.to_thread(execute, one_pair.source, more_than_fits)
            await until(lambda: r.stream._queued_bytes >= 1 << 20)
            pid, started = sender(one_pair.source, r.slot)
            await until(lambda: sender(one_pair.source, r.slot)[1] > started + 5)
            assert sender(one_pair.source, r.slot)[0] == pid
        await r.follower.catch_up_once()
        assert r.target_rows() == r.source_rows()


async def test_messages_of_others_change_nothing(pair):
    """Every slot of the database sees every message, and any role may write one."""
    async with rig(pair.source, pair.target) as r, r.following() as running:
        await r.copy().run()
        for transactional, prefix, content in (
            (True, "mover.mark", "of another migration"),
            (False, "mover.mark", "outside a transaction"),
            (False, "mover.truncate", '["app", "item"]'),
            (True, "mover.truncate", '["another", "table"]'),
            (True, "mover.truncate", "17"),
            (True, "mover.truncate", '["app"'),
            (True, "mover.truncate", '[["app"], {}]'),
            (True, "theirs", "\\x00"),
        ):
            execute(pair.source, "SELECT pg_logical_emit_message(%s, %s, %s)", transactional, prefix, content)
        execute(pair.source, "UPDATE app.item SET name = 'after' WHERE id = 1")
        await r.follower.catch_up_once()
        assert r.target_rows() == r.source_rows() and len(r.target_rows()) == 500
        assert not running.done()


async def test_a_second_reader_takes_the_slot_over(pair):
    async with rig(pair.source, pair.target) as r:
        async with r.following() as old:
            await r.copy().run()
            other = replication.WalStream(r.source, r.slot, r.slot)
            await other.start(r.follower.applied)
            with pytest.raises(Unreachable):
                await old
            await other.close()


class Peak:
    """How much this process's memory grew at most, by samples of a thread."""

    def __enter__(self) -> Peak:
        self._process = psutil.Process(os.getpid())
        self._before = self._most = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self._most = max(self._most, self._process.memory_info().rss)

    @property
    def growth_bytes(self) -> int:
        return self._most - self._before


async def watch_count(url: str, seen: set[int]) -> None:
    while True:
        seen.add(await asyncio.to_thread(count, url))


def count(url: str) -> int:
    return execute(url, "SELECT count(*) FROM app.item WHERE tenant_id = %s", TENANT)[0][0]


def end_stream(url: str, slot: str) -> None:
    execute(
        url,
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s",
        slot,
    )


def sender(url: str, slot: str) -> tuple[int, float]:
    """The walsender's pid, and when it heard of us last, by its own clock."""
    query = (
        "SELECT pid, extract(epoch FROM reply_time)::float8 FROM pg_stat_replication"
        " WHERE pid = (SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s)"
    )
    (row,) = execute(url, query, slot)
    return row


def confirmed(url: str, slot: str) -> Lsn:
    query = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s"
    return Lsn.parse(execute(url, query, slot)[0][0])


def is_lost(url: str, slot: str) -> bool:
    query = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = %s"
    return execute(url, query, slot) == [("lost",)]
