"""The daemon's memory is bounded in bytes, however large the tenant, its rows and its transactions are."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from mover.core.secret import Secret
from mover.demo.seed import demo_tenants, prepare_database, seed_organizations, seed_services
from mover.demo.servers import Cluster, PostgresServer
from mover.demo.stage import Stage
from mover.postgres.platform import initialise
from tests.support.platform import APP_PASSWORD, prepare_empty
from tests.support.waiting import until

MOVED_BYTES = 2_000_000_000
BODY_BYTES = 12_000  # a multiple of 32; stored as it is, the column is not compressed
DOCUMENTS = MOVED_BYTES // BODY_BYTES
MAX_RSS_MB = 200
# One transaction of the tenant that the stream carries while rows are copied.
REWRITTEN = 8_000
TIMEOUT_S = 400
TENANT, *_ = TENANTS = demo_tenants(large_rows=1000, others_rows=200, count=3)
GROW = """
insert into core_dms.documents (tenant_id, folder_id, title, body)
select %(tenant)s, (select min(id) from core_dms.folders where tenant_id = %(tenant)s), 'large ' || n,
       repeat(md5(n::text), %(repeats)s)
  from generate_series(1, %(documents)s) n
"""
REWRITE = """
update core_dms.documents set body = reverse(body)
 where id in (select id from core_dms.documents where tenant_id = %(tenant)s and length(body) > 9999
               order by id limit %(documents)s)
"""


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[PostgresServer, PostgresServer]]:
    """Of their own, since 2 GB would stay in the others' WAL."""
    settings = {"shared_buffers": "256MB", "max_wal_size": "2GB"}
    with (
        PostgresServer(16, fsync=False, settings=settings) as source,
        PostgresServer(18, fsync=False, settings=settings) as target,
    ):
        yield source, target


async def test_two_gigabytes_pass_through_little_memory(servers, tmp_path):
    source, target = servers
    urls = await asyncio.to_thread(seed, source, target)
    await initialise(Secret(urls["platform"]))
    stage = Stage(
        tmp_path,
        platform_url=urls["platform"],
        verticals={"core": urls["core"], "realestate": urls["realestate"]},
        engine={"monitoring_hours": {"database": 1}},  # the rows on the source stay for the comparison
    )
    stage.write_config()
    async with stage.running(), stage.client() as api:
        body = {"tenantId": str(TENANT.id), "targetVertical": "realestate", "targetTier": "database"}
        migration = (await api.submit(body))["id"]
        await until(lambda: column(urls, migration, "phase") == "copy", TIMEOUT_S)
        await asyncio.to_thread(execute, urls["core"], REWRITE, documents=REWRITTEN)
        resting = ("monitoring", "failed", "paused")
        await until(lambda: column(urls, migration, "status") in resting, TIMEOUT_S)
        progress = await api.progress(migration)
        peak_mb = peak_rss_mb(stage)
    assert progress["status"] == "monitoring", progress["error"]
    assert progress["bytes"]["done"] > 0.9 * MOVED_BYTES
    assert progress["changesApplied"] >= REWRITTEN
    print(f"the daemon moved {progress['bytes']['done'] / 1e9:.1f} GB and had {peak_mb} MB at most")
    assert peak_mb < MAX_RSS_MB
    assert large_rows(urls["realestate"]) == (DOCUMENTS, BODY_BYTES * DOCUMENTS)


def large_rows(url: str) -> tuple[int, int]:
    """How many, and their bytes; that the rows are equal, the migration has verified."""
    with psycopg.connect(url) as conn:
        return conn.execute(
            "select count(*), sum(octet_length(body)) from realestate_dms.documents"
            " where tenant_id = %s and title like 'large %%'",
            (TENANT.id,),
        ).fetchone()


def seed(source: Cluster, target: Cluster) -> dict[str, str]:
    urls = {
        "platform": source.create_database("platform"),
        "core": source.create_database("core"),
        "realestate": target.create_database("realestate"),
    }
    prepare_empty(urls["realestate"])
    with psycopg.connect(urls["platform"], autocommit=True) as conn:
        prepare_database(conn, APP_PASSWORD)
        seed_organizations(conn, TENANTS)
    with psycopg.connect(urls["core"], autocommit=True) as conn:
        prepare_database(conn, APP_PASSWORD)
        seed_services(conn, "core", TENANTS)
    execute(urls["core"], GROW, documents=DOCUMENTS, repeats=BODY_BYTES // 32)
    execute(urls["core"], "analyze core_dms.documents")
    return urls


def execute(url: str, statement: str, **parameters: object) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(statement, {"tenant": TENANT.id, **parameters})


def column(urls: dict[str, str], migration: str, name: str) -> str | None:
    with psycopg.connect(urls["platform"]) as conn:
        query = f"select {name} from platform.tenant_migrations where id = %s"
        (value,) = conn.execute(query, (migration,)).fetchone()
        return value


def peak_rss_mb(stage: Stage) -> int:
    assert stage.process is not None
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{stage.process.pid}/status").read_text())
    assert found
    return int(found[1]) // 1024
