"""Clones the source's schemas into the target under their mapped names, in the halves that a load wants.

Nothing is stored between the halves: the DDL is read again from the source, and each statement is run
only where the catalog says that its object is not there yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psycopg
from psycopg import errors, sql
from psycopg.rows import dict_row

from mover.core import ddl
from mover.core.ddl import Created, Statement
from mover.core.errors import DanglingReferences, LockNotAvailable, Refused, Where, first_error
from mover.core.ids import MigrationId, TableRef, TenantId
from mover.core.tables import Holding
from mover.postgres import catalog, owner, pg_dump
from mover.postgres.connect import Database
from mover.postgres.holdings import is_tenants, named
from mover.postgres.locks import with_lock_timeout
from mover.sql import load

Connection = psycopg.AsyncConnection[Any]

# What pg_dump sets for a restore, as far as every supported version knows it.
_SETTINGS: Mapping[str, str] = {
    "check_function_bodies": "off",
    "xmloption": "content",
    "client_min_messages": "warning",
    "standard_conforming_strings": "on",
}
_INDEX_SETTINGS: Mapping[str, str] = {
    **_SETTINGS,
    "maintenance_work_mem": "256MB",
    "max_parallel_maintenance_workers": "2",
}
_DEADLOCK_TRIES = 10


@dataclass(frozen=True, slots=True)
class ClonedDdl:
    """The source's DDL under the target's names, in pg_dump's order."""

    comments: Mapping[str, str | None]  # the target's schemas, with the comments that they shall have
    pre: tuple[Statement, ...]  # schemas, types, functions, tables, sequences, defaults, views
    # What tells rows apart, by the target's table; that of partitions stands with their root's.
    keys: Mapping[TableRef, tuple[Statement, ...]]
    post: tuple[Statement, ...]  # everything else


async def read_ddl(
    source: Database,
    target: Database,
    schemas: Mapping[str, str],
    *,
    bin_dirs: Sequence[Path] = (),
) -> ClonedDdl:
    """The DDL of the source's schemas for this target, without ours and without what it cannot hold."""
    async with source.borrow("dump") as ours, target.borrow("dump") as theirs:
        major = max(ours.info.server_version, theirs.info.server_version) // 10000
        roles = {row["name"]: row["member"] for row in await catalog.rows(theirs, "roles")}
        comments = await catalog.existing_schemas(ours, schemas)
        key_names = {
            Created(kind, TableRef(schemas[relation.ref.schema], relation.ref.name), relation.key_index.name)
            for relation in await catalog.read_relations(ours, schemas)
            if relation.key_index is not None
            for kind in ("index", "constraint")
        }
    program = await pg_dump.find(major, bin_dirs)
    names = sorted(schemas)
    pre, post = [
        _for_target(await pg_dump.run(program, source, names, section), schemas, roles)
        for section in ("pre-data", "post-data")
    ]
    keys, rest = _parted(post, key_names, _parents(pre))
    named = {schemas[schema]: comment for schema, comment in comments.items()}
    return ClonedDdl(named, tuple(pre), keys, rest)


def _parents(pre: Sequence[Statement]) -> Mapping[TableRef, TableRef]:
    """Each partition's table."""
    return dict(filter(None, (ddl.attached(s.sql) for s in pre if s.type == "TABLE ATTACH")))


def _parted(
    post: Sequence[Statement], key_names: Collection[Created], parents: Mapping[TableRef, TableRef]
) -> tuple[Mapping[TableRef, tuple[Statement, ...]], tuple[Statement, ...]]:
    """The keys by table, those of partitions behind their root's, as pg_dump has them; and the rest."""
    keys: dict[TableRef, tuple[Statement, ...]] = {}
    rest = []
    for statement in post:
        made = ddl.created(statement.sql)
        if made is not None and made in key_names:
            table = made.on
            while table in parents:
                table = parents[table]
            keys[table] = (*keys.get(table, ()), statement)
        else:
            rest.append(statement)
    return keys, tuple(rest)


def _for_target(dump: str, schemas: Mapping[str, str], roles: Mapping[str, bool]) -> list[Statement]:
    return [
        replace(statement, sql=_repeatable(ddl.rename_schemas(text, schemas)))
        for statement in ddl.split(dump)
        if (text := ddl.without_internal_options(statement.sql))
        and not ddl.is_ours(text)
        and _fits(statement, roles)
    ]


