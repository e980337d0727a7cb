"""`mover check`: every problem of the configuration's connections, all at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass

import redis.asyncio
import redis.exceptions

from mover.config import Config
from mover.core.errors import MoverError
from mover.core.secret import Secret
from mover.postgres.connect import Database
from mover.postgres.platform import check_platform, missing_route_columns

MIN_SERVER_VERSION = 150000  # publications with a row filter
REDIS_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `problem` says what is wrong with it and what to do."""

    subject: str
    detail: str = ""
    problem: str | None = None


async def check(config: Config) -> tuple[Finding, ...]:
    """Look at everything that the configuration names, side by side."""
    looks = [_guarded("platform", _platform(config)), _guarded("routing", _routes(config))]
    for name, url in _databases(config):
        looks.append(_guarded(name, _database(name, url)))
    if config.routing.redis_url is not None:
        looks.append(_redis(config.routing.redis_url))
    found = await asyncio.gather(*looks)
    absent = [
        Finding(f"verticals.{name}", "no database yet")
        for name, vertical in config.verticals.items()
        if vertical.database_url is None
    ]
    tokens = len(config.api.tokens)
    api = Finding(
        "api",
        f"{tokens} token(s)",
        None if tokens else "no token is configured: nobody can use the API; add one under [api] tokens",
    )
    return (api, *found, *absent)


def _databases(config: Config) -> Iterable[tuple[str, Secret]]:
    for name, vertical in config.verticals.items():
        if vertical.database_url is not None:
            yield f"verticals.{name}", vertical.database_url
    for tenant, url in config.dedicated.items():
        yield f"dedicated.{tenant}", url


async def _guarded(subject: str, look: Awaitable[Finding]) -> Finding:
    try:
        return await look
    except MoverError as error:
        return Finding(subject, problem=" ".join(filter(None, (f"{error.message}.", error.hint))))


async def _platform(config: Config) -> Finding:
    await check_platform(config.platform.database_url)
    return Finding("platform", "schema is up to date")


async def _routes(config: Config) -> Finding:
    table = config.routing.organizations_table
    missing = await missing_route_columns(config.platform.database_url, table)
    if missing is None:
        problem = f"there is no table {table}: set organizations_table, or `mover init --with-organizations`"
        return Finding("routing", problem=problem)
    if missing:
        return Finding("routing", problem=f"{table} lacks the columns {', '.join(missing)}")
    return Finding("routing", str(table))


async def _database(subject: str, url: Secret) -> Finding:
    async with Database(url, subject).connect("check") as conn:
        cursor = await conn.execute(
            "select current_setting('server_version_num')::int, current_setting('server_version'),"
            " current_setting('wal_level')"
        )
        row = await cursor.fetchone()
    assert row is not None  # a SELECT without FROM
    number, version, wal_level = row
    detail = f"PostgreSQL {version}, wal_level {wal_level}"
    if number < MIN_SERVER_VERSION:
        return Finding(subject, detail, f"PostgreSQL {version} is too old; 15 or later is needed")
    if wal_level != "logical":
        problem = f"wal_level is {wal_level}: set wal_level = logical and restart the server"
        return Finding(subject, detail, problem)
    return Finding(subject, detail)


async def _redis(url: Secret) -> Finding:
    client = redis.asyncio.Redis.from_url(
        url.reveal(), socket_timeout=REDIS_SECONDS, socket_connect_timeout=REDIS_SECONDS
    )
    try:
        await client.ping()
    except (redis.exceptions.RedisError, OSError) as error:
        # The library's messages may quote the URL's parts.
        return Finding("redis", problem=f"does not answer ({type(error).__name__}): check redis_url")
    finally:
        await client.aclose()
    return Finding("redis", "answers")
