"""What an operator has said of the objects of schemas, and what belongs to tables besides rows: plain SQL."""

from __future__ import annotations

from collections.abc import Iterable

import psycopg
from psycopg import sql

OBJECTS = """
with named as (
  select 'pg_namespace'::regclass as classid, oid as objid, oid as namespace from pg_namespace
   union all select 'pg_class'::regclass, oid, relnamespace from pg_class
   union all select 'pg_proc'::regclass, oid, pronamespace from pg_proc
   union all select 'pg_type'::regclass, oid, typnamespace from pg_type
   union all select 'pg_constraint'::regclass, oid, connamespace from pg_constraint
   union all
  select 'pg_trigger'::regclass, t.oid, c.relnamespace from pg_trigger t join pg_class c on c.oid = t.tgrelid
   union all
  select 'pg_policy'::regclass, p.oid, c.relnamespace from pg_policy p join pg_class c on c.oid = p.polrelid
), ours as (
  select n.* from named n join pg_namespace s on s.oid = n.namespace where s.nspname = any(%(schemas)s)
), found as (
  select 'comment' as kind, o.classid, o.objid, d.objsubid, d.description as text
    from ours o join pg_description d on (d.classoid, d.objoid) = (o.classid, o.objid)
   union all
  select 'privilege', o.classid, o.objid, a.objsubid,
         a.privilege_type || ' to ' || case a.grantee when 0 then 'public' else a.grantee::regrole::text end
         || case when a.is_grantable then ' with grant option' else '' end
    from ours o
   cross join lateral (
     select 0 as objsubid, x.* from pg_class c, aclexplode(c.relacl) x
      where o.classid = 'pg_class'::regclass and c.oid = o.objid and x.grantee <> c.relowner
      union all
     select t.attnum, x.* from pg_attribute t, aclexplode(t.attacl) x
      where o.classid = 'pg_class'::regclass and t.attrelid = o.objid
      union all
     select 0, x.* from pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) x
      where o.classid = 'pg_proc'::regclass and p.oid = o.objid
      union all
     select 0, x.* from pg_namespace n, aclexplode(n.nspacl) x
      where o.classid = 'pg_namespace'::regclass and n.oid = o.objid and x.grantee <> n.nspowner) a
   union all
  select 'trigger', o.classid, o.objid, 0, t.tgenabled::text || ' ' || pg_get_triggerdef(t.oid)
    from ours o join pg_trigger t on t.oid = o.objid and o.classid = 'pg_trigger'::regclass
   where not t.tgisinternal and t.tgname not like 'mover%%'
   union all
  select 'policy', o.classid, o.objid, 0, pg_get_expr(p.polqual, p.polrelid)
    from ours o join pg_policy p on p.oid = o.objid and o.classid = 'pg_policy'::regclass
   union all
  select 'view', o.classid, o.objid, 0, c.reloptions::text
    from ours o join pg_class c on c.oid = o.objid and o.classid = 'pg_class'::regclass and c.relkind = 'v'
)
select kind, i.type || ' ' || i.identity, text
  from found f cross join lateral pg_identify_object(f.classid, f.objid, f.objsubid) i
"""


def objects(url: str, schemas: Iterable[str]) -> set[tuple[str, str, str]]:
    """Comments, privileges, triggers, policies and views: what each is, of which object, its text."""
    with psycopg.connect(url) as conn:
        return {
            (kind, identity, text or "")
            for kind, identity, text in conn.execute(OBJECTS, {"schemas": list(schemas)})
        }


def views(url: str, schema: str, tenant: object) -> dict[str, list[tuple[object, ...]]]:
    """What each view shows of a tenant."""
    with psycopg.connect(url) as conn:
        names = conn.execute("select viewname from pg_views where schemaname = %s", (schema,)).fetchall()
        query = sql.SQL("select v::text from {} v where tenant_id = %s order by 1")
        return {
            name: conn.execute(query.format(sql.Identifier(schema, name)), (tenant,)).fetchall()
            for (name,) in names
        }
