-- The record of changed replica identities. Locks rows of ours only, each for one short transaction.

-- name: take_turn
-- One migration at a time works on a table's identity. Never waits: an index build would wait for the waiter.
SELECT pg_try_advisory_lock(hashtextextended(format('mover.identity/%%I.%%I', %(schema)s::text, %(name)s::text), 0))

-- name: end_turn
-- Gives the turn back.
SELECT pg_advisory_unlock(hashtextextended(format('mover.identity/%%I.%%I', %(schema)s::text, %(name)s::text), 0))

-- name: record
-- Written before the change; the first migration's memory of the old identity stays.
INSERT INTO mover.replica_identity (table_schema, table_name, old_identity, old_index, our_index)
VALUES (%(schema)s, %(name)s, %(old_identity)s, %(old_index)s, %(our_index)s)
ON CONFLICT DO NOTHING

-- name: recorded
-- What was there before us.
SELECT old_identity, old_index, our_index FROM mover.replica_identity
 WHERE table_schema = %(schema)s AND table_name = %(name)s

-- name: use
-- May be repeated.
INSERT INTO mover.replica_identity_user (table_schema, table_name, migration)
VALUES (%(schema)s, %(name)s, %(migration)s)
ON CONFLICT DO NOTHING

-- name: used_tables
-- The tables whose changed identity a migration uses.
SELECT table_schema, table_name FROM mover.replica_identity_user
 WHERE migration = %(migration)s ORDER BY 1, 2

-- name: stop_using
-- Says how many others still use it; may be repeated.
WITH gone AS (
  DELETE FROM mover.replica_identity_user
   WHERE table_schema = %(schema)s AND table_name = %(name)s AND migration = %(migration)s)
SELECT count(*) FROM mover.replica_identity_user
 WHERE table_schema = %(schema)s AND table_name = %(name)s AND migration <> %(migration)s

-- name: carrier
-- The table that carries an index of ours, whose name belongs to one table: renaming that changes nothing.
SELECT n.nspname::text AS schema, t.relname::text AS relation
  FROM pg_class c
  JOIN pg_index i ON i.indexrelid = c.oid
  JOIN pg_class t ON t.oid = i.indrelid
  JOIN pg_namespace n ON n.oid = t.relnamespace
 WHERE c.relname = %(index)s

-- name: forget
-- After the old identity is back.
DELETE FROM mover.replica_identity WHERE table_schema = %(schema)s AND table_name = %(name)s

-- name: our_publications
-- Publications of ours that still filter the table's rows: its identity must stay until they are gone.
SELECT p.pubname::text AS name
  FROM pg_publication_rel r
  JOIN pg_publication p ON p.oid = r.prpubid
  JOIN pg_class c ON c.oid = r.prrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = %(schema)s AND c.relname = %(name)s AND starts_with(p.pubname, 'mover_')

-- name: blockers
-- Whose transactions a concurrent index build waits for: those with a snapshot or an xid, oldest first.
SELECT pid, coalesce(nullif(application_name, ''), 'unnamed') AS application,
       extract(epoch FROM now() - xact_start)::float AS age_seconds
  FROM pg_stat_activity
 WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
   AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
 ORDER BY xact_start
 LIMIT 5
