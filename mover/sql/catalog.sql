-- Reads of the catalogs: only ACCESS SHARE locks on catalog tables, nothing is changed. `schemas` are the
-- moved schemas' names on this side. Every query runs with search_path = pg_catalog, so that names in
-- deparsed text are qualified.

-- name: server
-- One row about the server and our role.
SELECT current_setting('server_version_num')::int AS version_num,
       (SELECT system_identifier::text FROM pg_control_system()) AS system_identifier,
       CASE WHEN pg_is_in_recovery() THEN NULL
            ELSE ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int END AS timeline,
       pg_is_in_recovery() AS in_recovery,
       current_database()::text AS database,
       current_setting('server_encoding') AS encoding,
       current_setting('wal_level') AS wal_level,
       r.rolname::text AS role,
       r.rolsuper AS superuser,
       r.rolsuper OR r.rolreplication AS replication,
       r.rolsuper OR r.rolbypassrls AS bypass_rls,
       r.rolsuper OR r.rolcreaterole AS create_role,
       current_setting('max_replication_slots')::int AS slots_max,
       (SELECT count(*) FROM pg_replication_slots)::int AS slots_used,
       current_setting('max_wal_senders')::int AS senders_max,
       (SELECT count(*) FROM pg_stat_replication)::int AS senders_used,
       current_setting('max_connections')::int AS connections_max,
       (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')::int AS connections_used,
       CASE WHEN r.rolsuper THEN 0
            ELSE current_setting('superuser_reserved_connections')::int
               + coalesce(current_setting('reserved_connections', true)::int, 0)
       END AS connections_reserved,
       (SELECT setting::int FROM pg_settings WHERE name = 'max_slot_wal_keep_size') AS slot_wal_keep_mb,
       has_parameter_privilege('session_replication_role', 'SET') AS may_set_replica_role,
       has_database_privilege(current_database(), 'CREATE') AS may_create_schema,
       pg_backend_pid() AS backend_pid
  FROM pg_roles r
 WHERE r.rolname = current_user;

-- name: extensions
-- Installed extensions.
SELECT extname::text AS name, extversion AS version FROM pg_extension;

-- name: roles
-- All roles of the cluster, and whether ours may act for them.
SELECT rolname::text AS name, pg_has_role(oid, 'USAGE') AS member FROM pg_roles;

-- name: strangers
-- Who owns our own schema or something in it without being us or a superuser: his triggers would run with our
-- rights.
SELECT DISTINCT o.rolname::text AS name
  FROM (SELECT nspowner AS oid FROM pg_namespace WHERE nspname = 'mover'
        UNION SELECT relowner FROM pg_class WHERE relnamespace = to_regnamespace('mover')
        UNION SELECT proowner FROM pg_proc WHERE pronamespace = to_regnamespace('mover')) AS owners
  JOIN pg_roles o USING (oid)
 WHERE o.rolname <> current_user AND NOT o.rolsuper
 ORDER BY name;

-- name: long_transactions
-- Transactions of others that are older than `age_seconds`, prepared ones included, oldest first.
SELECT pid, coalesce(application_name, '') AS application,
       extract(epoch FROM now() - xact_start)::float AS age_seconds
  FROM pg_stat_activity
 WHERE xact_start < now() - make_interval(secs => %(age_seconds)s) AND pid <> pg_backend_pid()
   AND backend_type = 'client backend'
 UNION ALL
SELECT NULL, 'prepared transaction', extract(epoch FROM now() - prepared)::float
  FROM pg_prepared_xacts
 WHERE prepared < now() - make_interval(secs => %(age_seconds)s)
 ORDER BY age_seconds DESC
 LIMIT 20;

-- name: schemas
-- Which of the schemas exist, with their comments.
SELECT n.nspname::text AS name, obj_description(n.oid, 'pg_namespace') AS comment
  FROM pg_namespace n
 WHERE n.nspname = ANY(%(schemas)s);

-- name: closed_schemas
-- Those in which our role may not create an index.
SELECT n.nspname::text AS name
  FROM pg_namespace n
 WHERE n.nspname = ANY(%(schemas)s) AND NOT has_schema_privilege(n.oid, 'CREATE');

-- name: relations
-- Tables and views of the schemas, but for members of extensions; a partition with its root, a root with
-- its partitions, whatever their schemas.
WITH partitions AS (
  SELECT p.oid, r.oid AS root, jsonb_build_array(pn.nspname, p.relname) AS name,
         jsonb_build_array(rn.nspname, r.relname) AS root_name
    FROM pg_class p
    JOIN pg_namespace pn ON pn.oid = p.relnamespace
    JOIN pg_class r ON r.oid = pg_partition_root(p.oid)
    JOIN pg_namespace rn ON rn.oid = r.relnamespace
   WHERE p.relispartition AND p.relkind IN ('r', 'p', 'f')
)
SELECT c.oid::bigint AS oid, n.nspname::text AS schema, c.relname::text AS name, c.relkind::text AS kind,
       c.relpersistence::text AS persistence,
       NOT c.relispartition AND c.relkind <> 'p'
         AND EXISTS (SELECT FROM pg_inherits i WHERE c.oid IN (i.inhrelid, i.inhparent)) AS inherits,
       (SELECT p.root_name FROM partitions p WHERE p.oid = c.oid) AS root,
       (SELECT jsonb_agg(p.name ORDER BY p.name) FROM partitions p WHERE p.root = c.oid) AS partitions,
       row_security_active(c.oid) AS row_security, c.relforcerowsecurity AS row_security_forced,
       pg_get_userbyid(c.relowner)::text AS owner, pg_has_role(c.relowner, 'USAGE') AS owned,
       ARRAY(SELECT p FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) p
              WHERE has_table_privilege(c.oid, p)) AS privileges,
       c.relreplident::text AS replica_identity
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = ANY(%(schemas)s) AND c.relkind IN ('r', 'p', 'f', 'v', 'm')
   AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                      AND d.deptype = 'e')
 ORDER BY n.nspname, c.relname;

