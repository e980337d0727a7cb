"""A migration as the platform database knows it: the record, its progress, the owner's claim."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from mover.core.ids import Epoch, MigrationId, TenantId, Tier
from mover.core.secret import Secret
from mover.core.states import Phase, Status

# Where each phase begins and ends, in percent of a migration; monitoring waits, so it adds nothing.
_SPAN: dict[Phase, tuple[float, float]] = {
    Phase.PREFLIGHT: (0, 1),
    Phase.PROVISION: (1, 2),
    Phase.PREPARE: (2, 5),
    Phase.COPY: (5, 70),
    Phase.INDEX: (70, 80),
    Phase.CATCH_UP: (80, 87),
    Phase.VERIFY: (87, 97),
    Phase.CUTOVER: (97, 99),
    Phase.MONITOR: (99, 99),
    Phase.CLEANUP: (99, 100),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tenant lives, or shall live."""

    vertical: str
    tier: Tier
    url: Secret
    schemas: tuple[str, ...]  # one a service, by `tenancy.schema_pattern`, in the configured order

    def __str__(self) -> str:
        return f"{self.vertical} ({self.tier})"


class Wish(StrEnum):
    """What an operator has asked of a migration that a daemon may be working on."""

    PAUSE = "pause"
    CANCEL = "cancel"
    ROLLBACK = "rollback"  # as cancel; once the tenant has been switched, bring him back


@dataclass(frozen=True, slots=True)
class MigrationRequest:
    """What `POST /api/platform/migrations` asks for, validated."""

    tenant: TenantId
    target_vertical: str
    target_tier: Tier
    scheduled_at: datetime | None = None
    priority: int = 0
    reason: str | None = None
    requested_by: str = "unknown"


@dataclass(frozen=True, slots=True)
class Migration:
    """One row of `platform.tenant_migrations`."""

    id: MigrationId
    tenant: TenantId
    source_vertical: str
    source_tier: Tier
    target_vertical: str
    target_tier: Tier
    status: Status
    phase: Phase | None
    priority: int
    scheduled_at: datetime | None
    reason: str | None
    requested_by: str
    created_at: datetime
    started_at: datetime | None = None
    switched_at: datetime | None = None  # the decision: set in the transaction that changed the route
    completed_at: datetime | None = None
    rolled_back_at: datetime | None = None
    error: dict[str, str] | None = None  # the API's error object
    wish: Wish | None = None
    outcome: Status | None = None  # what `rolling_back` ends as


@dataclass(frozen=True, slots=True)
class Claim:
    """A lease on a migration. Every transaction of the owner carries `epoch`."""

    migration: Migration
    epoch: Epoch
    owner: str
    switched_ago_s: float | None = None  # when it was claimed, by the platform database's clock


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the journal, `platform.migration_steps`."""

    name: str  # "phase" or "phase.step"; never renamed once released
    status: str  # running | done | failed
    started_at: datetime
    duration_ms: float | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """One line of `platform.migration_events`; ids rise within a migration in the order of commit."""

    id: int
    at: datetime
    level: str
    message: str
    facts: dict[str, object]


@dataclass(slots=True)
class Progress:
    """Live figures of a migration; stored about once a second as one JSON document."""

    rows_done: int = 0
    rows_total: int = 0
    bytes_done: int = 0
    bytes_total: int = 0
    changes_applied: int = 0
    rows_compared: int = 0
    refused_writes: int = 0  # at the source, after the switch
    lag_bytes: int | None = None
    lag_seconds: float | None = None
    eta_seconds: float | None = None
    pause_ms: float | None = None
    waiting_for: str | None = None  # why nothing moves right now, for people
    worked_s: float = 0.0  # until the switch, tries and the time between them; not while it was paused
    phase_worked_s: float = 0.0  # of these, in this phase
    failing_s: float = 0.0  # of these, since it last got on
    capture: str | None = None  # how the source's changes are followed
    evidence: dict[str, object] = field(default_factory=dict)  # roots, counts, markers


def percent_done(status: Status, phase: Phase | None, progress: Progress) -> float:
    """How far a migration is, 0 to 100: by phase, and inside the copy by bytes (rows, where unknown)."""
    if status is Status.COMPLETED:
        return 100.0
    if phase is None:
        return 0.0
    begin, end = _SPAN[phase]
    if phase is not Phase.COPY:
        return begin
    done, total = (
        (progress.bytes_done, progress.bytes_total)
        if progress.bytes_total
        else (progress.rows_done, progress.rows_total)
    )
    share = min(done / total, 1.0) if total else 0.0
    return round(begin + (end - begin) * share, 1)
