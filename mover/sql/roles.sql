-- What acts on rows that a session without session_replication_role writes.

-- name: triggers
-- The application's triggers in force on the named tables, on those that foreign keys' actions reach from
-- them, and on their partitions. Reads only.
WITH RECURSIVE named AS (
    SELECT c.oid FROM unnest(%(schemas)s::text[], %(names)s::text[]) AS w(schema, name)
      JOIN pg_namespace n ON n.nspname = w.schema
      JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.name
), reached AS (
    SELECT oid FROM named
     UNION
    SELECT k.conrelid FROM reached r
      JOIN pg_constraint k ON k.confrelid = r.oid AND k.contype = 'f' AND k.conparentid = 0
                          AND (k.confdeltype IN ('c', 'n', 'd') OR k.confupdtype IN ('c', 'n', 'd'))
)
SELECT n.nspname, c.relname, t.tgname
  FROM reached r
  JOIN pg_class c ON c.oid = r.oid OR pg_partition_root(c.oid) = r.oid
  JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_trigger t ON t.tgrelid = c.oid
  JOIN pg_proc p ON p.oid = t.tgfoid
  JOIN pg_namespace f ON f.oid = p.pronamespace
 WHERE NOT t.tgisinternal AND t.tgparentid = 0 AND t.tgenabled = 'O' AND f.nspname <> 'mover'
 ORDER BY 1, 2, 3

-- name: checked_at_once
-- The foreign keys that are not DEFERRABLE, of the named tables and to them. Reads only.
WITH named AS (
    SELECT c.oid FROM unnest(%(schemas)s::text[], %(names)s::text[]) AS w(schema, name)
      JOIN pg_namespace n ON n.nspname = w.schema
      JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.name
)
SELECT n.nspname, c.relname, k.conname
  FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE k.contype = 'f' AND NOT k.condeferrable AND k.conparentid = 0
   AND (k.conrelid IN (SELECT oid FROM named) OR k.confrelid IN (SELECT oid FROM named))
 ORDER BY 1, 2, 3

-- name: foreign_keys
-- The two ends of each foreign key between two of the named tables, a partition standing for its root.
-- Reads only.
WITH named AS (
    SELECT c.oid, n.nspname, c.relname FROM unnest(%(schemas)s::text[], %(names)s::text[]) AS w(schema, name)
      JOIN pg_namespace n ON n.nspname = w.schema
      JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.name
)
SELECT DISTINCT c.nspname, c.relname, p.nspname, p.relname
  FROM pg_constraint k
  JOIN named c ON c.oid = coalesce(pg_partition_root(k.conrelid), k.conrelid)
  JOIN named p ON p.oid = coalesce(pg_partition_root(k.confrelid), k.confrelid)
 WHERE k.contype = 'f'

-- name: acting_keys
-- The foreign keys that act on their rows when a row of the named tables goes: CASCADE, SET NULL, SET DEFAULT.
-- Reads only.
WITH named AS (
    SELECT c.oid, n.nspname, c.relname FROM unnest(%(schemas)s::text[], %(names)s::text[]) AS w(schema, name)
      JOIN pg_namespace n ON n.nspname = w.schema
      JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.name
)
SELECT n.nspname, c.relname,
       ARRAY(SELECT a.attname::text FROM unnest(k.confkey) WITH ORDINALITY AS u (number, place)
               JOIN pg_attribute a ON a.attrelid = k.confrelid AND a.attnum = u.number ORDER BY u.place),
       ARRAY(SELECT a.attname::text FROM unnest(k.conkey) WITH ORDINALITY AS u (number, place)
               JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.number ORDER BY u.place)
  FROM pg_constraint k
  JOIN named p ON p.oid = k.confrelid
  JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE k.contype = 'f' AND k.conparentid = 0 AND k.confdeltype IN ('c', 'n', 'd')

-- name: unique_columns
-- The columns of each unique index of the named tables that has no expressions. Reads only.
WITH named AS (
    SELECT c.oid FROM unnest(%(schemas)s::text[], %(names)s::text[]) AS w(schema, name)
      JOIN pg_namespace n ON n.nspname = w.schema
      JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.name
)
SELECT ARRAY(SELECT a.attname::text FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS u (number, place)
               JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = u.number
              WHERE u.place <= i.indnkeyatts ORDER BY u.place)
  FROM pg_index i JOIN named n ON n.oid = i.indrelid
 WHERE i.indisunique AND i.indisvalid AND i.indexprs IS NULL
