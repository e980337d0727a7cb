-- What a fingerprint is made of: (key, text) of every object in the schemas, ours excluded. Only ACCESS
-- SHARE locks on catalog tables, nothing is changed. Keys and texts name schemas as SQL tokens, so that
-- they can be renamed. `words_*` hold deparsed queries, which differ between major versions.

-- name: types
-- Enums, domains and ranges; composite types appear by their columns.
SELECT format('type %%I.%%I', n.nspname, t.typname) AS key,
       CASE t.typtype
         WHEN 'e' THEN 'enum ' || (SELECT string_agg(quote_literal(e.enumlabel), ' ' ORDER BY e.enumsortorder)
                                     FROM pg_enum e WHERE e.enumtypid = t.oid)
         WHEN 'd' THEN concat_ws(' ', 'domain', format_type(t.typbasetype, t.typtypmod),
                                 CASE WHEN t.typnotnull THEN 'not null' END, 'default ' || t.typdefault)
         WHEN 'r' THEN 'range ' || (SELECT format_type(r.rngsubtype, NULL)
                                      FROM pg_range r WHERE r.rngtypid = t.oid)
       END AS text
  FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
 WHERE n.nspname = ANY(%(schemas)s) AND t.typtype IN ('e', 'd', 'r')
   AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_type'::regclass AND d.objid = t.oid
                      AND d.deptype = 'e');

-- name: relations
-- Tables, views and composite types.
SELECT format('relation %%I.%%I', n.nspname, c.relname) AS key,
       concat_ws(' ', c.relkind, c.relpersistence, CASE WHEN c.relforcerowsecurity THEN 'forced' END,
                 c.reloptions::text) AS text
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = ANY(%(schemas)s) AND c.relkind IN ('r', 'p', 'f', 'v', 'm', 'c')
   AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                      AND d.deptype = 'e');

-- name: row_security
-- Of its own, since a clone gets it with its policies, after the rows.
SELECT format('security %%I.%%I', n.nspname, c.relname) AS key, 'row security' AS text
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = ANY(%(schemas)s) AND c.relrowsecurity;

-- name: partitions
-- What a partitioned table is divided by, and what each partition takes; from 17 on a partition has its
-- root's identity columns, so that those are left out of its columns.
SELECT format('partitions %%I.%%I', n.nspname, c.relname) AS key,
       concat_ws(' ', 'by ' || pg_get_partkeydef(c.oid),
                 (SELECT format('of %%I.%%I', pn.nspname, p.relname) || CASE WHEN i.inhdetachpending
                                                                           THEN ' detached' ELSE '' END
                    FROM pg_inherits i JOIN pg_class p ON p.oid = i.inhparent
                    JOIN pg_namespace pn ON pn.oid = p.relnamespace
                   WHERE i.inhrelid = c.oid AND c.relispartition),
                 pg_get_expr(c.relpartbound, c.oid)) AS text
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = ANY(%(schemas)s) AND (c.relkind = 'p' OR c.relispartition AND c.relkind IN ('r', 'f'));

-- name: columns
-- Live columns; their order is not part of a fingerprint, since values travel by name.
SELECT format('column %%I.%%I.%%I', n.nspname, c.relname, a.attname) AS key,
       concat_ws(' ', format_type(a.atttypid, a.atttypmod),
                 CASE WHEN a.attcollation <> t.typcollation
                      THEN (SELECT format('collate %%I.%%I', ln.nspname, l.collname) FROM pg_collation l
                              JOIN pg_namespace ln ON ln.oid = l.collnamespace WHERE l.oid = a.attcollation)
                 END,
                 CASE WHEN a.attnotnull
                       AND NOT EXISTS (SELECT FROM pg_constraint k
                                        WHERE k.conrelid = a.attrelid AND k.contype = 'n'
                                          AND NOT k.convalidated AND k.conkey = ARRAY[a.attnum])
                      THEN 'not null' END,
                 CASE WHEN NOT c.relispartition THEN 'identity ' || nullif(a.attidentity::text, '') END,
                 'generated ' || nullif(a.attgenerated::text, ''),
                 'default ' || pg_get_expr(d.adbin, d.adrelid)) AS text
  FROM pg_attribute a
  JOIN pg_class c ON c.oid = a.attrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_type t ON t.oid = a.atttypid
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE n.nspname = ANY(%(schemas)s) AND c.relkind IN ('r', 'p', 'f', 'v', 'm', 'c')
   AND a.attnum > 0 AND NOT a.attisdropped;

