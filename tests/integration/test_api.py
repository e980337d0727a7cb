"""The HTTP API and the WebSocket before a real platform database."""

from __future__ import annotations

import asyncio
import logging
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import aiohttp
import psycopg
import pytest

from mover.config import Role
from mover.core.ids import TenantId
from mover.core.migration import Progress
from mover.core.states import Phase, Status
from mover.demo.servers import Cluster
from mover.web.client import ApiError, connect
from tests.conftest import MakeDatabase
from tests.support.api import TOKENS, Running, api_on, config_for
from tests.support.queue import CORE, ESTATE, add_tenant, platform_database, store_on, to_estate

MIGRATIONS = "/api/platform/migrations"


@dataclass
class Api:
    running: Running
    database: str
    session: aiohttp.ClientSession

    async def ask(
        self, method: str, path: str, role: Role | None = Role.ADMIN, **arguments: Any
    ) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {TOKENS[role]}"} if role else {}
        async with self.session.request(
            method, f"{self.running.url}{path}", headers=headers, **arguments
        ) as response:
            text = await response.text()
            assert "planted" not in text
            return response.status, await response.json()

    async def submit(self, tenant: TenantId, **fields: Any) -> tuple[int, Any]:
        body = {"tenantId": str(tenant), "targetVertical": "realestate", "targetTier": "database"}
        return await self.ask("POST", MIGRATIONS, Role.OPERATOR, json=body | fields)

    async def audit(self) -> list[tuple[str, str, str, str | None]]:
        async with await psycopg.AsyncConnection.connect(self.database) as conn:
            cursor = await conn.execute("select who, role, action, result from platform.audit order by id")
            return await cursor.fetchall()


@pytest.fixture
def database(pg16: Cluster, make_database: MakeDatabase) -> str:
    return make_database(pg16)


@asynccontextmanager
async def api_before(database: str) -> AsyncIterator[Api]:
    await platform_database(database)
    async with (
        store_on(database) as store,
        api_on(store, config_for(database)) as running,
        aiohttp.ClientSession() as session,
    ):
        yield Api(running, database, session)


async def test_a_migration_is_submitted_found_and_listed_newest_first(database: str) -> None:
    async with api_before(database) as api:
        first, second = await add_tenant(database), await add_tenant(database)
        status, migration = await api.submit(
            first, reason="growth", priority=3, scheduledAt="2030-01-02T03:04:05+00:00"
        )
        assert status == 202
        assert (
            migration
            | {
                "tenantId": str(first),
                "sourceVertical": "core",
                "sourceTier": "schema",
                "targetVertical": "realestate",
                "targetTier": "database",
                "status": "queued",
                "phase": None,
                "priority": 3,
                "scheduledAt": "2030-01-02T03:04:05+00:00",
                "reason": "growth",
                "requestedBy": "the operator",
                "completedAt": None,
                "error": None,
            }
            == migration
        )
        _, newer = await api.submit(second)
        assert await api.ask("GET", f"{MIGRATIONS}/{migration['id']}") == (200, migration)
        _, listing = await api.ask("GET", MIGRATIONS)
        assert [item["id"] for item in listing["migrations"]] == [newer["id"], migration["id"]]
        _, listing = await api.ask("GET", f"{MIGRATIONS}?status=paused&limit=1")
        assert listing == {"migrations": []}


async def test_a_dry_run_answers_the_plan_and_changes_nothing(database: str) -> None:
    async with api_before(database) as api:
        status, plan = await api.submit(await add_tenant(database), dryRun=True)
        assert status == 200
        assert plan["source"] == {"vertical": "core", "tier": "schema", "schemas": ["core_dms"]}
        assert plan["estimates"]["rows"] == 12
        assert plan["facts"] == {"sourceVersion": 160004}
        assert plan["refusals"] == [
            {
                "code": "no_tenant_column",
                "message": "which and why",
                "hint": "what to do",
                "table": "core_dms.logs",
            }
        ]
        assert await api.running.store.list(None, 10) == ()


