"""Bad input through the real daemon: a refusal says which, why and what to do, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import psycopg
import pytest
from psycopg import sql

from mover.demo.servers import PostgresServer
from mover.demo.stage import Stage
from mover.web.app import MIGRATIONS
from tests.acceptance.conftest import core_tenants, seed_core
from tests.support.acceptance import CORE, ESTATE, Scene
from tests.support.checks import leftovers
from tests.support.queue import role_with_password

ROWS = 200
NOWHERE = "postgresql://app:planted-secret@127.0.0.1:9/nowhere"
DONE, FAILED, USAGE, REFUSED = range(4)


@dataclass
class Asking:
    """A daemon, and the ways to ask it."""

    scene: Scene
    stage: Stage

    async def http(
        self, method: str, path: str = MIGRATIONS, body: object = None, token: str | None = "valid"
    ) -> tuple[int, Any]:
        """Status and JSON; `body` may be text that is no JSON."""
        headers = {"Authorization": f"Bearer {self.stage.token if token == 'valid' else token}"}
        data = body if isinstance(body, str) else json.dumps(body)
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                method, self.stage.server + path, data=data, headers=headers if token else {}
            ) as answer,
        ):
            text = await answer.text()
            assert "planted" not in text
            return answer.status, json.loads(text)

    async def submit(self, tenant: UUID, vertical: str = ESTATE, tier: str = "database", **more: object):
        body = {"tenantId": str(tenant), "targetVertical": vertical, "targetTier": tier, **more}
        return await self.http("POST", body=body)

    async def mover(self, *arguments: str) -> tuple[int, str]:
        code, text = await self.stage.run(*arguments)
        assert "planted" not in text
        return code, " ".join(text.split())  # however wide the terminal is

    async def migrate(self, tenant: UUID, vertical: str = ESTATE, tier: str = "database", *more: str):
        where = ("--to-vertical", vertical, "--to-tier", tier)
        return await self.mover("migrate", "--tenant", str(tenant), *where, *more)

    async def refused(self, tenant: UUID, codes: Collection[str], vertical: str = ESTATE) -> None:
        """Preflight refuses for exactly these reasons: in the plan, on the terminal, and when it is run."""
        status, plan = await self.submit(tenant, vertical, dryRun=True)
        assert status == 200, plan
        assert {refusal["code"] for refusal in plan["refusals"]} == set(codes), plan["refusals"]
        code, text = await self.migrate(tenant, vertical, "database", "--wait")
        assert code == REFUSED, text
        for refusal in plan["refusals"]:
            assert refusal["message"] in text and refusal["hint"] in text, (refusal, text)
        await self.check_failed("refused")

    async def does_not_connect(self, said: str, vertical: str, expected: tuple[int, str, int]) -> None:
        """`expected`: the HTTP status of a dry run, the error's code, the exit code."""
        status, code, exit_code = expected
        answer = await self.submit(self.scene.tenant, vertical, dryRun=True)
        assert (answer[0], answer[1]["error"]["code"]) == (status, code)
        assert said in answer[1]["error"]["message"] and answer[1]["error"]["hint"]
        found, text = await self.migrate(self.scene.tenant, vertical, "database", "--wait")
        assert (found, said in text) == (exit_code, True), text
        await self.check_failed(code)

    async def check_failed(self, code: str) -> None:
        """The newest migration has failed before it changed anything."""
        _, answer = await self.http("GET", f"{MIGRATIONS}?limit=1")
        (migration,) = answer["migrations"]
        assert (migration["status"], migration["error"]["code"]) == ("failed", code)
        assert migration["phase"] == "preflight"

    def check_nothing_is_left(self) -> None:
        for home in self.scene.homes.values():
            assert leftovers(home.url) == []
        assert "planted" not in self.stage.log_path.read_text()

    def live_at(self, url: str, tenant: UUID | None = None) -> None:
        """The tenant's own route says so."""
        self.scene.platform.execute(
            "update auth.organizations set database_url = %s where id = %s", url, tenant or self.scene.tenant
        )


@asynccontextmanager
async def asking(
    scene: Scene, verticals: Mapping[str, str] | None = None, **environment: str
) -> AsyncIterator[Asking]:
    """A daemon that knows more `verticals`, by their URLs."""
    stage = scene.stage()
    stage.verticals = {**stage.verticals, **(verticals or {})}
    stage.write_config()
    try:
        await stage.start(**environment)
        asked = Asking(scene, stage)
        yield asked
        asked.check_nothing_is_left()
    finally:
        await stage.kill()


@pytest.fixture
def scene(make_scene, pg16, pg18) -> Scene:
    return make_scene(pg16, pg18, rows=ROWS)