-- name: columns
-- Live columns of the relations, in order. One that is NOT NULL by a constraint that nobody has validated
-- (from 18 on) may hold NULL.
SELECT a.attrelid::bigint AS relation, a.attname::text AS name,
       format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull AND unproven IS NULL AS not_null,
       unproven::text,
       a.attgenerated::text AS generated, a.attidentity::text AS identity, a.attcollation <> 0 AS collatable,
       CASE WHEN a.attcollation IN (0, 'pg_catalog."default"'::regcollation) THEN ''
            ELSE a.attcollation::regcollation::text END AS collation,
       coalesce((SELECT collisdeterministic FROM pg_collation l WHERE l.oid = a.attcollation), true)
         AS deterministic
  FROM pg_attribute a
  LEFT JOIN LATERAL (SELECT k.conname AS unproven FROM pg_constraint k
                      WHERE k.conrelid = a.attrelid AND k.contype = 'n' AND NOT k.convalidated
                        AND k.conkey = ARRAY[a.attnum]) k ON true
 WHERE a.attrelid = ANY(%(relations)s) AND a.attnum > 0 AND NOT a.attisdropped
 ORDER BY a.attrelid, a.attnum;

-- name: unique_indexes
-- Valid unique indexes, the primary key included; our own are left out unless they identify replicas.
-- The expressions are those of a query on the table, to compare values across servers.
SELECT i.indrelid::bigint AS relation, c.relname::text AS name, i.indisprimary AS primary,
       i.indpred IS NOT NULL AS partial, i.indimmediate AS immediate, i.indisreplident AS replica_identity,
       coalesce((to_jsonb(i) ->> 'indnullsnotdistinct')::boolean, false) AS nulls_equal,
       ARRAY(SELECT coalesce(a.attname::text, '')
               FROM generate_series(0, i.indnkeyatts - 1) k
               LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[k]
                                       AND i.indkey[k] <> 0
              ORDER BY k) AS columns,
       ARRAY(SELECT pg_get_indexdef(i.indexrelid, k, false)
               FROM generate_series(1, i.indnkeyatts) k ORDER BY k) AS expressions,
       pg_get_expr(i.indpred, i.indrelid) AS predicate
  FROM pg_index i
  JOIN pg_class c ON c.oid = i.indexrelid
 WHERE i.indrelid = ANY(%(relations)s) AND i.indisunique AND i.indisvalid
   AND (i.indisreplident OR NOT starts_with(c.relname, 'mover_'))
 ORDER BY i.indrelid, NOT i.indisprimary, c.relname;

