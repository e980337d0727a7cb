"""The independent checks after a migration: plain SQL only, sharing no code with the mover.

Rows are compared as text, column by column by name, so that a type that lives in another schema on
the other side compares equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import psycopg
from psycopg import sql

Table = tuple[str, str]  # schema, name
TEXT_OPTIONS = (
    "-c timezone=UTC -c datestyle=ISO -c intervalstyle=postgres -c bytea_output=hex"
    " -c extra_float_digits=1 -c row_security=off"
)


@dataclass(frozen=True)
class Multiset:
    """Rows irrespective of their order; `digest` covers `columns` in this order."""

    count: int
    digest: str
    columns: tuple[str, ...]


def connect(url: str) -> psycopg.Connection:
    # Not prepared: tables change between two looks.
    return psycopg.connect(
        url, autocommit=True, options=TEXT_OPTIONS, application_name="checks", prepare_threshold=None
    )


def tenant_tables(url: str, schemas: Iterable[str], tenant_column: str = "tenant_id") -> list[Table]:
    """The ordinary and partitioned tables that have the tenant column."""
    with connect(url) as conn:
        return tenant_tables_on(conn, schemas, tenant_column)


def tenant_tables_on(conn: psycopg.Connection, schemas: Iterable[str], tenant_column: str) -> list[Table]:
    return conn.execute(
        """
        select n.nspname, c.relname
          from pg_class c
          join pg_namespace n on n.oid = c.relnamespace
          join pg_attribute a on a.attrelid = c.oid and a.attname = %s and not a.attisdropped
         where n.nspname = any(%s) and c.relkind in ('r', 'p') and not c.relispartition
         order by 1, 2
        """,
        (tenant_column, list(schemas)),
    ).fetchall()


def mapped(tables: Iterable[Table], schemas: Mapping[str, str]) -> dict[Table, Table]:
    """Each table of the source with its counterpart."""
    return {(schema, name): (schemas[schema], name) for schema, name in tables}


def tenant_multiset(
    url: str, schema: str, table: str, tenant: UUID | str, tenant_column: str = "tenant_id"
) -> Multiset:
    """The tenant's rows of one table."""
    return tenant_fingerprints(url, [(schema, table)], tenant, tenant_column)[schema, table]


def tenant_fingerprints(
    url: str, tables: Iterable[Table], tenant: UUID | str, tenant_column: str = "tenant_id"
) -> dict[Table, Multiset]:
    condition = sql.SQL("{} = %s").format(sql.Identifier(tenant_column))
    with connect(url) as conn:
        return {table: multiset(conn, table, condition, [str(tenant)]) for table in tables}


def assert_tenant_equal(
    source_url: str, target_url: str, tables: Mapping[Table, Table], tenant: UUID | str
) -> int:
    """Every table holds the same multiset of the tenant's rows on both sides; says how many rows."""
    on_source = tenant_fingerprints(source_url, tables, tenant)
    on_target = tenant_fingerprints(target_url, tables.values(), tenant)
    for ours, theirs in tables.items():
        source, target = on_source[ours], on_target[theirs]
        assert source == target, f"{ours} differs from {theirs}: {source} against {target}"
    return sum(rows.count for rows in on_source.values())


def other_tenants_fingerprint(
    url: str, tables: Iterable[Table], *tenants: UUID | str, tenant_column: str = "tenant_id"
) -> dict[Table, Multiset]:
    """All rows but those tenants'; equal before and after when nobody else was touched."""
    others = sql.SQL("({} = any(%s)) is not true").format(sql.Identifier(tenant_column))
    parameters = [[UUID(str(tenant)) for tenant in tenants]]
    with connect(url) as conn:
        return {table: multiset(conn, table, others, parameters) for table in tables}


