"""What the inside needs of the world, as Protocols. Adapters live in `postgres/` and `web/`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from mover.core.changes import Change, Piece, RowChange, Seen, Truncated
from mover.core.copying import Chunk, CopiedRanges, Key
from mover.core.ids import Lsn, TableRef, TenantId, Tier
from mover.core.membership import Values
from mover.core.migration import (
    Claim,
    Event,
    Migration,
    MigrationRequest,
    Place,
    Progress,
    Step,
    Wish,
)
from mover.core.snapshot import Snapshot
from mover.core.states import Phase, Status
from mover.core.tables import MovedTable, Plan
from mover.core.triggers import Trigger


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

    async def claim(
        self, owner: str, lease_seconds: float, *, moves: bool = True, watches: bool = True
    ) -> Claim | None:
        """Lease the most urgent migration that is due and free, raising its epoch, or None.

        Due: `queued` with scheduled_at reached (it becomes `in_progress`), or `in_progress`, `monitoring`,
        `rolling_back` whose lease ended, or one that is over, with a tombstone to be looked at or an
        abandoned target to be cleared. One that was left in its cutover comes first, since writers may be
        waiting for it; then by priority and age. SKIP LOCKED. Without `watches` none that is `monitoring`;
        without `moves` no other, but for cutovers that were left."""
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

    async def trigger(self, claim: Claim, trigger: Trigger, why: str) -> bool:
        """Ask for a rollback as an operator would, with a line in the audit; False where something is wished
        already, or nothing can be rolled back."""
        ...

    async def note_error(self, claim: Claim, error: Mapping[str, str]) -> None:
        """Show the error in the status without changing it; a phase that goes on clears it."""
        ...

    async def begin_step(self, claim: Claim, name: str) -> None: ...

    async def end_step(
        self, claim: Claim, name: str, *, detail: str | None = None, ok: bool = True
    ) -> None: ...

    async def steps(self, claim: Claim) -> tuple[Step, ...]: ...

    async def event(self, claim: Claim, message: str, level: str = "info", **facts: object) -> None:
        """Append a line to `platform.migration_events`, seen live over the WebSocket."""
        ...

    async def tombstone(self, claim: Claim, refused: int, check_again_seconds: float) -> float:
        """Note how many writes the left place has refused so far, and when to look again; of a migration that
        is over.

        Returns the seconds since that number last changed."""
        ...

    async def end_tombstone(self, claim: Claim) -> None:
        """The left place holds nothing of ours any more."""
        ...

    async def load_progress(self, claim: Claim) -> Progress:
        """What an earlier owner saved."""
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
        was lost after the COMMIT had been sent. Bounded in time by itself: a caller's own timeout would
        not know which of the two it cut off. Taken already, it returns."""
        ...

    async def decide_return(
        self, claim: Claim, source: Place, target: Place, evidence: Mapping[str, object]
    ) -> None:
        """The same for the way back of a migration that is `rolling_back`: the route changes from `target` to
        `source`, `rolled_back_at` is set, `evidence` is added. Raises as `decide`."""
        ...

    async def is_returned(self, claim: Claim) -> bool:
        """Whether that was decided, read as `is_switched`."""
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
        """Ask for pause or cancel; raises NotFound, and Conflict when the status does not allow it.

        A queued migration is paused or cancelled at once; a paused one that has begun goes to
        `rolling_back` with outcome `cancelled`, for a daemon to undo it."""
        ...

    async def resume(self, migration_id: str, by: str) -> None:
        """paused -> queued (never begun) or in_progress (begun; any daemon goes on from the journal).

        One that waits for a later try, or was halted, is tried again at once. Raises Conflict for others."""
        ...

    async def where_is(self, tenant: TenantId) -> tuple[str, Tier, str | None]:
        """The tenant's route: vertical, tier, database_url. Raises UnknownTenant."""
        ...

    async def events(self, migration_id: str, after: int, limit: int) -> tuple[Event, ...]:
        """The events with ids above `after`, oldest first."""
        ...

    async def counts(self) -> Mapping[Status, int]:
        """How many migrations have each status; every status is there."""
        ...

    async def asked(self, who: str, role: str, action: str, subject: str | None) -> int:
        """Note a request in the audit before it is carried out: the line's id."""
        ...

    async def answered(
        self, line: int, result: str, subject: str | None, facts: Mapping[str, object]
    ) -> None:
        """Note what became of it: `ok`, or the error's code."""
        ...

    async def check_ready(self) -> None:
        """Raises Unreachable, or Refused when `mover init` has to run first."""
        ...


