-- Creating and upgrading schema `platform`. Everything runs in one transaction under lock_schema.

-- name: lock_schema
-- An advisory lock until commit: two runs at a time take turns, the second finds nothing to do.
select pg_advisory_xact_lock(hashtextextended('mover.platform_schema', 0))

-- name: create_journal
-- Creates what is not there; repeatable. Under lock_schema, since IF NOT EXISTS alone can collide.
do $$ begin
    -- Not `create schema if not exists`: that needs the right to create even when there is nothing to do.
    if to_regnamespace('platform') is null then
        create schema platform;
    end if;
    if to_regclass('platform.schema_migrations') is null then
        create table platform.schema_migrations (
            version    integer primary key,
            name       text not null,
            applied_at timestamptz not null default now()
        );
    end if;
end $$

-- name: has_journal
-- Reads only.
select to_regclass('platform.schema_migrations') is not null as present

-- name: version
-- Reads only.
select coalesce(max(version), 0) as version from platform.schema_migrations

-- name: record_version
-- Under lock_schema, in the transaction that applied the file.
insert into platform.schema_migrations (version, name) values (%(version)s, %(name)s)

-- name: create_organizations_schema
-- Creates what is not there; repeatable. Under lock_schema.
create schema if not exists {schema}

-- name: create_organizations
-- Creates what is not there; repeatable. Under lock_schema.
create table if not exists {organizations} (
    id             uuid primary key,
    name           text,
    vertical       text not null default 'core',
    isolation_tier text not null default 'schema',
    database_url   text,
    updated_at     timestamptz not null default now()
)

-- name: route_columns
-- Reads only.
select a.attname
  from pg_catalog.pg_attribute a
  join pg_catalog.pg_class c on c.oid = a.attrelid
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
 where n.nspname = %(schema)s and c.relname = %(name)s and a.attnum > 0 and not a.attisdropped
