"""The live figures of a migration, on a clock of the test's own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from mover.core.migration import Progress
from mover.engine.figures import LARGE_LOG_BYTES, WARNING_INTERVAL_S, Figures
from mover.engine.site import Kept


@dataclass
class SetClock:
    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


SLOTS = [Kept(5, status) for status in ("reserved", "extended", "unreserved", "unreserved", "extended")]
LOGS = [Kept(log_bytes=size) for size in (0, 1 << 20, LARGE_LOG_BYTES, 2 * LARGE_LOG_BYTES, 8192)]


@pytest.mark.parametrize(("kept", "word"), [(SLOTS, "slot"), (LOGS, "log of changes")])
def test_what_the_source_keeps_is_warned_of_once_a_minute_however_often_we_look(kept, word) -> None:
    clock = SetClock()
    figures = Figures(Progress(), clock)
    warned = []
    for seen in kept + kept[2:] * 50:
        clock.now += 1
        if warning := figures.warning(seen):
            assert word in warning
            warned.append(clock.now)
    assert warned == [3, 3 + WARNING_INTERVAL_S, 3 + 2 * WARNING_INTERVAL_S]
