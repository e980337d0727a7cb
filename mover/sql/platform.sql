-- The platform database: queue, leases, journal, decision, and what the API asks.
-- `{columns}` are the columns of one Migration, `{organizations}` is the user's routing table.

-- name: durable_session
-- Takes no locks. Every commit here is a promise (epochs, the decision): never asynchronous, and never
-- weaker than what the server was set to. Repeatable.
select set_config('synchronous_commit',
                  case when current_setting('synchronous_commit') = 'remote_apply'
                       then 'remote_apply' else 'on' end, false)

-- name: claim
-- Locks the one row it takes; SKIP LOCKED, so that claimers pass each other by, and a row that changed
-- meanwhile is checked again under its lock. Repeated after a lost answer it takes another migration, or
-- the same one once the unanswered lease has ended.
with due as (
    select m.id as due_id
      from platform.tenant_migrations m
     where (m.status in ('queued', 'in_progress', 'monitoring', 'rolling_back')
            or m.status = 'paused' and m.started_at is not null
            or m.status in ('completed', 'rolled_back') and m.tombstone_check_at <= now())
       and (m.status <> 'queued' or m.scheduled_at is null or m.scheduled_at <= now())
       and (m.lease_until is null or m.lease_until <= now())
       and (m.not_before is null or m.not_before <= now())
       and case when m.status in ('monitoring', 'paused') then %(watches)s
                else %(moves)s or m.phase = 'cutover' and m.status in ('in_progress', 'rolling_back') end
     order by coalesce(m.phase = 'cutover' and m.status in ('in_progress', 'rolling_back'), false) desc,
              m.priority desc, m.created_at, m.id
     limit 1
       for update skip locked)
update platform.tenant_migrations
   set owner = %(owner)s,
       epoch = epoch + 1,
       lease_until = now() + make_interval(secs => %(lease_seconds)s),
       not_before = null,
       status = case when status = 'queued' then 'in_progress' else status end,
       started_at = coalesce(started_at, now())
  from due
 where id = due.due_id
returning epoch, extract(epoch from now() - switched_at)::float8 as switched_ago_s, {columns}

-- name: heartbeat
-- Locks the migration's row. Extends from now on, so repeating it only moves the lease forward.
update platform.tenant_migrations
   set lease_until = now() + make_interval(secs => %(lease_seconds)s)
 where id = %(id)s and epoch = %(epoch)s
returning wish

-- name: release
-- Locks the migration's row. Only the epoch's owner can end its own lease; repeating it changes nothing
-- but the back-off's start. A wish that has come meanwhile waits for a second at most; one that was paused and
-- is not any more does not wait for whoever has looked after it.
update platform.tenant_migrations
   set owner = null,
       lease_until = null,
       not_before = case when %(after_seconds)s::float8 > 0 and (status = 'paused') = %(was_paused)s
                         then now() + least(make_interval(secs => %(after_seconds)s),
                                            case when wish is not null then interval '1 second' end) end
 where id = %(id)s and epoch = %(epoch)s
returning id

-- name: lock_claim
-- FOR UPDATE until commit: the epoch cannot rise, nor the status change, beside what follows. Repeatable.
select status, phase, wish, switched_at is not null as switched, rolled_back_at is not null as returned,
       tenant_id
  from platform.tenant_migrations
 where id = %(id)s and epoch = %(epoch)s
   for update

-- name: enter_phase
-- Runs under lock_claim. Sets values, so it may be repeated. A phase that goes on has no error; what is
-- being undone keeps the reason. No wish is heard any more once the source is being cleaned.
update platform.tenant_migrations
   set phase = %(phase)s,
       wish = case when %(phase)s <> 'cleanup' then wish end,
       error = case when status = 'rolling_back' then error end
 where id = %(id)s

-- name: note_error
-- Locks the migration's row. Sets a value, so it may be repeated.
update platform.tenant_migrations set error = %(error)s
 where id = %(id)s and epoch = %(epoch)s
returning id

-- name: set_status
-- Runs under lock_claim or lock_migration, after the change was checked. Stamps keep their first value,
-- so it may be repeated. Notes may hold a URL: they go when nothing of ours is left to be found with it.
update platform.tenant_migrations
   set status = %(status)s,
       notes = case when %(status)s in ('failed', 'cancelled', 'rolled_back') then '{}' else notes end,
       wish = null,
       error = coalesce(%(error)s::jsonb, case when %(status)s <> 'completed' then error end),
       outcome = coalesce(%(outcome)s, outcome),
       completed_at = case when %(status)s = 'completed' then coalesce(completed_at, now())
                           else completed_at end,
       rolled_back_at = case when %(status)s = 'rolled_back' then coalesce(rolled_back_at, now())
                             else rolled_back_at end
 where id = %(id)s

-- name: begin_step
-- FOR SHARE on the migration's row until commit. Begun again, a step keeps its place in the journal.
with owner as (
    select id from platform.tenant_migrations where id = %(id)s and epoch = %(epoch)s for share)
