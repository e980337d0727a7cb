"""What the inside needs of the world, as Protocols. Adapters live in `postgres/` and `web/`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from mover.core.ids import TenantId, Tier
from mover.core.migration import Claim, Migration, MigrationRequest, Place, Progress, Step, Wish
from mover.core.states import Phase, Status
from mover.core.tables import Plan


class Clock(Protocol):
    """Time, injected so that tests need not wait."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start, never going back."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class MoveStore(Protocol):
    """Queue, leases and journal in the platform database.

    Every method that takes a Claim runs in a transaction that locks the migration's row (FOR SHARE or
    stronger) and checks its epoch; it raises LeaseLost when another daemon has claimed the migration.
    All methods raise Unreachable when the platform database does not answer.
    """

    async def claim(self, owner: str, lease_seconds: float) -> Claim | None:
        """Lease the most urgent migration that is due and free, raising its epoch, or None.

        Due: `queued` with scheduled_at reached (it becomes `in_progress`), or `in_progress`,
        `monitoring`, `rolling_back` whose lease ended. By priority, then age; SKIP LOCKED."""
        ...

    async def heartbeat(self, claim: Claim, lease_seconds: float) -> Wish | None:
        """Extend the lease; says what an operator wishes."""
        ...

    async def release(self, claim: Claim, after_seconds: float = 0) -> None:
        """End the lease; nobody may claim it again before `after_seconds` (back-off) have passed."""
        ...

    async def enter_phase(self, claim: Claim, phase: Phase) -> None:
        """Record that `phase` begins (only ever forward, but for a retried cutover)."""
        ...

    async def set_status(
        self,
        claim: Claim,
        status: Status,
        *,
        error: Mapping[str, str] | None = None,
        outcome: Status | None = None,
    ) -> None:
        """Change the status as STATUS_NEXT allows; stamps completed_at / rolled_back_at; clears the wish."""
        ...

    async def begin_step(self, claim: Claim, name: str) -> None: ...

    async def end_step(
        self, claim: Claim, name: str, *, detail: str | None = None, ok: bool = True
    ) -> None: ...

    async def steps(self, claim: Claim) -> tuple[Step, ...]: ...

    async def event(self, claim: Claim, message: str, level: str = "info", **facts: object) -> None:
        """Append a line to `platform.migration_events`, seen live over the WebSocket."""
        ...

    async def save_progress(self, claim: Claim, progress: Progress) -> None: ...

    async def save_plan(self, claim: Claim, plan: Plan) -> None: ...

    async def load_plan(self, claim: Claim) -> Plan | None: ...

    async def save_note(self, claim: Claim, key: str, value: object) -> None:
        """Keep a small JSON fact that the way back needs, written *before* the world changes."""
        ...

    async def load_notes(self, claim: Claim) -> dict[str, object]: ...

    async def decide(
        self, claim: Claim, source: Place, target: Place, evidence: Mapping[str, object]
    ) -> None:
        """The decision: in one transaction, compare-and-swap on the epoch, the route in
        `organizations_table` changes from `source` to `target`, status becomes `monitoring`, phase
        `monitor`, `switched_at` is set, `evidence` is stored.

        Raises LeaseLost or Conflict when it certainly did not commit, OutcomeUnknown when the answer
        was lost after the COMMIT had been sent."""
        ...

    async def is_switched(self, claim: Claim) -> bool:
        """Whether the decision was taken, read under the claim's epoch (so an older owner's decision
        can no longer arrive afterwards)."""
        ...


class Desk(Protocol):
    """What the API asks of the platform database; no claim needed."""

    async def submit(self, request: MigrationRequest, source: Place) -> Migration:
        """Raises Conflict when the tenant already has a live migration."""
        ...

    async def get(self, migration_id: str) -> Migration:
        """Raises NotFound."""
        ...

    async def list(self, status: Status | None, limit: int) -> tuple[Migration, ...]: ...

    async def progress(self, migration_id: str) -> tuple[Migration, Progress, tuple[Step, ...]]: ...

    async def wish(self, migration_id: str, wish: Wish, by: str) -> None:
        """Ask for pause or cancel; raises Conflict when the status does not allow it.

        A queued migration is paused or cancelled at once; a paused one that has begun goes to
        `rolling_back` with outcome `cancelled`, for a daemon to undo it."""
        ...

    async def resume(self, migration_id: str, by: str) -> None:
        """paused -> queued (never begun) or in_progress (begun; any daemon goes on from the journal)."""
        ...

    async def where_is(self, tenant: TenantId) -> tuple[str, Tier, str | None]:
        """The tenant's route: vertical, tier, database_url. Raises NotFound."""
        ...