async def test_what_cannot_be_moved_is_refused_with_the_reason(database: str) -> None:
    async with api_before(database) as api:
        tenant = await add_tenant(database)
        status, answer = await api.submit(TenantId(uuid4()))
        assert (status, answer["error"]["code"]) == (404, "unknown_tenant")
        status, answer = await api.submit(tenant, targetVertical="aviation")
        assert status == 422
        assert "core, health, realestate" in answer["errors"][0]["message"]
        status, answer = await api.submit(tenant, targetVertical="core", targetTier="schema")
        assert (status, answer["errors"][0]["field"]) == (422, "targetVertical")
        assert "already lives in core (schema)" in answer["errors"][0]["message"]
        # core's own database is the shared one: the same schemas under another name of the tier.
        status, answer = await api.submit(tenant, targetVertical="core", targetTier="database")
        assert (status, answer["errors"][0]["field"]) == (422, "targetTier")
        status, answer = await api.submit(tenant, targetVertical="health")
        assert (status, answer["error"]["code"]) == (409, "refused")
        assert "verticals.health.database_url" in answer["error"]["hint"]
        assert await api.running.store.list(None, 10) == ()


async def test_a_second_live_migration_is_a_conflict(database: str) -> None:
    async with api_before(database) as api:
        tenant = await add_tenant(database)
        _, migration = await api.submit(tenant)
        status, answer = await api.submit(tenant)
        assert (status, answer["error"]["code"], answer["error"]["tenant"]) == (
            409,
            "conflict",
            str(tenant),
        )
        assert migration["id"] in answer["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"targetTier": "planted"}, "targetTier"),
        ({"tenantId": "planted"}, "tenantId"),
        ({"priority": "high"}, "priority"),
        ({"priority": True}, "priority"),
        ({"scheduledAt": "2030-01-02T03:04:05"}, "scheduledAt"),
        ({"autoApprove": False}, "autoApprove"),
        ({"colour": "planted"}, "colour"),
        ({"reason": "plan\0ted"}, "reason"),
    ],
)
async def test_a_wrong_field_is_named(fields: dict[str, Any], field: str, database: str) -> None:
    async with api_before(database) as api:
        status, answer = await api.submit(TenantId(uuid4()), **fields)
        assert status == 422
        assert [wrong["field"] for wrong in answer["errors"]] == [field]


async def test_a_body_that_is_no_json_too_large_or_no_object_is_refused(database: str) -> None:
    async with api_before(database) as api:
        status, answer = await api.ask("POST", MIGRATIONS, data=b'{"tenantId": planted')
        assert (status, answer["error"]["code"]) == (400, "malformed_json")
        status, answer = await api.ask("POST", MIGRATIONS, data=b"[]")
        assert (status, answer["errors"][0]["field"]) == (422, "body")
        status, answer = await api.ask("POST", MIGRATIONS, data=b" " * 100_000)
        assert (status, answer["error"]["code"]) == (413, "request_entity_too_large")
        status, answer = await api.ask("POST", MIGRATIONS, data=b"{}")
        assert {wrong["field"] for wrong in answer["errors"]} == {
            "tenantId",
            "targetVertical",
            "targetTier",
        }


async def test_wrong_queries_and_paths_are_refused(database: str) -> None:
    async with api_before(database) as api:
        for query, field in (
            ("status=planted", "status"),
            ("limit=0", "limit"),
            ("limit=x", "limit"),
            ("limit=" + "9" * 5000, "limit"),
        ):
            status, answer = await api.ask("GET", f"{MIGRATIONS}?{query}")
            assert (status, answer["errors"][0]["field"]) == (422, field)
        for name in (str(uuid4()), "not-a-uuid"):
            status, answer = await api.ask("GET", f"{MIGRATIONS}/{name}")
            assert (status, answer["error"]["code"]) == (404, "not_found")
        assert (await api.ask("GET", "/api/nothing"))[0] == 404
        status, answer = await api.ask("DELETE", MIGRATIONS)
        assert (status, answer["error"]["code"]) == (405, "method_not_allowed")


async def test_later_routes_say_so(database: str) -> None:
    async with api_before(database) as api:
        for method, path in (
            ("POST", f"{MIGRATIONS}/{uuid4()}/approve"),
            ("GET", f"{MIGRATIONS}/cost-estimate"),
            ("GET", "/api/openapi.json"),
        ):
            status, answer = await api.ask(method, path)
            assert (status, answer["error"]["code"]) == (501, "not_implemented")