class ChangeStream(Protocol):
    """The source's committed changes of the tenant's rows, transaction by transaction, in commit order."""

    async def start(self, after: Lsn) -> None:
        """Begin (again) with the first transaction that commits after what is confirmed, which must not be
        after `after`. Raises SlotLost."""
        ...

    async def wait(self) -> None:
        """Until `take` has something to give; raises what ended the stream."""
        ...

    def take(self, max_bytes: int) -> list[Piece]:
        """What has arrived, without waiting; may end in the middle of a huge transaction."""
        ...

    @property
    def idle_lsn(self) -> Lsn:
        """Everything up to here has been taken, and the source had nothing more; 0 while it has."""
        ...

    def confirm(self, flushed: Lsn) -> None:
        """What committed before `flushed` is durable on the target: the source may forget it."""
        ...

    async def close(self) -> None: ...


class ConsistentPoint(Protocol):
    """An ordinary REPEATABLE READ snapshot of the source."""

    @property
    def snapshot(self) -> Snapshot: ...

    @property
    def snapshot_id(self) -> str:
        """For SET TRANSACTION SNAPSHOT."""
        ...

    def rows(
        self,
        table: MovedTable,
        tenant: TenantId,
        names: Sequence[str],
        values: Collection[Key],
        copied: CopiedRanges,
    ) -> AsyncGenerator[bytes]:
        """The tenant's rows in the copied ranges that have one of `values` in the columns `names`, as the
        snapshot sees them: COPY text of the copied columns. To be closed by whoever stops in the middle."""
        ...


class Positions(Protocol):
    """Places in the source's WAL."""

    async def mark(self, token: str) -> None:
        """Write a mark (core.ids.new_mark) behind everything that has committed so far, all of which is
        durable then; the stream reaches it."""
        ...

    async def wal_lsn(self) -> Lsn:
        """The current end of the source's WAL."""
        ...


class ChangeSource(Positions, Protocol):
    """What following the source needs of it, beside the stream."""

    def consistent_point(self) -> AbstractAsyncContextManager[ConsistentPoint]:
        """A point taken now; its snapshot lives as long as the context."""
        ...

    async def snapshot(self) -> Snapshot:
        """What a transaction that begins now sees; nobody holds it."""
        ...


class ChangesSince(Protocol):
    """What triggers have written down that a point sees and an earlier snapshot did not."""

    @property
    def is_empty(self) -> bool: ...

    @property
    def tables(self) -> Collection[TableRef]:
        """Those of which anything is written down."""
        ...

    @property
    def truncated(self) -> Sequence[Truncated]:
        """Before everything else."""
        ...

    def rehomed(self) -> AsyncGenerator[Values]:
        """Rows that refer to these may have come to the tenant or left, without a change of their own. In
        pieces that memory holds, between which the point may be asked other things; may be asked again."""
        ...

    def rows(self, copied: Mapping[TableRef, CopiedRanges]) -> AsyncGenerator[list[Seen]]:
        """Every row that has changed and may be in the copied ranges, once, as the point sees it. May be
        asked again; nothing else is asked of the point meanwhile. Whoever stops in the middle closes it."""
        ...

    def whole_rows(self, copied: Mapping[TableRef, CopiedRanges]) -> AsyncGenerator[list[RowChange]]:
        """The net changes of tables without a key, unless they are among those `truncated`; may be asked
        again."""
        ...


