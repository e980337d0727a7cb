"""Percent: from phase and figures, never going back while a migration goes forward."""

from __future__ import annotations

from itertools import pairwise

from mover.core.migration import Progress, percent_done
from mover.core.states import PHASES, Phase, Status


def test_it_rises_with_the_phases_and_the_copy() -> None:
    values = [0.0]
    for phase in PHASES:
        figures = [Progress()]
        if phase is Phase.COPY:
            figures += [Progress(bytes_done=done, bytes_total=10) for done in range(11)]
        values += [percent_done(Status.IN_PROGRESS, phase, progress) for progress in figures]
    assert all(before <= after for before, after in pairwise(values))
    assert percent_done(Status.COMPLETED, Phase.CLEANUP, Progress()) == 100


def test_without_bytes_rows_are_counted_and_an_estimate_may_be_too_low() -> None:
    half = Progress(rows_done=5, rows_total=10)
    assert percent_done(Status.IN_PROGRESS, Phase.COPY, half) == 37.5
    beyond = Progress(rows_done=15, rows_total=10)
    assert percent_done(Status.IN_PROGRESS, Phase.COPY, beyond) == 70
    assert percent_done(Status.QUEUED, None, Progress()) == 0
