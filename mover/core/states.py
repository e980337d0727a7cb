"""A migration's life: the phases, the statuses, and the one table of allowed changes.

The daemon, the tests' model and the picture in the README are all made from `STATUS_NEXT` and
`PHASES`; `check_status` is the only door.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from mover.core.errors import Conflict


class Phase(StrEnum):
    """In the order in which a migration passes through them."""

    PREFLIGHT = "preflight"
    PROVISION = "provision"
    PREPARE = "prepare"
    COPY = "copy"
    INDEX = "index"
    CATCH_UP = "catch_up"
    VERIFY = "verify"
    CUTOVER = "cutover"
    MONITOR = "monitor"
    CLEANUP = "cleanup"


PHASES: tuple[Phase, ...] = tuple(Phase)


class Status(StrEnum):
    """What the API reports."""

    PENDING_APPROVAL = "pending_approval"
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    PAUSED = "paused"
    MONITORING = "monitoring"  # served by the target; the window before the source is cleaned
    COMPLETED = "completed"
    FAILED = "failed"
    ROLLING_BACK = "rolling_back"  # undoing what we made; ends as `outcome` says
    ROLLED_BACK = "rolled_back"
    CANCELLED = "cancelled"


STATUS_NEXT: Mapping[Status, frozenset[Status]] = {
    Status.PENDING_APPROVAL: frozenset({Status.QUEUED, Status.CANCELLED}),
    Status.QUEUED: frozenset({Status.IN_PROGRESS, Status.PAUSED, Status.CANCELLED}),
    Status.IN_PROGRESS: frozenset({Status.PAUSED, Status.MONITORING, Status.ROLLING_BACK, Status.FAILED}),
    Status.PAUSED: frozenset({Status.QUEUED, Status.IN_PROGRESS, Status.ROLLING_BACK, Status.CANCELLED}),
    Status.MONITORING: frozenset({Status.COMPLETED, Status.ROLLING_BACK}),
    Status.ROLLING_BACK: frozenset({Status.ROLLED_BACK, Status.CANCELLED, Status.FAILED}),
    Status.COMPLETED: frozenset(),
    Status.FAILED: frozenset(),
    Status.ROLLED_BACK: frozenset(),
    Status.CANCELLED: frozenset(),
}

# A tenant has at most one migration in these.
LIVE: frozenset[Status] = frozenset(s for s, following in STATUS_NEXT.items() if following)


def check_status(old: Status, new: Status) -> None:
    """Raises Conflict when the table does not allow `old` -> `new`."""
    if new is not old and new not in STATUS_NEXT[old]:
        raise Conflict(f"a migration that is {old} cannot become {new}")
