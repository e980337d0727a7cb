"""The fence's promise: nothing of the tenant commits behind the mark, whatever its writers do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import psycopg
import pytest

from mover.postgres import fence
from tests.support.fencing import (
    OTHER,
    STYLES,
    TENANT,
    Fenced,
    Ledger,
    all_held,
    change_triggers,
    fenced,
    insert,
    leave,
    open_transactions,
    replace_guard,
)

Weaken = Callable[[Fenced], Awaitable[None]]
BUSY_WRITERS = 6
VERSIONS = ("pg16", "pg18")


@pytest.fixture(params=VERSIONS)
def url(request, make_database, monkeypatch) -> str:
    # Writers are opened one after the other here, on a machine that may be slow.
    monkeypatch.setattr(fence, "MAX_HOLDER_AGE_S", 60)
    return make_database(request.getfixturevalue(request.param))


async def reads_the_row(world: Fenced) -> None:
    await replace_guard(
        world,
        r"pg_sequence_last_value\([^)]+\)",
        "(SELECT array_position('{open,closed,aborted,moved}'::text[], f.state)"
        f" FROM mover.fence f WHERE name = '{world.fence.name}')",
    )


async def takes_no_lock(world: Fenced) -> None:
    await replace_guard(world, r"pg_try_advisory_xact_lock_shared\([^)]+\)", "true")


async def sleeps_on_replicas(world: Fenced) -> None:
    world.fence._refuse_altered = trusts_everybody  # it is noticed otherwise
    await change_triggers(world, "ALTER TABLE app.item ENABLE TRIGGER {insert}")


async def trusts_everybody(_: psycopg.AsyncConnection) -> None: ...


async def looks_at_new_only(world: Fenced) -> None:
    await change_triggers(
        world,
        "CREATE OR REPLACE TRIGGER {update} AFTER UPDATE ON app.item FOR EACH ROW"
        " WHEN (NEW.tenant_id = {tenant}) EXECUTE FUNCTION {guard}();"
        "ALTER TABLE app.item ENABLE ALWAYS TRIGGER {update}",
    )


async def close_under_writers(world: Fenced, ledger: Ledger, weaken: Weaken | None) -> str:
    """close -> move_away while writers of all kinds are at work; the mark."""
    async with (
        asyncio.TaskGroup() as busy,
        open_transactions(world, STYLES, "late", 20) as late,
        open_transactions(world, (insert, leave), "flying", 1) as flying,
    ):
        for number in range(BUSY_WRITERS):
            busy.create_task(ledger.write_until_refused(world, number))
        await ledger.busy(BUSY_WRITERS)
        await world.fence.get_ready()
        if weaken is not None:
            await weaken(world)
        for transaction in flying:
            await transaction.write()
        closing = asyncio.create_task(world.fence.close(lock_timeout_s=5))
        while not closing.done() and not await world.mover_waits():
            pass
        for transaction in flying:
            await transaction.commit(ledger)
        mark = await closing
        tasks = [busy.create_task(transaction.write_and_commit(ledger)) for transaction in late]
        await all_held(world, late, tasks)
        await others_write_freely(world)
        ledger.at_mark = await world.notes()
        await world.fence.move_away()
        ledger.over = True
        await asyncio.gather(*tasks)
    return mark


async def others_write_freely(world: Fenced) -> None:
    async with world.connect(statement_timeout="1s") as conn:
        for _ in range(20):
            await conn.execute("INSERT INTO app.item (tenant_id, note) VALUES (%s, 'other')", (OTHER,))


async def leaks(world: Fenced, weaken: Weaken | None = None) -> list[str]:
    """What the cutover let through."""
    ledger = Ledger()
    mark = await close_under_writers(world, ledger, weaken)
    found = [f"acknowledged behind the mark: {token}" for token in ledger.acknowledged - ledger.at_mark]
    if count := await world.changes_behind(mark):
        found.append(f"{count} changes behind the mark")
    for error in ledger.refused:
        assert error.diag.message_primary == f"tenant {TENANT} has moved"
        assert error.diag.message_hint == "Reload the tenant's route and retry there."
    return found


async def test_nothing_of_the_tenant_commits_behind_the_mark(url, capture):
    async with fenced(url, capture=capture) as world:
        assert await leaks(world) == []


@pytest.mark.parametrize("weaken", [reads_the_row, takes_no_lock, sleeps_on_replicas, looks_at_new_only])
async def test_a_weakened_guard_is_caught(url, weaken):
    async with fenced(url) as world:
        assert await leaks(world, weaken) != [], "the weakened guard went unnoticed: this test proves nothing"
