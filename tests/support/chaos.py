"""A tenant with live writers, two daemons, and everything between them that can break: each fault and each
wish is a method, and so is the way back to order with the checks that follow.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg

from mover.core.errors import MoverError, Remedy
from mover.core.ids import TenantId, Tier
from mover.core.migration import MigrationRequest, Place, Wish
from mover.core.secret import Secret
from mover.core.states import PHASES, Phase
from mover.demo.schema import schemas
from mover.demo.servers import PostgresServer
from mover.demo.stage import Stage
from mover.demo.workload import Workload, WorkloadReport
from mover.postgres.store import Store, open_store
from tests.support.acceptance import (
    CORE,
    ENDED,
    ESTATE,
    PLATFORM,
    Home,
    Scene,
    Watch,
    at,
    clean,
    lives,
    works,
)
from tests.support.checks import leftovers
from tests.support.proxy import Proxy, proxied
from tests.support.queue import ORGANIZATIONS
from tests.support.waiting import until, until_asked
from tests.support.witness import Witness

SIDES = (CORE, ESTATE, PLATFORM)
DAEMONS = (0, 1)
LOOK_S = 0.1
# Everything works again: after so long a migration is at rest, and what it has left is gone.
SETTLE_S = 120
# Time passes, even where nobody can write.
WRITE_S = 3
HURRY_S = 1.0
LONG_WINDOW_HOURS = 1.0
TIERS = ("schema", "database", "dedicated", "downgrade")
TRY_NOW = "update platform.tenant_migrations set not_before = null where id = %s"
IS_CLEARED = "select tombstone_check_at is null from platform.tenant_migrations where id = %s"
END_BACKENDS = """
select pg_terminate_backend(pid) from pg_stat_activity
 where datname = current_database() and starts_with(application_name, 'mover/')
