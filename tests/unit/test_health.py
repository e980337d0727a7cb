"""When what a probe sees asks for a rollback."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from mover.core.errors import Unreachable
from mover.core.secret import Secret
from mover.engine.health import Health
from mover.probes import ErrorRate, ErrorRateProbe


class Script:
    """A probe that sees one thing after the other, and then ends the watching."""

    def __init__(self, seen: Iterable[str | None]) -> None:
        self.seen = iter(seen)

    async def look(self) -> str | None:
        try:
            said = next(self.seen)
        except StopIteration:
            raise asyncio.CancelledError from None
        if said == "away":
            raise Unreachable("target: away")
        return said


class Clock:
    def monotonic(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        pass


async def asked(*probes: Script, failures: int = 3) -> list[str]:
    reasons: list[str] = []

    async def ask(why: str) -> None:
        reasons.append(why)

    with pytest.raises(asyncio.CancelledError):
        await Health(probes, Clock(), 1.0, failures, ask).watch()
    return reasons


async def test_a_probe_asks_when_it_was_bad_so_many_times_in_a_row():
    assert await asked(Script(["bad", "bad"])) == []
    assert await asked(Script(["bad", "bad", None, "bad", "bad"])) == []
    assert await asked(Script(["bad", "bad", "worse"])) == ["worse"]


async def test_a_probe_that_cannot_tell_says_neither_good_nor_bad():
    assert await asked(Script(["away"] * 10)) == []
    assert await asked(Script(["bad", "away", "bad", "away", "bad"])) == ["bad"]


async def test_each_probe_counts_for_itself():
    assert await asked(Script(["bad", None] * 3), Script([None, "bad"] * 3), failures=2) == []


@pytest.mark.parametrize(
    ("now", "before", "is_spike"),
    [
        (0.04, None, False),  # below the threshold
        (0.06, None, True),
        (0.06, 0.0, True),
        (0.10, 0.04, False),  # high, but not much higher than it was
        (0.13, 0.04, True),
        (None, 0.0, False),  # no requests
    ],
)
async def test_a_spike_is_high_and_much_higher_than_before(monkeypatch, now, before, is_spike):
    async def read(self: ErrorRate) -> float | None:
        return now

    monkeypatch.setattr(ErrorRate, "read", read)
    probe = ErrorRateProbe(ErrorRate(Secret("http://nowhere"), "q"), 0.05, 3.0, before)
    assert (await probe.look() is not None) == is_spike
