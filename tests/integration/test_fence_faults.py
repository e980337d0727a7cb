"""The fence when things go wrong: owners that freeze, die or come back, and transactions that do not end."""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process

import psycopg
import pytest
from psycopg import AsyncConnection

from mover.core.errors import CutoverAborted, LeaseLost, MoverError, Unreachable
from mover.postgres import fence, guards, owner
from mover.postgres.fence import WrongState
from tests.support.fencing import (
    CHANGES,
    LEVELS,
    STYLES,
    TENANT,
    Fenced,
    Ledger,
    all_held,
    fenced,
    insert,
    open_transactions,
    quiet,
)

GUARD_WAIT_MS = 400
# An owner of its own process, so that it can be frozen; says when it has begun, then closes the fence.
OWNER = """
import asyncio, sys
from uuid import UUID
from mover.core.ids import Epoch
from mover.core.secret import Secret
from mover.postgres.connect import Database, Identity
from mover.postgres import fence
from tests.support.fencing import TENANT

async def main(url, migration, hold_s):
    fence.MAX_HOLDER_AGE_S = 60
    identity = Identity(UUID(migration), Epoch(1))
    database = Database(Secret(url), "source", identity)
    ours = fence.PgFence(database, TENANT, "core", identity, float(hold_s))
    await ours.get_ready()
    print("ready", flush=True)
    await ours.close(lock_timeout_s=30)
    print("closed", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture(params=["pg16", "pg18"])
def url(request, make_database, monkeypatch) -> str:
    monkeypatch.setattr(fence, "MAX_HOLDER_AGE_S", 60)
    monkeypatch.setattr(guards, "GUARD_WAIT_MS", GUARD_WAIT_MS)
    return make_database(request.getfixturevalue(request.param))


async def owner_process(world: Fenced) -> Process:
    arguments = (world.url, str(world.identity.migration), str(world.hold_s))
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", OWNER, *arguments, stdout=PIPE)
    assert await line_of(process) == b"ready\n"
    return process


async def line_of(process: Process) -> bytes:
    assert process.stdout is not None
    return await process.stdout.readline()


async def write(world: Fenced, token: str = "written") -> None:
    async with world.connect() as conn:
        await insert(conn, token, 0)


async def test_a_reopened_fence_lets_every_waiting_writer_finish(url):
    ledger = Ledger()
    async with (
        fenced(url) as world,
        open_transactions(world, STYLES, "late", 1) as late,
        asyncio.TaskGroup() as tasks,
    ):
        await world.fence.get_ready()
        await world.fence.close(lock_timeout_s=5)
        writing = [tasks.create_task(transaction.write_and_commit(ledger)) for transaction in late]
        await all_held(world, late, writing)
        assert not any(task.done() for task in writing)
        await world.fence.reopen()
        await asyncio.gather(*writing)
        assert ledger.acknowledged == {transaction.token for transaction in late} <= await world.notes()
        assert await world.fence.refused_writes() == 0


async def test_an_owner_frozen_behind_the_lock_frees_the_writers_unharmed(url):
    async with fenced(url, hold_s=0.3) as world, world.connect() as flying:
        await flying.execute("BEGIN")
        await insert(flying, "flying", 0)
        process = await owner_process(world)
        try:
            while not await world.mover_waits():
                assert process.returncode is None
            process.send_signal(signal.SIGSTOP)
            await flying.execute("COMMIT")
            await write(world)  # waits for as long as the frozen owner's session lives
        finally:
            process.kill()
            await process.wait()
        assert await world.fence.state() == "open"


async def test_writers_of_an_owner_frozen_under_the_fence_get_a_retryable_error(url):
    async with fenced(url, hold_s=0.3) as world:
        process = await owner_process(world)
        try:
            assert await line_of(process) == b"closed\n"
            process.send_signal(signal.SIGSTOP)
            loop = asyncio.get_running_loop()
            started = loop.time()
            with pytest.raises(psycopg.errors.SerializationFailure) as refused:
                await write(world)
            assert loop.time() - started >= GUARD_WAIT_MS / 1000 * 0.9
            assert refused.value.diag.message_primary == f"tenant {TENANT} is being moved"
            assert refused.value.diag.message_hint == "Retry the transaction."
        finally:
            process.kill()
            await process.wait()
        await world.fence.reopen()
        await write(world)


async def test_a_pause_within_its_budget_refuses_nobody(url):
    """However short the writers' patience with a dead owner is."""
    async with fenced(url, hold_s=5) as world:
        await world.fence.get_ready()
        await world.fence.close(lock_timeout_s=5)
        async with world.connect(statement_timeout=str(GUARD_WAIT_MS + 200)) as conn:
            with pytest.raises(psycopg.errors.QueryCanceled):
                await insert(conn, "impatient", 0)


