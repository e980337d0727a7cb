"""Passwords and rows' values, planted everywhere, are found nowhere: whatever happens to the migrations."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, LiteralString

import aiohttp
import psycopg
import pytest
from psycopg import sql

from mover.demo.servers import PASSWORD_GROUP, Cluster
from mover.demo.stage import Stage
from mover.web.app import MIGRATIONS
from tests.support.acceptance import CORE, ESTATE, Scene, at, until_stopped
from tests.support.waiting import until

ROWS = 500
PLANTED = "core_dms.documents"
KEY = "decafbad-0000-4000-8000-000000000001"  # of a row that the tests damage
ROW_VALUES = (
    "update core_dms.documents set title = 'planted-title', body = 'planted-body',"
    " labels = '{planted-label}', metadata = '{\"planted-key\": 1}'",
    "update core_dms.tags set name = 'planted-tag-' || id",
    "update core_crm.contacts set email = 'planted-' || id || '@example.org', full_name = 'planted-name'",
)


@pytest.fixture
def scene(make_scene, pg16, pg18) -> Scene:
    """Whose rows and route are full of secrets; the target holds other tenants already."""
    scene = make_scene(pg16, pg18, rows=ROWS, shared=True)
    core = scene.homes[CORE]
    for statement in ROW_VALUES:
        core.execute(statement)
    folder = "(select min(id) from core_dms.folders where tenant_id = %(tenant)s)"
    with psycopg.connect(core.url) as conn:
        conn.execute(
            "insert into core_dms.documents (id, tenant_id, folder_id, title)"
            f" values (%(key)s, %(tenant)s, {folder}, 'planted-title')",
            {"key": KEY, "tenant": scene.tenant},
        )
    return scene


@contextmanager
def planted_password(server: Cluster, url: str) -> Iterator[str]:
    """`url` for a superuser of its own whom the server asks for a password."""
    name = f"owner_{url.rpartition('_')[2]}"
    role, group = sql.Identifier(name), sql.Identifier(PASSWORD_GROUP)
    with psycopg.connect(server.url(), autocommit=True) as conn:
        if not conn.execute("select from pg_roles where rolname = %s", (PASSWORD_GROUP,)).fetchall():
            conn.execute(sql.SQL("create role {}").format(group))
        create = sql.SQL("create role {} login superuser password 'planted-password' in role {}")
        conn.execute(create.format(role, group))
        yield url.replace("postgres@", f"{name}:planted-password@", 1)
        conn.execute(sql.SQL("reassign owned by {} to postgres").format(role))
        with psycopg.connect(url, autocommit=True) as here:
            here.execute(sql.SQL("reassign owned by {} to postgres").format(role))
        conn.execute(sql.SQL("drop role {}").format(role))


@dataclass
class Overheard:
    """Everything that the daemon and its commands have said."""

    scene: Scene
    stage: Stage
    said: dict[str, str] = field(default_factory=dict)

    async def listen(self, migration: str) -> None:
        """Every answer about a migration, in every way there is to ask."""
        one = f"{MIGRATIONS}/{migration}"
        headers = {"Authorization": f"Bearer {self.stage.token}"}
        async with aiohttp.ClientSession(self.stage.server, headers=headers) as session:
            for path in (MIGRATIONS, one, f"{one}/progress", "/metrics", "/healthz", "/readyz"):
                async with session.get(path) as answer:
                    self.said[path] = await answer.text()
            async with session.ws_connect(f"{one}/events") as socket:
                self.said[f"{one}/events"] = "\n".join(
                    [message.data async for message in socket if message.type is aiohttp.WSMsgType.TEXT]
                )
        commands = [
            (command, migration, *form) for command in ("status", "watch") for form in ((), ("--json",))
        ]
        answers = await asyncio.gather(*(self.stage.run(*command) for command in commands))
        self.said |= {" ".join(command): text for command, (_, text) in zip(commands, answers, strict=True)}

    def check(self) -> None:
        """A key may be in the stored evidence of a mismatch, and nowhere else."""
        self.said["log"] = self.stage.log_path.read_text()
        assert '"level": "debug"' in self.said["log"], "the daemon did not say all that it could"
        self.said |= {name: text for name, text in self._stored()}
        for place, text in self.said.items():
            for secret in (PLANTED, KEY):
                line = next((line for line in text.splitlines() if secret in line), None)
                assert line is None, f"{place}: {line}"

    def _stored(self) -> Iterator[tuple[str, str]]:
        platform = self.scene.platform
        for (table,) in platform.execute(
            "select c.oid::regclass::text from pg_class c join pg_namespace n on n.oid = c.relnamespace"
            " where n.nspname = 'platform' and c.relkind = 'r'"
        ):
            rows = platform.execute(
                f"select to_jsonb(t) #- '{{progress,evidence,mismatches}}' from {table} t"
            )
            yield table, "\n".join(str(row) for (row,) in rows)


async def test_no_secret_is_seen_or_stored(scene):
    with ExitStack() as stack:
        homes = {
            name: stack.enter_context(planted_password(h.server, h.url)) for name, h in scene.homes.items()
        }
        stage = scene.stage(tombstone_days=0)
        stage.verticals = homes
        stage.platform_url = stack.enter_context(planted_password(scene.platform.server, scene.platform.url))
        stage.write_config()
        # the tenant's route has a URL of its own, with another spelling of the same password
        scene.platform.execute(
            "update auth.organizations set database_url = %s where id = %s",
            homes[CORE] + "?application_name=planted-name",
            scene.tenant,
        )
        overheard = Overheard(scene, stage)
        try:
            await a_migration_that_is_refused(scene, stage, overheard)
            await a_migration_that_fails_to_copy(scene, stage, overheard)
            await a_migration_whose_rows_differ(scene, stage, overheard)
            await a_migration_that_succeeds(scene, stage, overheard)
            overheard.check()
        finally:
            await stage.kill()


async def a_migration_that_is_refused(scene: Scene, stage: Stage, overheard: Overheard) -> None:
    scene.homes[CORE].execute("create table core_dms.settings (name text default 'x' primary key)")
    await stage.start(MOVER__LOG__LEVEL="debug")
    migration = await submitted(scene, stage)
    await ended(scene, migration, "failed", "refused")
    await overheard.listen(migration)
    for command in (("--dry-run",), ("--dry-run", "--json")):
        arguments = ("--tenant", str(scene.tenant), "--to-vertical", ESTATE, "--to-tier", "database")
        code, text = await stage.run("migrate", *arguments, *command)
        assert code == 3
        overheard.said[f"mover migrate {command}"] = text
    overheard.said["mover check"] = (await stage.run("check", "--config", str(stage.config_path)))[1]
    scene.homes[CORE].execute("drop table core_dms.settings")
    await stage.stop()


async def a_migration_that_fails_to_copy(scene: Scene, stage: Stage, overheard: Overheard) -> None:
    """Another tenant takes a key meanwhile: the server's DETAIL names it."""
    migration = await frozen_at(scene, stage, "prepare.stream.done")
    scene.homes[ESTATE].execute(
        "insert into realestate_dms.documents (id, tenant_id, folder_id, title)"
        " select %s, tenant_id, id, 'planted-title' from realestate_dms.folders limit 1",
        KEY,
    )
    stage.send_signal(signal.SIGCONT)
    await ended(scene, migration, "failed", "apply_conflict")
    await overheard.listen(migration)
    scene.homes[ESTATE].execute("delete from realestate_dms.documents where id = %s", KEY)
    await stage.stop()