"""
# What a pause that was wished for may have come upon; after any other error it would not go on by itself.
PASSING = {error.code for error in MoverError.__subclasses__() if error.remedy is Remedy.RETRY}
# Before anything is made, a server that does not answer ends the request.
NOT_READY = "unreachable"
# What a writer sees of a server that stops under it, and does not hide.
BROKEN = ("AdminShutdown", "CrashShutdown", "CannotConnectNow", "OperationalError", "ConnectionRefusedError")


@dataclass
class World:
    """Two places between which a tenant moves. Daemons reach every server through a proxy, writers and
    checks directly."""

    scene: Scene
    proxies: Mapping[str, Proxy]
    servers: Mapping[str, PostgresServer]
    witness: Witness
    stages: list[Stage]
    writers: tuple[TenantId, ...]  # other tenants that write
    watch: Watch = field(init=False)  # of the move of now, which `leave` begins
    workload: Workload = field(init=False)
    refused: list[str] = field(default_factory=list)  # what was asked in vain
    crashes: int = 0  # of servers, under the writers of now
    is_long: bool = True  # the window in which a tenant can come back: nothing but he ends it
    # Of each daemon and each server: what happens to it at the same time comes one after the other.
    _locks: defaultdict[object, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))

    async def leave(self, source: str) -> None:
        """The next move is from there; nobody writes yet."""
        target = {CORE: ESTATE, ESTATE: CORE}[source]
        self.watch = await asyncio.to_thread(
            self.scene.watch, source, target, writers=self.writers, keeps_snapshot=False
        )

    # The operations. Each makes sense at any time: one that is refused, or comes too late, does nothing.

    async def submit(self) -> None:
        """The tenant shall move; again only when nothing is left of the last time."""
        watch = self.watch
        if watch.id and await asyncio.to_thread(watch.leaves_anything):
            return
        here, there = watch.source, watch.target
        request = MigrationRequest(watch.tenant, there.vertical, Tier(there.tier))
        place = Place(
            here.vertical, Tier(here.tier), Secret(here.url), tuple(schemas(here.vertical).values())
        )

        async def ask(store: Store) -> None:
            watch.id = str((await store.submit(request, place)).id)

        await self._ask("submit", ask)

    async def wish(self, wish: str) -> None:
        await self._ask(wish, lambda store: store.wish(self.watch.id, Wish(wish), "an operator"))

    async def resume(self) -> None:
        await self._ask("resume", lambda store: store.resume(self.watch.id, "an operator"))

    async def launch(self, number: int, point: str = "", blow: str = "SIGKILL") -> None:
        """A daemon begins, to get `blow` at a crash point, if one is named."""
        stage = self.stages[number]
        async with self._locks[number]:
            if not lives(stage):
                await stage.launch(**(at(point, signal.Signals[blow]) if point else {}))

    async def kill(self, number: int) -> None:
        async with self._locks[number]:
            await self.stages[number].kill()

    async def freeze(self, number: int) -> None:
        self.stages[number].send_signal(signal.SIGSTOP)

    async def thaw(self, number: int) -> None:
        self.stages[number].send_signal(signal.SIGCONT)

    async def stop(self, number: int) -> None:
        """SIGTERM, which is obeyed in time whatever else is broken."""
        async with self._locks[number]:
            self.stages[number].send_signal(signal.SIGCONT)
            await self.stages[number].stop()

    async def cut(self, side: str) -> None:
        self.proxies[side].cut()

    async def hold(self, side: str) -> None:
        self.proxies[side].hold()

    async def restore(self, side: str) -> None:
        self.proxies[side].restore()

    async def end_backends(self, side: str) -> None:
        """Of the mover's, as an administrator would."""
        home = self.scene.platform if side == PLATFORM else self.scene.homes[side]
        with suppress(psycopg.OperationalError):  # the server is away, and they with it
            await asyncio.to_thread(home.execute, END_BACKENDS)

    async def crash(self, side: str, down_s: float = 0.5) -> None:
        """The server stops immediately, under everybody, and comes back."""
        server = self.servers[side]
        self.crashes += 1
        async with self._locks[server.port]:
            await asyncio.to_thread(server.stop_immediately)
            try:
                await asyncio.sleep(down_s)
            finally:
                await asyncio.to_thread(server.come_back)

    async def write(self, count: int) -> None:
        """Until so many transactions more are committed; not for ever, since their fence may be closed."""
        enough, until_s = self.workload.transactions + count, _now() + WRITE_S
        await until(lambda: self.workload.transactions >= enough or _now() > until_s)

    # What follows.

    async def get_to(self, phase: Phase) -> None:
        """Unless something happens to the first daemon, or to the migration, before."""

        def is_there(row: dict[str, Any]) -> bool:
            reached = row["phase"] is not None and PHASES.index(row["phase"]) >= PHASES.index(phase)
            return reached or row["status"] in ENDED or not works(self.stages[0])

        await self.watch.until_row(is_there)

    async def check_invariants(self) -> None:
        """Raises Violated."""
        watch = self.watch
        if watch.id:
            await asyncio.to_thread(self.witness.look, watch.id, _side(watch.source), _side(watch.target))

    async def keep_looking(self) -> None:
        """Until cancelled."""
        while True:
            await self.check_invariants()
            await asyncio.sleep(LOOK_S)

    async def heal(self) -> None:
        """Every connection works, and both daemons live, with no crash point before them."""
        for proxy in self.proxies.values():
            proxy.restore()
        await asyncio.gather(*(stage.kill() for stage in self.stages))
        await asyncio.gather(*(stage.start() for stage in self.stages))

    def set_window(self, *, is_long: bool) -> None:
        """For daemons that begin from now on."""
        self.is_long = is_long
        for stage in self.stages:
            hours = dict.fromkeys(TIERS, LONG_WINDOW_HOURS if is_long else 0.0)
            stage.engine = {**stage.engine, "monitoring_hours": hours}
            stage.write_config()

    async def settle(self) -> str:
        """What becomes of the migration when nothing breaks any more: its status at rest."""
        await self.heal()
        if not self.watch.id:
            return "nothing"
        status = await self.until_row(self.is_at_rest)
        watch = self.watch
        await asyncio.to_thread(self.witness.look_at_rest, _side(watch.source), _side(watch.target))
        return status

    def is_at_rest(self, row: dict[str, Any]) -> bool:
        is_watched = self.is_long and row["status"] == "monitoring" and row["phase"] == "monitor"
        return row["status"] in ENDED or (is_watched and row["wish"] is None and row["error"] is None)

    async def until_row(
        self, condition: Callable[[dict[str, Any]], bool], timeout_s: float = SETTLE_S
    ) -> str:
        """What waits for its next try need not, and what an operator has paused goes on."""
        async with _beside(self._hurry()):
            return await self.watch.until_row(condition, timeout_s)

    async def _hurry(self) -> None:
        while True:
            row = self.watch.row
            if row and not row["leased"]:
                with suppress(psycopg.OperationalError):
                    await asyncio.to_thread(self.scene.platform.execute, TRY_NOW, self.watch.id)
            if row and row["status"] == "paused":
                assert row["error"] is None or row["error"]["code"] in PASSING, row["error"]
                await self.resume()
            await asyncio.sleep(HURRY_S)

    async def check_ended(self) -> None:
        """The writers have stopped and the migration has ended: as it says, and nothing is left behind."""
        watch, status = self.watch, self.watch.row["status"]
        if status == "completed":
            await until_asked(lambda: leftovers(watch.target.url) == [])
            await until_asked(lambda: leftovers(watch.source.url, tombstone=True) == [])
            await asyncio.to_thread(watch.check_completed)
        else:
            assert status != "failed" or watch.row["error"]["code"] == NOT_READY, watch.row["error"]
            with suppress(TimeoutError):  # the check says what is left
                await until_asked(lambda: self._is_cleared() and not watch.leaves_anything(), SETTLE_S)
            await asyncio.to_thread(watch.check_undone, status)
        await self.check_invariants()
        self.scene.watches.remove(watch)
        watch.close()

    def _is_cleared(self) -> bool:
        """Also of what he who came back has left, which an earlier tombstone hides from `leaves_anything`."""
        return self.scene.platform.execute(IS_CLEARED, self.watch.id) == [(True,)]

    async def until_equal(self) -> None:
        """The tenant is served by the target, nobody writes, and the source has followed."""
        await until_asked(self.watch.sides_are_equal, SETTLE_S)

    @asynccontextmanager
    async def writing(self, tps: float) -> AsyncIterator[Workload]:
        """What the writers saw is checked when they have stopped."""
        self.crashes = 0
        async with self.scene.writing(others=self.writers, tps=tps) as self.workload:
            yield self.workload
        self.check_writers(self.workload.report())

    def check_writers(self, report: WorkloadReport) -> None:
        """Nothing but a server that stops under them is an error to them."""
        if not self.crashes:
            return clean(report)
        assert report.stale_reads == 0
        strange = [kind for kind in report.errors if not any(known in kind for known in BROKEN)]
        assert not strange, strange

    async def _ask(self, what: str, ask: Callable[[Store], Any]) -> None:
        """As the API does it, whichever daemon lives; what is refused is noted."""
        url = Secret(self.scene.platform.url)
        try:
            async with open_store(url, ORGANIZATIONS, lambda *_: None) as store:
                await ask(store)
        except MoverError as error:
            self.refused.append(f"{what}: {error}")


@asynccontextmanager
async def world_on(
    scene: Scene, servers: Mapping[str, PostgresServer], **engine: object
) -> AsyncIterator[World]:
    """With two daemons that are not started yet, and witnessed from beginning to end."""
    witness = Witness(scene.platform.url, scene.tenant)
    async with AsyncExitStack() as stack:
        stack.callback(witness.close)
        proxies = {side: await stack.enter_async_context(proxied(scene.url(side))) for side in SIDES}
        scene.detours |= {side: proxy.url for side, proxy in proxies.items()}
        stages = [scene.stage(f"daemon{number}", **engine) for number in DAEMONS]
        for stage in stages:
            stack.push_async_callback(stage.kill)
        world = World(scene, proxies, servers, witness, stages, (scene.tenants[1].id,))
        await world.leave(CORE)
        async with _beside(world.keep_looking()):
            yield world


@asynccontextmanager
async def _beside(work: Any) -> AsyncIterator[None]:
    """Runs until the block ends; what it raises ends the block."""
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(work)
        try:
            yield
        finally:
            task.cancel()


def _side(home: Home) -> tuple[str, str]:
    return home.url, home.vertical


def _now() -> float:
    return time.monotonic()
