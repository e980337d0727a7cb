"""The demo's platform and its writers, also while a tenant is moved under them by plain SQL."""

import psycopg
import pytest

from mover.core.secret import Secret
from mover.demo.ledger import Ledger, verify_ledger
from mover.demo.places import PsycopgPlaces
from mover.demo.schema import create_services, create_shared, schemas
from mover.demo.seed import seed_services
from mover.demo.servers import PostgresServer
from mover.demo.workload import Rates, Workload
from tests.support.checks import assert_tenant_equal, mapped, tenant_tables
from tests.support.platform import Platform, seed_database, small_tenants
from tests.support.waiting import until

# Tables with a column that defaults to now().
WITH_TIMES = {"documents", "document_versions", "contacts", "invoices", "activities", "folders"}
RATES = Rates(tps=200, clients=6, others_tps=40, others_clients=2)


def writers_on(platform, ledger):
    places = PsycopgPlaces(platform.app_url, {"core": platform.app_url})
    moving, *others = (tenant.id for tenant in platform.tenants)
    return Workload(places, moving, others[:2], ledger, RATES)


def verdicts(platform, ledger, vertical="core"):
    """Of the tenant that moves, served by `vertical` now, and of two that stay."""
    moving, *others = platform.tenants[:3]
    places = [(moving, vertical), *((tenant, "core") for tenant in others)]
    return [verify_ledger(ledger, Secret(platform.url), schemas(v), tenant.id) for tenant, v in places]


async def test_every_acknowledged_write_is_there_once(pg16, make_platform):
    platform, ledger = make_platform(pg16), Ledger()
    workload = writers_on(platform, ledger)
    async with workload.running():
        await until(lambda: workload.transactions > 600)
    report = workload.report()
    assert report.errors == ()
    assert report.stale_reads == 0 and report.pause_ms is None
    found = verdicts(platform, ledger)
    assert all(verdict.complete and verdict.checked and not verdict.unknown for verdict in found), found


@pytest.mark.parametrize(
    ("damage", "lost", "duplicated"),
    [
        (
            "delete from core_crm.activities where write_id = (select min(write_id::text)::uuid from made)",
            1,
            0,
        ),
        ("insert into core_crm.activities (tenant_id, write_id, kind) table made limit 1", 0, 1),
        ("update core_crm.contacts set touches = touches - 1 where id = (select min(id) from hot)", 1, 0),
        ("update core_crm.contacts set touches = touches + 1 where id = (select min(id) from hot)", 0, 1),
    ],
)
async def test_damage_done_behind_the_writers_back_is_seen(pg16, make_platform, damage, lost, duplicated):
    platform, ledger = make_platform(pg16), Ledger()
    workload = writers_on(platform, ledger)
    async with workload.running():
        await until(lambda: workload.transactions > 300)
    moving = platform.tenants[0].id
    with psycopg.connect(platform.url, autocommit=True) as conn:
        conn.execute(
            "create temporary table made as select tenant_id, write_id, kind from core_crm.activities"
            " where write_id is not null and tenant_id = %s",
            (moving,),
        )
        conn.execute(
            "create temporary table hot as select id from core_crm.contacts"
            " where touches > 0 and tenant_id = %s",
            (moving,),
        )
        conn.execute(damage)
    verdict = verdicts(platform, ledger)[0]
    assert (verdict.lost, verdict.duplicated) == (lost, duplicated)
    assert len(verdict.examples) == 1


async def test_writers_follow_a_tenant_that_moves_under_them(pg18, make_platform):
    platform, ledger = make_platform(pg18), Ledger()
    with psycopg.connect(platform.url, autocommit=True) as conn:
        create_services(conn, "realestate")
    workload = writers_on(platform, ledger)
    moving = platform.tenants[0].id
    async with workload.running():
        await until(lambda: workload.transactions > 300)
        await move_by_hand(platform.url, moving)
        before = workload.transactions
        await until(lambda: workload.transactions > before + 300)
    report = workload.report()
    assert report.errors == ()
    assert report.pause_ms is not None and report.pause_ms.max >= report.pause_ms.p50 > 0
    found = verdicts(platform, ledger, "realestate")
    assert all(verdict.complete for verdict in found), found
    # And had they gone on where they were, that would show.
    assert not verify_ledger(ledger, Secret(platform.url), schemas("core"), moving).complete


