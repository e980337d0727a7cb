"""Reads one side's catalogs into facts. Changes nothing, judges nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import psycopg
from psycopg.rows import dict_row

from mover.core.ddl import mentions_in_literals
from mover.core.errors import Refused
from mover.core.facts import (
    ColumnFacts,
    ForeignKey,
    IndexFacts,
    LongTransaction,
    PublicationFacts,
    Relation,
    SequenceFacts,
    ServerFacts,
    SideFacts,
    SubscriptionFacts,
    TriggerFacts,
)
from mover.core.ids import TableRef
from mover.sql import load

Connection = psycopg.AsyncConnection[Any]
Row = dict[str, Any]

OLDEST_SERVER = 150000  # row filters in publications, GRANT SET ON PARAMETER
LONG_TRANSACTION_S = 60
CLONE_MARK = "made by mover, migration "  # the first line of a cloned schema's comment, until it is kept


async def rows(conn: Connection, query: str, **parameters: Any) -> list[Row]:
    """The answer of a named query of `catalog.sql`."""
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(load("catalog")[query], parameters)
        return await cursor.fetchall()


async def read_server(conn: Connection, label: str) -> ServerFacts:
    """Raises Refused when the server is too old to be read at all."""
    version = conn.info.server_version
    if version < OLDEST_SERVER:
        raise Refused(
            f"{label}: PostgreSQL {version // 10000} is not supported",
            hint=f"Upgrade the server to PostgreSQL {OLDEST_SERVER // 10000} or newer.",
        )
    (row,) = await rows(conn, "server")
    # A pooler makes up the process id that it gives to a client.
    pooled = row.pop("backend_pid") != conn.info.backend_pid
    long_ones = await rows(conn, "long_transactions", age_seconds=LONG_TRANSACTION_S)
    return ServerFacts(
        **row,
        pooled=pooled,
        extensions={e["name"]: e["version"] for e in await rows(conn, "extensions")},
        roles=frozenset(r["name"] for r in await rows(conn, "roles")),
        long_transactions=tuple(LongTransaction(**t) for t in long_ones),
        strangers=await strangers(conn),
    )


async def strangers(conn: Connection) -> tuple[str, ...]:
    """Ordinary roles other than ours that own our schema, or something in it."""
    return tuple(row["name"] for row in await rows(conn, "strangers"))


async def existing_schemas(conn: Connection, schemas: Collection[str]) -> dict[str, str | None]:
    """Those of `schemas` that exist, with their comments."""
    found = await rows(conn, "schemas", schemas=list(schemas))
    return {row["name"]: row["comment"] for row in found}


def migration_that_made(comment: str | None) -> str | None:
    """The id of the migration that cloned a schema with this comment and may still drop it."""
    first = (comment or "").split("\n")[0]
    return first.removeprefix(CLONE_MARK) if first.startswith(CLONE_MARK) else None


async def read_side(conn: Connection, schemas: Collection[str], label: str) -> SideFacts:
    """Everything about `schemas` on one side."""
    names = {"schemas": list(schemas)}
    comments = await existing_schemas(conn, schemas)
    extensions = await rows(conn, "extensions_used", **names)
    roles = await rows(conn, "granted_roles", **names)
    return SideFacts(
        server=await read_server(conn, label),
        schemas=frozenset(comments),
        closed_schemas=frozenset(row["name"] for row in await rows(conn, "closed_schemas", **names)),
        unfinished_clones=frozenset(filter(None, map(migration_that_made, comments.values()))),
        relations=await read_relations(conn, schemas),
        foreign_keys=await read_foreign_keys(conn, schemas),
        sequences=tuple(_sequence(row) for row in await rows(conn, "sequences", **names)),
        publications=tuple(_publication(row) for row in await rows(conn, "publications", **names)),
        subscriptions=tuple(
            SubscriptionFacts(row["name"], TableRef(row["schema"], row["table_name"]))
            for row in await rows(conn, "subscriptions", **names)
        ),
        extensions_needed=frozenset(row["name"] for row in extensions),
        extensions_inside=frozenset(row["name"] for row in extensions if row["inside"]),
        granted_roles=frozenset(row["name"] for row in roles if not row["policy"]),
        policy_roles=frozenset(row["name"] for row in roles if row["policy"]),
        functions_with_literals=await _functions_with_literals(conn, schemas),
    )


async def read_relations(conn: Connection, schemas: Collection[str]) -> tuple[Relation, ...]:
    found = await rows(conn, "relations", schemas=list(schemas))
    oids = [row["oid"] for row in found]
    columns = _by_relation(await rows(conn, "columns", relations=oids))
    indexes = _by_relation(await rows(conn, "unique_indexes", relations=oids))
    triggers = _by_relation(await rows(conn, "triggers", relations=oids))
    rules = _by_relation(await rows(conn, "rules", relations=oids))
    return tuple(
        Relation(
            ref=TableRef(row["schema"], row["name"]),
            kind=row["kind"],
            persistence=row["persistence"],
            inherits=row["inherits"],
            row_security=row["row_security"],
            row_security_forced=row["row_security_forced"],
            owner=row["owner"],
            owned=row["owned"],
            privileges=frozenset(row["privileges"]),
            replica_identity=row["replica_identity"],
            columns=tuple(_column(c) for c in columns[row["oid"]]),
            indexes=tuple(_index(i) for i in indexes[row["oid"]]),
            triggers=tuple(_trigger(t) for t in triggers[row["oid"]]),
            rules=tuple(_trigger(r) for r in rules[row["oid"]]),
            root=TableRef(*row["root"]) if row["root"] else None,
            partitions=tuple(TableRef(*name) for name in row["partitions"] or ()),
        )
        for row in found
    )


async def read_foreign_keys(conn: Connection, schemas: Collection[str]) -> tuple[ForeignKey, ...]:
    return tuple(_foreign_key(row) for row in await rows(conn, "foreign_keys", schemas=list(schemas)))


async def read_relation(conn: Connection, table: TableRef) -> Relation | None:
    """One table, or None when it is not there."""
    return next((r for r in await read_relations(conn, [table.schema]) if r.ref == table), None)


async def existing_tables(conn: Connection, tables: Sequence[TableRef]) -> Mapping[TableRef, frozenset[str]]:
    """Those of `tables` that are there, each with what our role may do: SELECT, REFERENCES."""
    found = await rows(
        conn, "existing_tables", schemas=[t.schema for t in tables], names=[t.name for t in tables]
    )
    return {TableRef(row["schema"], row["name"]): frozenset(row["privileges"]) for row in found}


def _by_relation(found: Sequence[Row]) -> Mapping[int, list[Row]]:
    grouped: dict[int, list[Row]] = defaultdict(list)
    for row in found:
        grouped[row["relation"]].append(row)
    return grouped


def _column(row: Row) -> ColumnFacts:
    return ColumnFacts(**{name: value for name, value in row.items() if name != "relation"})


def _trigger(row: Row) -> TriggerFacts:
    return TriggerFacts(row["name"], row["on_delete"], row["enabled"])


def _index(row: Row) -> IndexFacts:
    return IndexFacts(
        name=row["name"],
        columns=tuple(row["columns"]),
        primary=row["primary"],
        partial=row["partial"],
        immediate=row["immediate"],
        replica_identity=row["replica_identity"],
        nulls_equal=row["nulls_equal"],
        expressions=tuple(row["expressions"]),
        predicate=row["predicate"],
    )


def _foreign_key(row: Row) -> ForeignKey:
    return ForeignKey(
        name=row["name"],
        child=TableRef(row["child_schema"], row["child_name"]),
        parent=TableRef(row["parent_schema"], row["parent_name"]),
        child_columns=tuple(row["child_columns"]),
        parent_columns=tuple(row["parent_columns"]),
        validated=row["validated"],
        indexed=row["indexed"],
        on_delete=row["on_delete"],
        on_update=row["on_update"],
    )


def _sequence(row: Row) -> SequenceFacts:
    owner = TableRef(row["owner_schema"], row["owner_name"]) if row["owner_name"] is not None else None
    return SequenceFacts(TableRef(row["schema"], row["name"]), owner, row["increment"])


def _publication(row: Row) -> PublicationFacts:
    return PublicationFacts(
        name=row["name"],
        table=TableRef(row["schema"], row["table_name"]),
        columns=tuple(row["columns"]) if row["columns"] is not None else None,
        filter_columns=tuple(row["filter_columns"]),
        updates_or_deletes=row["updates_or_deletes"],
    )


async def _functions_with_literals(conn: Connection, schemas: Collection[str]) -> tuple[str, ...]:
    unmapped = {schema: schema for schema in schemas}
    bodies = await rows(conn, "function_bodies", schemas=list(schemas))
    return tuple(row["name"] for row in bodies if mentions_in_literals(row["body"], unmapped))
