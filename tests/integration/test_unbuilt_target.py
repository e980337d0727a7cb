"""A fresh target has no foreign keys while rows are copied: which rows there are the tenant's by others is
told by the plan, and by the source."""

from __future__ import annotations

from uuid import uuid4

import psycopg
import pytest

from mover.core.ids import TableRef
from tests.integration.test_alignment import TENANT, Sides, planned
from tests.support import binders
from tests.support.rig import execute

OTHER = uuid4()


async def half_copied(make_database, pg16, pg18, *, others: bool = False) -> Sides:
    """The tenant's rows are on the target, and with `others` somebody else's by now."""
    source, target = make_database(pg16), make_database(pg18)
    fill(source, "core_crm", [TENANT, OTHER], binders.ddl("core_crm"))
    s = await planned(source, target)
    fill(target, "estate_crm", [TENANT, OTHER] if others else [TENANT])
    assert execute(target, "select from pg_constraint where contype = 'f'") == []
    return s


def fill(url, schema, tenants, ddl="select"):
    with psycopg.connect(url) as conn:
        conn.execute(ddl)
        binders.seed(conn, schema, tenants, binders=3)


def on_target(s: Sides, rows_of=binders.rows_of) -> dict[str, list[str]]:
    with psycopg.connect(s.site.target_place.url.reveal()) as conn:
        return rows_of(conn, "estate_crm", TENANT)


async def test_owned_rows_that_are_copied_anew_go_first(make_database, pg16, pg18):
    s = await half_copied(make_database, pg16, pg18)
    assert all(on_target(s).values())
    owned = {TableRef("core_crm", table) for table in binders.TABLES if table != "binders"}
    await s.site.forget_copies(s.shape, owned, s.say)
    assert {table for table, rows in on_target(s).items() if rows} == {"binders"}


async def test_a_target_with_owned_rows_of_the_tenant_only_is_dropped(make_database, pg16, pg18):
    s = await half_copied(make_database, pg16, pg18)
    await s.site.remove_target_rows(s.shape, s.say)
    assert execute(target_url(s), "select to_regnamespace('estate_crm') is null") == [(True,)]


DROP = "alter table {0}.sheets drop constraint sheets_binder_id_fkey"
RENAME = "alter table {0}.sheets rename to pages; alter table {0}.pages rename binder_id to folder_id"
BACK = "alter table {0}.pages rename to sheets; alter table {0}.sheets rename folder_id to binder_id"
MEANWHILE = {
    "as planned": {},
    "a foreign key dropped on the source": {"source": DROP},
    "a table renamed on the source": {"source": RENAME},
    "a table renamed on both sides": {"source": RENAME, "target": RENAME},
}


@pytest.mark.parametrize("changes", MEANWHILE.values(), ids=MEANWHILE)
async def test_a_target_with_rows_of_others_is_left_to_them(make_database, pg16, pg18, changes):
    s = await half_copied(make_database, pg16, pg18, others=True)
    others = on_target(s, binders.rows_of_others)
    assert all(others.values())
    for side, change in changes.items():
        s.on(side, change)
    await s.site.remove_target_rows(s.shape, s.say)
    if "target" in changes:
        s.on("target", BACK)
    assert not any(on_target(s).values())
    assert on_target(s, binders.rows_of_others) == others


def target_url(s: Sides) -> str:
    return s.site.target_place.url.reveal()
