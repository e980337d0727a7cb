-- Capture by triggers: what the guards write down of the tenant's rows, for servers that offer no logical
-- decoding. One log a migration; an entry says that a row changed, not how:
--
--   part  0  the row that has `value` in its key's columns
--         n  those that refer to the row that has `value` in the n-th of the columns referred to
--        -1  the whole table was emptied, or the partition that `value` names by schema and name
--        -2  a row of a table without a key is gone, as text; -3: it came
--
-- The xid is the top-level transaction's, also of what a savepoint wrote.

-- name: make_log
-- Locks nothing of the application's; repeatable. Entries live for seconds, and whoever removes them vacuums,
-- since autovacuum may be off or busy for hours; no writer should wait for a shorter file.
-- A publication of all tables would refuse to have rows deleted that have no replica identity.
DO $make$
BEGIN
    IF to_regclass({name}) IS NULL THEN
        CREATE TABLE mover.{log} (
            xid xid8 NOT NULL,
            relation oid NOT NULL,
            part smallint NOT NULL,
            value text[]
        ) WITH (autovacuum_enabled = false, vacuum_truncate = false);
        CREATE INDEX {index} ON mover.{log} (relation, xid);
        ALTER TABLE mover.{log} REPLICA IDENTITY FULL;
    END IF;
END
$make$

-- name: log_bytes
-- Reads only; locks nothing of the application's.
SELECT coalesce(pg_total_relation_size(to_regclass(%(name)s)), 0)

-- name: drop_log
-- Locks: ACCESS EXCLUSIVE on the log, which nobody uses any more: the triggers are gone, and so were their
-- callers then, or the tenant has left. Repeatable.
DROP TABLE IF EXISTS mover.{log}

-- name: row_function
-- Some of a row's values as text. Depends on the columns, not on their names: a new name breaks no write.
-- Locks nothing of the application's; repeatable.
CREATE OR REPLACE FUNCTION mover.{function}({table}) RETURNS text[] LANGUAGE sql
BEGIN ATOMIC
    SELECT {values};
END

-- name: capture_function
-- A guard that writes down what it has let pass. Values are written as we write them, whatever the writer's
-- settings. Locks nothing of the application's; repeatable.
CREATE OR REPLACE FUNCTION mover.{function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp {settings}
AS $capture$
BEGIN
    {let_pass}
    {writes};
    RETURN NULL;
END
$capture$

-- name: capture_write
-- In the functions. Locks nothing of the application's.
INSERT INTO mover.{log} (xid, relation, part, value) VALUES {entries}

-- name: capture_write_if_changed
-- The same. A second trigger would cost everybody's statements its condition, which is read anew for each.
IF mover.{row_function}(OLD) IS DISTINCT FROM mover.{row_function}(NEW) THEN
    INSERT INTO mover.{log} (xid, relation, part, value) VALUES {entries};
END IF

-- name: are_plain
-- Whether these columns' values are written by the same letters whatever the settings. Reads only.
SELECT bool_and(atttypid = ANY ('{bool,int2,int4,int8,text,varchar,bpchar,uuid}'::regtype[]))
  FROM pg_attribute
 WHERE attrelid = %(relation)s::oid AND attname = ANY (%(names)s::name[])

-- name: new_entries
-- The kinds of entries that a snapshot sees and an earlier one did not; and the tables' columns, as that
-- snapshot sees them; in the tables' order. Reads only.
SELECT e.relation, e.part, n.nspname, c.relname, a.names, a.types, a.modifiers
  FROM unnest(%(relations)s::oid[]) WITH ORDINALITY AS r (relation, place)
 CROSS JOIN LATERAL (
       SELECT DISTINCT l.relation, l.part FROM mover.{log} AS l
        WHERE l.relation = r.relation AND {is_new}) AS e
  LEFT JOIN pg_class c ON c.oid = e.relation
  LEFT JOIN pg_namespace n ON n.oid = c.relnamespace
 CROSS JOIN LATERAL (
       SELECT array_agg(attname::text ORDER BY attnum) AS names,
              array_agg(atttypid::bigint ORDER BY attnum) AS types,
              array_agg(atttypmod ORDER BY attnum) AS modifiers
         FROM pg_attribute
        WHERE attrelid = e.relation AND attnum > 0 AND NOT attisdropped AND attgenerated = '') AS a
 ORDER BY r.place

-- name: changed_rows
-- What became of the rows that are written down: their keys, and all of their values where they are the
-- tenant's. Reads only.
COPY (SELECT {keys}, {values}
        FROM (SELECT DISTINCT {written} FROM mover.{log} AS l
               WHERE l.relation = {relation} AND l.part = 0 AND {is_new}) AS k
        LEFT JOIN {table} AS t ON ({keys}) = ({found_keys}) AND {tenants} AND {copied}) TO STDOUT

-- name: written_values
-- What else is written down of a table with a key, each value once. Reads only.
SELECT DISTINCT l.part, l.value FROM mover.{log} AS l
 WHERE l.relation = {relation} AND l.part > 0 AND {is_new}

-- name: emptied
-- That a table was emptied, or which of its partitions. Reads only.
SELECT DISTINCT l.value FROM mover.{log} AS l WHERE l.relation = {relation} AND l.part = -1 AND {is_new}

-- name: net_rows
-- How many more of each row have come than gone, of a table without a key. What goes comes first: it frees
-- values that are unique. Reads only.
COPY (SELECT l.value[1], sum(CASE l.part WHEN -3 THEN 1 ELSE -1 END) AS net FROM mover.{log} AS l
       WHERE l.relation = {relation} AND l.part IN (-2, -3) AND {is_new}
       GROUP BY l.value HAVING sum(CASE l.part WHEN -3 THEN 1 ELSE -1 END) <> 0 ORDER BY net) TO STDOUT

-- name: make_room
-- Locks the log against other maintenance alone; does nothing while there is some. Repeatable.
VACUUM (ANALYZE, SKIP_LOCKED) mover.{log}

-- name: forget
-- Under the owner's row: entries that every snapshot from now on sees, and the target's durable one did.
-- One batch, from where it left off: what was deleted may stay there as long as anybody's old snapshot
-- lives, and would be walked over each time. Deleting twice changes nothing.
DELETE FROM mover.{log} WHERE ctid = ANY (ARRAY(
    SELECT l.ctid FROM unnest(%(relations)s::oid[]) AS r (relation)
     CROSS JOIN LATERAL (SELECT l.ctid FROM mover.{log} AS l
                          WHERE l.relation = r.relation AND l.xid >= %(since)s::xid8
                            AND l.xid < %(before)s::xid8 LIMIT %(limit)s) AS l
     LIMIT %(limit)s))
