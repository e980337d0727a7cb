"""Both sides as a managed server gives them: roles with no more rights than the README lists, and a schema
in which triggers and foreign keys of every kind act."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import uuid4

import psycopg

from mover.core.ids import Capture, TenantId
from mover.demo import rights
from mover.demo.schema import schemas
from mover.demo.stage import Stage
from tests.support.acceptance import CORE, ESTATE, Home, Scene


@dataclass(frozen=True)
class Roles:
    """The mover's role on each home; `urls` reach the homes by it."""

    scene: Scene
    names: Mapping[str, str]

    @property
    def urls(self) -> dict[str, str]:
        return {
            vertical: home.url.replace("postgres@", f"{self.names[vertical]}@")
            for vertical, home in self.scene.homes.items()
        }

    def stage(self) -> Stage:
        """A daemon that reaches the homes by these roles only."""
        stage = self.scene.stage()
        stage.verticals = self.urls
        stage.write_config()
        return stage


@contextmanager
def ordinary_roles(scene: Scene) -> Iterator[Roles]:
    """The tables' owners and the mover's roles, which own nothing at the end."""
    suffix = uuid4().hex[:8]
    names = {vertical: f"mover_{vertical}_{suffix}" for vertical in scene.homes}
    try:
        for vertical, home in scene.homes.items():
            _make(home, names[vertical], f"owner_{vertical}_{suffix}", scene.capture)
        yield Roles(scene, names)
    finally:
        for vertical, home in scene.homes.items():
            for role in (names[vertical], f"owner_{vertical}_{suffix}"):
                home.execute(f"reassign owned by {role} to postgres")
                home.execute(f"drop owned by {role}")
                home.execute(f"drop role {role}")


def _make(home: Home, mover: str, owner: str, capture: Capture) -> None:
    of_source = home.vertical == CORE
    with psycopg.connect(home.url, autocommit=True) as conn:
        replication = of_source and capture is Capture.WAL
        rights.make_role(conn, mover, owner, replication=replication)
        rights.give_away(conn, owner, schemas(home.vertical).values())
        if of_source:
            rights.grant_on_source(conn, mover, owner)
        else:
            rights.grant_on_target(conn, mover, owner, with_tables=bool(home.tables))


# A garden: foreign keys with every action, to itself and (with `cycle`) in a circle, and triggers that would
# be seen if they fired again. `mover.tenant` is what our sessions can be told by.
GARDEN = """
create table {dms}.beds (
    tenant_id uuid not null, id int primary key, name text, best int,
    unique (tenant_id, name)
);
create table {dms}.plants (
    tenant_id uuid not null, id int primary key,
    bed int references {dms}.beds on delete cascade on update cascade,
    parent int references {dms}.plants on delete cascade,
    neighbour int references {dms}.plants on delete set null,
    twin int references {dms}.plants,
    note text, touched int not null default 0
);
create index on {dms}.plants (bed);
create index on {dms}.plants (parent);
create index on {dms}.plants (neighbour);
create index on {dms}.plants (twin);
create table {dms}.leaves (
    tenant_id uuid not null, plant int not null references {dms}.plants on delete cascade on update cascade,
    number int not null, bed int default 1 references {dms}.beds on delete set null on update cascade,
    primary key (plant, number)
);
create table {dms}.fruits (
    tenant_id uuid not null, id int primary key,
    plant int not null references {dms}.plants deferrable initially deferred
);
create index on {dms}.fruits (plant);
create index on {dms}.leaves (bed);
create table {dms}.marks (
    tenant_id uuid not null, bed int references {dms}.beds on delete cascade, what text
);
create index on {dms}.marks (bed);
create table {dms}.diary (
    tenant_id uuid not null, id int generated always as identity, what text not null,
    primary key (tenant_id, id)
);
create function {dms}.note_it() returns trigger language plpgsql as $$
begin
    if tg_op = 'DELETE' then
        insert into {dms}.diary (tenant_id, what) values (old.tenant_id, tg_table_name || ' ' || tg_op);
        return old;
    end if;
    insert into {dms}.diary (tenant_id, what) values (new.tenant_id, tg_table_name || ' ' || tg_op);
    return new;
end $$;
create function {dms}.count_it() returns trigger language plpgsql as $$
begin
    new.touched := new.touched + 1;
    return new;
end $$;
create trigger count_it before insert or update on {dms}.plants
    for each row {when} execute function {dms}.count_it();
create trigger note_it after insert or update on {dms}.leaves
    for each row {when} execute function {dms}.note_it();
create trigger note_end after delete on {dms}.plants for each row
    when (current_setting('mover.tenant', true) is null) execute function {dms}.note_it();
grant all on all tables in schema {dms} to app;
"""
CYCLE = """
alter table {dms}.beds
    add constraint best_plant foreign key (best) references {dms}.plants on delete set null;
"""
KNOWS_US = "when (current_setting('mover.tenant', true) is null)"
PLANTS = """
insert into {dms}.beds select '{tenant}', {first} + g, 'bed ' || g from generate_series(1, 20) g;
insert into {dms}.plants (tenant_id, id, bed, parent, neighbour, twin)
select '{tenant}', {first} + g, {first} + 1 + g % 20,
       case when g % 3 > 0 and g < 3000 then {first} + g + 1 end,
       {first} + 1 + (g * 7) % 3000, case when g % 5 = 0 then {first} + 1 + (g * 11) % 3000 end
  from generate_series(1, 3000) g;
insert into {dms}.leaves select tenant_id, id, n, bed from {dms}.plants, generate_series(1, 2) n
 where tenant_id = '{tenant}';
insert into {dms}.fruits
select tenant_id, id, id from {dms}.plants where tenant_id = '{tenant}' and id % 4 = 0;
insert into {dms}.marks
select tenant_id, bed, 'mark' from {dms}.plants where tenant_id = '{tenant}' and id % 9 = 0;
"""


