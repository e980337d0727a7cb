"""The databases as a managed server gives them: the application's objects belong to an ordinary role, and the
mover reaches them by another, which has what the README lists and nothing more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, LiteralString, TypeAlias

import psycopg
from psycopg import sql

Connection: TypeAlias = psycopg.Connection[Any]


def make_role(conn: Connection, mover: str, owner: str, *, replication: bool) -> None:
    names = {"mover": sql.Identifier(mover), "owner": sql.Identifier(owner)}
    conn.execute(sql.SQL("CREATE ROLE {owner} NOLOGIN").format(**names))
    conn.execute(
        sql.SQL("CREATE ROLE {mover} LOGIN {replication}").format(
            **names, replication=sql.SQL("REPLICATION" if replication else "")
        )
    )


def give_away(conn: Connection, owner: str, schemas: Iterable[str]) -> None:
    """Whatever the application made there belongs to `owner`."""
    for (statement,) in conn.execute(_GIVE_AWAY, {"schemas": list(schemas), "owner": owner}).fetchall():
        conn.execute(statement)


def grant_on_source(conn: Connection, mover: str, owner: str) -> None:
    _grant(conn, mover, owner, "GRANT {owner} TO {mover}", _CREATE)


def grant_on_target(conn: Connection, mover: str, owner: str, *, with_tables: bool) -> None:
    """`with_tables`: the application's are there already, and belong to `owner`."""
    _grant(conn, mover, owner, _CREATE, *_REFERENCES, *(["GRANT {owner} TO {mover}"] if with_tables else []))


def _grant(conn: Connection, mover: str, owner: str, *statements: LiteralString) -> None:
    names = {"mover": mover, "owner": owner, "database": conn.info.dbname}
    quoted = {kind: sql.Identifier(name) for kind, name in names.items()}
    for statement in statements:
        conn.execute(sql.SQL(statement).format(**quoted))


_CREATE = "GRANT CREATE ON DATABASE {database} TO {mover}"
_REFERENCES = (
    "GRANT USAGE ON SCHEMA shared TO {mover}",
    "GRANT SELECT, REFERENCES ON shared.countries TO {mover}",
)
_GIVE_AWAY = """
SELECT format('ALTER SCHEMA %%I OWNER TO %%I', nspname, %(owner)s::text)
  FROM pg_namespace WHERE nspname = ANY (%(schemas)s::text[])
UNION ALL
SELECT format('ALTER %%s %%s OWNER TO %%I', CASE c.relkind WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END,
              c.oid::regclass, %(owner)s::text)
  FROM pg_class c
 WHERE c.relnamespace::regnamespace::text = ANY (%(schemas)s::text[]) AND c.relkind IN ('r', 'p', 'v')
UNION ALL
SELECT format('ALTER ROUTINE %%s OWNER TO %%I', p.oid::regprocedure, %(owner)s::text)
  FROM pg_proc p WHERE p.pronamespace::regnamespace::text = ANY (%(schemas)s::text[])
UNION ALL
SELECT format('ALTER TYPE %%s OWNER TO %%I', t.oid::regtype, %(owner)s::text)
  FROM pg_type t WHERE t.typnamespace::regnamespace::text = ANY (%(schemas)s::text[]) AND t.typtype = 'e'
"""
