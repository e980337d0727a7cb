"""The live figures of a migration, on a clock of the test's own."""

from __future__ import annotations

from dataclasses import dataclass

from mover.core.migration import Progress
from mover.engine.figures import WARNING_INTERVAL_S, Figures


@dataclass
class SetClock:
    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_slot_in_danger_is_warned_of_once_a_minute_however_often_we_look() -> None:
    clock = SetClock()
    figures = Figures(Progress(), clock)
    warned = []
    for status in ["reserved", "extended"] + ["unreserved", "unreserved", "extended"] * 50:
        clock.now += 1
        if figures.warns_of_slot(status):
            warned.append(clock.now)
    assert warned == [3, 3 + WARNING_INTERVAL_S, 3 + 2 * WARNING_INTERVAL_S]
