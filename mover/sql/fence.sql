-- The fence: one tenant's writes at one place held back, refused, or let through.
--
-- A place is (tenant, vertical); {name} is its hash, and {key} the same hash as an advisory lock's key.
-- The state stands in a row, for people and for compare-and-swap, and in a sequence, for the guard: a
-- sequence is read without a snapshot, so that an old REPEATABLE READ or SERIALIZABLE transaction cannot be
-- fooled; quickest by the function behind pg_sequences.last_value. States in the sequence: 1 open, 2 closed,
-- 3 aborted, 4 moved.

-- name: install
-- Makes the guard functions; may be repeated. Locks nothing of the application's.
CREATE SEQUENCE IF NOT EXISTS mover.{state_sequence} MINVALUE 1 MAXVALUE 4 NO CYCLE;
CREATE SEQUENCE IF NOT EXISTS mover.{refused_sequence};
-- NULL until the place is opened, and again when the tenant has left: in between somebody follows what is written.
CREATE SEQUENCE IF NOT EXISTS mover.{opened_sequence};
-- Set to 2 before an owner of rows comes from another tenant; NULL until then.
CREATE SEQUENCE IF NOT EXISTS mover.{owners_sequence} MINVALUE 1 MAXVALUE 2 NO CYCLE;
-- The same of an owner that is owned itself, and is given another one.
CREATE SEQUENCE IF NOT EXISTS mover.{parents_sequence} MINVALUE 1 MAXVALUE 2 NO CYCLE;

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

-- The slow way of a writer: whether the fence is open; false when the tenant has moved.
CREATE OR REPLACE FUNCTION mover.{ask_function}() RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $ask$
DECLARE
    state bigint;
    deadline timestamptz := clock_timestamp() + interval '1 ms' * {wait_ms};
BEGIN
    IF NOT pg_try_advisory_xact_lock_shared({key}) THEN
        PERFORM mover.{wait_function}();
    END IF;
    LOOP
        state := pg_sequence_last_value('mover.{state_sequence}');
        IF state IN (1, 4) THEN
            RETURN state = 1;
        END IF;
        -- Closed without a living owner, who would hold the lock: somebody takes over soon.
        IF clock_timestamp() > deadline THEN
            RAISE EXCEPTION USING ERRCODE = '40001', MESSAGE = 'tenant {tenant} is being moved',
                HINT = 'Retry the transaction.';
        END IF;
        PERFORM pg_sleep(0.02);
    END LOOP;
END
$ask$;

CREATE OR REPLACE FUNCTION mover.{refuse_function}() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $refuse$
BEGIN
    PERFORM nextval('mover.{refused_sequence}');
    RAISE EXCEPTION USING ERRCODE = '25006', MESSAGE = 'tenant {tenant} has moved',
        HINT = 'Reload the tenant''s route and retry there.';
END
$refuse$;

