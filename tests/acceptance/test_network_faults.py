"""Cut, stalled, half-open and slow connections of the daemon to each server, at every stage of a migration,
while the tenant's application writes, over connections of its own: nothing is lost, and the status says what
is waited for.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest

from mover.core.ids import Capture
from mover.core.migration import Wish
from mover.demo.stage import Stage
from mover.demo.workload import Workload
from mover.web.client import ApiError
from tests.acceptance.test_lifecycle import EXIT_S
from tests.acceptance.test_rollback import LONG_WINDOW, until_written
from tests.support.acceptance import (
    CORE,
    ENDED,
    ESTATE,
    PLATFORM,
    Scene,
    Watch,
    clean,
    is_frozen,
    killed,
    stops_at,
    until_stopped,
)
from tests.support.checks import leftovers
from tests.support.proxy import Proxy, proxied
from tests.support.waiting import until

SIDES = (CORE, ESTATE, PLATFORM)
LABELS = {CORE: "source", ESTATE: "target"}
REASON_S = 20
TRY_NOW = "update platform.tenant_migrations set not_before = null where id = %s"
DELAY_S = 0.01  # each way: servers in two countries
SLOW_S = 300  # a migration asks many things one after the other
# Each list in the order in which a daemon passes the points: it stands still once at each.
AROUND_THE_SWITCH = ("copy.chunk", "cutover.closed", "cutover.deciding", "cutover.decided")
EVERYWHERE = (
    "provision.begun",
    "prepare.schemas.begun",
    "prepare.guards.begun",
    "copy.chunk",
    "index.begun",
    "catch_up.begun",
    "verify.begun",
    "cutover.begun",
    "cutover.closed",
    "cutover.proved",
    "cutover.deciding",
    "cutover.decided",
    "cutover.opened",
    "monitor.begun",
    "cleanup.begun",
    "removal.batch",
)
RETURNING = (
    "return.switch.begun",
    "cutover.closed",
    "cutover.proved",
    "return.deciding",
    "cutover.decided",
    "cutover.opened",
    "undo.stream.begun",
)


def everywhere(side: str) -> tuple[str, ...]:
    """While preflight looks at source and target nothing was made yet: then the request fails."""
    return ("preflight.begun", *EVERYWHERE) if side == PLATFORM else EVERYWHERE


@dataclass(frozen=True)
class Fault:
    """What happens to the connections, and how it is over."""

    name: str
    ends_in_a_cut: bool = False

    def begin(self, proxy: Proxy) -> None:
        proxy.cut() if self.name == "cut" else proxy.hold()

    def end(self, proxy: Proxy) -> None:
        if self.ends_in_a_cut:
            proxy.cut()
        proxy.restore()


CUT, STALLED, HALF_OPEN = Fault("cut"), Fault("stalled"), Fault("half-open", ends_in_a_cut=True)

# Each on one side; the rest is marked `faults`.
CHOSEN = [
    pytest.param(CORE, CUT, AROUND_THE_SWITCH, Capture.WAL, id="core-cut"),
    pytest.param(ESTATE, HALF_OPEN, ("copy.chunk", "cutover.closed"), Capture.WAL, id="realestate-half-open"),
    pytest.param(PLATFORM, CUT, ("cutover.deciding",), Capture.WAL, id="platform-cut"),
]
ALL = [
    pytest.param(
        side,
        fault,
        everywhere(side),
        capture,
        id=f"{side}-{fault.name}-{capture}-everywhere",
        marks=pytest.mark.faults,
    )
    for side in SIDES
    for fault in (CUT, STALLED, HALF_OPEN)
    for capture in Capture
    if capture is Capture.WAL or side == CORE  # the others do not notice how it is followed
]


@pytest.mark.parametrize(("side", "fault", "points", "capture"), [*CHOSEN, *ALL])
async def test_a_migration_outlasts_broken_connections(pg16, pg18, make_scene, side, fault, points, capture):
    async with disturbed(make_scene(pg16, pg18, capture=capture), side) as (watch, stage, proxy):
        async with watch.scene.writing() as workload:
            await stage.start(**stops_at(*points))
            await watch.submit(stage)
            await disturb(points, side, fault, watch, stage, proxy)
            await until_ended(watch, "completed")
    clean(workload.report())
    watch.check_completed()


# (side, point, bytes of the request): what is done there and acknowledged next.
Unanswered = Sequence[tuple[str, str, bytes]]
DECISION = (PLATFORM, "cutover.proved", b"COMMIT")
CLOSING = (CORE, "cutover.begun", b"{open}")
OPENING = (ESTATE, "cutover.decided", b"{closed,aborted,open}")
LEAVING = (CORE, "cutover.opened", b"{closed,moved}")
ROWS = [(ESTATE, point, b"COMMIT") for point in ("copy.begun", "copy.chunk", "catch_up.begun")]


@pytest.mark.parametrize(
    "unanswered",
    [(*ROWS, CLOSING, OPENING, LEAVING), (DECISION, LEAVING)],
    ids=["rows and fences", "the decision"],
)
async def test_what_was_done_without_an_answer_is_not_done_twice(pg16, pg18, make_scene, unanswered):
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    async with proxied_everywhere(scene) as proxies, scene.writing() as workload:
        async with killed(scene.stage()) as stage:
            await stage.start(**stops_at(*(point for _, point, _ in unanswered)))
            await watch.submit(stage)
            await lose(unanswered, proxies, watch, stage)
            await until_ended(watch, "completed")
    clean(workload.report())
    watch.check_completed()


@pytest.mark.faults
async def test_a_return_whose_decision_has_no_answer_is_not_decided_twice(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    async with proxied_everywhere(scene) as proxies, scene.writing() as workload:
        async with killed(scene.stage(monitoring_hours=LONG_WINDOW, abandoned_hours=0)) as stage:
            await return_begun(watch, stage, workload, ["cutover.proved", "cutover.opened"])
            await lose([DECISION, (ESTATE, "cutover.opened", b"{closed,moved}")], proxies, watch, stage)
            await until_ended(watch, "rolled_back")
            await until(lambda: leftovers(watch.target.url) == [])
    clean(workload.report())
    watch.check_undone("rolled_back")


@asynccontextmanager
async def proxied_everywhere(scene: Scene) -> AsyncIterator[dict[str, Proxy]]:
    async with AsyncExitStack() as stack:
        proxies = {side: await stack.enter_async_context(proxied(scene.url(side))) for side in SIDES}
        scene.detours |= {side: proxy.url for side, proxy in proxies.items()}
        yield proxies


async def lose(unanswered: Unanswered, proxies: Mapping[str, Proxy], watch: Watch, stage: Stage) -> None:
    """Each request reaches its server, and the connection breaks before the answer."""
    for side, _, request in unanswered:
        await until_next_point(watch, stage)
        proxy = proxies[side]
        proxy.lose_answer(to=request)
        stage.send_signal(signal.SIGCONT)
        await watch.until_row(lambda _, proxy=proxy: proxy.has_lost)


@pytest.mark.faults
@pytest.mark.parametrize("side", SIDES)
async def test_a_migration_gets_through_slow_connections(pg16, pg18, make_scene, side):
    async with disturbed(make_scene(pg16, pg18), side, pause_budget_ms=10_000) as (watch, stage, proxy):
        proxy.slow_down(DELAY_S)
        async with watch.scene.writing() as workload:
            await stage.start()
            await watch.submit(stage)
            await watch.until("completed", timeout_s=SLOW_S)
    clean(workload.report())
    watch.check_completed()


@pytest.mark.faults
@pytest.mark.parametrize("point", ["copy.chunk", "catch_up.begun"])
@pytest.mark.parametrize("side", SIDES)
async def test_sigterm_ends_a_daemon_that_waits_for_a_silent_server(pg16, pg18, make_scene, side, point):
    async with disturbed(make_scene(pg16, pg18), side) as (watch, stage, proxy):
        async with watch.scene.writing() as workload:
            await stage.start(**stops_at(point))
            await watch.submit(stage)
            await watch.until_frozen(stage)
            proxy.hold()
            stage.send_signal(signal.SIGCONT)
            stage.send_signal(signal.SIGTERM)
            async with asyncio.timeout(EXIT_S):
                assert await stage.wait() == 0
            proxy.restore()
            await stage.start()
            await until_ended(watch, "completed")
    clean(workload.report())
    watch.check_completed()


@pytest.mark.parametrize("side", [CORE, ESTATE])
async def test_a_server_that_does_not_answer_the_first_question_ends_the_request(
    pg16, pg18, make_scene, side
):
    """Nothing was made, and the same request can be made again."""
    async with disturbed(make_scene(pg16, pg18), side) as (watch, stage, proxy):
        proxy.cut()
        await stage.start()
        await watch.submit(stage)
        await watch.until("failed")
        assert watch.row["error"]["code"] == "unreachable"
        watch.check_undone("failed")
        proxy.restore()
        async with watch.scene.writing() as workload:
            await watch.submit(stage)
            await watch.until("completed")
    clean(workload.report())
    watch.check_completed()


@pytest.mark.faults
@pytest.mark.parametrize("fault", [CUT, STALLED, HALF_OPEN], ids=lambda fault: fault.name)
@pytest.mark.parametrize("side", SIDES)
async def test_a_return_outlasts_broken_connections(pg16, pg18, make_scene, side, fault):
    settings = {"monitoring_hours": LONG_WINDOW, "abandoned_hours": 0}
    async with disturbed(make_scene(pg16, pg18), side, **settings) as (watch, stage, proxy):
        async with watch.scene.writing() as workload:
            await return_begun(watch, stage, workload, RETURNING)
            await disturb(RETURNING, side, fault, watch, stage, proxy)
            await until_ended(watch, "rolled_back")
            await until_written(workload, 50)
            await until(lambda: leftovers(watch.target.url) == [])
    clean(workload.report())
    watch.check_undone("rolled_back")


async def return_begun(watch: Watch, stage: Stage, workload: Workload, points: Sequence[str]) -> None:
    """By a daemon that stands still at each of these points, after a while on the target."""
    await stage.start()
    await watch.submit(stage)
    await watch.until("monitoring")
    await until_written(workload, 100)
    await stage.stop()
    await watch.scene.wish(watch, Wish.ROLLBACK)
    await stage.start(**stops_at(*points))


@asynccontextmanager
async def disturbed(scene: Scene, side: str, **engine: object) -> AsyncIterator[tuple[Watch, Stage, Proxy]]:
    """A daemon, not started yet, that reaches one server through a proxy."""
    watch = scene.watch()
    async with proxied(scene.url(side)) as proxy:
        scene.detours[side] = proxy.url
        async with killed(scene.stage(**engine)) as stage:
            yield watch, stage, proxy


async def disturb(
    points: Sequence[str], side: str, fault: Fault, watch: Watch, stage: Stage, proxy: Proxy
) -> None:
    """The fault begins at each of these points, where the daemon stands still, and ends when it is seen."""
    for _ in points:
        await until_next_point(watch, stage)
        saved = watch.row["progress"]
        fault.begin(proxy)
        stage.send_signal(signal.SIGCONT)
        await goes_on_or_says_why(side, watch, stage, saved)
        fault.end(proxy)


async def goes_on_or_says_why(side: str, watch: Watch, stage: Stage, saved: dict) -> None:
    """Within a bounded time the daemon has got to the next point without that server, or we are told what is
    waited for: by the API where that is the platform database, or else by the progress as it is saved now."""
    if side == PLATFORM:
        await goes_on_or_cannot_tell(watch, stage)
        return

    def is_settled(row: dict) -> bool:
        assert row["status"] != "failed", row["error"]
        said = row["progress"].get("waiting_for") or ""
        is_said = row["progress"] != saved and (LABELS[side] in said or "cutover" in said)
        return is_said or is_frozen(stage) or row["status"] in ENDED

    await watch.until_row(is_settled, REASON_S)


async def goes_on_or_cannot_tell(watch: Watch, stage: Stage) -> None:
    async with stage.client() as api:
        asking = asyncio.create_task(api.progress(watch.id))
        freezing = asyncio.create_task(until_stopped(stage))
        await asyncio.wait([asking, freezing], return_when=asyncio.FIRST_COMPLETED)
        freezing.cancel()
        if not asking.done():
            asking.cancel()
            return
        with pytest.raises(ApiError) as refused:
            asking.result()
    assert refused.value.kind == "unreachable"


async def hurry(watch: Watch, condition: Callable[[dict], bool]) -> None:
    """Until it holds; what waits for its next try need not."""

    def holds(row: dict) -> bool:
        if not row["leased"]:
            watch.scene.platform.execute(TRY_NOW, watch.id)
        return condition(row)

    await watch.until_row(holds)


async def until_next_point(watch: Watch, stage: Stage) -> None:
    await hurry(watch, lambda row: is_frozen(stage) or row["status"] in ENDED)
    assert is_frozen(stage), (watch.seen, watch.row["error"])


async def until_ended(watch: Watch, status: str) -> None:
    await hurry(watch, lambda row: row["status"] in ENDED)
    assert watch.row["status"] == status, (watch.seen, watch.row["error"])
