"""The router against places that refuse as PostgreSQL does."""

import asyncio
from contextlib import asynccontextmanager
from uuid import UUID

import pytest

from cutover.router import Patience, Route, Router
from mover.core.ids import TenantId, Tier

TENANT = TenantId(UUID(int=1))
OLD, NEW = Route("core", Tier.SCHEMA), Route("realestate", Tier.DATABASE)


class Refusal(Exception):
    def __init__(self, sqlstate):
        super().__init__(sqlstate)
        self.sqlstate = sqlstate


class ManualClock:
    """Sleeping moves the time, and nothing else does."""

    def __init__(self):
        self.now = 0.0
        self.slept = []
        self.at_sleep = {}  # number of the sleep -> what happens meanwhile

    def monotonic(self):
        return self.now

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds
        self.at_sleep.get(len(self.slept), lambda: None)()
        await asyncio.sleep(0)


class Platform:
    """Places that accept the tenant's writes or answer with an SQLSTATE, and the route to them."""

    def __init__(self, written=OLD, living=OLD):
        self.written, self.living = written, living
        self.loads = 0
        self.attempts = []
        self.answers = []  # what the next attempts meet, before the place is asked
        self.at_commit = []
        self.loading = asyncio.Event()
        self.loading.set()
        self.asked = asyncio.Event()

    async def load_route(self, tenant):
        self.loads += 1
        self.asked.set()
        written = self.written
        await self.loading.wait()
        return written

    @asynccontextmanager
    async def transaction(self, route):
        self.attempts.append(route)
        if self.answers and (state := self.answers.pop(0)):
            raise Refusal(state)
        if route != self.living:
            raise Refusal("25006")
        yield route
        if self.at_commit:
            raise self.at_commit.pop(0)


async def work(session):
    return session


def router_of(platform, **patience):
    clock = ManualClock()
    return Router(platform, Patience(**patience), clock), clock


async def test_a_route_is_loaded_once_for_many_transactions():
    platform = Platform()
    router, _ = router_of(platform)
    assert [await router.run(TENANT, work) for _ in range(3)] == [OLD] * 3
    assert platform.loads == 1


async def test_a_cached_route_expires():
    platform = Platform()
    router, clock = router_of(platform, cache_s=30)
    await router.run(TENANT, work)
    clock.now += 31
    await router.run(TENANT, work)
    assert platform.loads == 2


async def test_a_refused_write_goes_to_the_new_place_at_once():
    platform = Platform()
    router, clock = router_of(platform)
    await router.run(TENANT, work)
    platform.written = platform.living = NEW
    assert await router.run(TENANT, work) == NEW
    assert platform.attempts == [OLD, OLD, NEW]
    assert clock.slept == []


async def test_a_route_that_still_shows_the_old_place_is_read_again_after_growing_delays():
    platform = Platform(written=OLD, living=NEW)
    router, clock = router_of(platform, first_delay_s=0.01, longest_delay_s=1)
    clock.at_sleep[4] = lambda: setattr(platform, "written", NEW)
    assert await router.run(TENANT, work) == NEW
    assert clock.slept[:4] == [0.01, 0.02, 0.04, 0.08]


@pytest.mark.parametrize("state", ["40001", "40P01"])
async def test_a_passing_failure_is_tried_again_in_the_same_place(state):
    platform = Platform()
    platform.answers = [state, state]
    router, clock = router_of(platform)
    assert await router.run(TENANT, work) == OLD
    assert platform.loads == 1 and len(clock.slept) == 2


async def test_a_refusal_at_commit_is_tried_again():
    platform = Platform()
    platform.at_commit = [Refusal("40001")]
    router, _ = router_of(platform)
    assert await router.run(TENANT, work) == OLD
    assert len(platform.attempts) == 2


async def test_an_unknown_outcome_is_never_tried_again():
    platform = Platform()
    platform.at_commit = [ConnectionResetError()]
    router, _ = router_of(platform)
    with pytest.raises(ConnectionResetError):
        await router.run(TENANT, work)
    assert len(platform.attempts) == 1


async def test_other_errors_reach_the_caller_untouched():
    platform = Platform()
    platform.answers = ["23505"]
    router, _ = router_of(platform)
    with pytest.raises(Refusal, match="23505"):
        await router.run(TENANT, work)
    assert platform.loads == 1


async def test_it_gives_up_in_time_with_the_last_refusal():
    platform = Platform(written=OLD, living=NEW)
    router, clock = router_of(platform, give_up_s=10)
    with pytest.raises(Refusal, match="25006"):
        await router.run(TENANT, work)
    assert 10 <= clock.now < 11


async def test_many_refused_writers_cause_one_load():
    platform = Platform()
    router, _ = router_of(platform)
    await router.run(TENANT, work)
    platform.written = platform.living = NEW
    platform.loading.clear()
    platform.asked.clear()
    runs = [asyncio.ensure_future(router.run(TENANT, work)) for _ in range(20)]
    await platform.asked.wait()
    platform.loading.set()
    assert await asyncio.gather(*runs) == [NEW] * 20
    assert platform.loads == 2


async def test_a_route_read_before_an_announcement_is_not_kept():
    platform = Platform()
    router, _ = router_of(platform)
    platform.loading.clear()
    platform.asked.clear()
    early = asyncio.ensure_future(router.route(TENANT))
    await platform.asked.wait()
    platform.written = NEW
    router.invalidate(TENANT)
    platform.loading.set()
    assert await early == OLD
    assert await router.route(TENANT) == NEW


@pytest.mark.parametrize("announced", [TENANT, None], ids=["this tenant", "announcements were missed"])
async def test_an_announced_move_is_followed_without_a_refusal(announced):
    platform = Platform()
    router, _ = router_of(platform)
    await router.run(TENANT, work)
    platform.written = platform.living = NEW

    async def announcements():
        yield announced

    await router.follow(announcements())
    assert await router.run(TENANT, work) == NEW
    assert platform.attempts == [OLD, NEW]