def status_without_utf8(url: str) -> int:
    """With a token that is no UTF-8."""
    request = urllib.request.Request(url, headers={"Authorization": "Bearer planted-\xff"})
    with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(request):
        pass
    with refused.value as answer:
        return answer.code


async def test_a_role_may_do_what_it_may_and_the_audit_knows_who_asked(database: str) -> None:
    async with api_before(database) as api:
        _, migration = await api.submit(await add_tenant(database))
        one = f"{MIGRATIONS}/{migration['id']}"
        assert (await api.ask("GET", one, None))[0] == 401
        async with api.session.get(
            f"{api.running.url}{one}", headers={"Authorization": "Bearer planted-nobody"}
        ) as response:
            assert response.status == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert "planted" not in await response.text()
        assert await asyncio.to_thread(status_without_utf8, f"{api.running.url}{one}") == 401
        assert (await api.ask("GET", one, Role.VIEWER))[0] == 200
        assert (await api.ask("POST", f"{one}/pause", Role.VIEWER))[0] == 403
        assert await api.ask("POST", f"{one}/pause", Role.OPERATOR) == (200, {"success": True})
        status, answer = await api.ask("POST", f"{one}/pause", Role.OPERATOR)
        assert (status, "paused" in answer["error"]["message"]) == (409, True)
        assert (await api.ask("POST", f"{one}/approve", Role.OPERATOR))[0] == 403
        assert await api.ask("POST", f"{one}/resume", Role.ADMIN) == (200, {"success": True})
        assert await api.ask("POST", f"{one}/cancel", Role.ADMIN) == (200, {"success": True})
        assert await api.audit() == [
            ("the operator", "operator", "submit", "ok"),
            ("the viewer", "viewer", "pause", "forbidden"),
            ("the operator", "operator", "pause", "ok"),
            ("the operator", "operator", "pause", "conflict"),
            ("the operator", "operator", "approve", "forbidden"),
            ("the admin", "admin", "resume", "ok"),
            ("the admin", "admin", "cancel", "ok"),
        ]


async def test_progress_is_as_documented(database: str) -> None:
    async with api_before(database) as api:
        store = api.running.store
        tenant = await add_tenant(database)
        _, migration = await api.submit(tenant)
        claim = await store.claim("one", 30)
        assert claim is not None
        await store.enter_phase(claim, Phase.COPY)
        await store.begin_step(claim, "copy")
        await store.save_progress(
            claim, Progress(rows_done=50, rows_total=100, bytes_done=10, bytes_total=20, changes_applied=4)
        )
        status, progress = await api.ask("GET", f"{MIGRATIONS}/{migration['id']}/progress", Role.VIEWER)
        assert status == 200
        [step] = progress.pop("steps")
        assert (step["name"], step["status"], step["durationMs"]) == ("copy", "running", None)
        assert progress == {
            "id": migration["id"],
            "tenantId": str(tenant),
            "status": "in_progress",
            "phase": "copy",
            "percent": 37.5,
            "rows": {"done": 50, "total": 100},
            "bytes": {"done": 10, "total": 20},
            "changesApplied": 4,
            "lagBytes": None,
            "lagSeconds": None,
            "etaSeconds": None,
            "pauseMs": None,
            "waitingFor": None,
            "capture": None,
            "error": None,
        }


async def test_events_come_from_the_past_then_live_until_the_end(database: str) -> None:
    async with api_before(database) as api:
        store = api.running.store
        migration = await store.submit(to_estate(await add_tenant(database)), CORE)
        claim = await store.claim("one", 30)
        assert claim is not None
        await store.event(claim, "the past", rows_done=3)
        seen: list[dict[str, Any]] = []
        async with connect(api.running.url, TOKENS[Role.VIEWER]) as client:
            async for message in client.events(str(migration.id)):
                seen.append(message)
                if message.get("message") == "the past":
                    await store.event(claim, "live", "warning")
                if message.get("message") == "live":
                    await store.decide(claim, CORE, ESTATE, {})
                if message.get("status") == "monitoring":
                    await store.set_status(claim, Status.COMPLETED)
                    await store.event(claim, "done")
        events = [message for message in seen if message["type"] == "event"]
        assert [event["message"] for event in events] == [
            "requested by ops",
            "the past",
            "live",
            "done",
        ]
        assert events[1]["facts"] == {"rowsDone": 3}
        assert events[2]["level"] == "warning"
        progress = [message for message in seen if message["type"] == "progress"]
        assert (progress[-1]["status"], progress[-1]["percent"]) == ("completed", 100)