def multiset(
    conn: psycopg.Connection,
    table: Table,
    condition: sql.Composable,
    parameters: Sequence[object] | Mapping[str, object],
) -> Multiset:
    """The rows of one table for which `condition` holds."""
    names = conn.execute(
        """
        select a.attname
          from pg_attribute a join pg_class c on c.oid = a.attrelid
          join pg_namespace n on n.oid = c.relnamespace
         where n.nspname = %s and c.relname = %s and a.attnum > 0 and not a.attisdropped
         order by a.attname collate "C"
        """,
        table,
    ).fetchall()
    columns = tuple(name for (name,) in names)
    assert columns, f"table {table} is not there"
    query = sql.SQL(
        """
        select count(*), md5(coalesce(string_agg(row_digest, '' order by row_digest), ''))
          from (select md5(row({values})::text) collate "C" as row_digest from {table} where {condition}) t
        """
    ).format(
        values=sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(c)) for c in columns),
        table=sql.Identifier(*table),
        condition=condition,
    )
    count, digest = conn.execute(query, parameters).fetchone()
    return Multiset(count, digest, columns)


# Each query answers (kind, name) of what must not be there any more.
LEFTOVERS: Mapping[str, str] = {
    "slot": "select slot_name from pg_replication_slots where database = current_database()",
    "publication": "select pubname from pg_publication",
    "subscription": """
        select subname from pg_subscription
         where subdbid = (select oid from pg_database where datname = current_database())""",
    "origin": "select roname from pg_replication_origin where roname like 'mover%'",
    "trigger": """
        select format('%I.%I.%I', n.nspname, c.relname, t.tgname)
          from pg_trigger t join pg_class c on c.oid = t.tgrelid
          join pg_namespace n on n.oid = c.relnamespace
          join pg_proc p on p.oid = t.tgfoid join pg_namespace pn on pn.oid = p.pronamespace
         where not t.tgisinternal and (t.tgname like 'mover%' or pn.nspname like 'mover%')""",
    "event trigger": "select evtname from pg_event_trigger where evtname like 'mover%'",
    "function": """
        select format('%I.%I', n.nspname, p.proname)
          from pg_proc p join pg_namespace n on n.oid = p.pronamespace
         where n.nspname like 'mover%' or p.proname like 'mover%'""",
    "relation": """
        select format('%I.%I', n.nspname, c.relname)
          from pg_class c join pg_namespace n on n.oid = c.relnamespace
         where (n.nspname like 'mover%' or c.relname like 'mover%') and n.nspname !~ '^pg_(toast|temp)'""",
    "invalid index": "select indexrelid::regclass::text from pg_index where not indisvalid",
    "schema": "select nspname from pg_namespace where nspname like 'mover%'",
    "constraint": "select conname from pg_constraint where conname like 'mover%'",
    "advisory lock": """
        select format('%s/%s/%s %s by %s', classid, objid, objsubid, mode, pid) from pg_locks
         where locktype = 'advisory'
           and database = (select oid from pg_database where datname = current_database())""",
    "prepared transaction": "select gid from pg_prepared_xacts where database = current_database()",
    "backend": """
        select application_name from pg_stat_activity
         where datname = current_database() and application_name like 'mover/%'""",
    "replica identity": """
        select format('%I.%I (%s)', n.nspname, c.relname, c.relreplident)
          from pg_class c join pg_namespace n on n.oid = c.relnamespace
         where c.relkind in ('r', 'p') and c.relreplident <> 'd'
           and n.nspname not in ('pg_catalog', 'information_schema')""",
}
# What stays on the side that a tenant left: the schema `mover`, what is in it, and the guards.
TOMBSTONE_KINDS = frozenset({"trigger", "function", "relation", "schema", "constraint"})


def leftovers(url: str, *, tombstone: bool = False) -> list[str]:
    """Every object of the mover's in this database, as "kind: name".

    With `tombstone`, guards and what is in the schema `mover` may be there."""
    with connect(url) as conn:
        return leftovers_on(conn, tombstone=tombstone)


def leftovers_on(conn: psycopg.Connection, *, tombstone: bool = False) -> list[str]:
    found = []
    for kind, query in LEFTOVERS.items():
        for (name,) in conn.execute(query):
            if not (tombstone and kind in TOMBSTONE_KINDS and _belongs_to_tombstone(kind, name)):
                found.append(f"{kind}: {name}")
    return found


def _belongs_to_tombstone(kind: str, name: str) -> bool:
    return kind in ("trigger", "constraint") or name == "mover" or name.startswith("mover.")
