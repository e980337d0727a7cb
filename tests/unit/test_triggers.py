"""When a migration takes too long."""

from __future__ import annotations

from mover.core.migration import Progress
from mover.core.triggers import Deadlines, Trigger, overdue

DEADLINES = Deadlines(whole_s=7200, phase_s=3600, unreachable_s=600)


def test_the_whole_counts_before_the_phase() -> None:
    found = overdue(Progress(worked_s=7201, phase_worked_s=7201), DEADLINES)
    assert found == (Trigger.TIMEOUT, "not switched after 2.0 hours of work")


def test_one_phase_alone_may_take_too_long() -> None:
    found = overdue(Progress(worked_s=7200, phase_worked_s=3601), DEADLINES)
    assert found == (Trigger.PHASE_TIMEOUT, "one phase has taken 1.0 hours")


def test_what_is_in_time_or_has_no_deadline_goes_on() -> None:
    assert overdue(Progress(worked_s=7200, phase_worked_s=3600), DEADLINES) is None
    for_ever = Progress(worked_s=1e9, phase_worked_s=1e9)
    assert overdue(for_ever, Deadlines(whole_s=0, phase_s=0, unreachable_s=0)) is None