async def test_a_socket_needs_a_token_and_a_migration(database: str) -> None:
    async with api_before(database) as api:
        migration = await api.running.store.submit(to_estate(await add_tenant(database)), CORE)
        events = f"{api.running.url}{MIGRATIONS}/{migration.id}/events"
        for url in (events, f"{events}?token=planted-nobody"):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await api.session.ws_connect(url)
            assert refused.value.status == 401
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await api.session.ws_connect(
                f"{api.running.url}{MIGRATIONS}/{uuid4()}/events?token={TOKENS[Role.VIEWER]}"
            )
        assert refused.value.status == 404
        async with api.session.ws_connect(f"{events}?token={TOKENS[Role.VIEWER]}") as socket:
            # A progress message or the request's event, whichever; leaving early harms nobody.
            assert (await socket.receive_json())["type"] in ("event", "progress")
        # Other routes take no token from the query, where proxies would log it.
        status, _ = await api.ask("GET", f"{MIGRATIONS}?token={TOKENS[Role.VIEWER]}", None)
        assert status == 401


async def test_a_daemon_that_stops_sends_its_listeners_away(database: str) -> None:
    await platform_database(database)
    async with store_on(database) as store, aiohttp.ClientSession() as session:
        migration = await store.submit(to_estate(await add_tenant(database)), CORE)
        async with asyncio.timeout(5):
            async with api_on(store, config_for(database)) as running:
                socket = await session.ws_connect(
                    f"{running.url}{MIGRATIONS}/{migration.id}/events?token={TOKENS[Role.VIEWER]}"
                )
                await socket.receive_json()
                listener = asyncio.ensure_future(_close_code(socket))
            assert await listener == aiohttp.WSCloseCode.GOING_AWAY


async def _close_code(socket: aiohttp.ClientWebSocketResponse) -> int | None:
    async for _ in socket:
        pass
    return socket.close_code


async def test_health_readiness_and_metrics_need_no_token(database: str) -> None:
    async with api_before(database) as api:
        await api.submit(await add_tenant(database))
        assert await api.ask("GET", "/healthz", None) == (200, {"status": "ok"})
        assert await api.ask("GET", "/readyz", None) == (200, {"status": "ready"})
        async with api.session.get(f"{api.running.url}/metrics") as response:
            text = await response.text()
            assert response.content_type == "text/plain"
        assert 'mover_migrations{status="queued"} 1.0' in text
        async with await psycopg.AsyncConnection.connect(database) as conn:
            await conn.execute("delete from platform.schema_migrations")
        status, answer = await api.ask("GET", "/readyz", None)
        assert (status, answer["error"]["code"]) == (503, "refused")
        assert "mover init" in answer["error"]["hint"]


async def test_what_was_not_foreseen_is_an_internal_error_without_its_text(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with api_before(database) as api:
        _, migration = await api.submit(await add_tenant(database))
        async with await psycopg.AsyncConnection.connect(database) as conn:
            await conn.execute(
                "update platform.tenant_migrations set phase = 'copy',"
                """ progress = '{"rows_done": "planted", "rows_total": 1}'"""
            )
        with caplog.at_level(logging.CRITICAL):
            status, answer = await api.ask("GET", f"{MIGRATIONS}/{migration['id']}/progress")
        assert (status, answer["error"]["code"]) == (500, "internal")


async def test_the_client_says_what_the_daemon_said(database: str) -> None:
    async with api_before(database) as api, connect(api.running.url, TOKENS[Role.VIEWER]) as client:
        with pytest.raises(ApiError) as refused:
            await client.act(str(uuid4()), "pause")
        assert refused.value.status == 403
        with pytest.raises(ApiError) as refused:
            await client.list("planted", 50)
        assert refused.value.status == 422
        assert refused.value.reasons[0].startswith("status: ")
