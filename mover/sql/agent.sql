-- What the mover owns in each database it touches: one schema, `mover`. Every statement may be repeated.

-- name: make_schema
-- Locks: none on the application's objects. Two installers take turns by an advisory lock.
SELECT pg_advisory_xact_lock(hashtextextended('mover.schema', 0));
CREATE SCHEMA IF NOT EXISTS mover;

-- name: install
-- After make_schema, in its transaction.
CREATE TABLE IF NOT EXISTS mover.owner (
    migration uuid PRIMARY KEY,
    epoch bigint NOT NULL
);
CREATE TABLE IF NOT EXISTS mover.progress (
    migration uuid PRIMARY KEY,
    applied_lsn pg_lsn NOT NULL,
    snapshot text
);
CREATE TABLE IF NOT EXISTS mover.chunk (
    migration uuid NOT NULL,
    schema_name text NOT NULL,
    table_name text NOT NULL,
    number integer NOT NULL,
    lo text[],
    hi text[],
    done boolean NOT NULL DEFAULT false,
    rows bigint NOT NULL DEFAULT 0,
    bytes bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (migration, schema_name, table_name, number)
);
CREATE TABLE IF NOT EXISTS mover.fence (
    name text PRIMARY KEY,
    tenant uuid NOT NULL,
    vertical text NOT NULL,
    state text NOT NULL CHECK (state IN ('open', 'closed', 'aborted', 'moved')),
    epoch bigint NOT NULL,
    migration uuid NOT NULL,
    tombstone_of uuid  -- the earlier migration whose departure this place stood for
);

-- name: forget
-- One migration's row of the table {table}; deleting twice changes nothing.
DELETE FROM mover.{table} WHERE migration = %s

-- name: uninstall
-- Drops the schema when nobody needs it any more: no migration, no fence. Repeatable.
SELECT pg_advisory_xact_lock(hashtextextended('mover.schema', 0));
DO $$
BEGIN
    IF to_regnamespace('mover') IS NULL THEN
        RETURN;
    END IF;
    IF NOT EXISTS (SELECT FROM mover.owner) AND NOT EXISTS (SELECT FROM mover.fence) THEN
        DROP SCHEMA mover CASCADE;
    END IF;
END
$$;