async def test_requests_that_need_no_look_at_a_database(scene):
    tenant = scene.tenant
    async with asking(scene, MOVER__VERTICALS__HEALTH="{}") as asked:
        for wanted, status, said in (
            ((uuid4(),), 404, "the routing table has no such tenant"),
            ((tenant, "aviation"), 422, "unknown vertical; known are core, health, realestate"),
            ((tenant, CORE, "schema"), 422, "the tenant already lives in core (schema)"),
            ((tenant, CORE, "database"), 422, "are the same schemas of the same database"),
            ((tenant, "health"), 409, "Create one and set verticals.health.database_url."),
            ((tenant, ESTATE, "dedicated"), 409, "under [dedicated]"),
        ):
            answer = await asked.submit(*wanted)
            assert answer[0] == status and said in json.dumps(answer[1]), answer
            code, text = await asked.migrate(*wanted)
            assert (code, said in text) == (REFUSED, True), (code, text)
        assert (await asked.http("GET"))[1] == {"migrations": []}


async def test_a_second_migration_of_a_tenant(scene):
    async with asking(scene) as asked:
        status, first = await asked.submit(scene.tenant, scheduledAt="2100-01-01T00:00:00Z")
        assert status == 202
        status, answer = await asked.submit(scene.tenant)
        assert (status, answer["error"]["code"]) == (409, "conflict")
        assert f"already has a live migration {first['id']} (queued)" in answer["error"]["message"]
        code, text = await asked.migrate(scene.tenant)
        assert code == REFUSED
        assert first["id"] in text and "Wait for it to end, or cancel it." in text


async def test_malformed_requests(scene):
    async with asking(scene) as asked:
        status, answer = await asked.http("POST", body='{"tenantId": planted')
        assert (status, answer["error"]["code"]) == (400, "malformed_json")
        status, answer = await asked.http("POST", body={"tenantId": "planted", "targetTier": 7, "x": 1})
        assert status == 422
        fields = {error["field"] for error in answer["errors"]}
        assert fields == {"tenantId", "targetVertical", "targetTier", "x"}
        status, answer = await asked.http("POST", body="[]")
        assert status == 422
        status, answer = await asked.http("POST", body="x" * 100_000)
        assert status == 413
        assert (await asked.http("GET", f"{MIGRATIONS}?limit=planted"))[0] == 422
        assert (await asked.http("GET", f"{MIGRATIONS}/nothing"))[0] == 404
        assert (await asked.http("PUT"))[0] == 405
        for wrong in (("--tenant", "7"), ("--tenant", str(scene.tenant), "--to-tier", "planet")):
            assert (await asked.mover("migrate", *wrong, "--to-vertical", ESTATE))[0] == USAGE
        code, text = await asked.migrate(scene.tenant, ESTATE, "database", "--at", "tomorrow")
        assert (code, "scheduledAt" in text) == (REFUSED, True)


async def test_tokens(scene):
    admin, viewer = "planted-admin", "planted-viewer"
    tokens = ", ".join(
        f'{{ name = "{role}", role = "{role}", sha256 = "{hashed(token)}" }}'
        for role, token in (("admin", admin), ("viewer", viewer))
    )
    async with asking(scene, MOVER__API__TOKENS=f"[{tokens}]") as asked:
        for token, status, code in (
            (None, 401, "unauthorized"),
            ("planted-wrong", 401, "unauthorized"),
            (viewer, 403, "forbidden"),
        ):
            answer = await asked.http("POST", body={}, token=token)
            assert (answer[0], answer[1]["error"]["code"]) == (status, code)
        assert (await asked.http("GET", token=viewer))[0] == 200
        code, text = await asked.migrate(scene.tenant)  # with a token that this daemon does not know
        assert (code, "the token is not known" in text) == (REFUSED, True)
        asked.stage.token = viewer
        code, text = await asked.migrate(scene.tenant)
        assert (code, "this needs the role operator" in text) == (REFUSED, True)
        asked.stage.token = ""
        code, text = await asked.migrate(scene.tenant)
        assert (code, "Set MOVER_TOKEN" in text) == (USAGE, True)


async def test_no_daemon(scene):
    stage = scene.stage()
    code, text = await stage.run("list")
    assert (code, "no daemon answers" in text) == (FAILED, True)


def hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


async def test_tables_that_cannot_be_moved_are_all_named_at_once(scene):
    core = scene.homes[CORE]
    core.execute("create table core_dms.settings (name text primary key)")
    core.execute("create table core_dms.pages (number int, document uuid references core_dms.documents)")
    core.execute("create table core_dms.drafts (tenant_id uuid, body text)")
    async with asking(scene) as asked:
        codes = {"no_tenant_column", "owned_table", "nullable_tenant_column"}
        await asked.refused(scene.tenant, codes)
        code, text = await asked.migrate(scene.tenant, ESTATE, "database", "--dry-run")
        assert code == REFUSED
        for table in ("settings", "pages", "drafts"):
            assert f"refused: table core_dms.{table}" in text
        assert 'tenancy.reference_tables += ["core_dms.settings"]' in text


