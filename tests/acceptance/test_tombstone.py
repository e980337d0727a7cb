"""After completion the place that was left refuses writes, until nobody has tried for long enough."""

from __future__ import annotations

from tests.support.checks import leftovers
from tests.support.waiting import until

QUIET_S = 2.0


async def test_the_tombstone_goes_after_its_quiet_time_and_leaves_nothing(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    async with scene.daemon(tombstone_days=QUIET_S / 86_400) as stage:
        await watch.submit(stage)
        await watch.until("completed")
        assert leftovers(watch.source.url, tombstone=True) == []
        await until(lambda: leftovers(watch.source.url) == [])
    assert leftovers(watch.target.url) == []
    assert "the tombstone on the source is removed" in stage.log_path.read_text()


async def test_a_refused_write_begins_the_quiet_time_anew(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    async with scene.daemon(tombstone_days=QUIET_S / 86_400) as stage:
        await watch.submit(stage)
        await watch.until("completed")
        watch.check_completed()  # among others it sends a stale write, which is refused
        await until(lambda: refused(scene, watch) == 1)
        assert leftovers(watch.source.url) != [], "the refused write did not count"
        await until(lambda: leftovers(watch.source.url) == [])


def refused(scene, watch) -> int | None:
    query = "select tombstone_refused from platform.tenant_migrations where id = %s"
    ((count,),) = scene.platform.execute(query, watch.id)
    return count