-- name: triggers
-- The application's triggers on changes of rows, but for those that partitions have from their root, and
-- those whose WHEN tells our sessions apart; of tgtype, bit 4 is INSERT, 8 DELETE, 16 UPDATE.
SELECT t.tgrelid::bigint AS relation, t.tgname::text AS name, t.tgtype & 8 <> 0 AS on_delete,
       t.tgenabled::text AS enabled
  FROM pg_trigger t
  JOIN pg_proc p ON p.oid = t.tgfoid
  JOIN pg_namespace n ON n.oid = p.pronamespace
 WHERE t.tgrelid = ANY(%(relations)s) AND NOT t.tgisinternal AND t.tgparentid = 0
   AND NOT starts_with(t.tgname, 'mover_') AND n.nspname <> 'mover' AND t.tgtype & 28 <> 0
   AND (t.tgqual IS NULL OR position('mover.tenant' IN pg_get_triggerdef(t.oid)) = 0)
 ORDER BY t.tgname;

-- name: rules
-- Rules on changes of rows; ev_type 4 is DELETE.
SELECT r.ev_class::bigint AS relation, r.rulename::text AS name, r.ev_type = '4' AS on_delete,
       r.ev_enabled::text AS enabled
  FROM pg_rewrite r
 WHERE r.ev_class = ANY(%(relations)s) AND r.ev_type <> '1'
 ORDER BY r.rulename;

-- name: foreign_keys
-- Foreign keys from or into the schemas, also from elsewhere; not the copies that partitions inherit.
SELECT c.conname::text AS name, cn.nspname::text AS child_schema, ct.relname::text AS child_name,
       pn.nspname::text AS parent_schema, pt.relname::text AS parent_name,
       ARRAY(SELECT a.attname::text FROM unnest(c.conkey) WITH ORDINALITY k(num, ord)
               JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.num ORDER BY k.ord)
         AS child_columns,
       ARRAY(SELECT a.attname::text FROM unnest(c.confkey) WITH ORDINALITY k(num, ord)
               JOIN pg_attribute a ON a.attrelid = c.confrelid AND a.attnum = k.num ORDER BY k.ord)
         AS parent_columns, c.convalidated AS validated,
       c.confdeltype::text AS on_delete, c.confupdtype::text AS on_update,
       EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.conrelid AND i.indisvalid AND i.indpred IS NULL
                   AND i.indkey[0] = ANY (c.conkey)) AS indexed
  FROM pg_constraint c
  JOIN pg_class ct ON ct.oid = c.conrelid
  JOIN pg_namespace cn ON cn.oid = ct.relnamespace
  JOIN pg_class pt ON pt.oid = c.confrelid
  JOIN pg_namespace pn ON pn.oid = pt.relnamespace
 WHERE c.contype = 'f' AND c.conparentid = 0
   AND (cn.nspname = ANY(%(schemas)s) OR pn.nspname = ANY(%(schemas)s))
 ORDER BY cn.nspname, ct.relname, c.conname;