async def a_migration_whose_rows_differ(scene: Scene, stage: Stage, overheard: Overheard) -> None:
    migration = await frozen_at(scene, stage, "copy.done")
    with psycopg.connect(scene.homes[ESTATE].url) as conn:
        conn.execute("select set_config('mover.tenant', %s, false)", (str(scene.tenant),))
        conn.execute("update realestate_dms.documents set body = 'planted-damage' where id = %s", (KEY,))
    stage.send_signal(signal.SIGCONT)
    await ended(scene, migration, "failed", "verification_failed")
    mismatches = column(scene, migration, "progress -> 'evidence' -> 'mismatches'")
    assert KEY in str(mismatches)
    await overheard.listen(migration)
    await stage.stop()


async def a_migration_that_succeeds(scene: Scene, stage: Stage, overheard: Overheard) -> None:
    await stage.start(MOVER__LOG__LEVEL="debug")
    async with scene.writing(tps=40):
        migration = await submitted(scene, stage)
        await ended(scene, migration, "completed")
    await overheard.listen(migration)
    # the URL of the route's own was needed until the tombstone's end
    await until(lambda: column(scene, migration, "notes") == {})
    await stage.stop()


async def submitted(scene: Scene, stage: Stage) -> str:
    async with stage.client() as api:
        body = {"tenantId": str(scene.tenant), "targetVertical": ESTATE, "targetTier": "database"}
        migration = await api.submit(body)
    return str(migration["id"])


async def frozen_at(scene: Scene, stage: Stage, point: str) -> str:
    """A new migration, its daemon stopped at a crash point."""
    await stage.start(MOVER__LOG__LEVEL="debug", **at(point, signal.SIGSTOP))
    migration = await submitted(scene, stage)
    await until_stopped(stage)
    return migration


async def ended(scene: Scene, migration: str, status: str, code: str | None = None) -> None:
    await until(lambda: column(scene, migration, "status") in ("completed", "failed"))
    assert column(scene, migration, "status") == status, column(scene, migration, "error")
    assert column(scene, migration, "error ->> 'code'") == code


def column(scene: Scene, migration: str, expression: LiteralString) -> Any:
    query = f"select {expression} from platform.tenant_migrations where id = %s"
    ((value,),) = scene.platform.execute(query, migration)
    return value
