"""Twenty times there and back under load, nothing lost, and a pause that nobody minds."""

from __future__ import annotations

from statistics import median

import pytest

from tests.acceptance.test_rollback import LONG_WINDOW, until_written
from tests.conftest import every_combination
from tests.support.acceptance import CORE, ESTATE, clean
from tests.support.checks import leftovers
from tests.support.waiting import until

ROUND_TRIPS = 20
TPS = 200
MAX_MEDIAN_PAUSE_MS = 100


@pytest.mark.long
@every_combination
async def test_a_tenant_goes_and_comes_back_twenty_times(pg16, pg18, make_scene, capture):
    scene = make_scene(pg16, pg18, shared=True, capture=capture)
    pauses_ms: dict[str, list[float]] = {"there": [], "back": []}
    longest_ms: dict[str, float] = {}
    async with scene.daemon(monitoring_hours=LONG_WINDOW, abandoned_hours=0) as stage:
        for _ in range(ROUND_TRIPS):
            watch = scene.watch()
            for way, status, place in (("there", "monitoring", ESTATE), ("back", "rolled_back", CORE)):
                async with scene.writing(tps=TPS) as workload:
                    await until_written(workload, TPS)
                    if way == "there":
                        await watch.submit(stage)
                    else:
                        assert (await stage.run("rollback", watch.id))[0] == 0
                    await watch.until(status)
                    await until_written(workload, TPS)
                clean(report := workload.report())
                assert (scene.route(), report.pause_ms is not None) == (place, True)
                pauses_ms[way].append(report.pause_ms.p50)
                longest_ms[way] = max(longest_ms.get(way, 0), report.pause_ms.max)
            await until(lambda watch=watch: leftovers(watch.target.url) == [])
            watch.check_undone("rolled_back")
            watch.close()
    medians = {way: median(each) for way, each in pauses_ms.items()}
    print(f"{ROUND_TRIPS} round trips at {TPS}/s by {capture}: medians {medians} ms, longest {longest_ms} ms")
    assert max(medians.values()) <= MAX_MEDIAN_PAUSE_MS
