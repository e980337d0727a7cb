"""Customer relations: accounts and their people, a pipeline, meetings in shared rooms, an audit trail."""

from __future__ import annotations

from tests.support.applications import Application

DDL = r"""
create type lead_source as enum ('web', 'fair', 'word of mouth', 'it''s a "secret"');
create type stage_kind as enum ('open', 'won', 'lost');
create type postal_address as (street text, city text, code varchar(10));
create domain email_address as text check (value ~ '^[^@ ]+@[^@ ]+$' and value = lower(value));
create domain share as numeric(5, 4) default 0 check (value between 0 and 1);
create sequence case_numbers start 1000 increment 3;

create function set_updated_at() returns trigger language plpgsql as $$
begin
    new.updated_at := clock_timestamp();
    return new;
end $$;

create table accounts (
    id         bigint generated always as identity primary key,
    tenant_id  uuid not null,
    name       text not null constraint name_is_there check (btrim(name) <> ''),
    parent_id  bigint references accounts on delete set null,
    address    postal_address,
    billing    jsonb not null default '{}',
    tags       text[] not null default '{}',
    source     lead_source,
    search     tsvector generated always as (
        setweight(to_tsvector('simple', name), 'A')
        || setweight(to_tsvector('simple', coalesce(billing ->> 'note', '')), 'B')) stored,
    updated_at timestamptz not null default now(),
    constraint not_its_own_parent check (parent_id <> id)
);
create index accounts_of_tenant on accounts (tenant_id, id);
create index accounts_search on accounts using gin (search);
create index accounts_billing on accounts using gin (billing jsonb_path_ops);
create index accounts_tags on accounts using gin (tags);
create unique index accounts_name_once on accounts (tenant_id, lower(name)) where parent_id is null;
comment on table accounts is 'Whoever may buy; "it''s" a tree';
comment on column accounts.address is 'Where letters go';
comment on index accounts_search is 'For the search box';
comment on constraint not_its_own_parent on accounts is 'Longer circles are the application''s business';

create table people (
    tenant_id   uuid not null,
    email       email_address not null,
    "Full Name" text collate "C",
    birthday    date,
    phones      varchar(30)[] check (cardinality(phones) <= 3),
    photo       bytea,
    updated_at  timestamptz not null default now(),
    primary key (tenant_id, email)
);
alter table people alter photo set storage external;
comment on column people."Full Name" is 'As on the card';

create table account_people (
    tenant_id  uuid not null,
    account_id bigint not null references accounts on delete cascade,
    email      email_address not null,
    role       text not null default 'contact',
    weight     share,
    primary key (tenant_id, account_id, email),
    foreign key (tenant_id, email) references people on update cascade on delete cascade
);

create table stages (
    tenant_id  uuid not null,
    id         smallint not null,
    position   integer not null,
    kind       stage_kind not null default 'open',
    name       text not null,
    primary key (tenant_id, id),
    constraint stage_positions unique (tenant_id, position) deferrable initially deferred
);

create table opportunities (
    id         bigserial primary key,
    tenant_id  uuid not null,
    account_id bigint not null references accounts,
    stage      smallint not null,
    number     bigint not null default nextval('case_numbers'),
    amount     numeric(14, 2) not null check (amount >= 0),
    likely     share,
    expected   numeric(14, 2) generated always as (amount * likely) stored,
    closes     daterange,
    notes      text,
    updated_at timestamptz not null default now(),
    unique (tenant_id, number),
    foreign key (tenant_id, stage) references stages on update cascade deferrable
);
alter table opportunities alter notes set storage external;
create index opportunities_open on opportunities (tenant_id, account_id) include (amount) where stage < 3;

create table complaints (
    tenant_id  uuid not null,
    number     bigint not null default nextval('case_numbers'),
    account_id bigint references accounts on delete set null,
    severity   "char" not null default 'n',
    said       text not null,
    primary key (tenant_id, number)
);

create table meetings (
    id         uuid primary key default gen_random_uuid(),
    tenant_id  uuid not null,
    rooms      int4range not null,
    held       tstzrange not null check (not isempty(held)),
    constraint one_meeting_a_room exclude using gist (rooms with &&, held with &&)
        deferrable initially deferred
);
comment on constraint one_meeting_a_room on meetings is 'The building is everybody''s';

create table audit (
    id         bigint generated always as identity,
    tenant_id  uuid not null,
    at         timestamptz not null default clock_timestamp(),
    operation  text not null,
    relation   text not null,
    before     jsonb,
    after      jsonb,
    primary key (tenant_id, id)
);
create function note() returns trigger language plpgsql security definer set search_path from current as $$
declare
    old_row jsonb := case when tg_op <> 'INSERT' then to_jsonb(old) end;
    new_row jsonb := case when tg_op <> 'DELETE' then to_jsonb(new) end;
begin
    insert into audit (tenant_id, operation, relation, before, after)
    values ((coalesce(new_row, old_row) ->> 'tenant_id')::uuid, tg_op, tg_table_name, old_row, new_row);
    return null;
end $$;

create trigger account_updated before update on accounts
    for each row when (old.name is distinct from new.name) execute function set_updated_at();
create trigger person_updated before update on people for each row execute function set_updated_at();
create trigger opportunity_updated before update of stage, amount on opportunities
    for each row execute function set_updated_at();
create trigger accounts_audit after insert or update or delete on accounts
    for each row execute function note();
create trigger opportunities_audit after insert or update or delete on opportunities
    for each row execute function note();
create trigger people_audit after update on people for each row execute function note();
alter table people disable trigger people_audit;

create view pipeline as
    select o.tenant_id, s.name, count(*) as deals, sum(o.expected) as expected
      from opportunities o join stages s on (s.tenant_id, s.id) = (o.tenant_id, o.stage)
     group by o.tenant_id, s.name;
create view birthdays with (security_barrier) as
    select tenant_id, email, "Full Name", birthday from people where birthday is not null;
comment on view pipeline is 'What the board shows';
create function worth(account bigint) returns numeric language sql stable set search_path from current as $$
    select coalesce(sum(amount * likely), 0) from opportunities where account_id = account
$$;
comment on function worth is 'Weighted';

grant select, insert, update, delete
    on accounts, people, account_people, stages, opportunities, complaints, meetings to app;
grant select on pipeline, audit to app;
grant select (email, birthday) on birthdays to app;
grant usage on sequence case_numbers, opportunities_id_seq to app;
revoke execute on function worth(bigint) from public;
grant execute on function worth(bigint) to app;
"""