class LoggedPoint(ConsistentPoint, Protocol):
    async def changes_since(self, snapshot: Snapshot) -> ChangesSince:
        """Raises PlanOutdated when a table is not the planned one any more."""
        ...


class ChangeLog(Positions, Protocol):
    """The other way to follow a source: what triggers write down of the tenant's changes."""

    def consistent_point(self) -> AbstractAsyncContextManager[LoggedPoint]:
        """A point taken now; its snapshot lives as long as the context."""
        ...

    def next_point(self) -> AbstractAsyncContextManager[LoggedPoint]:
        """The same on a connection that stays open: for one at a time, and not for long."""
        ...

    async def forget(self, seen: Snapshot) -> bool:
        """What `seen` and every later snapshot see is durable on the target: it need not be kept. Removes a
        batch of it; says whether there may be more."""
        ...

    async def make_room(self) -> None:
        """Where enough is forgotten, let new entries have its room. Holds nobody up."""
        ...


class ApplyTransaction(Protocol):
    """One open transaction on the target; commits when its context ends without an error."""

    async def apply(self, changes: Sequence[Change], ends: Sequence[int] = ()) -> None:
        """Make the changes, in effect as if in order; `ends` are the places behind which a transaction of
        the source ends.

        Raises ApplyConflict when they do not fit the rows, SchemaChanged when they do not fit the plan."""
        ...

    @property
    def is_missing_rows(self) -> bool:
        """Whether a change did not carry all of a row that has to be there now. Such a transaction must
        not commit before `fetch_missing`."""
        ...

    async def fetch_missing(self, point: ConsistentPoint) -> None:
        """Read the missing rows from the source; the transaction must be exactly at the point."""
        ...

    async def settle(self, changes: ChangesSince, point: ConsistentPoint) -> Mapping[str, int]:
        """Bring the target from the snapshot since which the changes are to the point's; says how many of
        each kind of change that took.

        Raises ApplyConflict when they do not fit the rows, SchemaChanged when they do not fit the plan."""
        ...

    async def advance(self, applied: Lsn, snapshot: Snapshot | None) -> None:
        """Store the progress that this transaction makes true."""
        ...


class ApplyTarget(Protocol):
    """The target as the follower sees it."""

    def transaction(self) -> AbstractAsyncContextManager[ApplyTransaction]: ...

    async def progress(self) -> tuple[Lsn, Snapshot | None]:
        """Everything that committed before the LSN is applied, and everything that the snapshot sees."""
        ...

    def set_copied(self, ranges: Mapping[TableRef, CopiedRanges]) -> None:
        """Which rows are there, by source table: changes outside are dropped."""
        ...

    def collect_dirty(self) -> None:
        """From now on remember the keys that change, forgetting those remembered so far."""
        ...

    def dirty(self) -> Mapping[TableRef, frozenset[Key]] | None:
        """The keys changed since `collect_dirty`, by source table; None when they were too many to keep."""
        ...


class Copier(Protocol):
    """Copies chunks from a snapshot of the source into the target."""

    async def plan_chunks(
        self, table: MovedTable, snapshot_id: str, *, done: bool = False
    ) -> Sequence[Chunk]:
        """Split the tenant's rows of `table` by key; recorded on the target before they are used.

        `done`: they are held to be there."""
        ...

    async def chunks(self) -> Mapping[TableRef, Sequence[Chunk]]:
        """All recorded chunks, by source table."""
        ...

    async def take_back(self, table: MovedTable, chunk: Chunk) -> None:
        """Remove a chunk's rows from the target, where no foreign key acts on that, and record in the same
        transaction that they are not there. Not of a table that owns others, or is owned."""
        ...

    def worker(self, snapshot_id: str) -> AbstractAsyncContextManager[ChunkWorker]: ...


class ChunkWorker(Protocol):
    async def copy(self, table: MovedTable, chunk: Chunk) -> tuple[int, int]:
        """Copy one chunk and mark it done in the same transaction: (rows, bytes)."""
        ...
