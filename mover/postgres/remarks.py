"""Comments and privileges on a fresh target: as they are on the source now, whatever they were when its
schemas were cloned.

No row depends on them, so that one that cannot be carried over is said, and nothing more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from mover.core.ddl import rename_schemas
from mover.core.errors import LockNotAvailable
from mover.postgres import catalog, owner
from mover.postgres.connect import Database, Identity
from mover.postgres.identity import Say
from mover.postgres.locks import with_lock_timeout
from mover.sql import load

Connection = psycopg.AsyncConnection[Any]
_MAINTAIN_SINCE = 170000


@dataclass(frozen=True, slots=True)
class _Privilege:
    clause: str  # "SELECT ON TABLE realestate_crm.deals"
    grantee: str | None  # None: PUBLIC
    grantable: bool

    @property
    def words(self) -> dict[str, sql.Composable]:
        role = sql.SQL("PUBLIC") if self.grantee is None else sql.Identifier(self.grantee)
        return {"what": sql.SQL(self.clause), "role": role}


@dataclass(frozen=True, slots=True)
class _Remarks:
    """Under the target's names."""

    comments: Mapping[str, str | None]  # of every object, as COMMENT ON wants it
    privileges: Set[_Privilege]  # but for owners'
    owners: Set[str]


async def carry(
    source: Database, target: Database, identity: Identity, schemas: Mapping[str, str], say: Say
) -> None:
    """Both sides have the same objects. Repeatable."""
    async with source.borrow("remarks") as ours, target.borrow("remarks") as theirs:
        wanted = await _read(ours, schemas)
        there = await _read(theirs, {schema: schema for schema in schemas.values()})
        roles = {row["name"] for row in await catalog.rows(theirs, "roles")}
        kept = {row["grantee"] for row in await _rows(theirs, "given_by_default", {})}
        has_maintain = min(ours.info.server_version, theirs.info.server_version) >= _MAINTAIN_SINCE
        statements = [
            *_comments(wanted, there),
            *_grants(wanted, there, roles, kept, has_maintain=has_maintain),
        ]
        for statement in statements:
            await _run(theirs, identity, statement, say)


def _comments(wanted: _Remarks, there: _Remarks) -> Iterator[sql.Composed]:
    for named in sorted(wanted.comments.keys() & there.comments.keys()):
        if wanted.comments[named] != there.comments[named]:
            yield sql.SQL("COMMENT ON {} IS {}").format(sql.SQL(named), sql.Literal(wanted.comments[named]))


def _grants(
    wanted: _Remarks, there: _Remarks, roles: Collection[str], kept: Collection[str], *, has_maintain: bool
) -> Iterator[sql.Composed]:
    """What is taken away, then what is given. What owners have is their own, and what the target gives by
    default is the target's."""
    owners = wanted.owners | there.owners

    def concerns_us(privilege: _Privilege) -> bool:
        is_known = has_maintain or not privilege.clause.startswith("MAINTAIN ")
        return is_known and privilege.grantee not in owners

    def order(privilege: _Privilege) -> tuple[str, str]:
        return privilege.clause, privilege.grantee or ""

    for privilege in sorted(there.privileges - wanted.privileges, key=order):
        if concerns_us(privilege) and privilege.grantee not in kept:
            yield sql.SQL("REVOKE {what} FROM {role}").format(**privilege.words)
    for privilege in sorted(wanted.privileges - there.privileges, key=order):
        if concerns_us(privilege) and (privilege.grantee is None or privilege.grantee in roles):
            option = sql.SQL(" WITH GRANT OPTION" if privilege.grantable else "")
            yield sql.SQL("GRANT {what} TO {role}{option}").format(**privilege.words, option=option)


async def _run(conn: Connection, identity: Identity, statement: sql.Composed, say: Say) -> None:
    async def attempt() -> None:
        async with conn.transaction():
            await owner.hold(conn, identity)
            await conn.execute(statement)

    text = statement.as_string(conn)
    shown = text.partition(" IS ")[0] if text.startswith("COMMENT") else text
    try:
        await with_lock_timeout(conn, attempt)
    except (psycopg.errors.ProgrammingError, psycopg.errors.DependentObjectsStillExist, LockNotAvailable):
        await say(f"not carried over to the target: {shown}")
    else:
        await say(f"carried over from the source: {shown}")


async def _read(conn: Connection, schemas: Mapping[str, str]) -> _Remarks:
    objects = await _rows(conn, "objects", schemas)
    privileges = await _rows(conn, "privileges", schemas)
    return _Remarks(
        comments={rename_schemas(row["named"], schemas): row["comment"] for row in objects},
        privileges={
            _Privilege(rename_schemas(row["clause"], schemas), row["grantee"], row["grantable"])
            for row in privileges
        },
        owners={row["owner"] for row in objects},
    )


async def _rows(conn: Connection, query: str, schemas: Collection[str]) -> list[dict[str, Any]]:
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(load("remarks")[query], {"schemas": list(schemas)})
        return await cursor.fetchall()