ROWS = r"""
insert into accounts (tenant_id, name, address, billing, tags, source)
select %(t)s, 'account ' || g, row('Way ' || g, E'a\\b\tc', g)::postal_address,
       jsonb_build_object('note', 'pays ' || g, 'odd', E'\u00e4"\\\n', 'n', g / 3.0),
       array['x' || g %% 7, null], (enum_range(null::lead_source))[1 + g %% 4]
  from generate_series(1, 120) g;
update accounts a set parent_id = p.id
  from accounts p
 where a.tenant_id = %(t)s and p.tenant_id = %(t)s and a.name like '%%5' and p.name = 'account 1';
insert into people
select %(t)s, 'p' || g || '@example.org', 'Person ' || g, date '1970-01-01' - g * 1000, array['+' || g],
       decode(repeat(md5(g::text), 120), 'hex')
  from generate_series(1, 80) g;
insert into account_people
select %(t)s, id, 'p' || 1 + id %% 80 || '@example.org', 'contact', 0.5 from accounts where tenant_id = %(t)s;
insert into stages
select %(t)s, g, g * 10, case g when 4 then 'won' when 5 then 'lost' else 'open' end::stage_kind,
       'stage ' || g
  from generate_series(1, 5) g;
insert into opportunities (tenant_id, account_id, stage, amount, likely, closes, notes)
select %(t)s, id, 1 + id %% 5, id * 1.1, 0.25, daterange('2026-01-01', '2026-01-02'::date + id::int %% 90),
       repeat(md5(id::text), 90)
  from accounts where tenant_id = %(t)s;
insert into complaints (tenant_id, account_id, said)
select %(t)s, id, 'late' from accounts where tenant_id = %(t)s and id %% 3 = 0;
insert into meetings (tenant_id, rooms, held)
select %(t)s, int4range(%(k)s * 10, %(k)s * 10 + 2), tstzrange(h, h + '1 hour')
  from generate_series('2026-01-01 UTC'::timestamptz, '2026-01-03 UTC', '1 hour') h;
"""

