"""After the switch: whether the tenant is served well where he is now.

A probe that finds him served badly several times in a row asks for a rollback. One that cannot tell counts
for nothing: where the target itself is away, what the tenant wrote there last could not come back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mover.core.errors import MoverError
from mover.core.tables import Shape
from mover.ports import Clock


class Probe(Protocol):
    """One way to see how the tenant is served."""

    async def look(self) -> str | None:
        """What is wrong, for people; None where nothing is. Raises MoverError where it cannot tell."""
        ...


class Probes(Protocol):
    """Those that an operator has configured, for one tenant."""

    async def error_rate(self) -> float | None:
        """The share of the tenant's requests that fail now; None where nobody tells."""
        ...

    def watching(self, shape: Shape, error_rate_before: float | None) -> Sequence[Probe]: ...


@dataclass
class Health:
    """Looks at all probes at one rhythm."""

    probes: Sequence[Probe]
    clock: Clock
    interval_s: float
    failures: int
    ask: Callable[[str], Awaitable[None]]  # for a rollback, and why
    _bad: dict[int, int] = field(default_factory=dict)

    async def watch(self) -> None:
        """For ever."""
        while True:
            await self.clock.sleep(self.interval_s)
            for number, probe in enumerate(self.probes):
                await self._look(number, probe)

    async def _look(self, number: int, probe: Probe) -> None:
        try:
            wrong = await probe.look()
        except MoverError:
            return
        self._bad[number] = 0 if wrong is None else self._bad.get(number, 0) + 1
        if wrong is not None and self._bad[number] >= self.failures:
            await self.ask(wrong)
