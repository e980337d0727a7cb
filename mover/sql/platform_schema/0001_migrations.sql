-- Queue, journal, events and audit. Times are the platform database's own clock, leases included.

create table platform.tenant_migrations (
    id              uuid primary key default gen_random_uuid(),
    tenant_id       uuid not null,
    source_vertical text not null,
    source_tier     text not null check (source_tier in ('schema', 'database', 'dedicated')),
    target_vertical text not null,
    target_tier     text not null check (target_tier in ('schema', 'database', 'dedicated')),
    status          text not null check (status in (
                        'pending_approval', 'queued', 'in_progress', 'paused', 'monitoring',
                        'completed', 'failed', 'rolling_back', 'rolled_back', 'cancelled')),
    phase           text check (phase in (
                        'preflight', 'provision', 'prepare', 'copy', 'index', 'catch_up',
                        'verify', 'cutover', 'monitor', 'cleanup')),
    priority        integer not null default 0,
    scheduled_at    timestamptz,
    reason          text,
    requested_by    text not null,
    created_at      timestamptz not null default now(),
    started_at      timestamptz,
    switched_at     timestamptz,
    completed_at    timestamptz,
    rolled_back_at  timestamptz,
    error           jsonb,
    wish            text check (wish in ('pause', 'cancel')),
    outcome         text,
    owner           text,
    epoch           bigint not null default 0,
    lease_until     timestamptz,
    not_before      timestamptz,
    progress        jsonb not null default '{}',
    plan            jsonb,
    notes           jsonb not null default '{}',
    evidence        jsonb,
    -- The place that the tenant left keeps refusing writes until nobody has tried for long enough.
    tombstone_check_at timestamptz,  -- null: there is none (any more)
    tombstone_since    timestamptz,  -- the last refused write that was noticed, or the completion
    tombstone_refused  bigint,
    check ((status = 'monitoring') <= (switched_at is not null))
) with (fillfactor = 60);  -- heartbeats and progress rewrite the row about once a second

comment on column platform.tenant_migrations.epoch is
    'Rises at every claim; whoever carries an older one may commit nothing';
comment on column platform.tenant_migrations.switched_at is
    'The decision: set in the transaction that changed the route';

create unique index tenant_migrations_one_live on platform.tenant_migrations (tenant_id)
    where status in ('pending_approval', 'queued', 'in_progress', 'paused', 'monitoring', 'rolling_back');

create index tenant_migrations_claimable on platform.tenant_migrations (priority desc, created_at, id)
    where status in ('queued', 'in_progress', 'monitoring', 'rolling_back');

create index tenant_migrations_tombstones on platform.tenant_migrations (tombstone_check_at)
    where status = 'completed';

create index tenant_migrations_newest on platform.tenant_migrations (created_at desc, id);

create table platform.migration_steps (
    id           bigint generated always as identity,
    migration_id uuid not null references platform.tenant_migrations on delete cascade,
    name         text not null,
    status       text not null check (status in ('running', 'done', 'failed')),
    attempts     integer not null default 1,
    started_at   timestamptz not null,
    ended_at     timestamptz,
    detail       text,
    primary key (migration_id, name)
);

create table platform.migration_events (
    id           bigserial primary key,
    migration_id uuid not null references platform.tenant_migrations on delete cascade,
    at           timestamptz not null default clock_timestamp(),
    level        text not null,
    message      text not null,
    facts        jsonb not null default '{}'
);

create index migration_events_tail on platform.migration_events (migration_id, id);

create table platform.audit (
    id       bigserial primary key,
    at       timestamptz not null default clock_timestamp(),
    who      text not null,
    role     text not null,
    action   text not null,
    subject  text,           -- migration or tenant
    result   text,           -- 'ok' or an error code; null: the daemon died before it answered
    facts    jsonb not null default '{}'
);