def plant(scene: Scene, *, shared: bool) -> None:
    """In core with rows of two tenants, and the second one's in the target, where it exists already."""
    for number, (vertical, home) in enumerate(scene.homes.items()):
        if vertical == ESTATE and not shared:
            continue
        names = {"dms": schemas(vertical)["dms"], "when": KNOWS_US if shared else ""}
        with psycopg.connect(home.url, autocommit=True) as conn:
            conn.execute(GARDEN.format(**names))
            if not shared:
                conn.execute(CYCLE.format(**names))
            tenants = [scene.tenant, scene.tenants[1].id] if vertical == CORE else [uuid4()]
            for place, tenant in enumerate(tenants):
                first = (2 * number + place) * 100_000
                conn.execute(PLANTS.format(tenant=tenant, first=first, **names))


def make_triggers_know_us(scene: Scene) -> None:
    """The way out that preflight names."""
    for vertical, home in scene.homes.items():
        home.execute(
            f"create or replace trigger documents_touch before update on {vertical}_dms.documents"
            f" for each row {KNOWS_US} execute function {vertical}_dms.touch()"
        )


PACE_S = 0.01  # people do other things, too


class Gardener:
    """Writes one transaction after the other until the place refuses."""

    def __init__(self, home: Home, tenant: TenantId, seed: int = 0) -> None:
        self.home, self.tenant = home, tenant
        self.random = random.Random(seed)
        self.transactions = 0
        self._next = 10_000

    async def work(self) -> None:
        options = f"-c search_path={schemas(self.home.vertical)['dms']}"
        async with await psycopg.AsyncConnection.connect(self.home.app_url.reveal(), options=options) as conn:
            while True:
                try:
                    for _ in range(self.random.randint(1, 3)):
                        await self._write(conn)
                    await conn.commit()
                    self.transactions += 1
                    await asyncio.sleep(PACE_S)
                except psycopg.errors.ReadOnlySqlTransaction:
                    return
                except psycopg.errors.RestrictViolation:
                    await conn.rollback()
                except (psycopg.errors.IntegrityError, psycopg.errors.OperationalError) as error:
                    if (error.sqlstate or "")[:2] not in ("23", "40"):
                        raise
                    await conn.rollback()

    async def _write(self, conn: psycopg.AsyncConnection) -> None:
        self._next += 10
        named = {
            "t": self.tenant,
            "new": self._next,
            "some": self.random.randint(1, 3000),
            "other": self.random.randint(1, 3000),
            "bed": self.random.randint(1, 20),
        }
        await conn.execute(self.random.choice(DEEDS), named)


DEEDS = (
    # Children before their parents, and rows that refer to each other, in one statement.
    "insert into plants (tenant_id, id, bed, parent, neighbour, twin) values"
    " (%(t)s, %(new)s, %(bed)s, %(new)s + 1, %(new)s + 2, %(new)s + 2),"
    " (%(t)s, %(new)s + 1, %(bed)s, null, %(new)s, null),"
    " (%(t)s, %(new)s + 2, %(bed)s, %(new)s + 1, null, %(new)s)",
    "with p as (insert into plants (tenant_id, id, bed) values (%(t)s, %(new)s, %(bed)s) returning id)"
    " insert into leaves select %(t)s, id, 1, %(bed)s from p",
    # Cascades: to the same table, to others, and to rows that leave their parent in the same statement.
    "update plants set twin = null where tenant_id = %(t)s and twin = %(some)s",
    "delete from plants where tenant_id = %(t)s and id = %(some)s",
    "delete from plants where tenant_id = %(t)s and id >= 10000 and id %% 10 < 3",
    "with d as (delete from plants where tenant_id = %(t)s and id = %(some)s and parent is null returning id)"
    " update plants set parent = null where tenant_id = %(t)s and parent in (select id from d)",
    "with d as (delete from plants where tenant_id = %(t)s and id = %(some)s returning id)"
    " update leaves set plant = %(other)s, number = 100 + number + %(new)s from d where plant = d.id",
    # Keys that take their children's with them.
    "update plants set id = %(new)s where tenant_id = %(t)s and id = %(some)s and not exists"
    " (select from plants p where p.tenant_id = %(t)s and %(some)s in (p.parent, p.neighbour, p.twin))",
    "update beds set id = id + 100, name = name || '+' where tenant_id = %(t)s"
    " and id = (select max(id) from beds where tenant_id = %(t)s and id between 16 and 20 and %(some)s < 60)",
    "delete from beds where tenant_id = %(t)s and id = 100 + %(bed)s and %(some)s < 300",
    # Unique values that swap, and ordinary changes.
    "update beds set name = case id when 1 then 'b' else 'a' end where tenant_id = %(t)s and id in (1, 2)"
    " and name not in ('a', 'b')",
    "update plants set note = repeat('x', 3000), bed = %(bed)s"
    " where tenant_id = %(t)s and id %% 50 = %(bed)s",
    "update leaves set bed = %(bed)s where tenant_id = %(t)s and plant = %(some)s",
    "insert into marks select %(t)s, id, 'mark' from beds where tenant_id = %(t)s and id = %(bed)s",
    "insert into fruits select %(t)s, %(new)s, id from plants where tenant_id = %(t)s and id = %(some)s",
    "delete from fruits where tenant_id = %(t)s and plant = %(some)s",
    "delete from fruits where tenant_id = %(t)s and id %% 30 = %(bed)s",
)