-- name: sequences
-- Sequences of the schemas and the table that owns each, by serial or identity column.
SELECT n.nspname::text AS schema, c.relname::text AS name, s.seqincrement AS increment,
       tn.nspname::text AS owner_schema, t.relname::text AS owner_name
  FROM pg_sequence s
  JOIN pg_class c ON c.oid = s.seqrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.objsubid = 0
                       AND d.refclassid = 'pg_class'::regclass AND d.refobjsubid > 0
                       AND d.deptype IN ('a', 'i')
  LEFT JOIN pg_class t ON t.oid = d.refobjid
  LEFT JOIN pg_namespace tn ON tn.oid = t.relnamespace
 WHERE n.nspname = ANY(%(schemas)s)
 ORDER BY n.nspname, c.relname;

-- name: publications
-- Somebody else's publications that name a table of the schemas with a column list or a row filter.
SELECT p.pubname::text AS name, n.nspname::text AS schema, c.relname::text AS table_name,
       p.pubupdate OR p.pubdelete AS updates_or_deletes,
       CASE WHEN pr.prattrs IS NOT NULL THEN
         ARRAY(SELECT a.attname::text FROM unnest(pr.prattrs::int2[]) k
                 JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k) END AS columns,
       ARRAY(SELECT DISTINCT a.attname::text
               FROM regexp_matches(pr.prqual::text, ':varattno (\d+)', 'g') m
               JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = m[1]::int) AS filter_columns
  FROM pg_publication_rel pr
  JOIN pg_publication p ON p.oid = pr.prpubid
  JOIN pg_class c ON c.oid = pr.prrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = ANY(%(schemas)s) AND NOT starts_with(p.pubname, 'mover_')
   AND (pr.prattrs IS NOT NULL OR pr.prqual IS NOT NULL)
 ORDER BY p.pubname, n.nspname, c.relname;

-- name: subscriptions
-- Native subscriptions that write into the schemas.
SELECT s.subname::text AS name, n.nspname::text AS schema, c.relname::text AS table_name
  FROM pg_subscription_rel r
  JOIN pg_subscription s ON s.oid = r.srsubid
  JOIN pg_class c ON c.oid = r.srrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = ANY(%(schemas)s)
 ORDER BY s.subname, n.nspname, c.relname;

-- name: extensions_used
-- Extensions that live in the schemas, and those whose types or functions the schemas' columns, domains,
-- indexes, defaults, triggers and functions use.
WITH members AS (
  SELECT d.classid, d.objid, e.extname
    FROM pg_depend d JOIN pg_extension e ON d.refclassid = 'pg_extension'::regclass AND e.oid = d.refobjid
   WHERE d.deptype = 'e'
), objects AS (
  SELECT 'pg_class'::regclass AS classid, c.oid FROM pg_class c
    JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = ANY(%(schemas)s)
   UNION ALL
  SELECT 'pg_proc'::regclass, p.oid FROM pg_proc p
    JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = ANY(%(schemas)s)
   UNION ALL
  SELECT 'pg_type'::regclass, t.oid FROM pg_type t
    JOIN pg_namespace n ON n.oid = t.typnamespace WHERE n.nspname = ANY(%(schemas)s)
   UNION ALL
  SELECT 'pg_attrdef'::regclass, a.oid FROM pg_attrdef a JOIN pg_class c ON c.oid = a.adrelid
    JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = ANY(%(schemas)s)
   UNION ALL
  SELECT 'pg_constraint'::regclass, k.oid FROM pg_constraint k
    JOIN pg_namespace n ON n.oid = k.connamespace WHERE n.nspname = ANY(%(schemas)s)
   UNION ALL
  SELECT 'pg_trigger'::regclass, t.oid FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
    JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = ANY(%(schemas)s)
)
SELECT e.extname::text AS name, true AS inside
  FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
 WHERE n.nspname = ANY(%(schemas)s)
 UNION
SELECT m.extname::text, false
  FROM objects o
  JOIN pg_depend d ON d.classid = o.classid AND d.objid = o.oid AND d.deptype <> 'e'
  JOIN members m ON m.classid = d.refclassid AND m.objid = d.refobjid;