-- name: guard_function
-- One for all tables with a tenant column; owned tables have their own, which look at their rows again.
-- Repeatable; locks nothing of the application's.
CREATE OR REPLACE FUNCTION mover.{function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $guard$
BEGIN
    {let_pass}
    RETURN NULL;
END
$guard$

-- name: let_pass
-- In the guard functions: returns for the mover's own rows, and goes on where the fence is open, the tenant's
-- lock taken. The quick way needs no subtransaction; it fails when the fence is being closed or is held. CASE,
-- since it keeps the order: the state counts under the lock.
IF current_setting('mover.tenant', true) = {tenant_value} THEN
        RETURN NULL;
    END IF;
    IF (CASE WHEN pg_try_advisory_xact_lock_shared({key})
             THEN pg_sequence_last_value('mover.{state_sequence}') END) IS DISTINCT FROM 1
    THEN
        IF NOT mover.{ask_function}() THEN
            {moved};
        END IF;
    END IF;

-- name: let_pass_in_doubt
-- The same for rows of which it may be in doubt whose they are. At a place that was not opened yet nobody waits
-- for the tenant's rows to come: who is in doubt goes on, to be waited for and read when it is closed again.
IF current_setting('mover.tenant', true) = {tenant_value} THEN
        RETURN NULL;
    END IF;
    IF (CASE WHEN pg_try_advisory_xact_lock_shared({key})
             THEN pg_sequence_last_value('mover.{state_sequence}') END) IS DISTINCT FROM 1
    THEN
        IF pg_sequence_last_value('mover.{opened_sequence}') IS NULL
           AND pg_sequence_last_value('mover.{state_sequence}') <> 4 AND ({ours}) IS NOT TRUE
        THEN
            PERFORM mover.{wait_function}();
        ELSIF NOT mover.{ask_function}() THEN
            {moved};
        END IF;
    END IF;

-- name: refuse
-- Where the tenant has moved. Locks nothing.
PERFORM mover.{refuse_function}()

-- name: refuse_if_ours
-- The same for a row of which it was in doubt whose it is: behind the fence the look-up tells. Locks owners as
-- it does; but what is older than the pause may hide an owner.
IF {ours} THEN
                PERFORM mover.{refuse_function}();
            ELSIF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
                RAISE EXCEPTION USING ERRCODE = '40001', MESSAGE = 'tenant {tenant} has moved',
                    HINT = 'Retry the transaction.';
            END IF;
            RETURN NULL

-- name: truncate_function
-- A statement trigger knows no tenant: it tells that the table was emptied, and fails while the fence is
-- closed rather than making every tenant wait. Repeatable; locks nothing of the application's.
CREATE OR REPLACE FUNCTION mover.{truncate_function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $truncate$
DECLARE
    state bigint;
    root regclass := coalesce(pg_partition_root(TG_RELID), TG_RELID);
BEGIN
    IF NOT pg_try_advisory_xact_lock_shared({key}) THEN
        RAISE EXCEPTION USING ERRCODE = '40001', MESSAGE = 'tenant {tenant} is being moved',
            HINT = 'Retry the transaction.';
    END IF;
    state := pg_sequence_last_value('mover.{state_sequence}');
    IF state = 1 THEN
        {told};
    ELSIF state <> 4 THEN
        RAISE EXCEPTION USING ERRCODE = '40001', MESSAGE = 'tenant {tenant} is being moved',
            HINT = 'Retry the transaction.';
    END IF;
    RETURN NULL;
END
$truncate$

-- name: tell_function
-- A row to which owned rows refer changed its tenant: theirs come or go with it, without a change of their
-- own. Or another tenant's gave its values up, which the next row may take while rows still refer to them.
-- The arguments are the message's prefix and the numbers of the columns referred to, which outlive a new
-- name. Dates are written as they are in the stream, whatever the writer's DateStyle; messages are not converted
-- to the reader's encoding. By the types' output functions: a cast may be somebody else's.
CREATE OR REPLACE FUNCTION mover.{tell_function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET datestyle = 'ISO, YMD'
AS $tell$
DECLARE
    written CONSTANT text := 'SELECT CASE WHEN ($1).%1$I IS DISTINCT FROM NULL THEN format(''%%s'', ($1).%1$I) END';
    referenced name;
    value text;
    was jsonb := '{{}}';
    is_now jsonb := '{{}}';
BEGIN
    FOR referenced IN
        SELECT attname FROM pg_attribute WHERE attrelid = TG_RELID AND attnum = ANY (TG_ARGV[1:]::int2[])
    LOOP
        EXECUTE format(written, referenced) INTO value USING OLD;
        was := was || jsonb_build_object(referenced, value);
        IF TG_OP = 'UPDATE' THEN
            EXECUTE format(written, referenced) INTO value USING NEW;
            is_now := is_now || jsonb_build_object(referenced, value);
        END IF;
    END LOOP;
    PERFORM pg_logical_emit_message(true, TG_ARGV[0],
        convert_to(jsonb_build_array(TG_TABLE_SCHEMA, TG_TABLE_NAME, was, is_now)::text, 'UTF8'));
    RETURN NULL;
END
$tell$

-- name: truncate_in_stream
-- The table first, then which of its partitions it was.
PERFORM pg_logical_emit_message(true, 'mover.truncate', convert_to((
    SELECT jsonb_build_array(n.nspname, c.relname) || CASE WHEN root <> TG_RELID
           THEN jsonb_build_array(TG_TABLE_SCHEMA, TG_TABLE_NAME) ELSE '[]' END
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = root)::text, 'UTF8'))

-- name: owner_view
-- The rows that one foreign key of an owned table refers to, and whether each is the tenant's. Depends on the
-- columns, not on their names: the functions that read it stay right when somebody renames one. Its name stands
-- for all that it depends on, so one that is there is right, and need not be locked to be made anew.
CREATE VIEW mover.{owner_view} AS SELECT {referenced}, {ours} AS ours FROM {table} AS o

-- name: collations
-- Of these columns, in their order. Reads only.
SELECT n.nspname, c.collname
  FROM unnest(%(names)s::name[]) WITH ORDINALITY AS r (name, place)
  JOIN pg_attribute a ON a.attrelid = %(relation)s::oid AND a.attname = r.name
  LEFT JOIN pg_collation c ON c.oid = a.attcollation
  LEFT JOIN pg_namespace n ON n.oid = c.collnamespace
 ORDER BY r.place

-- name: owned_function
-- Whether a row with these values is the tenant's: looked up in the rows that it refers to, as they are now;
-- NULL where that is in doubt, which it is not where the tenant has moved.
-- Nobody may be fooled about that until its transaction ends, and others should not be in each other's way
-- for it. An owner is locked FOR KEY SHARE, as an insertion's foreign key does, so that it can neither go nor
-- give its key to another; what changes whose it is waits for those locks (hand_over_function).
-- plpgsql keeps the plans, which are most of the cost.
-- A trigger's condition is evaluated with the rights of whoever writes, and defaults may leave out PUBLIC.
CREATE OR REPLACE FUNCTION mover.{owned_function}({parameters}, coming boolean) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $owned$
DECLARE
    is_ours boolean;
    is_found boolean;
    has_changed boolean;
    in_doubt boolean := false;
BEGIN
    {ties}
    IF in_doubt THEN
        IF pg_sequence_last_value('mover.{state_sequence}') <> 4 THEN
            RETURN NULL;
        ELSIF current_setting('transaction_isolation') IN ('repeatable read', 'serializable')
              AND current_setting('session_replication_role') = 'replica'
        THEN
            -- What is older than the owner does not see it, and no foreign key stops the row.
            RAISE EXCEPTION USING ERRCODE = '40001', MESSAGE = 'tenant {tenant} has moved',
                HINT = 'Retry the transaction.';
        END IF;
    END IF;
    RETURN false;
END
$owned$;
GRANT EXECUTE ON FUNCTION mover.{owned_function}({parameters}, boolean) TO PUBLIC

-- name: owned_by
-- One foreign key, in the function above; locks the owner, FOR SHARE at most.
    SELECT ours INTO is_ours FROM mover.{owner_view} WHERE {chosen} FOR KEY SHARE SKIP LOCKED;
    is_found := FOUND;
    IF is_ours THEN
        RETURN true;
    END IF;
    -- What was read may be older than the lock. Asked behind it: who changes whose the owner is tells so first,
    -- and then waits for the lock.
    has_changed := coalesce(pg_sequence_last_value('mover.{owners_sequence}') = 2
                            OR {is_owned} AND pg_sequence_last_value('mover.{parents_sequence}') = 2, false);
    IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') AND (has_changed OR NOT EXISTS (
        SELECT FROM pg_trigger WHERE tgrelid = {owner_oid} AND tgfoid = to_regproc({hand_over_function})))
    THEN
        -- Fails where the owner has changed since the transaction's snapshot, which may be older than our triggers:
        -- an earlier trigger that it shows has called another function, of the same name.
        SELECT ours INTO is_ours FROM mover.{owner_view} WHERE {chosen} FOR SHARE;
        is_found := FOUND;
    ELSIF has_changed AND is_found THEN
        SELECT ours INTO is_ours FROM mover.{owner_view} WHERE {chosen};
        is_found := FOUND;
    END IF;
    IF is_found THEN
        in_doubt := in_doubt OR is_ours IS NULL;
    ELSE
        -- Somebody else holds the owner, or it is still to be made. That is not waited for: two who wait in
        -- different orders would never end. It may become the tenant's before we end, and is treated so; the
        -- guard asks again behind the fence.
        SELECT ours INTO is_ours FROM mover.{owner_view} WHERE {chosen};
        in_doubt := in_doubt OR FOUND OR coming AND {refers};
    END IF;
    IF is_ours THEN
        RETURN true;
    END IF;

-- name: uncalled
-- A function that no trigger calls goes before it is made anew, so that who sees an earlier trigger can tell:
-- between the two anybody may have changed whose an owner is. Reads only.
SELECT p.oid::regprocedure::text FROM pg_proc p
 WHERE p.oid = to_regproc(%(function)s) AND NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgfoid = p.oid)

