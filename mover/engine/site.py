"""The two databases of a migration, as the engine sees them. The adapter is `postgres/site.py`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence, Set
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from cutover.ports import Sequences, TargetFence
from mover.core.ids import Capture, Side, TableRef, TenantId
from mover.core.tables import MovedTable, Plan, Shape
from mover.ports import ApplyTarget, ChangeLog, ChangeSource, ChangeStream, Copier
from verify.ports import DigestReader


class SnapshotReaders(Protocol):
    """Open connections to one side, for the `verify` package; shares nothing with the copy path."""

    def at_snapshot(
        self, tenant: TenantId, snapshot_id: str | None = None
    ) -> AbstractAsyncContextManager[DigestReader]:
        """A reader under an exported snapshot, or under a new one that it takes now."""
        ...


@dataclass(frozen=True, slots=True)
class Stream:
    """A source that sends what commits there."""

    reader: ChangeStream
    source: ChangeSource


@dataclass(frozen=True, slots=True)
class Link:
    """The open connections between the two sides while rows flow."""

    changes: Stream | ChangeLog
    target: ApplyTarget
    copier: Copier
    source_readers: SnapshotReaders
    target_readers: SnapshotReaders
    schema_stamp: Callable[[], Awaitable[str]]  # quick to read, see Site.schema_stamp


@dataclass(frozen=True, slots=True)
class Kept:
    """What the source keeps for us until we have read it."""

    wal_bytes: int = 0  # by the slot
    wal_status: str = ""  # pg_replication_slots.wal_status; "" where there is no slot
    log_bytes: int = 0  # what triggers have written down

    def is_more_than(self, limit_bytes: float) -> bool:
        """A limit of 0 is none."""
        return 0 < limit_bytes < self.wal_bytes + self.log_bytes

    def __str__(self) -> str:
        return f"{(self.wal_bytes + self.log_bytes) / (1 << 30):.1f} GiB"


@dataclass(frozen=True, slots=True)
class Aligned:
    """What the two sides' schemas are now, equal as far as rows depend on them."""

    shape: Shape  # planned again from the catalogs
    stamp: str  # Site.schema_stamp, read before everything else
    unfilled: Set[tuple[TableRef, str]]  # the source's columns that are NULL in every row not written since
    storage: Mapping[str, str]  # the source's tables -> another value once their rows were rewritten


Say = Callable[[str], Awaitable[None]]


