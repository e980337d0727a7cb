"""The owner's side of the platform database: claims, leases, journal, and the decision.

Every statement here carries the claim's epoch and holds the migration's row until it commits, so that
a daemon that was suspended and wakes up after a take-over can do nothing but learn of it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, LiteralString

from psycopg import sql

from mover.core.crash import reach
from mover.core.errors import ApplyConflict, Conflict, LeaseLost, MoverError, OutcomeUnknown, Where
from mover.core.ids import Epoch, TableRef, TenantId, Tier
from mover.core.migration import Claim, Place, Progress, Step, Wish
from mover.core.plan_codec import decode_plan, encode_plan
from mover.core.secret import Secret
from mover.core.states import PHASES, Phase, Status, check_status
from mover.core.tables import Plan
from mover.core.triggers import Trigger
from mover.postgres.platform_pool import Connection, PlatformPool
from mover.postgres.rows import COLUMNS, jsonb, migration_of, progress_document, progress_of, step_of
from mover.sql import load

_QUERIES = load("platform")
_CLAIM = sql.SQL(_QUERIES["claim"]).format(columns=COLUMNS)
# A cutover that gave up follows the stream again before the next attempt.
_RETRIED = frozenset({Phase.CATCH_UP, Phase.VERIFY, Phase.CUTOVER})

ConfiguredUrl = Callable[[TenantId, str, Tier], Secret | None]


class ClaimStore:
    """Implements `ports.MoveStore`."""

    def __init__(
        self,
        pool: PlatformPool,
        organizations: TableRef,
        configured_url: ConfiguredUrl,
        decision_seconds: float,
    ) -> None:
        self._pool = pool
        self._configured_url = configured_url
        self._decision_seconds = decision_seconds
        self._switch_route = sql.SQL(_QUERIES["switch_route"]).format(
            organizations=sql.Identifier(organizations.schema, organizations.name)
        )

    async def claim(
        self, owner: str, lease_seconds: float, *, moves: bool = True, watches: bool = True
    ) -> Claim | None:
        wanted = {"owner": owner, "lease_seconds": lease_seconds, "moves": moves, "watches": watches}
        async with self._pool.connection() as conn:
            cursor = await conn.execute(_CLAIM, wanted)
            row = await cursor.fetchone()
        return Claim(migration_of(row), Epoch(row["epoch"]), owner, row["switched_ago_s"]) if row else None

    async def heartbeat(self, claim: Claim, lease_seconds: float) -> Wish | None:
        row = await self._owned("heartbeat", claim, lease_seconds=lease_seconds)
        return Wish(row["wish"]) if row["wish"] else None

    async def release(self, claim: Claim, after_seconds: float = 0) -> None:
        was_paused = claim.migration.status is Status.PAUSED
        await self._owned("release", claim, after_seconds=float(after_seconds), was_paused=was_paused)

    async def enter_phase(self, claim: Claim, phase: Phase) -> None:
        async with self._pool.transaction() as conn:
            row = await _lock(conn, claim)
            old = Phase(row["phase"]) if row["phase"] else None
            if Status(row["status"]) is not Status.ROLLING_BACK:
                _check_phase(old, phase, claim)
            if old is not phase is Phase.CLEANUP and row["wish"] == Wish.ROLLBACK.value:
                raise Conflict("a rollback was asked for: the source is not cleaned", where=_where(claim))
            await conn.execute(_QUERIES["enter_phase"], {"id": claim.migration.id, "phase": phase.value})

    async def set_status(
        self,
        claim: Claim,
        status: Status,
        *,
        error: Mapping[str, str] | None = None,
        outcome: Status | None = None,
    ) -> None:
        async with self._pool.transaction() as conn:
            row = await _lock(conn, claim)
            check_status(Status(row["status"]), status)
            if status is Status.ROLLING_BACK and row["phase"] == Phase.CLEANUP.value:
                raise Conflict("the source is being cleaned: there is nothing to go back to")
            if status is Status.MONITORING and not row["switched"]:
                raise Conflict("only the decision leads to monitoring", where=_where(claim))
            await conn.execute(
                _QUERIES["set_status"],
                {
                    "id": claim.migration.id,
                    "status": status.value,
                    "error": jsonb(dict(error)) if error is not None else None,
                    "outcome": outcome.value if outcome else None,
                },
            )

    async def trigger(self, claim: Claim, trigger: Trigger, why: str) -> bool:
        async with self._pool.transaction() as conn:
            await _lock(conn, claim)
            facts = {"code": trigger.value, "message": f"rolled back: {why}"}
            parameters = {"id": claim.migration.id, "trigger": trigger.value, "error": jsonb(facts)}
            cursor = await conn.execute(_QUERIES["trigger"], parameters | {"audited": jsonb({"why": why})})
            return await cursor.fetchone() is not None

    async def note_error(self, claim: Claim, error: Mapping[str, str]) -> None:
        await self._owned("note_error", claim, error=jsonb(dict(error)))

    async def begin_step(self, claim: Claim, name: str) -> None:
        await self._owned("begin_step", claim, name=name)

    async def end_step(self, claim: Claim, name: str, *, detail: str | None = None, ok: bool = True) -> None:
        await self._owned("end_step", claim, name=name, detail=detail, status="done" if ok else "failed")

    async def steps(self, claim: Claim) -> tuple[Step, ...]:
        async with self._pool.connection() as conn:
            cursor = await conn.execute(_QUERIES["claimed_steps"], _key(claim))
            rows = await cursor.fetchall()
        if not rows:
            raise _lost(claim)
        return tuple(step_of(row) for row in rows if row["name"] is not None)

    async def event(self, claim: Claim, message: str, level: str = "info", **facts: object) -> None:
        await self._owned("append_event", claim, message=message, level=level, facts=jsonb(facts))

    async def tombstone(self, claim: Claim, refused: int, check_again_seconds: float) -> float:
        row = await self._owned(
            "tombstone", claim, refused=refused, check_again_seconds=float(check_again_seconds)
        )
        return float(row["quiet_seconds"])

    async def end_tombstone(self, claim: Claim) -> None:
        await self._owned("end_tombstone", claim)

    async def load_progress(self, claim: Claim) -> Progress:
        return progress_of((await self._owned("load_progress", claim))["progress"])

    async def save_progress(self, claim: Claim, progress: Progress) -> None:
        await self._owned("save_progress", claim, progress=progress_document(progress))

    async def save_plan(self, claim: Claim, plan: Plan) -> None:
        await self._owned("save_plan", claim, plan=jsonb(encode_plan(plan)))

    async def load_plan(self, claim: Claim) -> Plan | None:
        row = await self._owned("load_plan", claim)
        return decode_plan(row["plan"]) if row["plan"] is not None else None

    async def save_note(self, claim: Claim, key: str, value: object) -> None:
        await self._owned("save_note", claim, key=key, value=jsonb(value))

    async def load_notes(self, claim: Claim) -> dict[str, object]:
        row = await self._owned("load_notes", claim)
        notes: dict[str, object] = row["notes"]
        return notes

    async def decide(
        self, claim: Claim, source: Place, target: Place, evidence: Mapping[str, object]
    ) -> None:
        await self._decided(claim, self._record_decision, source, target, evidence)

    async def decide_return(
        self, claim: Claim, source: Place, target: Place, evidence: Mapping[str, object]
    ) -> None:
        await self._decided(claim, self._record_return, target, source, evidence)

    async def _decided(
        self,
        claim: Claim,
        record: Callable[[Connection, Claim, Place, Place, Mapping[str, object]], Awaitable[None]],
        old: Place,
        new: Place,
        evidence: Mapping[str, object],
    ) -> None:
        committing = False
        try:
            async with self._pool.transaction(self._decision_seconds) as conn:
                await record(conn, claim, old, new, evidence)
                committing = True
        except ApplyConflict:  # the server's own word: a constraint of the routing table said no
            raise
        except MoverError as error:
            if not committing:
                raise
            raise OutcomeUnknown(
                "the decision was sent and its answer was lost", where=_where(claim)
            ) from error

    async def is_switched(self, claim: Claim) -> bool:
        return bool((await self._owned("is_switched", claim))["switched"])

    async def is_returned(self, claim: Claim) -> bool:
        return bool((await self._owned("is_switched", claim))["returned"])

    async def _record_decision(
        self,
        conn: Connection,
        claim: Claim,
        source: Place,
        target: Place,
        evidence: Mapping[str, object],
    ) -> None:
        row = await _lock(conn, claim)
        if row["switched"]:
            return
        check_status(Status(row["status"]), Status.MONITORING)
        await self._change_route(conn, claim, source, target)
        await conn.execute(
            _QUERIES["record_decision"], {"id": claim.migration.id, "evidence": jsonb(dict(evidence))}
        )
        reach("cutover.deciding")

    async def _record_return(
        self,
        conn: Connection,
        claim: Claim,
        target: Place,
        source: Place,
        evidence: Mapping[str, object],
    ) -> None:
        row = await _lock(conn, claim)
        if row["returned"]:
            return
        if Status(row["status"]) is not Status.ROLLING_BACK or not row["switched"]:
            raise Conflict("only a switched migration that is rolling back returns", where=_where(claim))
        await self._change_route(conn, claim, target, source)
        await conn.execute(
            _QUERIES["record_return"], {"id": claim.migration.id, "evidence": jsonb(dict(evidence))}
        )
        reach("return.deciding")

    async def _change_route(self, conn: Connection, claim: Claim, old: Place, new: Place) -> None:
        cursor = await conn.execute(self._switch_route, self._route_change(claim, old, new))
        if await cursor.fetchone() is None:
            raise Conflict(
                f"the tenant's route is not {old} any more",
                where=_where(claim),
                hint="Somebody changed the routing table by hand; nothing was switched.",
            )

    def _route_change(self, claim: Claim, source: Place, target: Place) -> dict[str, object]:
        """The route's old and new values; a URL that the configuration yields anyway is not stored."""
        configured = self._configured_url(claim.migration.tenant, target.vertical, target.tier)
        return {
            "tenant": claim.migration.tenant,
            "source_vertical": source.vertical,
            "source_tier": source.tier.value,
            "source_url": source.url.reveal(),
            "target_vertical": target.vertical,
            "target_tier": target.tier.value,
            "target_url": None if configured == target.url else target.url.reveal(),
        }

    async def _owned(self, query: LiteralString, claim: Claim, **parameters: object) -> dict[str, Any]:
        """Run a statement that gives one row while the claim holds, and none when it is lost."""
        async with self._pool.connection() as conn:
            cursor = await conn.execute(_QUERIES[query], {**_key(claim), **parameters})
            row = await cursor.fetchone()
        if row is None:
            raise _lost(claim)
        return row


def _key(claim: Claim) -> dict[str, object]:
    return {"id": claim.migration.id, "epoch": claim.epoch}


async def _lock(conn: Connection, claim: Claim) -> dict[str, Any]:
    row = await (await conn.execute(_QUERIES["lock_claim"], _key(claim))).fetchone()
    if row is None:
        raise _lost(claim)
    return row


def _check_phase(old: Phase | None, new: Phase, claim: Claim) -> None:
    retried = old in _RETRIED and new in _RETRIED
    if old is not None and not retried and PHASES.index(new) < PHASES.index(old):
        raise Conflict(f"a migration in {old} cannot go back to {new}", where=_where(claim))


def _where(claim: Claim) -> Where:
    return Where(tenant=claim.migration.tenant)


def _lost(claim: Claim) -> LeaseLost:
    return LeaseLost("another daemon owns this migration now", where=_where(claim))