-- name: hand_over_function
-- A row comes to the tenant, and with it those that refer to it; or it may do so later with another owner.
-- Whoever writes to those that refer to it may have looked it up when it was not the tenant's, and is waited
-- for: the row is locked against their locks. Depends on the columns, not on their names. Locks nothing of
-- the application's when made; repeatable.
CREATE OR REPLACE FUNCTION mover.{hold_function}({table}) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT FROM {table} AS o WHERE {itself} FOR UPDATE;
END;
CREATE OR REPLACE FUNCTION mover.{ours_function}({table}) RETURNS boolean
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT {ours};
END;
CREATE OR REPLACE FUNCTION mover.{hand_over_function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $hand_over$
BEGIN
    IF mover.{ours_function}(NEW) AND NOT mover.{ours_function}(OLD)
       AND pg_sequence_last_value('mover.{owners_sequence}') IS NULL
    THEN
        PERFORM setval('mover.{owners_sequence}', 2);
    END IF;
    IF {is_owned} AND pg_sequence_last_value('mover.{parents_sequence}') IS NULL THEN
        PERFORM setval('mover.{parents_sequence}', 2);
    END IF;
    PERFORM mover.{hold_function}(NEW);
    RETURN NULL;
END
$hand_over$

-- name: functions
-- Those of this place whose names begin so. Reads only.
SELECT p.oid::regprocedure::text FROM pg_proc p
 WHERE p.pronamespace = 'mover'::regnamespace AND starts_with(p.proname, %(prefix)s)

-- name: views
-- Those of this place. Reads only.
SELECT relname FROM pg_class
 WHERE relnamespace = 'mover'::regnamespace AND relkind = 'v' AND starts_with(relname, %(prefix)s)

-- name: drop_view
-- After whatever reads it; repeatable.
DROP VIEW IF EXISTS mover.{view}

-- name: drop_function
-- After whatever calls it; repeatable.
DROP FUNCTION IF EXISTS {function}

-- name: guard_table
-- AFTER ROW, one trigger per operation: a BEFORE trigger costs other tenants WAL even when WHEN is false.
-- ENABLE ALWAYS: session_replication_role = replica must not pass. WHEN is short: it is read and planned anew
-- for each statement, also of other tenants. Only where the mover loads rows it leaves those out, so that no
-- event is queued for them; and where it looks an owner up. Locks: SHARE ROW EXCLUSIVE on the table,
-- under our lock timeout. Repeatable; the caller asks the catalog first, so as not to take the lock.
-- A partitioned table's row triggers stand on its partitions as well, those that come later included.
CREATE OR REPLACE TRIGGER {insert_trigger} AFTER INSERT ON {table} FOR EACH ROW
    WHEN ({insert_condition})
    EXECUTE FUNCTION mover.{insert_function}();
CREATE OR REPLACE TRIGGER {update_trigger} AFTER UPDATE ON {table} FOR EACH ROW
    WHEN ({update_condition})
    EXECUTE FUNCTION mover.{update_function}();
CREATE OR REPLACE TRIGGER {delete_trigger} AFTER DELETE ON {table} FOR EACH ROW
    WHEN ({delete_condition})
    EXECUTE FUNCTION mover.{delete_function}();
CREATE OR REPLACE TRIGGER {truncate_trigger} AFTER TRUNCATE ON {table} FOR EACH STATEMENT
    EXECUTE FUNCTION mover.{truncate_function}();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {insert_trigger};
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {update_trigger};
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {delete_trigger};
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {truncate_trigger};

-- name: hand_over
-- On a table to which owned rows refer. Locks as above; repeatable.
CREATE OR REPLACE TRIGGER {hand_over_trigger} AFTER UPDATE ON {table} FOR EACH ROW
    WHEN (ROW({old_values}) IS DISTINCT FROM ROW({new_values}) AND {arrives}
          AND current_setting('mover.tenant', true) IS DISTINCT FROM {tenant_value})
    EXECUTE FUNCTION mover.{hand_over_function}();
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {hand_over_trigger}

-- name: tell_of_rehome
-- On a table to which owned rows refer. Locks as above; repeatable.
CREATE OR REPLACE TRIGGER {rehome_trigger} AFTER UPDATE ON {table} FOR EACH ROW
    WHEN (OLD.{column} IS DISTINCT FROM NEW.{column}
          AND (OLD.{column} = {tenant_value} OR NEW.{column} = {tenant_value})
          AND current_setting('mover.tenant', true) IS DISTINCT FROM {tenant_value})
    EXECUTE FUNCTION mover.{tell_function}('mover.rehome', {numbers});
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {rehome_trigger};

-- name: tell_of_rekey
-- Where a foreign key of the owned rows takes NO ACTION, so that they may wait for the next row with the same
-- values: as long as the statement runs, or the transaction. The tenant's own rows are in the stream. Locks
-- as above; repeatable.
CREATE OR REPLACE TRIGGER {rekey_trigger} AFTER UPDATE ON {table} FOR EACH ROW
    WHEN (OLD.{column} IS DISTINCT FROM {tenant_value} AND ROW({old_values}) IS DISTINCT FROM ROW({new_values})
          AND current_setting('mover.tenant', true) IS DISTINCT FROM {tenant_value})
    EXECUTE FUNCTION mover.{tell_function}('mover.vacate', {numbers});
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {rekey_trigger};

-- name: tell_of_vacate
-- The same of a row that goes. Locks as above; repeatable.
CREATE OR REPLACE TRIGGER {vacate_trigger} AFTER DELETE ON {table} FOR EACH ROW
    WHEN (OLD.{column} IS DISTINCT FROM {tenant_value}
          AND current_setting('mover.tenant', true) IS DISTINCT FROM {tenant_value})
    EXECUTE FUNCTION mover.{tell_function}('mover.vacate', {numbers});
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
-- guard are there and always fire, on each of its partitions, too; how many that tell of changes do; and
-- whether they write down what they let pass; and whether their conditions leave the mover's own rows out.
-- Reads only; locks none of them.
WITH parts AS (
    SELECT c.oid, coalesce(pg_partition_root(c.oid), c.oid) AS root
      FROM pg_class c WHERE c.relkind IN ('r', 'p')
), found AS (
    SELECT t.tgrelid, count(*) FILTER (WHERE t.tgname = ANY (%(guarding)s) AND t.tgenabled = 'A') = 4 AS whole,
           count(*) FILTER (WHERE t.tgname = ANY (%(telling)s) AND t.tgenabled = 'A') AS telling,
           bool_or(t.tgparentid = 0) AS made, bool_or(starts_with(p.proname, 'capture_')) AS captures,
           coalesce(bool_and(strpos(pg_get_triggerdef(t.oid), 'mover.tenant') > 0)
               FILTER (WHERE t.tgname = ANY (%(guarding)s) AND t.tgqual IS NOT NULL), false) AS spares_ours
      FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
     WHERE t.tgname = ANY (%(guarding)s::name[] || %(telling)s::name[]) GROUP BY t.tgrelid
)
SELECT n.nspname, c.relname,
       (SELECT coalesce(bool_and(coalesce(f.whole, false)), false)
          FROM parts p LEFT JOIN found f ON f.tgrelid = p.oid WHERE p.root = c.oid),
       m.telling, m.captures, m.spares_ours
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
DROP TRIGGER IF EXISTS {hand_over_trigger} ON {table};

-- name: stop_telling
-- Locks as above; repeatable.
DROP TRIGGER IF EXISTS {rehome_trigger} ON {table};
DROP TRIGGER IF EXISTS {rekey_trigger} ON {table};
DROP TRIGGER IF EXISTS {vacate_trigger} ON {table};
DROP TRIGGER IF EXISTS {hand_over_trigger} ON {table};

-- name: uninstall
-- After the last trigger; repeatable.
DROP FUNCTION IF EXISTS mover.{guard_function}();
DROP FUNCTION IF EXISTS mover.{ask_function}();
DROP FUNCTION IF EXISTS mover.{refuse_function}();
DROP FUNCTION IF EXISTS mover.{truncate_function}();
DROP FUNCTION IF EXISTS mover.{wait_function}();
DROP SEQUENCE IF EXISTS mover.{state_sequence};
DROP SEQUENCE IF EXISTS mover.{refused_sequence};
DROP SEQUENCE IF EXISTS mover.{opened_sequence};
DROP SEQUENCE IF EXISTS mover.{owners_sequence};
DROP SEQUENCE IF EXISTS mover.{parents_sequence};

-- name: record
-- Under the owner's row. The place's row, in the state that this migration begins with; taken over from
-- an earlier migration, whose tombstone is remembered in case the tenant does not come back after all; whoever still
-- clears the place for that one loses it with his owner's row, at the latest behind the batch that he is at.
-- Repeatable: this migration's own state stays, and the sequences are set to it.
WITH known AS (
    SELECT 1 FROM mover.fence WHERE name = %(name)s AND migration = %(migration)s
), disowned AS (
    DELETE FROM mover.owner o USING mover.fence f
     WHERE f.name = %(name)s AND f.migration <> %(migration)s AND o.migration = f.migration
), recorded AS (
    INSERT INTO mover.fence AS f (name, tenant, vertical, state, epoch, migration)
    VALUES (%(name)s, %(tenant)s, %(vertical)s, %(state)s, %(epoch)s, %(migration)s)
    ON CONFLICT (name) DO UPDATE
       SET state = CASE WHEN f.migration = excluded.migration THEN f.state ELSE excluded.state END,
           tombstone_of = CASE WHEN f.migration = excluded.migration THEN f.tombstone_of
                               WHEN f.state = 'moved' THEN f.migration END,
           epoch = excluded.epoch, migration = excluded.migration
    RETURNING state
)
SELECT CASE WHEN state = 'open' OR NOT EXISTS (SELECT FROM known)
            THEN setval(%(opened)s::regclass, 1, state = 'open') END,
       setval(%(sequence)s::regclass, array_position('{open,closed,aborted,moved}'::text[], state))
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
SELECT CASE WHEN setval(%(sequence)s::regclass, array_position('{open,closed,aborted,moved}'::text[], %(new)s)) = 1
            THEN setval(%(opened)s::regclass, 1)
            WHEN %(new)s <> 'closed' THEN setval(%(opened)s::regclass, 1, false) END,
       CASE WHEN %(mark)s <> '' THEN pg_logical_emit_message(true, 'mover.mark', %(mark)s) END,
       CASE WHEN %(new)s <> 'closed' THEN (SELECT true FROM pg_advisory_unlock_all()) END
  FROM changed

-- name: correct
-- The sequence as the row says, under the row's lock: whoever took the place over may have failed behind it.
-- Repeatable.
SELECT setval(%(sequence)s::regclass, array_position('{open,closed,aborted,moved}'::text[], state))
  FROM (SELECT state FROM mover.fence WHERE name = %(name)s FOR UPDATE) AS f

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

-- name: altering
-- Guarded tables, and partitions, from which a transaction that has not ended may have taken the guards. Asked in a
-- statement of its own, before the catalog is: who has ended by then is found there. Reads only.
SELECT DISTINCT l.relation::regclass::text FROM pg_locks l JOIN pg_trigger t ON t.tgrelid = l.relation
 WHERE l.locktype = 'relation' AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.mode IN ('ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
   AND t.tgname = ANY (%(triggers)s::name[])

-- name: end_session
-- A holding session of which the owner does not know what it still does; waits until it is gone.
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
 WHERE pid = %(pid)s AND application_name = %(application_name)s