insert into platform.migration_steps as s (migration_id, name, status, started_at)
select id, %(name)s, 'running', clock_timestamp() from owner
    on conflict (migration_id, name) do update
   set status = 'running', started_at = excluded.started_at, ended_at = null, detail = null,
       attempts = s.attempts + 1
returning 1

-- name: end_step
-- FOR SHARE on the migration's row until commit. Sets values, so it may be repeated; a step that was
-- never begun is written whole.
with owner as (
    select id from platform.tenant_migrations where id = %(id)s and epoch = %(epoch)s for share)
insert into platform.migration_steps (migration_id, name, status, started_at, ended_at, detail)
select id, %(name)s, %(status)s, clock_timestamp(), clock_timestamp(), %(detail)s from owner
    on conflict (migration_id, name) do update
   set status = excluded.status, ended_at = excluded.ended_at, detail = excluded.detail
returning 1

-- name: claimed_steps
-- FOR SHARE on the migration's row: one row without a step when the claim holds and nothing was begun.
with owner as (
    select id from platform.tenant_migrations where id = %(id)s and epoch = %(epoch)s for share)
select s.name, s.status, s.started_at, s.detail,
       extract(epoch from s.ended_at - s.started_at)::float8 * 1000 as duration_ms
  from owner left join platform.migration_steps s on s.migration_id = owner.id
 order by s.id

-- name: append_event
-- FOR NO KEY UPDATE on the migration's row before the id is drawn: within a migration ids commit in
-- order, so that a reader who asks for what follows its last id misses nothing. Repeated, it appends twice.
with owner as (
    select id from platform.tenant_migrations
     where id = %(id)s and epoch = %(epoch)s for no key update)
insert into platform.migration_events (migration_id, level, message, facts)
select id, %(level)s, %(message)s, %(facts)s from owner
returning 1

-- name: append_desk_event
-- Runs under lock_migration, hence in order (see append_event).
insert into platform.migration_events (migration_id, level, message, facts)
values (%(id)s, 'info', %(message)s, %(facts)s)

-- name: trigger
-- Runs under lock_claim. No row where something is wished for already, or nothing can be rolled back; so it may
-- be repeated: the status here decides whether it was switched, and only one trigger is for afterwards. One that is
-- paused has nobody at work who would hear a wish.
with wished as (
    update platform.tenant_migrations
       set wish = case when status <> 'paused' then 'rollback' end,
           status = case when status = 'paused' then 'rolling_back' else status end,
           outcome = case when status = 'paused' then 'rolled_back' else outcome end,
           error = %(error)s,
           notes = notes || jsonb_build_object('trigger', %(trigger)s::text)
     where id = %(id)s and wish is null
       and status = any(case when %(trigger)s = 'error_rate_spike' then '{monitoring}'
                             else '{in_progress,paused}' end::text[])
    returning id
), audited as (
    insert into platform.audit (who, role, action, subject, result, facts)
    select 'mover', 'admin', 'rollback: ' || %(trigger)s, id::text, 'ok', %(audited)s from wished
)
select id from wished

-- name: tombstone
-- Locks the migration's row. The quiet time begins anew when the number of refused writes has changed,
-- so repeating it changes nothing but the time of the next check.
update platform.tenant_migrations
   set tombstone_since = case when tombstone_refused is distinct from %(refused)s then now()
                              else coalesce(tombstone_since, now()) end,
       tombstone_refused = %(refused)s,
       tombstone_check_at = now() + make_interval(secs => %(check_again_seconds)s)
 where id = %(id)s and epoch = %(epoch)s
returning extract(epoch from now() - tombstone_since)::float8 as quiet_seconds

-- name: end_tombstone
-- Locks the migration's row. Repeatable.
update platform.tenant_migrations set tombstone_check_at = null, notes = '{}'
 where id = %(id)s and epoch = %(epoch)s
returning id

-- name: load_progress
-- FOR SHARE on the migration's row. Reads only.
select progress from platform.tenant_migrations where id = %(id)s and epoch = %(epoch)s for share

-- name: save_progress
-- Locks the migration's row. Sets a value, so it may be repeated.
update platform.tenant_migrations set progress = %(progress)s
 where id = %(id)s and epoch = %(epoch)s
returning id

-- name: save_plan
-- Locks the migration's row. Sets a value, so it may be repeated.
update platform.tenant_migrations set plan = %(plan)s
 where id = %(id)s and epoch = %(epoch)s
returning id

-- name: load_plan
-- FOR SHARE on the migration's row. Reads only.
select plan from platform.tenant_migrations where id = %(id)s and epoch = %(epoch)s for share

-- name: save_note
-- Locks the migration's row. Sets one key, so it may be repeated.
update platform.tenant_migrations
   set notes = notes || jsonb_build_object(%(key)s::text, %(value)s::jsonb)
 where id = %(id)s and epoch = %(epoch)s
returning id

-- name: load_notes
-- FOR SHARE on the migration's row. Reads only.
select notes from platform.tenant_migrations where id = %(id)s and epoch = %(epoch)s for share

