-- What tells that schemas have changed since they were last compared. Only ACCESS SHARE locks on catalog
-- tables. Ours is left out.

-- name: stamp
-- One value that changes with anything that rows depend on: tables, columns, constraints, unique indexes,
-- triggers, functions, enums; with the replica identities of partitions, which we never change; and with the
-- storage of a table that has the tenant column, or a foreign key by which its rows may be the tenant's, since
-- what rewrites or empties one is not in the stream. Read under the fence, so it is one query.
WITH relations AS (
  SELECT c.* FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
   WHERE n.nspname = ANY(%(schemas)s) AND c.relkind IN ('r', 'p', 'f')
), lines AS (
  SELECT concat_ws(' ', 'table', c.oid, c.relnamespace, c.relname, c.relkind, c.relrowsecurity, c.relforcerowsecurity,
                   md5(c.relpartbound::text),
                   CASE WHEN c.relispartition OR c.relkind = 'p' THEN concat(c.relreplident,
                     (SELECT i.indexrelid FROM pg_index i WHERE i.indrelid = c.oid AND i.indisreplident)) END,
                   (SELECT i.inhparent || ' ' || i.inhdetachpending FROM pg_inherits i
                     WHERE i.inhrelid = c.oid AND c.relispartition),
                   CASE WHEN EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid
                                        AND a.attname = %(column)s AND NOT a.attisdropped)
                          OR EXISTS (SELECT FROM pg_constraint k WHERE k.contype = 'f' AND k.conrelid = c.oid
                                        AND k.confrelid <> k.conrelid)
                        THEN pg_relation_filenode(c.oid) END) AS line
    FROM relations c
   UNION ALL
  SELECT concat_ws(' ', 'column', a.attrelid, a.attnum, a.attname, a.atttypid, a.atttypmod, a.attcollation,
                   a.attnotnull, a.attisdropped, a.attidentity, a.attgenerated,
                   (SELECT d.oid FROM pg_attrdef d WHERE d.adrelid = a.attrelid AND d.adnum = a.attnum))
    FROM pg_attribute a JOIN relations c ON c.oid = a.attrelid
   WHERE a.attnum > 0
   UNION ALL
  SELECT concat_ws(' ', 'constraint', k.oid, k.conname, k.convalidated)
    FROM pg_constraint k JOIN relations c ON c.oid = k.conrelid
   WHERE NOT starts_with(k.conname, 'mover_')
   UNION ALL
  SELECT concat_ws(' ', 'index', i.indexrelid, i.indisvalid)
    FROM pg_index i JOIN relations c ON c.oid = i.indrelid JOIN pg_class x ON x.oid = i.indexrelid
   WHERE i.indisunique AND NOT starts_with(x.relname, 'mover_')
   UNION ALL
  SELECT concat_ws(' ', 'trigger', t.oid, t.tgname, t.tgenabled)
    FROM pg_trigger t JOIN relations c ON c.oid = t.tgrelid
   WHERE NOT t.tgisinternal AND NOT starts_with(t.tgname, 'mover_')
   UNION ALL
  SELECT concat_ws(' ', 'function', p.oid, p.xmin)
    FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
   WHERE n.nspname = ANY(%(schemas)s)
   UNION ALL
  SELECT concat_ws(' ', 'enum', e.enumtypid, e.enumsortorder, e.enumlabel)
    FROM pg_enum e JOIN pg_type t ON t.oid = e.enumtypid JOIN pg_namespace n ON n.oid = t.typnamespace
   WHERE n.nspname = ANY(%(schemas)s)
)
SELECT md5(coalesce(string_agg(line, chr(10) ORDER BY line), '')) FROM lines

-- name: storage
-- What each table's rows are stored in, its partitions' included: another after a rewrite, a TRUNCATE, or
-- when the table or a partition was made anew, attached or detached.
SELECT n.nspname::text AS schema, c.relname::text AS name,
       md5(string_agg(format('%%s/%%s', p.relid, pg_relation_filenode(p.relid)), ' ' ORDER BY p.relid)) AS text
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
 CROSS JOIN LATERAL (SELECT c.oid AS relid WHERE c.relkind = 'r'
                      UNION ALL
                     SELECT t.relid::oid FROM pg_partition_tree(c.oid) t WHERE c.relkind = 'p') p
 WHERE n.nspname = ANY(%(schemas)s) AND c.relkind IN ('r', 'p')
 GROUP BY n.nspname, c.relname

-- name: unfilled
-- The columns of ordinary tables, and whether they are NULL in every row that nobody has written since they
-- were added: no default ever filled them, neither their own nor their type's.
SELECT n.nspname::text AS schema, c.relname::text AS relation, a.attname::text AS name,
       NOT a.attnotnull AND NOT a.atthasdef AND NOT a.atthasmissing AND a.attidentity = '' AND a.attgenerated = ''
         AND t.typtype <> 'd' AND a.attcollation = t.typcollation AS unfilled
  FROM pg_attribute a
  JOIN pg_class c ON c.oid = a.attrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_type t ON t.oid = a.atttypid
 WHERE n.nspname = ANY(%(schemas)s) AND c.relkind = 'r' AND NOT c.relispartition
   AND a.attnum > 0 AND NOT a.attisdropped

-- name: forget_chunks
-- These tables are copied anew. Locks rows of ours only; may be repeated.
DELETE FROM mover.chunk
 WHERE migration = %s AND (schema_name, table_name) IN (SELECT * FROM unnest(%s::text[], %s::text[]))
