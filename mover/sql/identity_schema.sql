-- Which replica identities we changed, and for whom.

-- name: install
-- Locks nothing of the application's; may be repeated.
CREATE TABLE IF NOT EXISTS mover.replica_identity (
    table_schema text NOT NULL,
    table_name text NOT NULL,
    old_identity text NOT NULL,
    old_index text,
    our_index text,
    PRIMARY KEY (table_schema, table_name)
);
CREATE TABLE IF NOT EXISTS mover.replica_identity_user (
    table_schema text NOT NULL,
    table_name text NOT NULL,
    migration uuid NOT NULL,
    PRIMARY KEY (table_schema, table_name, migration),
    FOREIGN KEY (table_schema, table_name) REFERENCES mover.replica_identity ON DELETE CASCADE
);
