-- What operators have said of the schemas' objects: comments and privileges. Only ACCESS SHARE locks on
-- catalog tables, nothing is changed. `named` is an object as COMMENT ON wants it. Ours is left out.

-- name: objects
-- Everything that can have a comment or privileges, with its owner.
WITH objects AS (
  SELECT 'pg_namespace'::regclass AS classid, oid, 0 AS sub, oid AS namespace, nspowner AS owner FROM pg_namespace
   UNION ALL
  SELECT 'pg_class'::regclass, oid, 0, relnamespace, relowner FROM pg_class
   WHERE relkind IN ('r', 'p', 'f', 'v', 'm', 'S', 'i', 'I')
   UNION ALL
  SELECT 'pg_class'::regclass, c.oid, a.attnum, c.relnamespace, c.relowner
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
   WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'p', 'f', 'v', 'm', 'c')
   UNION ALL
  SELECT 'pg_proc'::regclass, oid, 0, pronamespace, proowner FROM pg_proc
   UNION ALL
  SELECT 'pg_type'::regclass, t.oid, 0, t.typnamespace, t.typowner
    FROM pg_type t LEFT JOIN pg_class c ON c.oid = t.typrelid
   WHERE t.typtype IN ('e', 'd', 'r') OR c.relkind = 'c'
   UNION ALL
  SELECT 'pg_constraint'::regclass, k.oid, 0, k.connamespace, coalesce(c.relowner, t.typowner)
    FROM pg_constraint k LEFT JOIN pg_class c ON c.oid = k.conrelid LEFT JOIN pg_type t ON t.oid = k.contypid
   UNION ALL
  SELECT 'pg_trigger'::regclass, t.oid, 0, c.relnamespace, c.relowner
    FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
   WHERE NOT t.tgisinternal AND NOT starts_with(t.tgname, 'mover_')
   UNION ALL
  SELECT 'pg_policy'::regclass, p.oid, 0, c.relnamespace, c.relowner
    FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid
   UNION ALL
  SELECT 'pg_statistic_ext'::regclass, oid, 0, stxnamespace, stxowner FROM pg_statistic_ext
)
SELECT CASE WHEN i.type LIKE '%% column' THEN 'COLUMN'
            WHEN i.type LIKE '%% constraint' THEN 'CONSTRAINT'
            WHEN i.type = 'statistics object' THEN 'STATISTICS'
            ELSE upper(i.type) END || ' '
       || CASE i.type WHEN 'domain constraint' THEN regexp_replace(i.identity, ' on ', ' ON DOMAIN ')
                      ELSE i.identity END AS named,
       d.description AS comment, pg_get_userbyid(o.owner)::text AS owner
  FROM objects o
  JOIN pg_namespace n ON n.oid = o.namespace
 CROSS JOIN LATERAL pg_identify_object(o.classid, o.oid, o.sub) i
  LEFT JOIN pg_description d ON d.classoid = o.classid AND d.objoid = o.oid AND d.objsubid = o.sub
 WHERE n.nspname = ANY(%(schemas)s) AND i.type <> 'schema' AND i.identity !~ '\mmover_'

-- name: privileges
-- Each privilege of somebody who does not own the object, as GRANT wants it, with the object's owner.
WITH granted AS (
  SELECT 'pg_namespace'::regclass AS classid, oid, oid AS namespace, NULL AS attname, nspowner AS owner,
         'SCHEMA' AS kind, coalesce(nspacl, acldefault('n', nspowner)) AS acl
    FROM pg_namespace
   UNION ALL
  SELECT 'pg_class'::regclass, oid, relnamespace, NULL, relowner,
         CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END,
         coalesce(relacl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", relowner))
    FROM pg_class WHERE relkind IN ('r', 'p', 'f', 'v', 'm', 'S')
   UNION ALL
  SELECT 'pg_class'::regclass, c.oid, c.relnamespace, a.attname, c.relowner, 'TABLE', a.attacl
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
   WHERE a.attacl IS NOT NULL AND NOT a.attisdropped
   UNION ALL
  SELECT 'pg_proc'::regclass, oid, pronamespace, NULL, proowner, 'ROUTINE',
         coalesce(proacl, acldefault('f', proowner))
    FROM pg_proc
   UNION ALL
  SELECT 'pg_type'::regclass, t.oid, t.typnamespace, NULL, t.typowner, 'TYPE',
         coalesce(t.typacl, acldefault('T', t.typowner))
    FROM pg_type t LEFT JOIN pg_class c ON c.oid = t.typrelid
   WHERE t.typtype IN ('e', 'd', 'r') OR c.relkind = 'c'
)
SELECT format('%%s%%s ON %%s %%s', a.privilege_type, ' (' || quote_ident(g.attname) || ')', g.kind, i.identity)
         AS clause,
       a.privilege_type AS privilege,
       CASE a.grantee WHEN 0 THEN NULL ELSE pg_get_userbyid(a.grantee)::text END AS grantee,
       bool_or(a.is_grantable) AS grantable
  FROM granted g
  JOIN pg_namespace n ON n.oid = g.namespace
 CROSS JOIN LATERAL aclexplode(g.acl) a
 CROSS JOIN LATERAL pg_identify_object(g.classid, g.oid, 0) i
 WHERE n.nspname = ANY(%(schemas)s) AND a.grantee <> g.owner
 GROUP BY g.attname, g.kind, i.identity, a.privilege_type, a.grantee

-- name: given_by_default
-- Roles to which objects that ours makes are granted without being asked.
SELECT DISTINCT pg_get_userbyid(a.grantee)::text AS grantee
  FROM pg_default_acl d CROSS JOIN LATERAL aclexplode(d.defaclacl) a
 WHERE d.defaclrole = (SELECT oid FROM pg_roles WHERE rolname = current_user) AND a.grantee <> 0