async def move_by_hand(url, tenant):
    """As crude as can be: everything under one lock, in one transaction."""
    left, new = schemas("core"), schemas("realestate")
    order = {
        "crm": ("companies", "contacts", "deals", "invoices", "invoice_lines", "activities"),
        "dms": ("folders", "documents", "document_versions", "tags", "document_tags"),
    }
    async with await psycopg.AsyncConnection.connect(url) as conn:
        await conn.execute(
            "create function left_behind() returns trigger language plpgsql as $$ begin"
            " raise exception 'tenant has moved' using errcode = '25006'; end $$"
        )
        for service, tables in order.items():
            for table in tables:
                old = f"{left[service]}.{table}"
                await conn.execute(f"lock table {old} in share row exclusive mode")
                cursor = await conn.execute(
                    "select string_agg(quote_ident(attname), ', ') from pg_attribute"
                    " where attrelid = %s::regclass and attnum > 0 and not attisdropped"
                    " and attgenerated = ''",
                    (old,),
                )
                (columns,) = await cursor.fetchone()
                values = columns.replace("status", "status::text::realestate_dms.document_status").replace(
                    "stage", "stage::text::realestate_crm.deal_stage"
                )
                await conn.execute(
                    f"insert into {new[service]}.{table} ({columns}) overriding system value"
                    f" select {values} from {old} where tenant_id = '{tenant}'"
                )
                for event, row in (("insert", "new"), ("update", "new"), ("delete", "old")):
                    await conn.execute(
                        f"create trigger left_{event} after {event} on {old} for each row"
                        f" when ({row}.tenant_id = '{tenant}') execute function left_behind()"
                    )
        for table in ("crm.contacts", "crm.deals", "crm.invoices", "crm.activities", "dms.folders"):
            await conn.execute(
                f"select setval(pg_get_serial_sequence('realestate_{table}', 'id'),"
                f" (select max(id) from core_{table}))"
            )
        await conn.execute("update auth.organizations set vertical = 'realestate' where id = %s", (tenant,))


async def test_an_answer_that_never_came_counts_as_neither(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    with PostgresServer(16, fsync=False, settings={"shared_buffers": "32MB"}) as server:
        tenants = small_tenants()
        url = server.create_database("core")
        seed_database(url, tenants)
        platform = Platform(server, url, tenants)
        workload = writers_on(platform, ledger)
        async with workload.running():
            await until(lambda: workload.transactions > 300)
            server.kill9()
            server.come_back()
            before = workload.transactions
            await until(lambda: workload.transactions > before + 300)
        assert workload.client_errors
        found = verdicts(platform, ledger)
    ledger.close()
    assert all(verdict.complete for verdict in found), found


def test_the_same_seed_makes_the_same_rows(pg16, pg18, make_database):
    tenants = small_tenants(count=2, rows=300)
    urls = make_database(pg16), make_database(pg18)
    for url in urls:
        seed_database(url, tenants)
    tables = [t for t in tenant_tables(urls[0], schemas("core").values()) if t[1] not in WITH_TIMES]
    for tenant in tenants:
        assert assert_tenant_equal(*urls, mapped(tables, {s: s for s, _ in tables}), tenant.id) > 100


def test_keys_of_two_seeded_databases_can_be_kept_apart(pg16, make_database):
    tenants = small_tenants(count=2, rows=300)
    urls = make_database(pg16), make_database(pg16)
    seed_database(urls[0], tenants)
    with psycopg.connect(urls[1], autocommit=True) as conn:
        create_shared(conn)
        seed_services(conn, "core", tenants, first_key=1_000_000)
    keys = []
    for url in urls:
        with psycopg.connect(url) as conn:
            keys.append({id_ for (id_,) in conn.execute("select id from core_crm.contacts")})
    assert keys[0].isdisjoint(keys[1])


def test_the_application_can_do_its_work_and_nothing_else(pg16, make_platform):
    platform = make_platform(pg16)
    with psycopg.connect(platform.app_url.reveal()) as conn:
        (tenant,) = conn.execute("select id from auth.organizations limit 1").fetchone()
        assert conn.execute("select core_crm.pipeline_value(%s)", (tenant,)).fetchone()[0] > 0
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute("update auth.organizations set vertical = 'mine'")