-- name: granted_roles
-- Roles named in the privileges of the schemas' objects, and in their policies.
SELECT DISTINCT r.rolname::text AS name, g.policy
  FROM (SELECT (aclexplode(nspacl)).grantee AS role, false AS policy FROM pg_namespace
         WHERE nspname = ANY(%(schemas)s)
         UNION ALL
        SELECT (aclexplode(c.relacl)).grantee, false FROM pg_class c
          JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = ANY(%(schemas)s)
         UNION ALL
        SELECT (aclexplode(a.attacl)).grantee, false FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
          JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = ANY(%(schemas)s)
         UNION ALL
        SELECT (aclexplode(p.proacl)).grantee, false FROM pg_proc p
          JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = ANY(%(schemas)s)
         UNION ALL
        SELECT unnest(p.polroles), true FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid
          JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = ANY(%(schemas)s)) g
  JOIN pg_roles r ON r.oid = g.role;

-- name: function_bodies
-- The source texts of the schemas' SQL and PL/pgSQL functions.
SELECT p.oid::regprocedure::text AS name, p.prosrc AS body
  FROM pg_proc p
  JOIN pg_namespace n ON n.oid = p.pronamespace
  JOIN pg_language l ON l.oid = p.prolang
 WHERE n.nspname = ANY(%(schemas)s) AND l.lanname IN ('sql', 'plpgsql') AND p.prosqlbody IS NULL
 ORDER BY 1;

-- name: existing_tables
-- Which of the named tables are there, and what our role may do with them.
SELECT n.nspname::text AS schema, c.relname::text AS name,
       ARRAY(SELECT p FROM unnest('{SELECT,REFERENCES}'::text[]) AS p
              WHERE has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, p)) AS privileges
  FROM unnest(%(schemas)s::text[], %(names)s::text[]) AS wanted(schema, name)
  JOIN pg_namespace n ON n.nspname = wanted.schema
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.name AND c.relkind IN ('r', 'p', 'f');

-- name: table_size
-- The estimated number of rows of a table, its bytes, and the share of rows with this value in a column:
-- from the most common values, else from the number of distinct ones; NULL when never analysed. Those of a
-- partitioned table are its partitions'.
WITH whole AS (
  SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
   WHERE n.nspname = %(schema)s AND c.relname = %(name)s
), parts AS (
  SELECT greatest(c.reltuples, 0)::float AS tuples, pg_table_size(c.oid)::bigint AS bytes,
         coalesce(
           (SELECT f.freq FROM unnest(s.most_common_vals::text::text[], s.most_common_freqs) AS f(val, freq)
             WHERE f.val = %(value)s),
           CASE WHEN s.n_distinct > 0 THEN 1 / s.n_distinct
                WHEN s.n_distinct < 0 AND c.reltuples > 0 THEN 1 / (-s.n_distinct * c.reltuples) END)::float
           AS share
    FROM whole
    JOIN pg_class c ON c.relkind IN ('r', 'f')
                   AND (c.oid = whole.oid OR c.relispartition AND pg_partition_root(c.oid) = whole.oid)
    JOIN pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_stats s ON s.schemaname = n.nspname AND s.tablename = c.relname AND s.attname = %(column)s
                        AND NOT s.inherited
)
SELECT coalesce(sum(tuples), 0)::float AS tuples, coalesce(sum(bytes), 0)::bigint AS bytes,
       sum(tuples * share) / nullif(sum(tuples) FILTER (WHERE share IS NOT NULL), 0) AS share
  FROM parts;

-- name: table_state
-- One table's replica identity and, by name, whether each of its indexes is valid.
SELECT c.oid::bigint AS oid, c.relreplident::text AS replica_identity,
       (SELECT ic.relname::text FROM pg_index i JOIN pg_class ic ON ic.oid = i.indexrelid
         WHERE i.indrelid = c.oid AND i.indisreplident) AS identity_index,
       (SELECT coalesce(jsonb_object_agg(ic.relname, i.indisvalid), '{}')
          FROM pg_index i JOIN pg_class ic ON ic.oid = i.indexrelid WHERE i.indrelid = c.oid) AS indexes
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = %(schema)s AND c.relname = %(name)s;
