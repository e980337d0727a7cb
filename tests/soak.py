"""`python -m tests.soak --minutes 30`: a tenant under load is moved to another database and rolled back again
and again, sometimes for good and moved back, while daemons, connections and servers fail every few seconds.

What always holds is looked at all the time; after each move nothing is lost, nothing is there twice, other
tenants are untouched, and nothing is left behind. Exits 1 when a promise is broken, and says which.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import uvloop

from mover.core.errors import first_error
from mover.core.ids import Capture
from mover.demo.servers import PostgresServer, RedisServer
from mover.demo.workload import WorkloadReport
from tests.acceptance.conftest import NEIGHBOURS_FIRST_KEY as FIRST_KEY
from tests.acceptance.conftest import core_tenants, seed_core, seed_estate, seed_platform
from tests.support.acceptance import CORE, ENDED, ESTATE, PLATFORM, Home, Scene
from tests.support.chaos import DAEMONS, SIDES, World, world_on

TPS = 200
VERSIONS = {CORE: 16, ESTATE: 18, PLATFORM: 16}
SMALL = {"shared_buffers": "128MB", "max_wal_size": "512MB"}
GAP_S = (1.0, 4.0)  # between the beginnings of two faults
LASTS_S = (0.5, 5.0)
DISTURBED_S = (30.0, 60.0)  # each part of a move; then it is left alone, so that it comes to rest
CALM_EVERY = 8  # of so many moves one is undisturbed, and its pauses count
FOR_GOOD_EVERY = 5
WRITTEN = TPS  # transactions before, between and after the moves
REPORT_S = 60
SHOWN = 30  # of the latest faults, when a promise is broken


@dataclass
class Tally:
    """The numbers."""

    began_s: float = field(default_factory=time.monotonic)
    moves: Counter[str] = field(default_factory=Counter)  # by how they ended
    calm_p50_ms: list[float] = field(default_factory=list)
    calm_max_ms: float = 0.0
    transactions: int = 0

    def note(self, report: WorkloadReport, *, is_calm: bool) -> None:
        self.transactions += report.transactions + report.others_transactions
        if is_calm and report.pause_ms is not None:
            self.calm_p50_ms.append(report.pause_ms.p50)
            self.calm_max_ms = max(self.calm_max_ms, report.pause_ms.max)

    def line(self, world: World, faults: Counter[str]) -> str:
        pauses = f"median {median(self.calm_p50_ms):.0f} ms, " if self.calm_p50_ms else ""
        return (
            f"{(time.monotonic() - self.began_s) / 60:5.1f} min: {_counted(self.moves)} | "
            f"{faults.total()} faults: {_counted(faults)} | "
            f"{self.transactions} transactions, {world.scene.ledger.writes} acknowledged writes | "
            f"{world.witness.looks} looks ({world.witness.missed} missed), "
            f"{world.witness.changes} changes of status | "
            f"undisturbed pauses: {pauses}longest {self.calm_max_ms:.0f} ms"
        )


@dataclass
class Faults:
    """They begin every few seconds, last as long, and may overlap."""

    world: World
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    latest: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def happening(self) -> AsyncIterator[None]:
        """When the block ends no new one begins, and what was begun is over."""
        async with asyncio.TaskGroup() as tasks:
            pacing = tasks.create_task(self._pace(tasks))
            try:
                yield
            finally:
                pacing.cancel()

    async def _pace(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            await asyncio.sleep(self.rng.uniform(*GAP_S))
            faults = self._faults()
            (_, name, fault) = self.rng.choices(faults, [weight for weight, *_ in faults])[0]
            self.counts[name] += 1
            self.latest = [*self.latest[-SHOWN:], f"{time.strftime('%H:%M:%S')} {name}"]
            tasks.create_task(fault(), name=name)

    def _faults(self) -> list[tuple[int, str, Callable[[], Awaitable[None]]]]:
        """How often each comes; what ends a migration is rare, or nothing else were tried."""
        return [
            (4, "kill -9", self._kill),
            (2, "SIGTERM", self._stop),
            (4, "SIGSTOP", self._freeze),
            (4, "cut", self._cut),
            (2, "stalled", self._hold),
            (4, "backends ended", self._end_backends),
            (2, "server stopped", self._crash),
            (4, "pause and resume", self._pause),
            (1, "cancel", self._cancel),
            (1, "rollback", self._rollback),
        ]

    async def _last(self) -> None:
        await asyncio.sleep(self.rng.uniform(*LASTS_S))

    async def _kill(self) -> None:
        number = self.rng.choice(DAEMONS)
        await self.world.kill(number)
        await self._last()
        await self.world.launch(number)

    async def _stop(self) -> None:
        number = self.rng.choice(DAEMONS)
        await self.world.stop(number)
        await self._last()
        await self.world.launch(number)

    async def _freeze(self) -> None:
        number = self.rng.choice(DAEMONS)
        await self.world.freeze(number)
        await self._last()
        await self.world.thaw(number)

    async def _cut(self) -> None:
        side = self.rng.choice(SIDES)
        await self.world.cut(side)
        await self._last()
        await self.world.restore(side)

    async def _hold(self) -> None:
        side = self.rng.choice(SIDES)
        await self.world.hold(side)
        await self._last()
        await self.world.restore(side)

    async def _end_backends(self) -> None:
        await self.world.end_backends(self.rng.choice(SIDES))

    async def _crash(self) -> None:
        await self.world.crash(self.rng.choice(SIDES), self.rng.uniform(*LASTS_S) / 2)

    async def _pause(self) -> None:
        await self.world.wish("pause")
        await self._last()
        await self.world.resume()

    async def _cancel(self) -> None:
        await self.world.wish("cancel")

    async def _rollback(self) -> None:
        await self.world.wish("rollback")


@dataclass
class Soak:
    """Move after move, until the time is over."""

    world: World
    faults: Faults
    minutes: float
    tally: Tally = field(default_factory=Tally)

    async def run(self) -> None:
        async with _beside(self._report()):
            number = 0
            while not self._is_over() or self.world.scene.route() != CORE:
                number += 1
                await self._move(number)

    async def _move(self, number: int) -> None:
        """One migration from where the tenant lives: for good, or until he is rolled back."""
        world, source = self.world, self.world.scene.route()
        is_for_good = source != CORE or number % FOR_GOOD_EVERY == 0
        is_calm = number % CALM_EVERY == 1
        world.set_window(is_long=True)
        await world.heal()
        await world.leave(source)
        await self._written(world.submit, is_calm=is_calm)
        if world.watch.row["status"] == "monitoring":
            await world.until_equal()
            if is_for_good:
                world.set_window(is_long=False)
                await world.heal()
            await self._written(self._stay if is_for_good else self._return, is_calm=is_calm)
        await world.check_ended()
        self.tally.moves[world.watch.row["status"]] += 1

    async def _written(self, part: Callable[[], Awaitable[None]], *, is_calm: bool) -> None:
        """One part of a move under writers, and under faults unless it is calm."""
        world = self.world
        async with world.writing(TPS) as workload:
            await world.write(WRITTEN)
            await part()
            if is_calm:
                await world.until_row(world.is_at_rest)
            else:
                async with self.faults.happening():
                    await self._until_disturbed_enough()
                await world.settle()
            await world.write(WRITTEN)
        self.tally.note(workload.report(), is_calm=is_calm)

    async def _return(self) -> None:
        await self.world.wish("rollback")

    async def _stay(self) -> None:
        """The window is short now: he stays by himself."""

    async def _until_disturbed_enough(self) -> None:
        """Or until it has ended under the faults."""
        until_s = time.monotonic() + self.faults.rng.uniform(*DISTURBED_S)
        await self.world.until_row(lambda row: row["status"] in ENDED or time.monotonic() > until_s)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            print(self, flush=True)

    def __str__(self) -> str:
        return self.tally.line(self.world, self.faults.counts)

    def _is_over(self) -> bool:
        return time.monotonic() - self.tally.began_s > self.minutes * 60


@contextmanager
def platform(folder: Path, capture: Capture) -> Iterator[tuple[Scene, dict[str, PostgresServer]]]:
    """Three servers of their own: the shared core, a vertical's with other tenants, and the platform's."""
    tenants = core_tenants()
    with ExitStack() as stack:
        servers = {
            side: stack.enter_context(PostgresServer(version, fsync=False, in_memory=True, settings=SMALL))
            for side, version in VERSIONS.items()
        }
        urls = {side: server.create_database(side) for side, server in servers.items()}
        seed_core(urls[CORE], tenants)
        seed_estate(urls[ESTATE], FIRST_KEY)
        seed_platform(urls[PLATFORM], tenants)
        homes = {
            CORE: Home(servers[CORE], urls[CORE], CORE, "schema"),
            ESTATE: Home(servers[ESTATE], urls[ESTATE], ESTATE),
        }
        redis = stack.enter_context(RedisServer())
        store = Home(servers[PLATFORM], urls[PLATFORM], "")
        scene = Scene(folder, store, homes, tenants, redis.url, capture)
        stack.callback(scene.close)
        yield scene, servers


async def soak(scene: Scene, servers: dict[str, PostgresServer], minutes: float, seed: int) -> Soak:
    with first_error():
        async with world_on(scene, servers, abandoned_hours=0) as world:
            running = Soak(world, Faults(world, random.Random(seed)), minutes)
            try:
                await running.run()
            except BaseException:
                print("what was going on:", world.watch.seen, world.watch.row, sep="\n")
                print(*running.faults.latest, *world.refused[-SHOWN:], running, sep="\n", flush=True)
                raise
            return running


@asynccontextmanager
async def _beside(work: Awaitable[None]) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--capture", type=Capture, choices=list(Capture), default=Capture.WAL)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mover-soak-"))
    print(f"seed {options.seed}, capture by {options.capture}; the daemons' logs are in {folder}", flush=True)
    with platform(folder, options.capture) as (scene, servers):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            done = runner.run(soak(scene, servers, options.minutes, options.seed))
    print("violations: 0", done, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
