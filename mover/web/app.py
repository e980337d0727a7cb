"""The HTTP API: tells callers apart, translates between JSON and the desk, decides nothing."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from mover.config import Role, Token
from mover.core.errors import InvalidRequest, MoverError, Refused, Where
from mover.core.ids import TenantId, Tier
from mover.core.migration import MigrationRequest, Place, Wish
from mover.core.tables import Plan
from mover.log import logger
from mover.metrics import Metrics
from mover.ports import Desk
from mover.web.auth import Caller, Doorkeeper
from mover.web.bodies import MAX_BODY_BYTES, parse_listing, parse_submission
from mover.web.errors import (
    NotImplementedYet,
    error_object,
    error_response,
    internal_response,
    plain_response,
)
from mover.web.events import EventFeed
from mover.web.views import dumps, migration_view, plan_view, progress_view

MIGRATIONS = "/api/platform/migrations"
_log = logger(__name__)

Planner: TypeAlias = Callable[[MigrationRequest, Place, Place], Awaitable[Plan]]
PlaceOf: TypeAlias = Callable[[TenantId, str, Tier, str | None], Place]


@dataclass(slots=True)
class Call:
    """A request whose caller is known; subject and facts go into the audit."""

    request: web.Request
    caller: Caller
    subject: str | None = None
    facts: dict[str, object] = field(default_factory=dict)

    @property
    def migration_id(self) -> str:
        return self.request.match_info["id"]


Handler: TypeAlias = Callable[[Call], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    method: str
    path: str
    action: str  # as the audit names it
    role: Role
    handler: Handler
    query_token: bool = False  # browsers cannot set a header on a WebSocket


class Api:
    """The handlers; one per route of the documentation."""

    def __init__(
        self,
        desk: Desk,
        planner: Planner,
        place: PlaceOf,
        tokens: Sequence[Token],
        metrics: Metrics,
        feed: EventFeed,
    ) -> None:
        self._desk = desk
        self._planner = planner
        self._place = place
        self._doorkeeper = Doorkeeper(tokens)
        self._metrics = metrics
        self._feed = feed

    def routes(self) -> tuple[Route, ...]:
        viewer, operator, admin = Role
        one = f"{MIGRATIONS}/{{id}}"
        return (
            Route("POST", MIGRATIONS, "submit", operator, self.submit),
            Route("GET", MIGRATIONS, "list", viewer, self.list),
            Route("GET", f"{MIGRATIONS}/cost-estimate", "cost-estimate", viewer, self.not_yet),
            Route("GET", one, "get", viewer, self.get),
            Route("GET", f"{one}/progress", "progress", viewer, self.progress),
            Route("GET", f"{one}/events", "events", viewer, self.events, query_token=True),
            Route("POST", f"{one}/pause", "pause", operator, self.pause),
            Route("POST", f"{one}/resume", "resume", operator, self.resume),
            Route("POST", f"{one}/cancel", "cancel", operator, self.cancel),
            Route("POST", f"{one}/rollback", "rollback", operator, self.rollback),
            Route("POST", f"{one}/approve", "approve", admin, self.not_yet),
            Route("GET", "/api/openapi.json", "openapi", viewer, self.not_yet),
        )

    def guarded(self, route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """The route's handler behind its role; what may change something is audited, refused or not."""

        async def handle(request: web.Request) -> web.StreamResponse:
            query_token = request.query.get("token") if route.query_token else None
            caller = self._doorkeeper.caller(request.headers.get("Authorization"), query_token)
            call = Call(request, caller, subject=request.match_info.get("id"))
            if route.method != "GET":
                return await self._audited(route, call)
            caller.require(route.role)
            return await route.handler(call)

        return handle

    async def submit(self, call: Call) -> web.StreamResponse:
        submission = parse_submission(await call.request.read())
        request = submission.request(call.caller.name)
        call.subject = str(request.tenant)
        call.facts |= {"vertical": request.target_vertical, "tier": request.target_tier.value}
        source, target = await self._places(request)
        if submission.dry_run:
            call.facts["dry_run"] = True
            plan = await self._planner(request, source, target)
            return web.json_response(plan_view(request, source, target, plan), dumps=dumps)
        migration = await self._desk.submit(request, source)
        call.facts["migration"] = str(migration.id)
        return web.json_response(migration_view(migration), status=202)

    async def list(self, call: Call) -> web.StreamResponse:
        status, limit = parse_listing(call.request.query)
        found = await self._desk.list(status, limit)
        return web.json_response({"migrations": [migration_view(migration) for migration in found]})

    async def get(self, call: Call) -> web.StreamResponse:
        return web.json_response(migration_view(await self._desk.get(call.migration_id)))

    async def progress(self, call: Call) -> web.StreamResponse:
        migration, progress, steps = await self._desk.progress(call.migration_id)
        return web.json_response(progress_view(migration, progress, steps), dumps=dumps)

    async def events(self, call: Call) -> web.StreamResponse:
        return await self._feed.serve(call.request, call.migration_id)

    async def pause(self, call: Call) -> web.StreamResponse:
        await self._desk.wish(call.migration_id, Wish.PAUSE, call.caller.name)
        return _success()

    async def cancel(self, call: Call) -> web.StreamResponse:
        await self._desk.wish(call.migration_id, Wish.CANCEL, call.caller.name)
        return _success()

    async def rollback(self, call: Call) -> web.StreamResponse:
        await self._desk.wish(call.migration_id, Wish.ROLLBACK, call.caller.name)
        return _success()

    async def resume(self, call: Call) -> web.StreamResponse:
        await self._desk.resume(call.migration_id, call.caller.name)
        return _success()

    async def not_yet(self, call: Call) -> web.StreamResponse:
        raise NotImplementedYet("this is not available in this version")

    async def healthz(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def readyz(self, request: web.Request) -> web.Response:
        try:
            await self._desk.check_ready()
        except MoverError as error:
            return web.json_response({"error": error_object(error)}, status=503)
        return web.json_response({"status": "ready"})

    async def metrics(self, request: web.Request) -> web.Response:
        with suppress(MoverError):  # the other figures are worth having while the platform is down
            self._metrics.status_counts.set(await self._desk.counts())
        return web.Response(body=self._metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _audited(self, route: Route, call: Call) -> web.StreamResponse:
        caller = call.caller
        line = await self._desk.asked(caller.name, caller.role.value, route.action, call.subject)
        result = "internal"
        try:
            caller.require(route.role)
            response = await route.handler(call)
            result = "ok"
            return response
        except MoverError as error:
            result = error.code
            raise
        finally:
            await self._note_answer(line, result, call)

    async def _note_answer(self, line: int, result: str, call: Call) -> None:
        """What was done is done: a caller is not told otherwise because the note of it failed."""
        try:
            await self._desk.answered(line, result, call.subject, call.facts)
        except MoverError:
            _log.exception("the audit lacks a result", action="audit", line=line, result=result)

    async def _places(self, request: MigrationRequest) -> tuple[Place, Place]:
        """Where the tenant lives, and where it shall live; refuses what needs no look at the databases."""
        where = Where(tenant=request.tenant)
        vertical, tier, url = await self._desk.where_is(request.tenant)
        target = self._place(request.tenant, request.target_vertical, request.target_tier, None)
        try:
            source = self._place(request.tenant, vertical, tier, url)
        except InvalidRequest as error:
            raise Refused(
                "the tenant's route names a vertical that the configuration does not know",
                where=where,
                hint="Add it to the configuration, or correct the route.",
            ) from error
        if (source.vertical, source.tier) == (target.vertical, target.tier):
            raise InvalidRequest(f"the tenant already lives in {source}", where=where, field="targetVertical")
        if (source.url, source.schemas) == (target.url, target.schemas):
            raise InvalidRequest(
                f"{source} and {target} are the same schemas of the same database",
                where=where,
                field="targetTier",
            )
        return source, target


def make_app(
    desk: Desk,
    planner: Planner,
    place: PlaceOf,
    tokens: Sequence[Token],
    metrics: Metrics,
    *,
    poll_seconds: float = 0.25,
) -> web.Application:
    """The application; `place` is `Config.place`, `planner` answers a dry run."""
    feed = EventFeed(desk, poll_seconds)
    api = Api(desk, planner, place, tokens, metrics, feed)
    app = web.Application(middlewares=[_answer_errors], client_max_size=MAX_BODY_BYTES)
    for route in api.routes():
        app.router.add_route(route.method, route.path, api.guarded(route))
    app.router.add_get("/healthz", api.healthz)
    app.router.add_get("/readyz", api.readyz)
    app.router.add_get("/metrics", api.metrics)

    async def close_feed(_: web.Application) -> None:
        await feed.close()

    app.on_shutdown.append(close_feed)
    return app


@web.middleware
async def _answer_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every error in one shape, every request one line; a query may hold a token, so it stays out."""
    started = time.monotonic()
    response: web.StreamResponse
    try:
        response = await handler(request)
    except MoverError as error:
        response = error_response(error)
    except web.HTTPException as error:
        response = plain_response(error)
    except Exception:
        _log.exception("a request failed", action="request", path=request.path)
        response = internal_response()
    say = _log.debug if request.method == "GET" else _log.info  # those who watch ask often
    say(
        "request",
        action="request",
        method=request.method,
        path=request.path,
        status=response.status,
        duration_ms=round((time.monotonic() - started) * 1000, 1),
    )
    return response


def _success() -> web.Response:
    return web.json_response({"success": True})
