"""Fills the demo's platform: server-side, deterministic, the tenants' rows interleaved on disk as in a
database that has grown. The same seed makes the same rows (but for times of creation).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import LiteralString
from uuid import UUID

from psycopg import sql

from mover.core.ids import TenantId
from mover.demo.schema import (
    Connection,
    create_app_role,
    create_services,
    create_shared,
    identifiers,
    schemas,
)
from mover.sql import load

TENANTS = 25
LARGE_ROWS = 320_000  # of the large tenant, over all tables
NAMES = (
    "Nordlicht Immobilien, Alpenblick Hausverwaltung, Atelier Brandt, Bäckerei Lindner, Beltz & Partner, "
    "Café Morgenrot, Dachwerk Süd, Elbe Logistik, Fjord Energie, Gartenbau Hollmann, Hafenkontor, "
    "Isar Treuhand, Jolie Mode, Kanzlei Reuter, Lahn Optik, Maison Dupont, Neckar Medien, Ostsee Charter, "
    "Praxis Dr. Weiß, Quellhof, Rhein Apotheken, Seeblick Hotels, Tischlerei Vogt, Uferpark, Weingut Stein"
).split(", ")


@dataclass(frozen=True, slots=True)
class Tenant:
    id: TenantId
    ordinal: int  # below 32: part of the generated keys
    name: str
    rows: int


# How a tenant's rows are spread over the tables.
SHARES = {
    "folders": 0.01,
    "documents": 0.08,
    "document_versions": 0.12,
    "tags": 0.002,
    "document_tags": 0.14,
    "companies": 0.03,
    "contacts": 0.15,
    "deals": 0.14,
    "invoices": 0.05,
    "invoice_lines": 0.10,
    "activities": 0.178,
}
LEAST = 5  # rows of a table, however small the tenant

# k(…) makes a row's number n, which counts from 1 per tenant and table, a key that is unique over the
# tenants; pick(…) chooses one of a parent table's rows; the rest are reproducible values.
HELPERS: LiteralString = """
create function pg_temp.h(kind text, n bigint) returns text language sql immutable
    return md5({seed} || kind || n);
create function pg_temp.u(kind text, n bigint) returns uuid language sql immutable
    return md5({seed} || kind || n)::uuid;
create function pg_temp.k(n bigint, ordinal int) returns bigint language sql immutable
    return {first_key} + n * 32 + ordinal;
create function pg_temp.pick(n bigint, parents bigint) returns bigint language sql immutable
    return 1 + (n * 7919) % parents;
create function pg_temp.long(kind text, parts int) returns text language sql immutable
    return (select string_agg(md5({seed} || kind || i), ' ') from generate_series(1, parts) i);