-- name: constraints
-- Of tables and domains; NOT NULL is a column's property on every version here (a constraint from 18 on), unless
-- it is NOT VALID, which a clone gets after the rows. What
-- a partition has because its root has it is left out: a side may name it as it likes, or attach it later.
SELECT format('constraint %%I.%%I.%%I', n.nspname, coalesce(c.relname, t.typname), k.conname) AS key,
       pg_get_constraintdef(k.oid) AS text
  FROM pg_constraint k
  LEFT JOIN pg_class c ON c.oid = k.conrelid
  LEFT JOIN pg_type t ON t.oid = k.contypid
  JOIN pg_namespace n ON n.oid = coalesce(c.relnamespace, t.typnamespace)
 WHERE n.nspname = ANY(%(schemas)s) AND (k.contype IN ('c', 'f', 'p', 'u', 'x') OR k.contype = 'n' AND NOT k.convalidated)
   AND NOT starts_with(k.conname, 'mover_') AND k.conparentid = 0
   AND CASE WHEN c.relispartition AND k.contype IN ('p', 'u', 'x')
            THEN NOT EXISTS (SELECT FROM pg_partition_ancestors(k.conrelid) above
                               JOIN pg_constraint whole ON whole.conrelid = above.relid
                              WHERE above.relid <> k.conrelid AND whole.contype = k.contype
                                AND pg_get_constraintdef(whole.oid) = pg_get_constraintdef(k.oid))
            ELSE true END;

-- name: indexes
-- Valid indexes that no constraint owns; those that a partition has because its root has them are left out.
WITH indexes AS MATERIALIZED (
  SELECT n.nspname, ic.relname, i.indexrelid, c.oid AS relation, c.relispartition, i.indisunique, i.indisvalid,
         ic.relispartition AS attached, pg_get_indexdef(i.indexrelid) AS text,
         substring(pg_get_indexdef(i.indexrelid) FROM ' USING .*') AS definition
    FROM pg_index i
    JOIN pg_class ic ON ic.oid = i.indexrelid
    JOIN pg_class c ON c.oid = i.indrelid
    JOIN pg_namespace n ON n.oid = c.relnamespace
   WHERE n.nspname = ANY(%(schemas)s) AND c.relkind IN ('r', 'p', 'm')
)
SELECT format('index %%I.%%I', i.nspname, i.relname) AS key, i.text
  FROM indexes i
 WHERE i.indisvalid AND NOT i.attached AND NOT starts_with(i.relname, 'mover_')
   AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid AND k.contype IN ('p', 'u', 'x'))
   AND NOT EXISTS (SELECT FROM indexes whole
                    WHERE i.relispartition AND whole.relation <> i.relation
                      AND whole.definition = i.definition AND whole.indisunique = i.indisunique
                      AND whole.relation IN (SELECT relid FROM pg_partition_ancestors(i.relation)));

-- name: triggers
-- The application's triggers and whether they are enabled.
SELECT format('trigger %%I.%%I.%%I', n.nspname, c.relname, t.tgname) AS key,
       concat_ws(' ', pg_get_triggerdef(t.oid), t.tgenabled) AS text
  FROM pg_trigger t
  JOIN pg_class c ON c.oid = t.tgrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_proc p ON p.oid = t.tgfoid
  JOIN pg_namespace pn ON pn.oid = p.pronamespace
 WHERE n.nspname = ANY(%(schemas)s) AND NOT t.tgisinternal
   AND NOT starts_with(t.tgname, 'mover_') AND pn.nspname <> 'mover';

