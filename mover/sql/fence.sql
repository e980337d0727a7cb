-- The fence: one tenant's writes at one place held back, refused, or let through.
--
-- A place is (tenant, vertical); {name} is its hash, and {key} the same hash as an advisory lock's key.
-- The state stands in a row, for people and for compare-and-swap, and in a sequence, for the guard: a
-- sequence's last_value is read without a snapshot, so that an old REPEATABLE READ or SERIALIZABLE
-- transaction cannot be fooled. States in the sequence: 1 open, 2 closed, 3 aborted, 4 moved.

-- name: install
-- Makes the guard functions; may be repeated. Locks nothing of the application's.
CREATE SEQUENCE IF NOT EXISTS mover.{state_sequence} MINVALUE 1 MAXVALUE 4 NO CYCLE;
CREATE SEQUENCE IF NOT EXISTS mover.{refused_sequence};

CREATE OR REPLACE FUNCTION mover.{wait_function}() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = {wait_ms}
AS $wait$
BEGIN
    PERFORM pg_advisory_xact_lock_shared({key});
EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION USING ERRCODE = '40001', MESSAGE = 'tenant {tenant} is being moved',
        HINT = 'Retry the transaction.';
END
$wait$;

CREATE OR REPLACE FUNCTION mover.{guard_function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $guard$
DECLARE
    state bigint;
    deadline timestamptz;
BEGIN
    -- The quick way needs no subtransaction; it fails when the fence is being closed or is held.
    IF NOT pg_try_advisory_xact_lock_shared({key}) THEN
        deadline := clock_timestamp() + interval '1 ms' * {wait_ms};
        PERFORM mover.{wait_function}();
    END IF;
    LOOP
        SELECT last_value INTO state FROM mover.{state_sequence};
        IF state = 1 THEN
            RETURN NULL;
        END IF;
        IF state = 4 THEN
            PERFORM nextval('mover.{refused_sequence}');
            RAISE EXCEPTION USING ERRCODE = '25006', MESSAGE = 'tenant {tenant} has moved',
                HINT = 'Reload the tenant''s route and retry there.';
        END IF;
        -- Closed without a living owner, who would hold the lock: somebody takes over soon.
        deadline := coalesce(deadline, clock_timestamp() + interval '1 ms' * {wait_ms});
        IF clock_timestamp() > deadline THEN
            RAISE EXCEPTION USING ERRCODE = '40001', MESSAGE = 'tenant {tenant} is being moved',
                HINT = 'Retry the transaction.';
        END IF;
        PERFORM pg_sleep(0.02);
    END LOOP;
END
$guard$;

-- A statement trigger knows no tenant: it tells the stream that the table was emptied, and fails while
-- the fence is closed rather than making every tenant wait.
CREATE OR REPLACE FUNCTION mover.{truncate_function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $truncate$
DECLARE
    state bigint;
    root regclass := pg_partition_root(TG_RELID);
    truncated jsonb := jsonb_build_array(TG_TABLE_SCHEMA, TG_TABLE_NAME);
BEGIN
    IF NOT pg_try_advisory_xact_lock_shared({key}) THEN
        RAISE EXCEPTION USING ERRCODE = '40001', MESSAGE = 'tenant {tenant} is being moved',
            HINT = 'Retry the transaction.';
    END IF;
    SELECT last_value INTO state FROM mover.{state_sequence};
    IF state = 1 THEN
        IF root <> TG_RELID THEN  -- the table first, then which of its partitions
            SELECT jsonb_build_array(n.nspname, c.relname) || truncated INTO truncated
              FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = root;
        END IF;
        PERFORM pg_logical_emit_message(true, 'mover.truncate', truncated::text);
    ELSIF state <> 4 THEN
        RAISE EXCEPTION USING ERRCODE = '40001', MESSAGE = 'tenant {tenant} is being moved',
            HINT = 'Retry the transaction.';
    END IF;
    RETURN NULL;
END
$truncate$;

-- A row to which owned rows refer changed its tenant: theirs come or go with it, without a change of their
-- own. Or another tenant's gave its values up, which the next row may take while rows still refer to them.
-- The arguments are the message's prefix and the numbers of the columns referred to, which outlive a new
-- name. Dates are written as they are in the stream, whatever the writer's DateStyle.
CREATE OR REPLACE FUNCTION mover.{tell_function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET datestyle = 'ISO, YMD'
AS $tell$
DECLARE
    referenced name;
    value text;
    was jsonb := '{{}}';
    is_now jsonb := '{{}}';
BEGIN
    FOR referenced IN
        SELECT attname FROM pg_attribute WHERE attrelid = TG_RELID AND attnum = ANY (TG_ARGV[1:]::int2[])
    LOOP
        EXECUTE format('SELECT ($1).%I::text', referenced) INTO value USING OLD;
        was := was || jsonb_build_object(referenced, value);
        IF TG_OP = 'UPDATE' THEN
            EXECUTE format('SELECT ($1).%I::text', referenced) INTO value USING NEW;
            is_now := is_now || jsonb_build_object(referenced, value);
        END IF;
    END LOOP;
    PERFORM pg_logical_emit_message(true, TG_ARGV[0],
        jsonb_build_array(TG_TABLE_SCHEMA, TG_TABLE_NAME, was, is_now)::text);
    RETURN NULL;
END
$tell$;

-- name: owned_function
-- Whether a row with these values is the tenant's: looked up in the rows that it refers to, as they are now,
-- which is why it is VOLATILE. They are locked FOR SHARE until the writer's transaction ends, so that none
-- changes its tenant or parent under it; where the transaction sees older rows, and one has changed since, it
-- fails rather than being fooled. Depends on the columns, not on their names.
-- A trigger's condition is evaluated with the rights of whoever writes, and defaults may leave out PUBLIC.
CREATE OR REPLACE FUNCTION mover.{owned_function}({parameters}) RETURNS boolean
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT {owned};
END;
GRANT EXECUTE ON FUNCTION mover.{owned_function}({parameters}) TO PUBLIC

-- name: owned_functions
-- The functions of this place that look owners up.
SELECT p.oid::regprocedure::text FROM pg_proc p
 WHERE p.pronamespace = 'mover'::regnamespace AND starts_with(p.proname, %(prefix)s)

-- name: drop_owned_function
-- After the triggers that call it; repeatable.
DROP FUNCTION IF EXISTS {function}

-- name: guard_table
-- AFTER ROW, one trigger per operation: a BEFORE trigger costs other tenants WAL even when WHEN is false.
-- ENABLE ALWAYS: session_replication_role = replica must not pass. The mover's own sessions are told apart
-- in WHEN, so that no event is queued for the rows they load. Locks: SHARE ROW EXCLUSIVE on the table,
-- under our lock timeout. Repeatable; the caller asks the catalog first, so as not to take the lock.
-- A partitioned table's row triggers stand on its partitions as well, those that come later included.
CREATE OR REPLACE TRIGGER {insert_trigger} AFTER INSERT ON {table} FOR EACH ROW
    WHEN (current_setting('mover.tenant', true) IS DISTINCT FROM {tenant_value} AND {inserted})
    EXECUTE FUNCTION mover.{guard_function}();
CREATE OR REPLACE TRIGGER {update_trigger} AFTER UPDATE ON {table} FOR EACH ROW
    WHEN (current_setting('mover.tenant', true) IS DISTINCT FROM {tenant_value} AND {updated})
    EXECUTE FUNCTION mover.{guard_function}();
CREATE OR REPLACE TRIGGER {delete_trigger} AFTER DELETE ON {table} FOR EACH ROW
    WHEN (current_setting('mover.tenant', true) IS DISTINCT FROM {tenant_value} AND {deleted})
    EXECUTE FUNCTION mover.{guard_function}();
CREATE OR REPLACE TRIGGER {truncate_trigger} AFTER TRUNCATE ON {table} FOR EACH STATEMENT
    EXECUTE FUNCTION mover.{truncate_function}();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {insert_trigger};
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {update_trigger};
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {delete_trigger};
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {truncate_trigger};

-- name: tell_of_rehoming
-- On a table to which owned rows refer. Locks as above; repeatable.
CREATE OR REPLACE TRIGGER {rehome_trigger} AFTER UPDATE ON {table} FOR EACH ROW
    WHEN (OLD.{column} IS DISTINCT FROM NEW.{column}
          AND (OLD.{column} = {tenant_value} OR NEW.{column} = {tenant_value})
          AND current_setting('mover.tenant', true) IS DISTINCT FROM {tenant_value})
    EXECUTE FUNCTION mover.{tell_function}('mover.rehome', {numbers});
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {rehome_trigger};

-- name: tell_of_vacating
-- Where a foreign key of the owned rows is DEFERRABLE, so that they may wait for the next row with the same
-- values. The tenant's own rows are in the stream. Locks as above; repeatable.
CREATE OR REPLACE TRIGGER {rekey_trigger} AFTER UPDATE ON {table} FOR EACH ROW
    WHEN (OLD.{column} IS DISTINCT FROM {tenant_value} AND ROW({old_values}) IS DISTINCT FROM ROW({new_values})
          AND current_setting('mover.tenant', true) IS DISTINCT FROM {tenant_value})
    EXECUTE FUNCTION mover.{tell_function}('mover.vacate', {numbers});
CREATE OR REPLACE TRIGGER {vacate_trigger} AFTER DELETE ON {table} FOR EACH ROW
    WHEN (OLD.{column} IS DISTINCT FROM {tenant_value}
          AND current_setting('mover.tenant', true) IS DISTINCT FROM {tenant_value})
    EXECUTE FUNCTION mover.{tell_function}('mover.vacate', {numbers});
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {rekey_trigger};
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {vacate_trigger};

-- name: column_numbers
-- Reads only.
SELECT attnum FROM pg_attribute
 WHERE attrelid = format('%%I.%%I', %(schema)s::text, %(name)s::text)::regclass AND attname = ANY (%(names)s)
 ORDER BY attnum

-- name: guard_partition
-- A statement trigger fires for the named table only: whoever truncates a partition names just that.
-- Locks: SHARE ROW EXCLUSIVE on the partition, under our lock timeout; repeatable.
CREATE OR REPLACE TRIGGER {truncate_trigger} AFTER TRUNCATE ON {table} FOR EACH STATEMENT
    EXECUTE FUNCTION mover.{truncate_function}();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {truncate_trigger};

-- name: partitions
-- A partitioned table's partitions on all levels. Reads only; locks none of them.
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relispartition AND c.relkind IN ('r', 'p')
   AND pg_partition_root(c.oid) = format('%%I.%%I', %(schema)s::text, %(name)s::text)::regclass
 ORDER BY 1, 2

-- name: guarded
-- The tables that carry triggers of this place, a partitioned one before its partitions: whether all that
-- guard are there and always fire, on each of its partitions, too; and how many that tell of changes do.
-- Reads only; locks none of them.
WITH parts AS (
    SELECT c.oid, coalesce(pg_partition_root(c.oid), c.oid) AS root
      FROM pg_class c WHERE c.relkind IN ('r', 'p')
), found AS (
    SELECT t.tgrelid, count(*) FILTER (WHERE t.tgname = ANY (%(guarding)s) AND t.tgenabled = 'A') = 4 AS whole,
           count(*) FILTER (WHERE t.tgname = ANY (%(telling)s) AND t.tgenabled = 'A') AS telling,
           bool_or(t.tgparentid = 0) AS made
      FROM pg_trigger t WHERE t.tgname = ANY (%(guarding)s::name[] || %(telling)s::name[]) GROUP BY t.tgrelid
)
SELECT n.nspname, c.relname,
       (SELECT coalesce(bool_and(coalesce(f.whole, false)), false)
          FROM parts p LEFT JOIN found f ON f.tgrelid = p.oid WHERE p.root = c.oid),
       m.telling
  FROM found m
  JOIN pg_class c ON c.oid = m.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE m.made
 ORDER BY c.relispartition

-- name: unguard_table
-- Locks: ACCESS EXCLUSIVE on the table and its partitions, under our lock timeout; repeatable.
DROP TRIGGER IF EXISTS {insert_trigger} ON {table};
DROP TRIGGER IF EXISTS {update_trigger} ON {table};
DROP TRIGGER IF EXISTS {delete_trigger} ON {table};
DROP TRIGGER IF EXISTS {truncate_trigger} ON {table};
DROP TRIGGER IF EXISTS {rehome_trigger} ON {table};
DROP TRIGGER IF EXISTS {rekey_trigger} ON {table};
DROP TRIGGER IF EXISTS {vacate_trigger} ON {table};

-- name: stop_telling
-- Locks as above; repeatable.
DROP TRIGGER IF EXISTS {rehome_trigger} ON {table};
DROP TRIGGER IF EXISTS {rekey_trigger} ON {table};
DROP TRIGGER IF EXISTS {vacate_trigger} ON {table};

-- name: uninstall
-- After the last trigger; repeatable.
DROP FUNCTION IF EXISTS mover.{guard_function}();
DROP FUNCTION IF EXISTS mover.{truncate_function}();
DROP FUNCTION IF EXISTS mover.{tell_function}();
DROP FUNCTION IF EXISTS mover.{wait_function}();
DROP SEQUENCE IF EXISTS mover.{state_sequence};
DROP SEQUENCE IF EXISTS mover.{refused_sequence};

-- name: record
-- Under the owner's row. The place's row, in the state that this migration begins with; taken over from
-- an earlier migration, whose tombstone is remembered in case the tenant does not come back after all.
-- Repeatable: this migration's own state stays, and the sequence is set to it.
WITH recorded AS (
    INSERT INTO mover.fence AS f (name, tenant, vertical, state, epoch, migration)
    VALUES (%(name)s, %(tenant)s, %(vertical)s, %(state)s, %(epoch)s, %(migration)s)
    ON CONFLICT (name) DO UPDATE
       SET state = CASE WHEN f.migration = excluded.migration THEN f.state ELSE excluded.state END,
           tombstone_of = CASE WHEN f.migration = excluded.migration THEN f.tombstone_of
                               WHEN f.state = 'moved' THEN f.migration END,
           epoch = excluded.epoch, migration = excluded.migration
    RETURNING state
)
SELECT setval(%(sequence)s::regclass, array_position('{open,closed,aborted,moved}'::text[], state))
  FROM recorded

-- name: transition
-- One compare-and-swap, at the owner's epoch: no row comes back when the state or the owner is another.
-- The sequence is set under the row's lock, but at once and for good, whatever becomes of the
-- transaction; a caller who may repeat a change therefore lists the new state among the old ones, which
-- also waits for an earlier try that is still running. The mark, if there is one, stands in the stream
-- where this transaction commits. A session that holds the tenant's writers lets them go with any other
-- change than closing: the sequence tells them the new state before it is durable, which is harmless
-- whatever becomes of the commit.
WITH own AS (
    SELECT 1 FROM mover.owner WHERE migration = %(migration)s AND epoch = %(epoch)s FOR SHARE
), changed AS (
    UPDATE mover.fence AS f SET state = %(new)s, epoch = %(epoch)s FROM own
     WHERE f.name = %(name)s AND f.migration = %(migration)s AND f.state = ANY (%(old)s)
    RETURNING 1
)
SELECT setval(%(sequence)s::regclass, array_position('{open,closed,aborted,moved}'::text[], %(new)s)),
       CASE WHEN %(mark)s <> '' THEN pg_logical_emit_message(true, 'mover.mark', %(mark)s) END,
       CASE WHEN %(new)s <> 'closed' THEN (SELECT true FROM pg_advisory_unlock_all()) END
  FROM changed

-- name: row
-- Reads only.
SELECT migration, state, tombstone_of FROM mover.fence WHERE name = %(name)s

-- name: holders
-- Who holds the tenant's shared lock, that is: has written and not ended, with the transaction's age in
-- seconds. A prepared transaction holds it without a backend. For people, never a query's text.
SELECT coalesce('pid ' || l.pid, 'prepared transaction ' || p.transaction),
       extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, p.prepared))::float8 AS age
  FROM pg_locks l
  LEFT JOIN pg_stat_activity a USING (pid)
  LEFT JOIN pg_locks x ON l.pid IS NULL AND x.pid IS NULL AND x.locktype = 'transactionid'
        AND x.virtualtransaction = l.virtualtransaction
  LEFT JOIN pg_prepared_xacts p ON p.transaction = x.transactionid
 WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.classid::bigint = (%(key)s::bigint >> 32) & 4294967295
   AND l.objid::bigint = %(key)s::bigint & 4294967295
 ORDER BY age DESC

-- name: end_session
-- A holding session of which the owner does not know what it still does; waits until it is gone.
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
 WHERE pid = %(pid)s AND application_name = %(application_name)s