"""
ROWS: dict[str, LiteralString] = {
    "folders": """
        insert into {dms}.folders (id, tenant_id, name, path) overriding system value
        select pg_temp.k(n, ordinal), tenant, 'Folder ' || n, array['root', 'year ' || 2015 + n % 10]
    """,
    "documents": """
        insert into {dms}.documents
              (id, tenant_id, folder_id, title, status, labels, metadata, body, size_bytes, created_at)
        select pg_temp.u('document', pg_temp.k(n, ordinal)), tenant,
               pg_temp.k(pg_temp.pick(n, folders), ordinal), 'Document no. ' || n,
               (enum_range(null::{dms}.document_status))[1 + n % 4],
               case when n % 3 = 0 then array['contract', 'label ' || n % 17] else array[]::text[] end,
               jsonb_build_object('pages', n % 90, 'scanned', n % 2 = 0, 'author', 'user' || n % 40),
               case when n % 25 = 0 then pg_temp.long(ordinal || ' ' || n, 300)
                    when n % 7 > 0 then pg_temp.long(ordinal || ' ' || n, 4) end,
               n * 1000, timestamptz '2020-01-01 00:00+00' + n * interval '7 minutes'
    """,
    "document_versions": """
        insert into {dms}.document_versions (document_id, version, tenant_id, content, checksum)
        select pg_temp.u('document', pg_temp.k(1 + (n - 1) % documents, ordinal)),
               1 + (n - 1) / documents, tenant,
               decode(pg_temp.h('content', pg_temp.k(n, ordinal)), 'hex'),
               pg_temp.h('checksum', n)
    """,
    "tags": """
        insert into {dms}.tags (tenant_id, id, name, color)
        select tenant, n, 'tag ' || n, chr(97 + (n % 26)::int)::"char"
    """,
    "document_tags": """
        insert into {dms}.document_tags (tenant_id, document_id, tag_id, weight)
        select tenant, pg_temp.u('document', pg_temp.k(1 + (n - 1) % documents, ordinal)),
               1 + ((n - 1) / documents + (n - 1) % documents) % tags, 1.0 / n
    """,
    "companies": """
        insert into {crm}.companies (id, tenant_id, name, country_code, founded, profile)
        select pg_temp.u('company', pg_temp.k(n, ordinal)), tenant, 'Company ' || n,
               (array['AT', 'BE', 'CH', 'DE', 'ES', 'FR', 'GB', 'IT'])[1 + n % 8],
               date '1950-01-01' + (n % 25000)::int,
               jsonb_build_object('employees', n % 500, 'site', 'https://c' || n || '.example', 'vat', null)
    """,
    "contacts": """
        insert into {crm}.contacts (id, tenant_id, company_id, email, full_name, phones, balance)
        select pg_temp.k(n, ordinal), tenant,
               case when n % 5 > 0
                    then pg_temp.u('company', pg_temp.k(pg_temp.pick(n, companies), ordinal)) end,
               'contact' || n || '@example.org', case when n % 11 > 0 then 'Zoë Müller-' || n end,
               array['+49 30 ' || n, null], (n * 37 % 100000) / 100.0
    """,
    "deals": """
        insert into {crm}.deals (tenant_id, id, contact_id, stage, amount, expected_on, probability, notes)
        select tenant, pg_temp.k(n, ordinal), pg_temp.k(pg_temp.pick(n, contacts), ordinal),
               (enum_range(null::{crm}.deal_stage))[1 + n % 4], n % 90000 + 0.25,
               date '2026-01-01' + (n % 400)::int, (n % 10) / 10.0::real,
               case n % 4 when 0 then '' when 1 then E'two\\nlines\\tand a \\\\ backslash' end
    """,
    "invoices": """
        insert into {crm}.invoices (id, tenant_id, contact_id, issued_at, details)
        select pg_temp.k(n, ordinal), tenant, pg_temp.k(pg_temp.pick(n, contacts), ordinal),
               timestamptz '2024-01-01 12:00+00' + n * interval '11 minutes',
               jsonb_build_object('terms', 'net ' || n % 30, 'paid', n % 3 = 0)
    """,
    "invoice_lines": """
        insert into {crm}.invoice_lines (invoice_id, line, tenant_id, item, quantity, unit_price)
        select pg_temp.k(1 + (n - 1) % invoices, ordinal), 1 + (n - 1) / invoices, tenant,
               'Service ' || n % 50, 1 + n % 9, n % 3000 + 0.99
    """,
    "activities": """
        insert into {crm}.activities (id, tenant_id, contact_id, kind, payload, happened)
               overriding system value
        select pg_temp.k(n, ordinal), tenant, pg_temp.k(pg_temp.pick(n, contacts), ordinal),
               (array['call', 'mail', 'visit', 'note'])[1 + n % 4],
               jsonb_build_object('minutes', n % 60, 'done', n % 2 = 1),
               tstzrange(timestamptz '2025-01-01 00:00+00' + n * interval '1 minute', null)
    """,
}
# Sequences go on above the keys given.
SEQUENCES: LiteralString = """
select setval(pg_get_serial_sequence(format('%I.%I', {dms_name}, 'folders'), 'id'),
              (select max(id) from {dms}.folders)),
       setval(pg_get_serial_sequence(format('%I.%I', {crm_name}, 'contacts'), 'id'),
              (select max(id) from {crm}.contacts)),
       setval(pg_get_serial_sequence(format('%I.%I', {crm_name}, 'deals'), 'id'),
              (select max(id) from {crm}.deals)),
       setval(pg_get_serial_sequence(format('%I.%I', {crm_name}, 'invoices'), 'id'),
              (select max(id) from {crm}.invoices)),
       setval(pg_get_serial_sequence(format('%I.%I', {crm_name}, 'activities'), 'id'),
              (select max(id) from {crm}.activities))