async def test_a_session_killed_before_its_commit_leaves_nothing_that_reopening_does_not_mend(url):
    """The sequence says `closed` and the row does not: what setval does is never rolled back."""
    async with fenced(url, hold_s=1) as world, await psycopg.AsyncConnection.connect(url) as obstacle:
        await stop_commits_of_the_fence(world, obstacle)
        await world.fence.get_ready()
        closing = asyncio.create_task(world.fence.close(lock_timeout_s=5))
        ((holder,),) = await wait_for_rows(world, "SELECT pid FROM pg_locks WHERE objid = 99 AND NOT granted")
        await world.ask("SELECT pg_terminate_backend(%s)", holder)
        with pytest.raises(Unreachable):
            await closing
        await obstacle.rollback()
        assert await world.fence.state() == "open"
        with pytest.raises(psycopg.errors.SerializationFailure):
            await write(world)
        await world.fence.reopen()
        await write(world)


async def test_a_lost_session_that_still_closes_the_fence_is_ended_before_it_is_reopened(url):
    async with fenced(url) as world, await psycopg.AsyncConnection.connect(url) as obstacle:
        await stop_commits_of_the_fence(world, obstacle)
        await world.fence.get_ready()
        closing = asyncio.create_task(world.fence.close(lock_timeout_s=5))
        await wait_for_rows(world, "SELECT pid FROM pg_locks WHERE objid = 99 AND NOT granted")
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        reopening = asyncio.create_task(world.fence.reopen())
        await asyncio.wait([reopening], timeout=0.2)
        await obstacle.rollback()
        await reopening
        assert await world.fence.state() == "open"
        await write(world)


async def stop_commits_of_the_fence(world: Fenced, obstacle: psycopg.AsyncConnection) -> None:
    """Whoever changes the fence's row waits for `obstacle` when it commits."""
    await world.ask(
        "CREATE FUNCTION public.stop() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_advisory_xact_lock(99); RETURN NULL; END';"
        "CREATE CONSTRAINT TRIGGER stop AFTER UPDATE ON mover.fence DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION public.stop()"
    )
    await obstacle.execute("SELECT pg_advisory_xact_lock(99)")


async def wait_for_rows(world: Fenced, query: str) -> list[tuple]:
    while not (rows := await world.ask(query)):
        pass
    return rows


async def test_an_owner_of_an_older_epoch_can_do_nothing(url):
    async with fenced(url) as world:
        zombie, database = world.fence, world.database(epoch=2)
        await zombie.get_ready()
        assert database.identity is not None
        await owner.take(database, database.identity)
        for act in (
            zombie.close(lock_timeout_s=1),
            zombie.reopen(),
            zombie.open(),
            zombie.move_away(),
            zombie.abort(),
            zombie.close_again(),
            zombie.install([], "closed", quiet),
            zombie.remove([], quiet),
        ):
            with pytest.raises(MoverError) as lost:
                await act
            assert isinstance(lost.value, LeaseLost | Unreachable)
            assert await world.fence_of(database).state() == "open"
        with pytest.raises(LeaseLost):
            await zombie.reopen()
        await write(world)


async def test_an_owner_of_the_right_epoch_in_the_wrong_state_is_stopped(url):
    async with fenced(url) as world:
        with pytest.raises(WrongState):
            await world.fence.move_away()
        with pytest.raises(WrongState):
            await world.fence.close_again()
        assert await world.fence.abort() is False  # it is open: somebody has decided
        await world.fence.get_ready()
        await world.fence.close(lock_timeout_s=1)
        assert await world.fence.abort() is True
        assert await world.fence.abort() is True
        with pytest.raises(WrongState):
            await world.fence.move_away()
        await world.fence.close_again()
        await world.fence.move_away()
        await world.fence.move_away()
        with pytest.raises(WrongState):
            await world.fence.reopen()


async def test_a_fence_that_is_not_there_can_be_neither_aborted_nor_opened(url):
    """So nobody takes a target that was replaced for one that gave way."""
    async with fenced(url) as world:
        await world.ask("DELETE FROM mover.fence")
        for act in (world.fence.abort, world.fence.open, world.fence.reopen, world.fence.move_away):
            with pytest.raises(WrongState, match="absent"):
                await act()


async def test_transactions_that_write_for_long_are_named_before_anybody_waits(url, monkeypatch):
    monkeypatch.setattr(fence, "MAX_HOLDER_AGE_S", 0.0)
    async with fenced(url) as world, world.connect() as flying:
        await flying.execute("BEGIN")
        await insert(flying, "flying", 0)
        await world.fence.get_ready()
        with pytest.raises(CutoverAborted, match=f"open: pid {flying.info.backend_pid}$"):
            await world.fence.close(lock_timeout_s=5)
        await flying.execute("PREPARE TRANSACTION 'fence test'")
        with pytest.raises(CutoverAborted, match=r"open: prepared transaction \d+$"):
            await world.fence.close(lock_timeout_s=5)
        await flying.execute("COMMIT PREPARED 'fence test'")
        await world.fence.close(lock_timeout_s=5)
        assert "flying" in await world.notes()