async def test_a_target_without_the_reference_rows(scene):
    estate = scene.homes[ESTATE]
    estate.execute("delete from shared.countries where code in ('DE', 'FR')")
    async with asking(scene) as asked:
        await asked.refused(scene.tenant, {"references_missing"})
        estate.execute("drop table shared.countries")
        await asked.refused(scene.tenant, {"reference_table_missing"})


async def test_the_same_place_by_another_name(scene):
    another = scene.homes[CORE].url.replace("127.0.0.1", "localhost")
    async with asking(scene) as asked:
        asked.live_at(another)
        status, answer = await asked.submit(scene.tenant, CORE, "database", dryRun=True)
        assert status == 200
        assert "same_place" in {refusal["code"] for refusal in answer["refusals"]}


async def test_a_tenant_without_rows(scene):
    async with asking(scene) as asked:
        nobody = uuid4()
        asked.scene.platform.execute(
            "insert into auth.organizations (id, name, vertical, isolation_tier) values (%s, 'x', 'core',"
            " 'schema')",
            nobody,
        )
        await asked.refused(nobody, {"unknown_tenant"})


@pytest.fixture
def weak_role(scene) -> Iterator[str]:
    """May log in and nothing else."""
    role = f"weak_{uuid4().hex[:8]}"
    with psycopg.connect(scene.homes[CORE].url, autocommit=True) as conn:
        conn.execute(sql.SQL("create role {} login").format(sql.Identifier(role)))
        yield role
        conn.execute(sql.SQL("reassign owned by {} to postgres").format(sql.Identifier(role)))
        conn.execute(sql.SQL("drop owned by {}").format(sql.Identifier(role)))
        conn.execute(sql.SQL("drop role {}").format(sql.Identifier(role)))


async def test_a_role_without_rights(scene, weak_role):
    core = scene.homes[CORE]
    async with asking(scene) as asked:
        asked.live_at(core.url.replace("postgres@", f"{weak_role}@"))
        lacks = {"no_replication", "no_create", "not_owner", "no_privilege"}
        lacks.add("no_create_in_schema")
        await asked.refused(scene.tenant, lacks)


async def test_an_owner_without_replication(scene, weak_role):
    core = scene.homes[CORE]
    name = core.url.rpartition("/")[2]
    core.execute(f'grant create on database {name} to "{weak_role}"')
    core.execute(f'grant set on parameter session_replication_role to "{weak_role}"')
    for schema in ("core_dms", "core_crm"):
        core.execute(f'grant usage, create on schema {schema} to "{weak_role}"')
    for schema, table in core.tables:
        core.execute(f'alter table {schema}.{table} owner to "{weak_role}"')
    async with asking(scene, MOVER__ENGINE__CAPTURE="wal") as asked:
        asked.live_at(core.url.replace("postgres@", f"{weak_role}@"))
        await asked.refused(scene.tenant, {"no_replication"})


async def test_a_source_that_does_not_log_enough(scene):
    settings = {"wal_level": "replica", "shared_buffers": "32MB"}
    with PostgresServer(16, fsync=False, settings=settings) as server:
        url = server.create_database("core")
        seed_core(url, core_tenants(ROWS))
        async with asking(scene, MOVER__ENGINE__CAPTURE="wal") as asked:
            asked.live_at(url)
            await asked.refused(scene.tenant, {"wal_level"})
            assert leftovers(url) == []


async def test_a_wrong_password_on_either_side(scene):
    with role_with_password(scene.homes[CORE].server) as source_role:
        with role_with_password(scene.homes[ESTATE].server) as target_role:
            core, estate = (
                scene.homes[vertical].url.replace("postgres@", f"{role}:planted-secret@")
                for vertical, role in ((CORE, source_role), (ESTATE, target_role))
            )
            async with asking(scene, {"health": estate}) as asked:
                await asked.does_not_connect("target: wrong password", "health", (409, "refused", REFUSED))
                asked.live_at(core)
                await asked.does_not_connect("source: wrong password", ESTATE, (409, "refused", REFUSED))


async def test_a_server_that_is_down_on_either_side(scene):
    async with asking(scene, {"health": NOWHERE}) as asked:
        expected = 503, "unreachable", FAILED
        await asked.does_not_connect("target: nothing listens", "health", expected)
        asked.live_at(NOWHERE)
        await asked.does_not_connect("source: nothing listens", ESTATE, expected)
        asked.live_at(NOWHERE + "?planted=1")
        await asked.does_not_connect("source: the URL is not one", ESTATE, (409, "refused", REFUSED))