"""


def demo_tenants(
    large_rows: int = LARGE_ROWS, others_rows: int | None = None, count: int = TENANTS, seed: int = 1
) -> list[Tenant]:
    """The large tenant first; the others, of various sizes, have `others_rows` together."""
    weights = [1 + ordinal % 5 for ordinal in range(1, count)]
    unit = (large_rows if others_rows is None else others_rows) / max(1, sum(weights))
    sizes = [large_rows, *(int(unit * weight) for weight in weights)]
    return [_tenant(seed, ordinal, rows) for ordinal, rows in enumerate(sizes)]


def _tenant(seed: int, ordinal: int, rows: int) -> Tenant:
    digest = hashlib.md5(f"{seed} tenant {ordinal}".encode(), usedforsecurity=False)
    return Tenant(
        TenantId(UUID(bytes=digest.digest(), version=4)), ordinal, NAMES[ordinal % len(NAMES)], rows
    )


def prepare_database(conn: Connection, app_password: str) -> None:
    """What every database of the platform has before any service: role and reference table."""
    create_app_role(conn, app_password)
    create_shared(conn)


def seed_services(
    conn: Connection, vertical: str, tenants: Sequence[Tenant], *, seed: int = 1, first_key: int = 0
) -> None:
    """Both services' schemas with the tenants' rows. `first_key` keeps the generated keys of two
    databases apart, where one is to be merged into the other."""
    with conn.transaction():
        create_services(conn, vertical)
        names = identifiers(vertical)
        conn.execute(sql.SQL(HELPERS).format(seed=str(seed), first_key=first_key))
        _size(conn, tenants)
        for table, statement in ROWS.items():
            source = sql.SQL(" from seeding, generate_series(1, {}) n order by n, ordinal")
            conn.execute(sql.SQL(statement).format(**names) + source.format(sql.Identifier(table)))
        literals = {f"{service}_name": sql.Literal(name) for service, name in schemas(vertical).items()}
        conn.execute(sql.SQL(SEQUENCES).format(**names, **literals))
    conn.execute("analyze")


def _size(conn: Connection, tenants: Sequence[Tenant]) -> None:
    """Table `seeding`: for each tenant how many rows of each table."""
    columns = [sql.Identifier(table) for table in SHARES]
    create = sql.SQL("create temporary table seeding (tenant uuid, ordinal int, {} bigint) on commit drop")
    conn.execute(create.format(sql.SQL(" bigint, ").join(columns)))
    values = sql.SQL(", ").join(sql.Placeholder() * (2 + len(SHARES)))
    with conn.cursor() as cursor:
        cursor.executemany(
            sql.SQL("insert into seeding values ({})").format(values),
            [(tenant.id, tenant.ordinal, *_counts(tenant.rows)) for tenant in tenants],
        )


def _counts(rows: int) -> list[int]:
    return [max(LEAST, round(rows * share)) for share in SHARES.values()]


def seed_organizations(conn: Connection, tenants: Sequence[Tenant], vertical: str = "core") -> None:
    """`auth.organizations` with a route for each tenant; the application may read it."""
    queries = load("platform_schema")
    table = sql.Identifier("auth", "organizations")
    conn.execute(sql.SQL(queries["create_organizations_schema"]).format(schema=sql.Identifier("auth")))
    conn.execute(sql.SQL(queries["create_organizations"]).format(organizations=table))
    with conn.cursor() as cursor:
        cursor.executemany(
            "insert into auth.organizations (id, name, vertical, isolation_tier, updated_at)"
            " values (%s, %s, %s, 'schema', now())",
            [(tenant.id, tenant.name, vertical) for tenant in tenants],
        )
    conn.execute("grant usage on schema auth to app")
    conn.execute("grant select on auth.organizations to app")
