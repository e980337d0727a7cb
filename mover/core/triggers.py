"""What makes a migration roll itself back, or go on otherwise than planned. `TRIGGERS` is the one table of
it; the README's is held against it.

A rollback is asked for as an operator could ask for it, and is obeyed where he would be: never while a
cutover's outcome is open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from mover.core.migration import Progress


class Trigger(StrEnum):
    """What has happened; of those that ask for a rollback the label of `rollbacks_total`."""

    OPERATOR = "operator"
    INTEGRITY = "data_integrity_failed"
    TIMEOUT = "migration_timeout"
    PHASE_TIMEOUT = "phase_timeout"
    TARGET_UNREACHABLE = "target_db_unreachable"
    ERROR_RATE = "error_rate_spike"
    RETAINED = "too_much_retained"
    SLOT_LOST = "slot_lost"
    FAILED_OVER = "server_failed_over"
    FENCE_HELD = "fence_held"


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds until the switch that a migration may take; 0: as many as it needs."""

    whole_s: float
    phase_s: float
    unreachable_s: float


@dataclass(frozen=True, slots=True)
class Course:
    """What one trigger does before the switch, and after it."""

    before: str
    after: str


TRIGGERS: Mapping[Trigger, Course] = {
    Trigger.OPERATOR: Course("undone, nothing was switched", "the tenant comes back with what he wrote"),
    Trigger.INTEGRITY: Course(
        "undone, and `failed`", "nothing: halted with both sides' rows kept, since neither may be right"
    ),
    Trigger.TIMEOUT: Course("undone after `engine.timeout_hours`", "nothing: the window has its own end"),
    Trigger.PHASE_TIMEOUT: Course(
        "undone after `engine.phase_timeout_hours` in one phase", "nothing: the window has its own end"
    ),
    Trigger.TARGET_UNREACHABLE: Course(
        "undone after `engine.unreachable_minutes` of tries; the target when it answers again",
        "nothing: what the tenant wrote there last would be lost; the way back waits for it",
    ),
    Trigger.ERROR_RATE: Course(
        "not looked at: what is measured then is what later rates are held against",
        "the tenant comes back with what he wrote, after `health.failures` bad looks in a row",
    ),
    Trigger.RETAINED: Course(
        "undone when the slot, or the log, keeps more than `engine.max_retained_gb`, also while it is paused",
        "the way back is given up, so that the target's disk does not fill",
    ),
    Trigger.SLOT_LOST: Course(
        "goes on: both sides are compared, and what differs is copied anew", "the same, on the way back"
    ),
    Trigger.FAILED_OVER: Course(
        "goes on: both sides are compared, and what differs is copied anew", "the same, on the way back"
    ),
    Trigger.FENCE_HELD: Course(
        "opened by itself within `engine.pause_budget_ms`; once the decision was sent, held until the"
        " platform database tells its outcome: alarm, and writers get a retryable error",
        "the same when the tenant comes back",
    ),
}


def overdue(progress: Progress, deadlines: Deadlines) -> tuple[Trigger, str] | None:
    """The trigger of a migration that was not switched yet and takes too long, and why."""
    if 0 < deadlines.whole_s < progress.worked_s:
        return Trigger.TIMEOUT, f"not switched after {_spoken(progress.worked_s)} of work"
    if 0 < deadlines.phase_s < progress.phase_worked_s:
        return Trigger.PHASE_TIMEOUT, f"one phase has taken {_spoken(progress.phase_worked_s)}"
    return None


def _spoken(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