def _fits(statement: Statement, roles: Mapping[str, bool]) -> bool:
    """Session settings are ours to choose; a privilege needs its roles (known -> whether we may act for
    it); a schema's comment carries our mark."""
    words = [t.word for t in ddl.significant(statement.sql)[:3]]
    if words[0] in ("set", "reset") or (words[0] == "select" and "set_config" in statement.sql):
        return False
    if words == ["comment", "on", "schema"]:
        return False
    if statement.type == "DEFAULT ACL" and not roles.get(ddl.default_privileges_of(statement.sql) or ""):
        return False
    if statement.type in ("ACL", "DEFAULT ACL"):
        return ddl.roles(statement.sql) <= roles.keys()
    return True


def _repeatable(statement: str) -> str:
    """Functions are replaced; for other objects the catalog is asked first."""
    for kind in ("FUNCTION", "PROCEDURE"):
        if statement.startswith(f"CREATE {kind} "):
            return statement.replace(f"CREATE {kind} ", f"CREATE OR REPLACE {kind} ", 1)
    return statement


async def apply_pre(target: Database, cloned: ClonedDdl, migration: MigrationId) -> None:
    """Everything but keys, indexes and what follows, in one transaction; marked as made by `migration`.

    Raises Refused when a schema is there that this migration did not make."""
    async with target.borrow("clone", **_SETTINGS) as conn, conn.transaction():
        await _hold(conn, target)
        there = await catalog.existing_schemas(conn, cloned.comments)
        if there.keys() == cloned.comments.keys() and all(_made_by(c, migration) for c in there.values()):
            return
        if there:
            raise Refused(
                f"schema {', '.join(sorted(there))} is already on {target.label}",
                hint="Drop it when it is a leftover, or let preflight compare it.",
            )
        for statement in cloned.pre:
            await conn.execute(sql.SQL(statement.sql))
        for schema, comment in cloned.comments.items():
            await _comment(conn, schema, f"{catalog.CLONE_MARK}{migration}\n{comment or ''}")


async def build_keys(target: Database, cloned: ClonedDdl, tables: Collection[TableRef]) -> None:
    """The keys of these tables of the target."""
    statements = [s for table in tables for s in cloned.keys.get(table, ())]
    async with target.borrow("keys", **_INDEX_SETTINGS) as conn:
        there = await _existing(conn, cloned.comments)
        for statement in statements:
            if ddl.created(statement.sql) not in there:
                await _run_held(conn, target, statement)


async def build_rest(target: Database, cloned: ClonedDdl, *, workers: int) -> None:
    """Indexes, then foreign keys, both in parallel; then the rest in order; then statistics."""
    await build_keys(target, cloned, list(cloned.keys))
    async with target.borrow("index") as conn:
        there = await _existing(conn, cloned.comments)
    stages = _stages(cloned)
    for statements, at_once in (
        (stages.frames, 1),
        (stages.indexes, workers),
        (stages.attachments, 1),
        (stages.foreign_keys, workers),
    ):
        missing = [s for s in statements if ddl.created(s.sql) not in there]
        await _in_parallel(target, missing, at_once)
    async with target.borrow("index", **_INDEX_SETTINGS) as conn:
        for statement in stages.rest:
            if ddl.created(statement.sql) not in there:
                await _run_held(conn, target, statement)
        for table in sorted(cloned.keys):
            await conn.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(table.schema, table.name)))


@dataclass(slots=True)
class _Stages:
    frames: list[Statement] = field(default_factory=list)  # of partitioned tables: without rows of their own
    indexes: list[Statement] = field(default_factory=list)
    # Repeatable. With the last of its partitions' an index of a partitioned table is valid.
    attachments: list[Statement] = field(default_factory=list)
    foreign_keys: list[Statement] = field(default_factory=list)
    rest: list[Statement] = field(default_factory=list)


def _stages(cloned: ClonedDdl) -> _Stages:
    """An index of a view that is itself built here stays behind it."""
    made_here = [ddl.created(s.sql) for s in cloned.post]
    late = {made.on for made in made_here if made is not None and made.kind == "view"}
    partitioned = set(_parents(cloned.pre).values())
    stages = _Stages()
    for statement, made in zip(cloned.post, made_here, strict=True):
        if statement.type == "FK CONSTRAINT" and made is not None:
            stages.foreign_keys.append(statement)
        elif statement.type == "INDEX ATTACH":
            stages.attachments.append(statement)
        elif made is not None and _is_index(made, statement) and made.on not in late:
            (stages.frames if made.on in partitioned else stages.indexes).append(statement)
        else:
            stages.rest.append(statement)
    return stages


def _is_index(made: Created, statement: Statement) -> bool:
    """Also a unique or exclusion constraint."""
    return made.kind == "index" or (made.kind == "constraint" and statement.type == "CONSTRAINT")