async def test_writers_that_do_not_end_in_time_are_left_alone(url):
    async with fenced(url) as world, world.connect() as flying:
        await flying.execute("BEGIN")
        await insert(flying, "flying", 0)
        await world.fence.get_ready()
        with pytest.raises(CutoverAborted):
            await world.fence.close(lock_timeout_s=0.1)
        await world.fence.reopen()
        await write(world)
        await flying.execute("COMMIT")
        assert await world.fence.state() == "open"


@pytest.mark.parametrize("level", LEVELS)
async def test_writes_of_deferred_triggers_are_held_too(url, level):
    """They run when the transaction commits: the guard's last chance."""
    async with fenced(url) as world:
        await world.ask(
            "CREATE FUNCTION app.audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            f" INSERT INTO app.item (tenant_id, note) VALUES ('{TENANT}', 'audited'); RETURN NULL; END $$;"
            "CREATE TABLE app.request (id int);"
            "GRANT ALL ON app.request TO fence_app;"
            "CREATE CONSTRAINT TRIGGER audit AFTER INSERT ON app.request DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION app.audit()"
        )
        async with world.connect(level) as conn:
            await conn.execute("BEGIN")
            await conn.execute("INSERT INTO app.request VALUES (1)")
            await world.fence.get_ready()
            await world.fence.close(lock_timeout_s=5)
            committing = asyncio.create_task(conn.execute("COMMIT"))
            while conn.info.backend_pid not in await world.waiting():
                assert not committing.done()
            await world.fence.move_away()
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                await committing
        assert "audited" not in await world.notes()


HELD = """
SELECT FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock'
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


async def test_truncate_fails_fast_while_closed_and_tells_the_stream_while_open(url):
    async with fenced(url) as world, world.connect(lock_timeout="5s") as conn:
        await world.ask("ALTER TABLE app.part OWNER TO fence_app")
        await conn.execute("TRUNCATE app.part")
        content = b'["app", "part"]'
        assert any(content in data for (data,) in await world.ask(CHANGES, world.slot))
        await world.fence.get_ready()
        await world.fence.close(lock_timeout_s=5)
        with pytest.raises(psycopg.errors.SerializationFailure, match="is being moved"):
            await conn.execute("TRUNCATE app.part")
        await world.fence.let_go()  # the state is enough
        async with asyncio.timeout(60):  # the session ends when the server comes to it
            while await world.ask(HELD):
                pass
        with pytest.raises(psycopg.errors.SerializationFailure, match="is being moved"):
            await conn.execute("TRUNCATE app.part")
        await world.fence.move_away()
        await conn.execute("TRUNCATE app.part")  # other tenants' business now


async def test_refusals_are_counted_though_their_transactions_roll_back(url):
    async with fenced(url) as world:
        assert await world.fence.refused_writes() == 0
        await world.fence.get_ready()
        await world.fence.close(lock_timeout_s=5)
        await world.fence.move_away()
        for _ in range(3):
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                await write(world)
        assert await world.fence.refused_writes() == 3


ALTERATIONS = {
    "disabled": "ALTER TABLE app.item DISABLE TRIGGER USER",
    "dropped": "DROP TRIGGER mover_guard_{0}_update ON app.item",
    "asleep on replicas": "ALTER TABLE app.item ENABLE TRIGGER mover_guard_{0}_insert",
}
ALTERED = pytest.mark.parametrize("alteration", ALTERATIONS.values(), ids=ALTERATIONS.keys())


@ALTERED
async def test_the_fence_stays_open_while_somebody_may_write_past_the_guards(url, alteration):
    """The catalog does not show yet what he has done, and he holds no lock of the tenant's writers."""
    async with fenced(url) as world, await AsyncConnection.connect(world.url) as past:
        await world.fence.get_ready()
        await past.execute(alteration.format(world.fence.name))
        with pytest.raises(CutoverAborted, match=r"app\.item"):
            await world.fence.close(lock_timeout_s=1)
        assert await world.fence.state() == "open"
        await past.rollback()
        await world.fence.get_ready()
        await world.fence.close(lock_timeout_s=1)


@ALTERED
async def test_the_fence_stays_open_where_guards_went_since_they_were_looked_at(url, alteration):
    async with fenced(url) as world:
        await world.fence.get_ready()
        await world.ask(alteration.format(world.fence.name))
        with pytest.raises(CutoverAborted, match=r"app\.item"):
            await world.fence.close(lock_timeout_s=1)
        assert await world.fence.state() == "open"
        await write(world)


async def test_getting_ready_does_not_wait_for_whoever_holds_a_table_for_himself(url):
    async with fenced(url) as world, await AsyncConnection.connect(world.url) as other:
        await other.execute("LOCK TABLE app.item")
        with pytest.raises(CutoverAborted, match="holds the lock"):
            await world.fence.get_ready()
        await other.rollback()
        await world.fence.get_ready()
