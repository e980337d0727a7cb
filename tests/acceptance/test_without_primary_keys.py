"""A whole migration of tables without a primary key, while their rows change."""

from __future__ import annotations

import asyncio

import psycopg

from tests.support.acceptance import CORE, ESTATE

ROWS = 300
TABLES = """
create table core_dms.codes (tenant_id uuid not null, code text not null, note text);
create unique index on core_dms.codes (tenant_id, code);
create table core_dms.views (tenant_id uuid not null, seen date, price numeric, body json);
"""
SEED = """
insert into core_dms.codes select tenant, n::text from unnest(%(tenants)s::uuid[]) tenant,
       generate_series(1, %(rows)s) n;
insert into core_dms.views select tenant, 'today', mod(n, 7), '{}' from unnest(%(tenants)s::uuid[]) tenant,
       generate_series(1, %(rows)s) n, generate_series(1, 2);
"""
ONE_VIEW = "ctid = (select ctid from core_dms.views where tenant_id = %(tenant)s and price <> 9 limit 1)"
CHANGES = (
    f"delete from core_dms.views where {ONE_VIEW}",
    f"update core_dms.views set price = 9 where {ONE_VIEW}",
    "update core_dms.codes set code = '-' || code where tenant_id = %(tenant)s"
    " and code = (select max(code) from core_dms.codes where tenant_id = %(tenant)s)",
)


async def change_until_refused(url: str, tenant: object) -> int:
    """How many rounds of changes were acknowledged before the tenant was gone."""
    rounds = 0
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
        while rounds < ROWS:
            try:
                async with conn.transaction():
                    for change in CHANGES:
                        await conn.execute(change, {"tenant": tenant})
            except psycopg.errors.ReadOnlySqlTransaction:
                break
            rounds += 1
    return rounds


async def test_by_a_unique_key_and_by_whole_rows(make_scene, pg16, pg18):
    scene = make_scene(pg16, pg18)
    core, estate = scene.homes[CORE], scene.homes[ESTATE]
    with psycopg.connect(core.url) as conn:
        conn.execute(TABLES)
        tenants = [tenant.id for tenant in scene.tenants[:2]]
        for statement in SEED.split(";\n")[:-1]:
            conn.execute(statement, {"tenants": tenants, "rows": ROWS})
    watch = scene.watch()
    async with scene.daemon() as stage:
        await watch.submit(stage)
        changing = asyncio.create_task(change_until_refused(core.url, scene.tenant))
        await watch.until("completed")
    rounds = await changing
    assert rounds > 0
    watch.check_completed()
    views = "select count(*), count(*) filter (where price = 9) from realestate_dms.views"
    assert estate.execute(views) == [(2 * ROWS - rounds, rounds)]
    codes = "select count(*), sum(length(code) - length(ltrim(code, '-'))) from realestate_dms.codes"
    assert estate.execute(codes) == [(ROWS, rounds)]