async def _in_parallel(target: Database, statements: Sequence[Statement], workers: int) -> None:
    """Each statement in a transaction of its own, on up to `workers` connections."""
    waiting = list(reversed(statements))

    async def work() -> None:
        async with target.connect("index", **_INDEX_SETTINGS) as conn:
            while waiting:
                await _run_held(conn, target, waiting.pop())

    with first_error():
        async with asyncio.TaskGroup() as group:
            for number in range(min(workers, len(statements))):
                group.create_task(work(), name=f"index-{number}")


async def _run_held(conn: Connection, target: Database, statement: Statement) -> None:
    """One statement under the owner's epoch; two foreign keys on one table may deadlock, and are retried."""
    for _ in range(_DEADLOCK_TRIES):
        try:
            async with conn.transaction():
                await _hold(conn, target)
                await conn.execute(sql.SQL(statement.sql))
                return
        except errors.DeadlockDetected:
            continue
        except errors.ForeignKeyViolation as error:
            made = ddl.created(statement.sql)
            raise DanglingReferences(
                f"{target.label}: rows refer to rows that are not there, by {statement.name}",
                where=Where(table=made.on if made else None),
                hint="Correct these references on the source, and resume.",
            ) from error
    raise LockNotAvailable(f"{target.label}: {statement.type.lower()} {statement.name} met deadlocks")


async def _hold(conn: Connection, target: Database) -> None:
    if target.identity is not None:
        await owner.hold(conn, target.identity)


async def _existing(conn: Connection, schemas: Collection[str]) -> set[Created]:
    """The named objects of the schemas that a statement could be about to make."""
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(load("clone")["existing"], {"schemas": list(schemas)})
        return {
            Created(row["kind"], TableRef(row["schema"], row["table_name"]), row["name"])
            async for row in cursor
        }


def _made_by(comment: str | None, migration: MigrationId) -> bool:
    return catalog.migration_that_made(comment) == str(migration)


async def _comment(conn: Connection, schema: str, text: str) -> None:
    await conn.execute(
        sql.SQL("COMMENT ON SCHEMA {} IS {}").format(sql.Identifier(schema), sql.Literal(text or None))
    )


async def drop_clone(
    target: Database,
    schemas: Collection[str],
    migration: MigrationId,
    held: Sequence[Holding],
    tenant: TenantId,
) -> bool:
    """Drop the target's `schemas` if this migration made all of them and nobody else has rows there; `held`
    are the tables that may have the tenant's.

    Says whether they are gone. If not, they are no longer marked as ours, and the tenant's rows are left
    to be deleted one by one."""
    async with target.borrow("clone", client_min_messages="warning") as conn:

        async def attempt() -> bool:
            async with conn.transaction():
                await _hold(conn, target)
                there = await catalog.existing_schemas(conn, schemas)
                mine = {name: c for name, c in there.items() if c is not None and _made_by(c, migration)}
                if mine.keys() != there.keys() or await _others_have_rows(conn, mine, held, tenant):
                    await _unmark(conn, mine)
                    return False
                for schema in mine:
                    await conn.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))
                return True

        return await with_lock_timeout(conn, attempt)


async def _others_have_rows(
    conn: Connection, schemas: Collection[str], held: Sequence[Holding], tenant: TenantId
) -> bool:
    """Whether a table of the schemas holds anything but the tenant's rows. Nobody can add one afterwards:
    the tables stay locked until the transaction ends."""
    holdings = {holding.table: holding for holding in held}
    relations = await catalog.read_relations(conn, schemas)
    tables = [r.ref for r in relations if r.kind in ("r", "p") and r.root is None]
    for table in tables:
        await conn.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(named(table)))
    for table in tables:
        ours = is_tenants(holdings[table], "t", tenant) if table in holdings else sql.SQL("false")
        query = sql.SQL("SELECT 1 FROM {} AS t WHERE ({}) IS NOT TRUE LIMIT 1").format(named(table), ours)
        if await (await conn.execute(query)).fetchone() is not None:
            return True
    return False


async def keep_clone(target: Database, schemas: Collection[str], migration: MigrationId) -> None:
    """Give the schemas their own comments back: they are no longer ours to drop."""
    async with target.borrow("clone") as conn, conn.transaction():
        await _hold(conn, target)
        there = await catalog.existing_schemas(conn, schemas)
        await _unmark(
            conn, {name: c for name, c in there.items() if c is not None and _made_by(c, migration)}
        )


async def _unmark(conn: Connection, made: Mapping[str, str]) -> None:
    for schema, comment in made.items():
        await _comment(conn, schema, comment.partition("\n")[2])