class Site(Protocol):
    """The two databases of one migration, and everything that we make on them.

    Every method may be repeated: it asks the world whether its work is done. `say` tells people what a
    method waits for."""

    def rest(self) -> None:
        """The work is at its end: from now on no connection stays open between two questions."""
        ...

    async def preflight(self) -> Plan: ...

    def back(self) -> Site:
        """The same two databases with their roles swapped: rows flow from this one's target to its source."""
        ...

    async def plan_back(self, shape: Shape, capture: Capture | None) -> Plan:
        """The plan of the way back, by the catalogs as they are now; refused where it is not possible.
        `capture` is how it has been prepared, if it has.

        Raises SchemaChanged when the two sides differ."""
        ...

    @property
    def source_fence(self) -> TargetFence: ...

    @property
    def target_fence(self) -> TargetFence: ...

    def sequences(self, shape: Shape) -> AbstractAsyncContextManager[Sequences]: ...

    async def provision(self) -> None:
        """The target's database exists and answers."""
        ...

    async def watch_pulse(self, say: Callable[[str | None], None]) -> None:
        """Until cancelled: `say` is told why a side does not answer, and None when both do. Whoever waits for
        one that does not is let go with an error."""
        ...

    async def target_answers(self) -> bool:
        """Whether anybody can be served there."""
        ...

    async def server_identities(self) -> Mapping[str, str]:
        """System identifier and timeline of each side: they change with a restore or a promotion."""
        ...

    async def has_all_that_was_applied(self, known: str) -> bool:
        """Whether the source, another server now than `known` (as `server_identities` had it), has all of its
        changes that are on the target already; False also where it does not tell."""
        ...

    async def own_source(self) -> None:
        """Install our schema there and raise the epoch; ends an old owner's backends."""
        ...

    async def own_target(self) -> None:
        """The same on the target."""
        ...

    async def take_over(self) -> None:
        """Install our schema on both sides and raise the epoch there; ends an old owner's backends."""
        ...

    async def clone_schemas(self, shape: Shape) -> None:
        """A fresh target's schemas, without indexes."""
        ...

    async def schema_stamp(self) -> str:
        """Another whenever something in the source's schemas changes on which rows depend."""
        ...

    async def align(self, shape: Shape, say: Say, *, is_built: bool) -> Aligned:
        """The target follows what has changed harmlessly on the source since the plan; `is_built` says
        whether a fresh target has its indexes and what follows them.

        Raises SchemaChanged when anything else differs, or cannot be moved."""
        ...

    async def check_schemas(self, shape: Shape) -> None:
        """Raises PlanOutdated when `align` has something to do, SchemaChanged when an operator has."""
        ...

    async def check_references(self, shape: Shape, say: Say) -> None:
        """Raises DanglingReferences when rows refer across tenants that did not when it was planned; says
        which foreign keys could not be looked through in time."""
        ...

    async def check_others_references(self, shape: Shape, say: Say) -> None:
        """The same of other tenants' rows that refer to the tenant's, once these belong elsewhere."""
        ...

    async def carry_remarks(self, shape: Shape, say: Say) -> None:
        """A fresh target has the comments and privileges that the source has now; `check_schemas` has
        passed."""
        ...

    async def forget_copies(self, shape: Shape, tables: Collection[TableRef], say: Say) -> None:
        """The tenant's rows of these tables (of the source) are not on the target any more, nor are they
        held to be copied."""
        ...

    async def build_keys(self, shape: Shape, tables: Sequence[MovedTable]) -> None:
        """The keys of these tables on a fresh target."""
        ...

    async def build_rest(self, shape: Shape) -> None:
        """Everything else on a fresh target: indexes, constraints, triggers, statistics."""
        ...

    async def identify_rows(self, shape: Shape, say: Say) -> None:
        """Replica identities that cover the tenant column."""
        ...

    async def reserve_sequences(self, shape: Shape) -> None:
        """On a target with other tenants: what they take from now on is not among the tenant's values."""
        ...

    async def guard(self, shape: Shape, say: Say) -> None:
        """Guards on both sides: the source's fence open, the target's closed."""
        ...

    async def publish(self, shape: Shape, say: Say) -> None:
        """The publication, then the slot, then the stream's starting position on the target."""
        ...

    async def begin_anew(self, shape: Shape, say: Say) -> None:
        """What was to come from the source is lost: another slot, where there was one, and no progress.

        Nothing that is on the target is held to be what the source has."""
        ...

    async def guard_departure(self, shape: Shape, say: Say) -> None:
        """Of a way back: guards on its source, the migration's target, which may have to write down what they
        let pass. The fence stays as it is."""
        ...

    async def skip_ahead(self, shape: Shape) -> None:
        """What has committed on the source so far need not be kept for us."""
        ...

    async def begin_here(self) -> None:
        """What commits on the source from now on is applied, and nothing that has committed so far."""
        ...

    def link(self, shape: Shape) -> AbstractAsyncContextManager[Link]: ...

    async def kept_for_us(self) -> Kept: ...

    async def stop_stream(self, shape: Shape, say: Say) -> None:
        """Drop the slot, then the publication; or, once the tenant has left, write nothing down any more."""
        ...

    async def restore_identity(self, shape: Shape, say: Say) -> None: ...

    async def keep_target(self, shape: Shape) -> None:
        """The tenant is served there now: what we made on the target is not ours to drop any more."""
        ...

    async def reopen_source(self) -> None:
        """Whatever a dead owner left closed: the tenant writes at the source."""
        ...

    async def unguard_source(self, shape: Shape, say: Say) -> None: ...

    async def keep_tombstone(self, shape: Shape, say: Say) -> None:
        """On the source, after its rows are removed: of the guards only what refuses late writes stays."""

    async def unguard_target(self, shape: Shape, say: Say) -> None: ...

    async def remove_target_rows(self, shape: Shape, say: Say) -> None:
        """The tenant's rows on the target, or all that was not there before us."""
        ...

    async def holds_rows(self, shape: Shape, side: Side) -> bool:
        """Whether any row of the tenant's is there."""
        ...

    async def remove_source_rows(self, shape: Shape, say: Say) -> None:
        """The tenant's rows on the source, in throttled batches, children first."""
        ...

    async def forget_source(self) -> None:
        """Our rows about this migration there, and our schema with the last of them."""
        ...

    async def forget_target(self) -> None:
        """The same on the target."""
        ...

    async def refused_writes(self) -> int:
        """Writes that the guard on the source has refused."""
        ...

    async def remove_tombstone(self, shape: Shape, say: Say) -> None:
        """The guard on the source, and our schema there if nobody else needs it."""
        ...
