"""What the API asks of the platform database: submit, look, pause, cancel, resume, audit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple
from uuid import UUID

import psycopg
from psycopg import sql

from mover.core.errors import Conflict, NotFound, Refused, UnknownTenant, Where
from mover.core.ids import TableRef, TenantId, Tier
from mover.core.migration import Event, Migration, MigrationRequest, Place, Progress, Step, Wish
from mover.core.states import Phase, Status, check_status
from mover.postgres.platform import check_schema_version
from mover.postgres.platform_pool import Connection, PlatformPool
from mover.postgres.rows import COLUMNS, event_of, jsonb, migration_of, progress_of, step_of
from mover.sql import load

_QUERIES = load("platform")
_GET = sql.SQL(_QUERIES["get"]).format(columns=COLUMNS)
_LIST = sql.SQL(_QUERIES["list"]).format(columns=COLUMNS)
_LOCK = sql.SQL(_QUERIES["lock_migration"]).format(columns=COLUMNS)
_GET_WITH_PROGRESS = sql.SQL(_QUERIES["get_with_progress"]).format(columns=COLUMNS)


class Answer(NamedTuple):
    """What a wish does at once; without a status it is left for the owning daemon."""

    status: Status | None = None
    outcome: Status | None = None


class DeskStore:
    """Implements `ports.Desk`."""

    def __init__(self, pool: PlatformPool, organizations: TableRef) -> None:
        self._pool = pool
        table = sql.Identifier(organizations.schema, organizations.name)
        self._where_is = sql.SQL(_QUERIES["where_is"]).format(organizations=table)
        self._submit = sql.SQL(_QUERIES["submit"]).format(organizations=table, columns=COLUMNS)

    async def submit(self, request: MigrationRequest, source: Place) -> Migration:
        async with self._pool.transaction() as conn:
            try:
                async with conn.transaction():
                    cursor = await conn.execute(self._submit, _submission(request, source))
                    row = await cursor.fetchone()
            except psycopg.errors.UniqueViolation as error:
                raise await _second_migration(conn, request.tenant) from error
            if row is None:
                raise Conflict(
                    "the tenant's route changed while the request was checked",
                    where=Where(tenant=request.tenant),
                    hint="Ask again.",
                )
            migration = migration_of(row)
            await _note(conn, migration, f"requested by {request.requested_by}")
        return migration

    async def get(self, migration_id: str) -> Migration:
        async with self._pool.connection() as conn:
            cursor = await conn.execute(_GET, {"id": _uuid(migration_id)})
            row = await cursor.fetchone()
        if row is None:
            raise _unknown(migration_id)
        return migration_of(row)

    async def list(self, status: Status | None, limit: int) -> tuple[Migration, ...]:
        parameters = {"status": status.value if status else None, "limit": limit}
        async with self._pool.connection() as conn:
            rows = await (await conn.execute(_LIST, parameters)).fetchall()
        return tuple(migration_of(row) for row in rows)

    async def progress(self, migration_id: str) -> tuple[Migration, Progress, tuple[Step, ...]]:
        key = {"id": _uuid(migration_id)}
        async with self._pool.connection() as conn:
            row = await (await conn.execute(_GET_WITH_PROGRESS, key)).fetchone()
            if row is None:
                raise _unknown(migration_id)
            steps = await (await conn.execute(_QUERIES["steps"], key)).fetchall()
        return migration_of(row), progress_of(row["progress"]), tuple(step_of(step) for step in steps)

    async def wish(self, migration_id: str, wish: Wish, by: str) -> None:
        async with self._pool.transaction() as conn:
            migration = await _lock(conn, migration_id)
            answer = answer_wish(migration, wish)
            if wish is Wish.ROLLBACK and migration.status is Status.MONITORING:
                await _check_way_back(conn, migration)
            if answer.status is None:
                await conn.execute(_QUERIES["set_wish"], {"id": migration.id, "wish": wish.value})
            else:
                await _set_status(conn, migration, answer)
            await _note(conn, migration, f"{wish} asked by {by}")

    async def resume(self, migration_id: str, by: str) -> None:
        async with self._pool.transaction() as conn:
            migration = await _lock(conn, migration_id)
            if migration.status is Status.PAUSED:
                status = Status.IN_PROGRESS if migration.started_at else Status.QUEUED
                await conn.execute(_QUERIES["resume"], {"id": migration.id, "status": status.value})
            elif await (await conn.execute(_QUERIES["try_now"], {"id": migration.id})).fetchone() is None:
                raise Conflict(
                    f"the migration is {migration.status}, and neither paused nor waiting for another try",
                    where=Where(tenant=migration.tenant),
                )
            await _note(conn, migration, f"resume asked by {by}")

    async def where_is(self, tenant: TenantId) -> tuple[str, Tier, str | None]:
        async with self._pool.connection() as conn:
            row = await (await conn.execute(self._where_is, {"tenant": tenant})).fetchone()
        if row is None:
            raise UnknownTenant("the routing table has no such tenant", where=Where(tenant=tenant))
        try:
            return str(row["vertical"]), Tier(row["isolation_tier"]), row["database_url"]
        except ValueError:
            raise Refused(
                "the tenant's route has an isolation tier that is none of schema, database, dedicated",
                where=Where(tenant=tenant),
                hint="Correct isolation_tier in the routing table.",
            ) from None

    async def events(self, migration_id: str, after: int, limit: int) -> tuple[Event, ...]:
        parameters = {"id": _uuid(migration_id), "after": after, "limit": limit}
        async with self._pool.connection() as conn:
            rows = await (await conn.execute(_QUERIES["events"], parameters)).fetchall()
        return tuple(event_of(row) for row in rows)

    async def counts(self) -> Mapping[Status, int]:
        async with self._pool.connection() as conn:
            rows = await (await conn.execute(_QUERIES["counts"])).fetchall()
        found = {row["status"]: row["migrations"] for row in rows}
        return {status: found.get(status.value, 0) for status in Status}

    async def asked(self, who: str, role: str, action: str, subject: str | None) -> int:
        parameters = {"who": who, "role": role, "action": action, "subject": subject}
        async with self._pool.connection() as conn:
            row = await (await conn.execute(_QUERIES["asked"], parameters)).fetchone()
        assert row is not None  # INSERT … RETURNING
        return int(row["id"])

    async def answered(
        self, line: int, result: str, subject: str | None, facts: Mapping[str, object]
    ) -> None:
        parameters = {"id": line, "result": result, "subject": subject, "facts": jsonb(dict(facts))}
        async with self._pool.connection() as conn:
            await conn.execute(_QUERIES["answered"], parameters)

    async def check_ready(self) -> None:
        async with self._pool.connection() as conn:
            await check_schema_version(conn)


def answer_wish(migration: Migration, wish: Wish) -> Answer:
    """What the wish means in this status; raises Conflict where it means nothing, or where one that goes
    further waits to be heard: a rollback holds also after the switch, where the others are dropped."""
    match wish, migration.status:
        case Wish.PAUSE, Status.QUEUED:
            return Answer(Status.PAUSED)
        case Wish.PAUSE, Status.IN_PROGRESS if migration.wish in (None, Wish.PAUSE):
            return Answer()
        case Wish.CANCEL, Status.IN_PROGRESS if migration.wish is not Wish.ROLLBACK:
            return Answer()
        case Wish.CANCEL, Status.PENDING_APPROVAL | Status.QUEUED:
            return Answer(Status.CANCELLED)
        case Wish.CANCEL, Status.PAUSED if migration.started_at is None:
            return Answer(Status.CANCELLED)
        case Wish.CANCEL, Status.PAUSED:
            return Answer(Status.ROLLING_BACK, Status.CANCELLED)
        case Wish.ROLLBACK, Status.IN_PROGRESS:
            return Answer()
        case Wish.ROLLBACK, Status.MONITORING if migration.phase is not Phase.CLEANUP:
            return Answer()
        case Wish.ROLLBACK, Status.PENDING_APPROVAL | Status.QUEUED:
            return Answer(Status.CANCELLED)
        case Wish.ROLLBACK, Status.PAUSED if migration.started_at is None:
            return Answer(Status.CANCELLED)
        case Wish.ROLLBACK, Status.PAUSED:
            return Answer(Status.ROLLING_BACK, Status.ROLLED_BACK)
    waiting = migration.wish if migration.wish is not Wish.PAUSE else None
    reason = f"is being {_PAST[waiting]}" if waiting else f"is {migration.status}"
    raise Conflict(
        f"the migration {reason}: it cannot be {_PAST[wish]}",
        where=Where(tenant=migration.tenant),
        hint=_hint(migration, wish),
    )


def _hint(migration: Migration, wish: Wish) -> str | None:
    served = migration.status in (Status.MONITORING, Status.COMPLETED)
    if wish is Wish.ROLLBACK and served:
        return "The source is cleaned: move the tenant back with a new migration."
    if migration.status is Status.MONITORING and migration.wish is not Wish.ROLLBACK:
        return "The tenant is already served by the target: roll back instead."
    return None


_PAST = {Wish.PAUSE: "paused", Wish.CANCEL: "cancelled", Wish.ROLLBACK: "rolled back"}


async def _check_way_back(conn: Connection, migration: Migration) -> None:
    row = await (await conn.execute(_QUERIES["has_way_back"], {"id": migration.id})).fetchone()
    if row is None or not row["possible"]:
        raise Conflict(
            "the migration has no way back",
            where=Where(tenant=migration.tenant),
            hint="Its events say why; move the tenant back with a new migration.",
        )


def _submission(request: MigrationRequest, source: Place) -> dict[str, object]:
    return {
        "tenant": request.tenant,
        "source_vertical": source.vertical,
        "source_tier": source.tier.value,
        "target_vertical": request.target_vertical,
        "target_tier": request.target_tier.value,
        "priority": request.priority,
        "scheduled_at": request.scheduled_at,
        "reason": request.reason,
        "requested_by": request.requested_by,
    }


async def _second_migration(conn: Connection, tenant: TenantId) -> Conflict:
    row = await (await conn.execute(_QUERIES["live_migration"], {"tenant": tenant})).fetchone()
    name = f" {row['id']} ({row['status']})" if row else ""
    return Conflict(
        f"the tenant already has a live migration{name}",
        where=Where(tenant=tenant),
        hint="Wait for it to end, or cancel it.",
    )


async def _lock(conn: Connection, migration_id: str) -> Migration:
    row = await (await conn.execute(_LOCK, {"id": _uuid(migration_id)})).fetchone()
    if row is None:
        raise _unknown(migration_id)
    return migration_of(row)


async def _set_status(conn: Connection, migration: Migration, answer: Answer) -> None:
    assert answer.status is not None
    check_status(migration.status, answer.status)
    await conn.execute(
        _QUERIES["set_status"],
        {
            "id": migration.id,
            "status": answer.status.value,
            "error": None,
            "outcome": answer.outcome.value if answer.outcome else None,
        },
    )


async def _note(conn: Connection, migration: Migration, message: str) -> None:
    await conn.execute(
        _QUERIES["append_desk_event"], {"id": migration.id, "message": message, "facts": jsonb({})}
    )


def _uuid(migration_id: str) -> UUID:
    try:
        return UUID(migration_id)
    except ValueError:
        raise _unknown(migration_id) from None


def _unknown(migration_id: str) -> NotFound:
    return NotFound(f"there is no migration {migration_id[:40]}")