_ACCOUNT = "(select id from accounts where tenant_id = %(t)s order by id offset %(n)s %% 100 limit 1)"
_PERSON = "(select email from people where tenant_id = %(t)s order by email offset %(n)s %% 80 limit 1)"
CHANGES = (
    "insert into accounts (tenant_id, name, billing, source)"
    """ values (%(t)s, 'new ' || %(n)s, '{"note": "new"}', 'fair')""",
    f"update accounts set name = name || '!', billing = '[null]' where id = {_ACCOUNT}",
    f"update accounts set tags = tags || array['y'], address = row(null, '', '1') where id = {_ACCOUNT}",
    f"delete from opportunities where account_id = {_ACCOUNT} and number %% 2 = %(n)s %% 2",
    "delete from accounts where tenant_id = %(t)s"
    " and id = (select max(id) from accounts where tenant_id = %(t)s and name like 'new %%')",
    # A key that others follow by a cascade; the photo is too large for the row, and not in the stream.
    f"update people set email = 'n' || %(n)s || '@example.org' where tenant_id = %(t)s and email = {_PERSON}",
    "update people set phones = array['+' || %(n)s::text], birthday = 'infinity'"
    f" where tenant_id = %(t)s and email = {_PERSON}",
    # Positions are swapped, each of which is unique at commit.
    "update stages set position = 60 - position where tenant_id = %(t)s and id in (1, 5)",
    "insert into opportunities (tenant_id, account_id, stage, amount, likely)"
    f" select %(t)s, {_ACCOUNT}, 1, %(n)s / 100.0, 1",
    "update opportunities set stage = 1 + %(n)s %% 5, amount = amount + 1, likely = 1.0 / (1 + %(n)s %% 9)"
    " where id = (select id from opportunities where tenant_id = %(t)s"
    " order by id offset %(n)s %% 90 limit 1)",
    f"insert into complaints (tenant_id, account_id, said) select %(t)s, {_ACCOUNT}, 'again'",
    "update complaints set number = nextval('case_numbers'), severity = 'h' where tenant_id = %(t)s"
    " and number = (select min(number) from complaints where tenant_id = %(t)s)",
    # Two meetings swap their hours: each is in the other's way until both have moved.
    "update meetings set held = case id when a then theirs else ours end from"
    " (select a.id as a, a.held as ours, b.id as b, b.held as theirs from meetings a join meetings b"
    " on a.id < b.id and a.rooms && b.rooms where a.tenant_id = %(t)s and b.tenant_id = %(t)s"
    " order by a.id, b.id offset %(n)s %% 1000 limit 1) pair where id in (a, b)",
)

# Notes belong to whom the opportunity belongs to.
OWNED_DDL = """
create table opportunity_notes (
    opportunity_id bigint not null references opportunities on delete cascade,
    line           smallint not null,
    note           text,
    primary key (opportunity_id, line)
);
grant select, insert, update, delete on opportunity_notes to app;
create view noted as
    select o.tenant_id, o.number, n.*
      from opportunity_notes n join opportunities o on o.id = n.opportunity_id;
grant select on noted to app;
"""
OWNED_ROWS = """
insert into opportunity_notes
select id, g, 'note ' || g from opportunities, generate_series(1, 2) g where tenant_id = %(t)s;
"""
OWNED_CHANGES = (
    "insert into opportunity_notes select id, 100 + %(n)s %% 900, 'said ' || %(n)s from opportunities"
    " where tenant_id = %(t)s order by id offset %(n)s %% 40 limit 1 on conflict do nothing",
    "update opportunity_notes set note = note || %(n)s where opportunity_id = (select id from opportunities"
    " where tenant_id = %(t)s order by id offset %(n)s %% 40 limit 1)",
    "update opportunity_notes set opportunity_id ="
    " (select max(id) from opportunities where tenant_id = %(t)s) where line = 100 + %(n)s %% 50"
    " and opportunity_id in (select id from opportunities where tenant_id = %(t)s)",
)

CRM = Application(
    "crm",
    DDL + OWNED_DDL,
    ROWS + OWNED_ROWS,
    CHANGES + OWNED_CHANGES,
    shared_numbers=(
        (
            "select max(number) from (select number from opportunities"
            " union all select number from complaints) n",
            "case_numbers",
        ),
    ),
)
