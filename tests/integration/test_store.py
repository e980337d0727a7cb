"""Queue, leases, journal and decision on a real platform database."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import psycopg
import pytest

from mover.core.errors import (
    Conflict,
    LeaseLost,
    NotFound,
    OutcomeUnknown,
    Refused,
    UnknownTenant,
    Unreachable,
)
from mover.core.ids import TableRef, TenantId, Tier
from mover.core.migration import Claim, Place, Progress, Wish
from mover.core.secret import Secret
from mover.core.states import Phase, Status
from mover.core.tables import Column, Finding, MovedTable, Plan, SequenceRef, Shape
from mover.core.triggers import Trigger
from mover.demo.servers import Cluster
from mover.postgres.platform import check_platform, initialise, missing_route_columns
from mover.postgres.store import Store
from tests.conftest import MakeDatabase
from tests.support.queue import (
    CORE,
    ESTATE,
    ORGANIZATIONS,
    add_tenant,
    platform_database,
    role_with_password,
    store_on,
    to_estate,
)

LEASE_S = 30.0


@asynccontextmanager
async def platform(server: Cluster, make_database: MakeDatabase) -> AsyncIterator[tuple[str, Store]]:
    url = make_database(server)
    await platform_database(url)
    async with store_on(url) as store:
        yield url, store


async def claimed(url: str, store: Store, owner: str = "one") -> Claim:
    """A migration that this owner has just claimed."""
    tenant = await add_tenant(url)
    await store.submit(to_estate(tenant), CORE)
    claim = await store.claim(owner, LEASE_S)
    assert claim is not None
    return claim


async def end_lease(url: str, claim: Claim) -> None:
    """As if the owner had been silent for long."""
    async with await psycopg.AsyncConnection.connect(url) as conn:
        await conn.execute(
            "update platform.tenant_migrations set lease_until = now() - interval '1 s' where id = %s",
            (claim.migration.id,),
        )


async def route(url: str, tenant: TenantId) -> tuple[str, str, str | None]:
    async with await psycopg.AsyncConnection.connect(url) as conn:
        cursor = await conn.execute(
            "select vertical, isolation_tier, database_url from auth.organizations where id = %s", (tenant,)
        )
        row = await cursor.fetchone()
    assert row is not None
    return row


async def test_init_can_be_repeated_and_run_beside_itself(pg16: Cluster, make_database: MakeDatabase) -> None:
    url = Secret(make_database(pg16))
    runs = await asyncio.gather(*(initialise(url, organizations=ORGANIZATIONS) for _ in range(4)))
    assert sorted(len(applied) for applied in runs) == [0, 0, 0, 2]
    assert await initialise(url) == ()
    assert await missing_route_columns(url, ORGANIZATIONS) == ()
    await check_platform(url)


async def test_a_database_without_schema_is_refused_with_what_to_do(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    url = Secret(make_database(pg16))
    with pytest.raises(Refused) as refused:
        await check_platform(url)
    assert "mover init" in str(refused.value.hint)
    assert await missing_route_columns(url, ORGANIZATIONS) is None


async def test_a_newer_schema_is_left_alone(pg16: Cluster, make_database: MakeDatabase) -> None:
    url = make_database(pg16)
    await platform_database(url)
    async with await psycopg.AsyncConnection.connect(url) as conn:
        await conn.execute("insert into platform.schema_migrations values (9999, 'future')")
    with pytest.raises(Refused, match="newer"):
        await initialise(Secret(url))
    with pytest.raises(Refused, match="newer"):
        await check_platform(Secret(url))


async def test_a_wrong_password_is_refused_without_showing_it(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    url = make_database(pg16)
    with role_with_password(pg16) as role:
        wrong = Secret(url.replace("postgres@", f"{role}:planted-secret@", 1))
        with pytest.raises((Refused, Unreachable)) as refused:
            await check_platform(wrong)
    assert "planted-secret" not in f"{refused.value!r} {refused.value.hint}"


async def test_concurrent_claimers_never_get_the_same_migration(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store), AsyncExitStack() as stack:
        submitted = {(await store.submit(to_estate(await add_tenant(url)), CORE)).id for _ in range(24)}
        daemons = [await stack.enter_async_context(store_on(url)) for _ in range(4)]

        async def claim_all(store: Store, owner: str) -> list[Claim]:
            mine = []
            while (claim := await store.claim(owner, LEASE_S)) is not None:
                mine.append(claim)
            return mine

        claims = await asyncio.gather(
            *(claim_all(daemon, f"{i}.{j}") for i, daemon in enumerate(daemons) for j in range(3))
        )
        # SKIP LOCKED may leave a claimer empty-handed for a moment, so the rest is asked for again.
        got = [claim.migration.id for mine in claims for claim in mine]
        got += [claim.migration.id for claim in await claim_all(store, "last")]
        assert len(got) == len(set(got)) == 24
        assert set(got) == submitted


async def test_the_most_urgent_comes_first_and_the_scheduled_one_waits(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store):
        later = replace(
            to_estate(await add_tenant(url), priority=99),
            scheduled_at=datetime.now(UTC) + timedelta(hours=1),
        )
        await store.submit(later, CORE)
        first = await store.submit(to_estate(await add_tenant(url)), CORE)
        second = await store.submit(to_estate(await add_tenant(url)), CORE)
        urgent = await store.submit(to_estate(await add_tenant(url), priority=5), CORE)
        order = []
        while (claim := await store.claim("one", LEASE_S)) is not None:
            assert claim.migration.status is Status.IN_PROGRESS
            assert claim.migration.started_at is not None
            order.append(claim.migration.id)
        assert order == [urgent.id, first.id, second.id]


async def test_a_leased_migration_is_taken_over_only_when_the_lease_has_ended(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store):
        old = await claimed(url, store)
        assert await store.claim("two", LEASE_S) is None
        await end_lease(url, old)
        await store.heartbeat(old, LEASE_S)  # nobody else came: the lease goes on
        assert await store.claim("two", LEASE_S) is None
        await end_lease(url, old)
        new = await store.claim("two", LEASE_S)
        assert new is not None
        assert new.migration.id == old.migration.id
        assert new.epoch == old.epoch + 1


async def test_a_zombie_owner_can_do_nothing(pg16: Cluster, make_database: MakeDatabase) -> None:
    async with platform(pg16, make_database) as (url, store):
        zombie = await claimed(url, store)
        await store.enter_phase(zombie, Phase.COPY)
        await end_lease(url, zombie)
        owner = await store.claim("two", LEASE_S)
        assert owner is not None
        for attempt in (
            store.heartbeat(zombie, LEASE_S),
            store.release(zombie),
            store.enter_phase(zombie, Phase.INDEX),
            store.set_status(zombie, Status.PAUSED),
            store.note_error(zombie, {"code": "unreachable", "message": "m"}),
            store.begin_step(zombie, "copy.chunk"),
            store.end_step(zombie, "copy.chunk"),
            store.steps(zombie),
            store.event(zombie, "still here"),
            store.save_progress(zombie, Progress(rows_done=7)),
            store.save_plan(zombie, Plan(Shape({}, ()))),
            store.load_plan(zombie),
            store.save_note(zombie, "identity", "full"),
            store.load_notes(zombie),
            store.decide(zombie, CORE, ESTATE, {}),
            store.is_switched(zombie),
        ):
            with pytest.raises(LeaseLost):
                await attempt
        migration, progress, steps = await store.progress(str(zombie.migration.id))
        assert (migration.status, migration.phase) == (Status.IN_PROGRESS, Phase.COPY)
        assert (progress.rows_done, steps) == (0, ())
        assert await store.load_notes(owner) == {}
        assert await route(url, zombie.migration.tenant) == ("core", "schema", None)


async def test_a_take_over_waits_for_the_transaction_that_carries_the_old_epoch(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store):
        old = await claimed(url, store)
        await end_lease(url, old)
        async with await psycopg.AsyncConnection.connect(url) as conn:
            await conn.execute(
                "select from platform.tenant_migrations where id = %s and epoch = %s for share",
                (old.migration.id, old.epoch),
            )
            assert await store.claim("two", LEASE_S) is None
        assert await store.claim("two", LEASE_S) is not None


async def test_a_released_migration_waits_for_its_back_off(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        await store.release(claim, after_seconds=3600)
        assert await store.claim("two", LEASE_S) is None
        await store.release(claim)
        assert await store.claim("two", LEASE_S) is not None


async def test_a_tenant_has_one_live_migration_however_many_ask(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store):
        tenant = await add_tenant(url)
        answers = await asyncio.gather(
            *(store.submit(to_estate(tenant), CORE) for _ in range(6)), return_exceptions=True
        )
        refused = [answer for answer in answers if isinstance(answer, Conflict)]
        assert len(refused) == 5
        [migration] = await store.list(None, 50)
        assert all(str(migration.id) in str(answer) for answer in refused)
        await store.wish(str(migration.id), Wish.CANCEL, "ops")
        assert (await store.submit(to_estate(tenant), CORE)).status is Status.QUEUED


async def test_a_request_whose_source_is_no_longer_the_route_is_refused(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store):
        tenant = await add_tenant(url, ESTATE)
        with pytest.raises(Conflict, match="route changed"):
            await store.submit(to_estate(tenant), CORE)
        with pytest.raises(UnknownTenant):
            await store.where_is(TenantId(uuid4()))


async def test_only_the_table_of_statuses_is_allowed(pg16: Cluster, make_database: MakeDatabase) -> None:
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        with pytest.raises(Conflict):
            await store.set_status(claim, Status.COMPLETED)
        with pytest.raises(Conflict, match="decision"):
            await store.set_status(claim, Status.MONITORING)
        await store.set_status(claim, Status.ROLLING_BACK, outcome=Status.FAILED)
        with pytest.raises(Conflict):
            await store.set_status(claim, Status.IN_PROGRESS)
        error = {"code": "slot_lost", "message": "slot is gone"}
        await store.set_status(claim, Status.FAILED, error=error)
        migration = await store.get(str(claim.migration.id))
        assert (migration.status, migration.outcome) == (Status.FAILED, Status.FAILED)
        assert migration.error == error
        with pytest.raises(Conflict):
            await store.set_status(claim, Status.QUEUED)


async def test_a_noted_error_is_shown_until_a_phase_goes_on(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    error = {"code": "unreachable", "message": "the source does not answer"}
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        await store.note_error(claim, error)
        migration = await store.get(str(claim.migration.id))
        assert (migration.status, migration.error) == (Status.IN_PROGRESS, error)
        await store.enter_phase(claim, Phase.COPY)
        assert (await store.get(str(claim.migration.id))).error is None
        await store.set_status(claim, Status.ROLLING_BACK, error=error, outcome=Status.FAILED)
        await store.enter_phase(claim, Phase.COPY)
        await store.set_status(claim, Status.FAILED)
        assert (await store.get(str(claim.migration.id))).error == error


async def test_phases_go_forward_but_a_cutover_may_be_tried_again(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        for phase in (Phase.COPY, Phase.COPY, Phase.CUTOVER, Phase.CATCH_UP, Phase.CUTOVER):
            await store.enter_phase(claim, phase)
        with pytest.raises(Conflict):
            await store.enter_phase(claim, Phase.COPY)


async def test_the_journal_survives_and_keeps_its_order(pg16: Cluster, make_database: MakeDatabase) -> None:
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        assert await store.steps(claim) == ()
        await store.begin_step(claim, "prepare.publication")
        await store.begin_step(claim, "prepare.slot")
        await store.end_step(claim, "prepare.publication", detail="3 tables")
        await store.end_step(claim, "prepare.slot", ok=False)
        await store.begin_step(claim, "prepare.publication")
        publication, slot = await store.steps(claim)
        assert (publication.name, publication.status, publication.duration_ms) == (
            "prepare.publication",
            "running",
            None,
        )
        assert (slot.name, slot.status) == ("prepare.slot", "failed")
        assert slot.duration_ms is not None and slot.duration_ms >= 0


async def test_plan_notes_and_progress_come_back_as_they_were(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    table = MovedTable(
        TableRef("core_dms", "documents"),
        TableRef("realestate_dms", "documents"),
        (Column("id", "bigint", "bigint", not_null=True), Column("t", "core_dms.s", "realestate_dms.s")),
        ("id",),
        "tenant_id",
        estimated_rows=12,
    )
    plan = Plan(
        Shape(
            {"core_dms": "realestate_dms"},
            (table,),
            (SequenceRef(TableRef("core_dms", "s"), TableRef("realestate_dms", "s")),),
            fresh=False,
        ),
        (Finding("no_tenant_column", "which", "what to do", table.source), Finding("old", "m", "h")),
        {"core_dms.documents": "tenant"},
        {"source_version": 160004},
    )
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        assert await store.load_plan(claim) is None
        await store.save_plan(claim, plan)
        assert await store.load_plan(claim) == plan
        await store.save_note(claim, "identity", {"core_dms.documents": "d"})
        await store.save_note(claim, "slot", "mover_1")
        await store.save_note(claim, "slot", "mover_2")
        assert await store.load_notes(claim) == {
            "identity": {"core_dms.documents": "d"},
            "slot": "mover_2",
        }
        progress = Progress(rows_done=3, lag_seconds=0.5, evidence={"root": "ab"})
        await store.save_progress(claim, progress)
        _, stored, _ = await store.progress(str(claim.migration.id))
        assert stored == progress


async def test_the_decision_switches_the_route_and_the_status_together(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        await store.enter_phase(claim, Phase.CUTOVER)
        assert not await store.is_switched(claim)
        await store.decide(claim, CORE, ESTATE, {"source_root": "ab"})
        assert await store.is_switched(claim)
        migration = await store.get(str(claim.migration.id))
        assert (migration.status, migration.phase) == (Status.MONITORING, Phase.MONITOR)
        assert migration.switched_at is not None
        # The configuration yields this URL by itself, so the route need not carry it.
        assert await route(url, claim.migration.tenant) == ("realestate", "database", None)
        await store.decide(claim, CORE, ESTATE, {})  # asked again after a lost answer: nothing changes
        assert (await store.get(str(claim.migration.id))).switched_at == migration.switched_at


async def test_a_url_that_the_configuration_does_not_know_is_stored_in_the_route(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    own = Place("realestate", Tier.DEDICATED, Secret("postgresql://own.example/one"), ("realestate_dms",))
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        await store.decide(claim, CORE, own, {})
        assert await route(url, claim.migration.tenant) == (
            "realestate",
            "dedicated",
            "postgresql://own.example/one",
        )


@pytest.mark.parametrize(
    "change",
    [
        "update auth.organizations set vertical = 'health'",
        "update auth.organizations set isolation_tier = 'dedicated'",
        "update auth.organizations set database_url = 'postgresql://elsewhere.example/x'",
        "delete from auth.organizations",
    ],
)
async def test_a_route_that_was_changed_by_hand_is_not_overwritten(
    change: str, pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        async with await psycopg.AsyncConnection.connect(url) as conn:
            await conn.execute(change.encode())
        with pytest.raises(Conflict):
            await store.decide(claim, CORE, ESTATE, {})
        migration = await store.get(str(claim.migration.id))
        assert (migration.status, migration.switched_at) == (Status.IN_PROGRESS, None)
        assert not await store.is_switched(claim)


async def test_a_decision_is_not_taken_for_a_migration_that_is_being_undone(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        await store.set_status(claim, Status.ROLLING_BACK, outcome=Status.CANCELLED)
        with pytest.raises(Conflict):
            await store.decide(claim, CORE, ESTATE, {})
        assert await route(url, claim.migration.tenant) == ("core", "schema", None)


async def test_pause_resume_and_cancel_before_anything_began(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store):
        migration = await store.submit(to_estate(await add_tenant(url)), CORE)
        name = str(migration.id)
        await store.wish(name, Wish.PAUSE, "ops")
        assert (await store.get(name)).status is Status.PAUSED
        assert await store.claim("one", LEASE_S) is None
        with pytest.raises(Conflict):
            await store.wish(name, Wish.PAUSE, "ops")
        await store.resume(name, "ops")
        assert (await store.get(name)).status is Status.QUEUED
        with pytest.raises(Conflict):
            await store.resume(name, "ops")
        await store.wish(name, Wish.CANCEL, "ops")
        assert (await store.get(name)).status is Status.CANCELLED
        with pytest.raises(Conflict):
            await store.wish(name, Wish.CANCEL, "ops")
        assert [event.message for event in await store.events(name, 0, 10)] == [
            "requested by ops",
            "pause asked by ops",
            "resume asked by ops",
            "cancel asked by ops",
        ]


async def test_a_running_migration_learns_of_the_wish_at_its_next_heartbeat(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        name = str(claim.migration.id)
        assert await store.heartbeat(claim, LEASE_S) is None
        await store.wish(name, Wish.PAUSE, "ops")
        assert await store.heartbeat(claim, LEASE_S) is Wish.PAUSE
        await store.set_status(claim, Status.PAUSED, error={"code": "schema_changed", "message": "m"})
        await store.release(claim)
        assert (await store.get(name)).wish is None
        await store.resume(name, "ops")
        resumed = await store.claim("two", LEASE_S)
        assert resumed is not None
        assert (resumed.migration.status, resumed.migration.error) == (Status.IN_PROGRESS, None)
        await store.wish(name, Wish.CANCEL, "ops")
        with pytest.raises(Conflict, match="being cancelled"):
            await store.wish(name, Wish.PAUSE, "ops")


async def test_a_rollback_that_was_asked_for_is_not_forgotten_over_a_lesser_wish(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        name = str(claim.migration.id)
        await store.wish(name, Wish.CANCEL, "ops")
        await store.wish(name, Wish.ROLLBACK, "ops")
        for lesser in (Wish.PAUSE, Wish.CANCEL):
            with pytest.raises(Conflict, match="being rolled back"):
                await store.wish(name, lesser, "ops")
        assert await store.heartbeat(claim, LEASE_S) is Wish.ROLLBACK
        await store.decide(claim, CORE, ESTATE, {})
        with pytest.raises(Conflict, match="being rolled back"):
            await store.wish(name, Wish.CANCEL, "ops")
        assert await store.heartbeat(claim, LEASE_S) is Wish.ROLLBACK


@pytest.mark.parametrize("trigger", [Trigger.TIMEOUT, Trigger.TARGET_UNREACHABLE, Trigger.RETAINED])
async def test_what_takes_too_long_is_not_rolled_back_any_more_once_it_is_switched(
    pg16: Cluster, make_database: MakeDatabase, trigger: Trigger
) -> None:
    """Also in the claim that has switched it."""
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        await store.enter_phase(claim, Phase.CUTOVER)
        await store.decide(claim, CORE, ESTATE, {})
        assert not await store.trigger(claim, trigger, "late")
        assert await store.heartbeat(claim, LEASE_S) is None
        assert await store.trigger(claim, Trigger.ERROR_RATE, "badly served")
        assert await store.heartbeat(claim, LEASE_S) is Wish.ROLLBACK


async def test_a_rollback_that_was_accepted_keeps_the_source_from_being_cleaned(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        await store.enter_phase(claim, Phase.CUTOVER)
        await store.decide(claim, CORE, ESTATE, {})
        assert await store.trigger(claim, Trigger.ERROR_RATE, "badly served")
        with pytest.raises(Conflict, match="a rollback was asked for"):
            await store.enter_phase(claim, Phase.CLEANUP)
        assert await store.heartbeat(claim, LEASE_S) is Wish.ROLLBACK


async def test_cancelling_a_paused_migration_that_has_begun_leaves_it_to_be_undone(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        await store.set_status(claim, Status.PAUSED)
        await store.release(claim)
        assert await store.claim("two", LEASE_S, watches=False) is None
        await store.wish(str(claim.migration.id), Wish.CANCEL, "ops")
        undoing = await store.claim("two", LEASE_S)
        assert undoing is not None
        assert undoing.migration.status is Status.ROLLING_BACK
        assert undoing.migration.outcome is Status.CANCELLED


async def test_a_reader_of_events_misses_none_while_many_are_written(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        name = str(claim.migration.id)
        seen: list[str] = []

        async def follow() -> None:
            last = 0
            while len(seen) < 121:
                for event in await store.events(name, last, 10):
                    seen.append(event.message)
                    last = event.id

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(follow(), name="follow")
            for number in range(120):
                group.create_task(store.event(claim, f"line {number}", rows=number), name=f"{number}")
        assert sorted(seen) == sorted(["requested by ops", *(f"line {n}" for n in range(120))])


async def test_counts_name_every_status(pg16: Cluster, make_database: MakeDatabase) -> None:
    async with platform(pg16, make_database) as (url, store):
        await claimed(url, store)
        await store.submit(to_estate(await add_tenant(url)), CORE)
        counts = await store.counts()
        assert set(counts) == set(Status)
        assert (counts[Status.QUEUED], counts[Status.IN_PROGRESS], counts[Status.FAILED]) == (1, 1, 0)


async def test_what_does_not_exist_is_not_found(pg16: Cluster, make_database: MakeDatabase) -> None:
    async with platform(pg16, make_database) as (_, store):
        for name in (str(uuid4()), "not-a-uuid"):
            with pytest.raises(NotFound):
                await store.get(name)
            with pytest.raises(NotFound):
                await store.progress(name)
            with pytest.raises(NotFound):
                await store.resume(name, "ops")


async def test_requests_are_noted_before_and_after(pg16: Cluster, make_database: MakeDatabase) -> None:
    async with platform(pg16, make_database) as (url, store):
        line = await store.asked("ops", "admin", "pause", "some-id")
        async with await psycopg.AsyncConnection.connect(url) as conn:
            cursor = await conn.execute("select result from platform.audit where id = %s", (line,))
            assert await cursor.fetchone() == (None,)
            await conn.rollback()
            await store.answered(line, "conflict", None, {"vertical": "x"})
            cursor = await conn.execute("select who, role, action, subject, result from platform.audit")
            assert await cursor.fetchall() == [("ops", "admin", "pause", "some-id", "conflict")]


async def test_the_store_outlives_a_broken_connection(pg16: Cluster, make_database: MakeDatabase) -> None:
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
            await conn.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where datname = current_database() and pid <> pg_backend_pid()"
            )
        assert await store.heartbeat(claim, LEASE_S) is None


async def test_a_decision_whose_commit_was_not_answered_is_unknown(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        async with await psycopg.AsyncConnection.connect(url) as conn:
            # Deferred, so that the connection breaks while COMMIT is being carried out.
            await conn.execute(
                "create function break_off() returns trigger language plpgsql as"
                " 'begin perform pg_terminate_backend(pg_backend_pid()); return null; end';"
                "create constraint trigger break_off after update on auth.organizations"
                " deferrable initially deferred for each row execute function break_off()"
            )
        with pytest.raises(OutcomeUnknown):
            await store.decide(claim, CORE, ESTATE, {})
        assert not await store.is_switched(claim)


async def test_a_frozen_platform_cannot_draw_out_a_decision(
    pg16: Cluster, make_database: MakeDatabase
) -> None:
    async with platform(pg16, make_database) as (url, store):
        claim = await claimed(url, store)
        async with await psycopg.AsyncConnection.connect(url) as holder:
            await holder.execute("select from platform.tenant_migrations for update")
            decision = asyncio.ensure_future(store.decide(claim, CORE, ESTATE, {}))
            frozen = await backend_waiting_for_a_lock(url)
            os.kill(frozen, signal.SIGSTOP)
            try:
                # Asking it to cancel, and waiting for that, would take more than 5 s.
                async with asyncio.timeout(4):
                    with pytest.raises(Unreachable):
                        await decision
            finally:
                os.kill(frozen, signal.SIGCONT)
        assert not await store.is_switched(claim)


async def backend_waiting_for_a_lock(url: str) -> int:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
        while True:
            cursor = await conn.execute(
                "select pid from pg_stat_activity"
                " where datname = current_database() and wait_event_type = 'Lock'"
            )
            if (row := await cursor.fetchone()) is not None:
                return int(row[0])
