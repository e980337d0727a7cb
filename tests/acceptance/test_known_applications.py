"""A customer database, a shop and a document store, each moved while somebody works with it."""

from __future__ import annotations

import asyncio

import pytest

from mover.demo.schema import schemas
from mover.demo.stage import Stage
from tests.acceptance.conftest import neighbours
from tests.support.acceptance import CORE, ESTATE, Home, Scene
from tests.support.applications import Application, Clerk
from tests.support.applications.archive import ARCHIVE
from tests.support.applications.crm import CRM
from tests.support.applications.objects import objects, views
from tests.support.applications.shop import SHOP

TRANSACTIONS = 60  # at the least, before the tenant is switched


@pytest.mark.parametrize("application", [CRM, SHOP, ARCHIVE], ids=["crm", "shop", "archive"])
async def test_into_an_empty_database(application, pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18, rows=500)
    open_for_business(application, scene)
    said = of_all_objects(scene.homes[CORE])
    async with scene.daemon() as stage:
        await move(application, scene, stage, CORE, ESTATE)
    assert of_all_objects(scene.homes[ESTATE]) == said


async def test_to_other_tenants_and_back_to_where_it_was(pg16, pg18, make_scene):
    """Their numbers, names and articles are in nobody's way."""
    scene = make_scene(pg18, pg16, shared=True, rows=500)
    open_for_business(SHOP, scene)
    estate = scene.homes[ESTATE]
    SHOP.create(estate.url, schema_of(SHOP, estate))
    skip_numbers(estate, schema_of(SHOP, estate))
    SHOP.fill(estate.url, schema_of(SHOP, estate), neighbours()[0].id, len(scene.tenants))
    async with scene.daemon() as stage:
        await move(SHOP, scene, stage, CORE, ESTATE)
        await move(SHOP, scene, stage, ESTATE, CORE)


def schema_of(application: Application, home: Home) -> str:
    return schemas(home.vertical)[application.service]


def open_for_business(application: Application, scene: Scene) -> None:
    core = scene.homes[CORE]
    schema = schema_of(application, core)
    application.create(core.url, schema)
    for number, tenant in enumerate(scene.tenants[:2]):
        application.fill(core.url, schema, tenant.id, number)


def skip_numbers(home: Home, schema: str) -> None:
    """What is given out here was not given out where the tenant comes from."""
    home.execute(
        "select setval(format('%%I.%%I', schemaname, sequencename)::regclass, 1000000 + start_value)"
        " from pg_sequences where schemaname = %s and last_value is null",
        schema,
    )


def of_all_objects(home: Home) -> set[tuple[str, ...]]:
    """Under the same names whatever the place."""
    found = objects(home.url, schemas(home.vertical).values())
    return {tuple(part.replace(f"{home.vertical}_", "") for part in each) for each in found}


async def move(application: Application, scene: Scene, stage: Stage, source: str, target: str) -> None:
    """With a clerk who works until told that the tenant has moved; then everything is compared."""
    ours, theirs = scene.homes[source], scene.homes[target]
    watch = scene.watch(source, target)
    clerk = Clerk(application, scene.tenant, 0, seed=len(scene.watches))
    working = asyncio.create_task(clerk.work(ours.app_url, schema_of(application, ours)))
    try:
        await watch.submit(stage)
        await watch.until_row(lambda row: row["switched_at"] is not None)
        async with asyncio.timeout(60):
            await working
        shown = views(ours.url, schema_of(application, ours), scene.tenant)
        await watch.until("completed")
    finally:
        working.cancel()
    assert sum(clerk.done.values()) > TRANSACTIONS
    assert views(theirs.url, schema_of(application, theirs), scene.tenant) == shown
    watch.check_completed()
    application.assert_numbers_are_new(theirs.url, schema_of(application, theirs))
