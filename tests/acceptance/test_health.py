"""A tenant who is served badly where he has gone is brought back with everything he wrote."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from mover.demo.process import free_port
from tests.acceptance.test_rollback import LONG_WINDOW, until_written
from tests.acceptance.test_triggers import audited
from tests.support.acceptance import CORE, ESTATE, Scene, Watch, clean
from tests.support.checks import leftovers
from tests.support.waiting import until

SPIKE = [("rollback: error_rate_spike", "ok")]
QUICK = {"interval_seconds": 0.3, "failures": 3}
SCRAPE = """
global: {{scrape_interval: 200ms, scrape_timeout: 200ms}}
scrape_configs: [{{job_name: application, static_configs: [{{targets: ["127.0.0.1:{port}"]}}]}}]
"""


async def test_a_tenant_who_cannot_write_at_the_target_comes_back(pg16, pg18, make_scene, capture):
    """A managed server whose disk is full takes no more writes, but for sessions that insist."""
    scene = make_scene(pg16, pg18, shared=True, capture=capture)
    watch, estate = scene.watch(), scene.homes[ESTATE]
    async with scene.daemon(health=QUICK, monitoring_hours=LONG_WINDOW, abandoned_hours=0) as stage:
        async with scene.writing() as workload:
            await watch.submit(stage)
            await watch.until("monitoring")
            await until_written(workload, 100)
        clean(workload.report())
        assert audited(scene, watch) == []
        name = estate.url.rpartition("/")[2]
        estate.execute(f"alter database {name} set default_transaction_read_only = on")
        await watch.until("rolled_back")
        assert (audited(scene, watch), scene.route()) == (SPIKE, CORE)
        await until(lambda: leftovers(estate.url) == [])
    watch.check_undone("rolled_back")
    assert facts_of(scene, watch, "alert") == ["rolled_back"]
    assert facts_of(scene, watch, "billing") == ["refund"]


NEEDS_A_USER = """
create function core_crm.needs_user() returns trigger language plpgsql security definer as $$
begin
    perform nextval('public.looks');
    perform current_setting('app.user');
    return new;
end $$
"""


async def test_what_the_applications_triggers_want_of_a_session_brings_nobody_back(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    core = scene.homes[CORE]
    for home in scene.homes.values():
        home.execute("create sequence public.looks")
    core.execute(NEEDS_A_USER)
    for schema, table in core.tables:
        core.execute(
            f"create trigger audit before update on {schema}.{table}"
            " for each row execute function core_crm.needs_user()"
        )
    watch, estate = scene.watch(keeps_snapshot=False), scene.homes[ESTATE]
    async with scene.daemon(health=QUICK, monitoring_hours=LONG_WINDOW) as stage:
        await watch.submit(stage)
        await watch.until("monitoring")
        looks = "select pg_sequence_last_value('public.looks')"
        await until(lambda: (estate.execute(looks)[0][0] or 0) > 2 * QUICK["failures"])
        assert (watch._read()["status"], audited(scene, watch)) == ("monitoring", [])


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Prometheus")
async def test_a_tenant_whose_error_rate_spikes_comes_back(pg16, pg18, make_scene, tmp_path):
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    rates = {scene.tenants[1].id: 0.9, scene.tenant: 0.02}
    async with exporting(rates) as port, prometheus(tmp_path, port) as url:
        query = 'tenant_error_rate{tenant="{tenant_id}"}'
        await until_known(url, query.replace("{tenant_id}", str(scene.tenant)))
        health = {**QUICK, "synthetic": False, "prometheus_url": url, "error_rate_query": query}
        async with scene.daemon(health=health, monitoring_hours=LONG_WINDOW, abandoned_hours=0) as stage:
            async with scene.writing() as workload:
                await watch.submit(stage)
                await watch.until("monitoring")
                await until_written(workload, 100)
                assert audited(scene, watch) == []
                rates[scene.tenant] = 0.5
                await watch.until("rolled_back")
                await until_written(workload, 50)
            clean(workload.report())
            assert (audited(scene, watch), scene.route()) == (SPIKE, CORE)
            await until(lambda: leftovers(watch.target.url) == [])
    watch.check_undone("rolled_back")
    why = watch.row["error"]["message"]
    assert why == "rolled back: 50.0% of the tenant's requests fail; before the switch: 2.0%"


def facts_of(scene: Scene, watch: Watch, key: str) -> list[str]:
    rows = scene.platform.execute(
        "select facts ->> %s from platform.migration_events where migration_id = %s and facts ? %s",
        key,
        watch.id,
        key,
    )
    return [value for (value,) in rows]


@asynccontextmanager
async def exporting(rates: dict) -> AsyncIterator[int]:
    """An application that tells which share of each tenant's requests fails."""

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(
            text="".join(f'tenant_error_rate{{tenant="{t}"}} {r}\n' for t, r in rates.items())
        )

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port := free_port()).start()
        yield port
    finally:
        await runner.cleanup()


@asynccontextmanager
async def prometheus(folder: Path, target: int) -> AsyncIterator[str]:
    (folder / "prometheus.yml").write_text(SCRAPE.format(port=target))
    address = f"127.0.0.1:{free_port()}"
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/prometheus",
        f"--web.listen-address={address}",
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield f"http://{address}"
    finally:
        process.kill()
        await process.wait()


async def until_known(url: str, query: str) -> None:
    """Until the server answers, and has scraped something."""
    async with aiohttp.ClientSession() as session, asyncio.timeout(60):
        while True:
            try:
                async with session.get(f"{url}/api/v1/query", params={"query": query}) as response:
                    if (await response.json())["data"]["result"]:
                        return
            except (aiohttp.ClientError, ValueError):
                pass
            await asyncio.sleep(0.05)