-- name: switch_route
-- Runs under lock_claim; locks the tenant's route. Compares with the place that was moved from: a route
-- that somebody changed meanwhile is left alone, and no row comes back.
update {organizations}
   set vertical = %(target_vertical)s,
       isolation_tier = %(target_tier)s,
       database_url = %(target_url)s,
       updated_at = now()
 where id = %(tenant)s
   and vertical = %(source_vertical)s
   and isolation_tier = %(source_tier)s
   and (database_url is null or database_url = %(source_url)s)
returning id

-- name: record_decision
-- Runs under lock_claim, in switch_route's transaction. A rollback that came too late for the attempt is still
-- wished for.
update platform.tenant_migrations
   set status = 'monitoring', phase = 'monitor', switched_at = now(), error = null,
       wish = case when wish = 'rollback' then wish end,
       evidence = %(evidence)s
 where id = %(id)s

-- name: record_return
-- Runs under lock_claim, in switch_route's transaction.
update platform.tenant_migrations
   set rolled_back_at = now(), error = null,
       evidence = coalesce(evidence, '{}') || jsonb_build_object('return', %(evidence)s::jsonb)
 where id = %(id)s

-- name: is_switched
-- FOR SHARE on the migration's row: an older owner's decision has either committed or never will.
select switched_at is not null as switched, rolled_back_at is not null as returned
  from platform.tenant_migrations where id = %(id)s and epoch = %(epoch)s for share

-- name: submit
-- No locks beyond the new row's; the unique index over live migrations refuses a second one. No row when
-- the route is not the given source any more.
insert into platform.tenant_migrations
       (tenant_id, source_vertical, source_tier, target_vertical, target_tier, status,
        priority, scheduled_at, reason, requested_by)
select %(tenant)s, %(source_vertical)s, %(source_tier)s, %(target_vertical)s, %(target_tier)s, 'queued',
       %(priority)s, %(scheduled_at)s, %(reason)s, %(requested_by)s
 where exists (select from {organizations} o
                where o.id = %(tenant)s and o.vertical = %(source_vertical)s
                  and o.isolation_tier = %(source_tier)s)
returning {columns}

-- name: live_migration
-- Reads only.
select id, status from platform.tenant_migrations
 where tenant_id = %(tenant)s
   and status in ('pending_approval', 'queued', 'in_progress', 'paused', 'monitoring', 'rolling_back')

-- name: get
-- Reads only.
select {columns} from platform.tenant_migrations where id = %(id)s

-- name: list
-- Reads only.
select {columns} from platform.tenant_migrations
 where %(status)s::text is null or status = %(status)s
 order by created_at desc, id
 limit %(limit)s

-- name: get_with_progress
-- Reads only.
select progress, {columns} from platform.tenant_migrations where id = %(id)s

-- name: steps
-- Reads only.
select name, status, started_at, detail,
       extract(epoch from ended_at - started_at)::float8 * 1000 as duration_ms
  from platform.migration_steps where migration_id = %(id)s order by id

-- name: events
-- Reads only. Ids of one migration commit in order (append_event).
select id, at, level, message, facts from platform.migration_events
 where migration_id = %(id)s and id > %(after)s
 order by id
 limit %(limit)s

-- name: lock_migration
-- FOR UPDATE until commit: no claim, heartbeat or status change beside what follows.
select {columns} from platform.tenant_migrations where id = %(id)s for update

-- name: set_wish
-- Runs under lock_migration. Sets values, so it may be repeated. A migration that waits for its next try,
-- or was halted, is claimed at once, to hear the wish.
update platform.tenant_migrations set wish = %(wish)s, not_before = null where id = %(id)s

-- name: has_way_back
-- Reads only. False where it was found to be impossible before the switch.
select not exists (select from jsonb_array_elements(notes -> 'way_back' -> 'findings') as f
                    where not (f ->> 'warning')::boolean) as possible
  from platform.tenant_migrations where id = %(id)s

-- name: try_now
-- Runs under lock_migration. No row when the migration does not wait for a later try. Repeatable.
update platform.tenant_migrations set not_before = null
 where id = %(id)s and status in ('in_progress', 'monitoring', 'rolling_back') and not_before > now()
returning id

-- name: resume
-- Runs under lock_migration, after the change was checked.
update platform.tenant_migrations
   set status = %(status)s, wish = null, error = null, not_before = null
 where id = %(id)s

-- name: where_is
-- Reads only.
select vertical, isolation_tier, database_url from {organizations} where id = %(tenant)s

-- name: counts
-- Reads only.
select status, count(*) as migrations from platform.tenant_migrations group by status

-- name: asked
-- Written before the request is carried out. Repeated, it notes a second request.
insert into platform.audit (who, role, action, subject)
values (%(who)s, %(role)s, %(action)s, %(subject)s)
returning id

-- name: answered
-- Locks the audit line. Sets values, so it may be repeated.
update platform.audit set result = %(result)s, subject = coalesce(%(subject)s, subject), facts = %(facts)s
 where id = %(id)s
