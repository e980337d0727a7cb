"""The README's example for applications follows a tenant that moves."""

from __future__ import annotations

import re
from pathlib import Path
from uuid import UUID

import psycopg
from psycopg_pool import AsyncConnectionPool

TENANT = UUID("817b5ba9-2999-4c6a-8dd5-bd010605c51c")
ROUTES = f"""
create schema auth;
create table auth.organizations (id uuid, vertical text, isolation_tier text, database_url text);
insert into auth.organizations values ('{TENANT}', 'core', 'schema', null);
"""
DOCUMENTS = """
create schema {vertical}_dms;
create table {vertical}_dms.documents (id int primary key, title text);
insert into {vertical}_dms.documents values (1, 'old');
"""
# The tenant leaves while the transaction runs: refused here, and from now on routed elsewhere.
LEFT = """
create function core_dms.refuse() returns trigger language plpgsql as $$
begin
    raise exception using errcode = '25006', message = 'tenant has moved';
end $$;
create trigger refuse after update on core_dms.documents for each row execute function core_dms.refuse();
"""
SWITCHED = "update auth.organizations set vertical = 'realestate', isolation_tier = 'database'"


def example() -> dict[str, object]:
    (code,) = re.findall(r"^```python\n(.*?)^```$", Path("README.md").read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def titles(url: str, schema: str) -> list[str]:
    with psycopg.connect(url) as conn:
        return [title for (title,) in conn.execute(f"select title from {schema}.documents")]


async def test_the_example_writes_where_the_tenant_lives_now(pg16, make_database):
    platform, core, realestate = (make_database(pg16) for _ in range(3))
    for url, script in (
        (platform, ROUTES),
        (core, DOCUMENTS.format(vertical="core")),
        (realestate, DOCUMENTS.format(vertical="realestate")),
    ):
        with psycopg.connect(url) as conn:
            conn.execute(script)
    names = example()
    async with (
        AsyncConnectionPool(platform, open=False) as routes,
        AsyncConnectionPool(core, open=False) as old,
        AsyncConnectionPool(realestate, open=False) as new,
    ):
        places = names["Places"](routes, {"core": old, "realestate": new})
        await names["rename"](places, TENANT, 1, "before")
        assert titles(core, "core_dms") == ["before"]

        load_route, loaded = places.load_route, []

        async def load_and_switch(tenant):
            loaded.append(await load_route(tenant))
            if len(loaded) == 1:
                with psycopg.connect(core) as conn:
                    conn.execute(LEFT)
                with psycopg.connect(platform) as conn:
                    conn.execute(SWITCHED)
            return loaded[-1]

        places.load_route = load_and_switch
        await names["rename"](places, TENANT, 1, "after")
    assert [route.vertical for route in loaded] == ["core", "realestate"]
    assert titles(core, "core_dms") == ["before"]
    assert titles(realestate, "realestate_dms") == ["after"]