-- name: policies
-- To whom and for what; the conditions are in words_policies.
SELECT format('policy %%I.%%I.%%I', n.nspname, c.relname, p.polname) AS key,
       concat_ws(' ', p.polcmd, CASE WHEN p.polpermissive THEN 'permissive' ELSE 'restrictive' END,
                 ARRAY(SELECT coalesce(r.rolname::text, 'public') FROM unnest(p.polroles) role
                         LEFT JOIN pg_roles r ON r.oid = role ORDER BY 1)::text) AS text
  FROM pg_policy p
  JOIN pg_class c ON c.oid = p.polrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = ANY(%(schemas)s);

-- name: sequences
-- Their parameters and owning columns, never their values.
SELECT format('sequence %%I.%%I', n.nspname, c.relname) AS key,
       concat_ws(' ', format_type(s.seqtypid, NULL), s.seqstart, s.seqincrement, s.seqmin, s.seqmax, s.seqcache,
                 s.seqcycle,
                 (SELECT format('owned by %%I.%%I.%%I', tn.nspname, t.relname, a.attname)
                    FROM pg_depend d
                    JOIN pg_class t ON t.oid = d.refobjid
                    JOIN pg_namespace tn ON tn.oid = t.relnamespace
                    JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = d.refobjsubid
                   WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.objsubid = 0
                     AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i'))) AS text
  FROM pg_sequence s
  JOIN pg_class c ON c.oid = s.seqrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = ANY(%(schemas)s);

-- name: functions
-- Signatures and properties; settings are written as SET clauses. Bodies come from function_bodies.
SELECT format('function %%I.%%I(%%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)) AS key,
       concat_ws(' ', p.prokind, l.lanname, pg_get_function_arguments(p.oid),
                 'returns ' || pg_get_function_result(p.oid), p.provolatile, p.proparallel, p.proisstrict,
                 p.prosecdef, p.proleakproof,
                 (SELECT string_agg('SET ' || regexp_replace(s, '=', ' = '), ' ' ORDER BY s)
                    FROM unnest(p.proconfig) s)) AS text
  FROM pg_proc p
  JOIN pg_namespace n ON n.oid = p.pronamespace
  JOIN pg_language l ON l.oid = p.prolang
 WHERE n.nspname = ANY(%(schemas)s)
   AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid
                      AND d.deptype = 'e');

-- name: function_bodies
-- Source texts; standard SQL bodies are in words_functions.
SELECT format('body %%I.%%I(%%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)) AS key,
       l.lanname::text AS language, p.prosrc AS text
  FROM pg_proc p
  JOIN pg_namespace n ON n.oid = p.pronamespace
  JOIN pg_language l ON l.oid = p.prolang
 WHERE n.nspname = ANY(%(schemas)s) AND p.prosqlbody IS NULL
   AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid
                      AND d.deptype = 'e');

-- name: words_functions
-- Standard SQL bodies.
SELECT format('body %%I.%%I(%%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)) AS key,
       pg_get_function_sqlbody(p.oid) AS text
  FROM pg_proc p
  JOIN pg_namespace n ON n.oid = p.pronamespace
 WHERE n.nspname = ANY(%(schemas)s) AND p.prosqlbody IS NOT NULL;

-- name: words_views
-- Queries of views.
SELECT format('view %%I.%%I', n.nspname, c.relname) AS key, pg_get_viewdef(c.oid) AS text
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = ANY(%(schemas)s) AND c.relkind IN ('v', 'm');

-- name: words_rules
-- Rules on tables and views.
SELECT format('rule %%I.%%I.%%I', n.nspname, c.relname, r.rulename) AS key,
       concat_ws(' ', pg_get_ruledef(r.oid), r.ev_enabled) AS text
  FROM pg_rewrite r
  JOIN pg_class c ON c.oid = r.ev_class
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = ANY(%(schemas)s) AND r.rulename <> '_RETURN';

-- name: words_policies
-- Conditions of policies.
SELECT format('policy condition %%I.%%I.%%I', n.nspname, c.relname, p.polname) AS key,
       concat_ws(' with check ', pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid))
         AS text
  FROM pg_policy p
  JOIN pg_class c ON c.oid = p.polrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = ANY(%(schemas)s);
