"""The SQL lexer: cutting dumps into statements, renaming schemas by token, knowing what is created."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mover.core import ddl
from mover.core.ids import TableRef

NAMES = {"core_dms": "realestate_dms", "Core": "Real Estate"}


def rename(sql: str) -> str:
    return ddl.rename_schemas(sql, NAMES)


@given(st.text(alphabet="abE'\"$-/*\\;.\n (xé1", max_size=60))
def test_tokens_join_to_the_text_whatever_it_is(text):
    assert "".join(t.text for t in ddl.tokens(text)) == text


@given(st.text(alphabet="abE'\"$-/*\\;.\n (xé1", max_size=60))
def test_renaming_nothing_changes_nothing(text):
    assert ddl.rename_schemas(text, {}) == text


DUMP = r"""
--
-- PostgreSQL database dump
--

\restrict x;y'

SET statement_timeout = 0;

--
-- Name: documents; Type: TABLE; Schema: core_dms; Owner: -
--

CREATE TABLE core_dms.documents (
    id integer DEFAULT nextval('core_dms.s;q'::regclass), -- a; comment
    note text DEFAULT E'it\'s; fine' /* nested /* ; */ ; */
);


--
-- Name: f(integer); Type: FUNCTION; Schema: core_dms; Owner: -
--

CREATE FUNCTION core_dms.f(a integer) RETURNS integer
    LANGUAGE plpgsql
    AS $_$ begin return $1; end; $_$;

CREATE FUNCTION core_dms.g() RETURNS integer
    LANGUAGE sql
    BEGIN ATOMIC
 SELECT CASE WHEN true THEN 1 ELSE 2 END;
 SELECT 2;
END;

--
-- Name: documents r; Type: RULE; Schema: core_dms; Owner: -
--

CREATE RULE r AS ON INSERT TO core_dms.documents DO ALSO (SELECT 1; SELECT 2);
\unrestrict x
"""


def test_a_dump_is_cut_at_its_outermost_semicolons():
    statements = ddl.split(DUMP)
    assert [(s.type, s.name) for s in statements] == [
        ("", ""),
        ("TABLE", "documents"),
        ("FUNCTION", "f(integer)"),
        ("FUNCTION", "f(integer)"),
        ("RULE", "documents r"),
    ]
    assert statements[1].sql.endswith(")")
    assert statements[3].sql.endswith("SELECT 2;\nEND")
    assert statements[4].sql.endswith("SELECT 2)")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("CREATE TABLE core_dms.documents ()", "CREATE TABLE realestate_dms.documents ()"),
        ('"Core"."Files"', '"Real Estate"."Files"'),
        ("CORE_DMS.x", "realestate_dms.x"),
        ("core_dms . x", "realestate_dms . x"),
        ("CREATE SCHEMA core_dms", "CREATE SCHEMA realestate_dms"),
        ("GRANT USAGE ON SCHEMA core_dms TO app", "GRANT USAGE ON SCHEMA realestate_dms TO app"),
        ("nextval('core_dms.s'::regclass)", "nextval('realestate_dms.s'::regclass)"),
        ("""nextval('"Core"."S"'::regclass)""", """nextval('"Real Estate"."S"'::regclass)"""),
        ("setval('core_dms.s', 3)", "setval('realestate_dms.s', 3)"),
        ("'core_dms'::regnamespace", "'realestate_dms'::regnamespace"),
        ("'core_dms.mood'::core_dms.mood", "'core_dms.mood'::realestate_dms.mood"),
        ("'core_dms.x'::text", "'core_dms.x'::text"),
        ("-- core_dms.x\n/* core_dms.x */", "-- core_dms.x\n/* core_dms.x */"),
        ("x.core_dms.y", "x.core_dms.y"),
        ("SELECT core_dms FROM t", "SELECT core_dms FROM t"),
        ("SET search_path TO 'core_dms', 'public'", "SET search_path TO 'realestate_dms', 'public'"),
        ("set local search_path = public, core_dms", "set local search_path = public, realestate_dms"),
    ],
)
def test_a_schema_is_renamed_where_the_token_is_a_schemas_name(before, after):
    assert rename(before) == after


def test_function_bodies_are_renamed_but_their_dynamic_sql_is_not():
    body = "begin perform core_dms.f(); execute 'select core_dms.g()'; end"
    sql = f"CREATE FUNCTION core_dms.h() RETURNS void LANGUAGE plpgsql AS $a$ {body} $a$"
    assert "perform realestate_dms.f(); execute 'select core_dms.g()'" in rename(sql)
    assert ddl.mentions_in_literals(body, NAMES)
    assert not ddl.mentions_in_literals("begin perform nextval('core_dms.s'::regclass); end", NAMES)


def test_the_body_of_another_language_stays_as_it_is():
    sql = "CREATE FUNCTION core_dms.h() RETURNS void LANGUAGE plpython3u AS $$ core_dms.x = 'it' $$"
    assert rename(sql).endswith("AS $$ core_dms.x = 'it' $$")


@pytest.mark.parametrize(
    ("sql", "kind", "table", "name"),
    [
        ("CREATE UNIQUE INDEX i ON ONLY s.t USING btree (a)", "index", TableRef("s", "t"), "i"),
        ('CREATE INDEX "On" ON "S"."T t" (a)', "index", TableRef("S", "T t"), "On"),
        ("ALTER TABLE ONLY s.t ADD CONSTRAINT c PRIMARY KEY (a)", "constraint", TableRef("s", "t"), "c"),
        ("CREATE TRIGGER g AFTER INSERT ON s.t FOR EACH ROW", "trigger", TableRef("s", "t"), "g"),
        ("CREATE CONSTRAINT TRIGGER g AFTER INSERT ON s.t", "trigger", TableRef("s", "t"), "g"),
        ("CREATE POLICY p ON s.t USING (true)", "policy", TableRef("s", "t"), "p"),
        ("CREATE RULE r AS ON INSERT TO s.t DO NOTHING", "rule", TableRef("s", "t"), "r"),
        ("CREATE MATERIALIZED VIEW s.v AS SELECT 1", "view", TableRef("s", "v"), "v"),
        ("CREATE STATISTICS s.x ON a, b FROM s.t", "statistics", TableRef("s", "x"), "x"),
    ],
)
def test_what_a_statement_creates_is_known(sql, kind, table, name):
    assert ddl.created(sql) == ddl.Created(kind, table, name)


@pytest.mark.parametrize(
    "sql",
    [
        "ALTER TABLE s.t ENABLE ROW LEVEL SECURITY",
        "CREATE OR REPLACE VIEW s.v AS SELECT 1",
        "ALTER TABLE ONLY s.t ALTER COLUMN a SET STATISTICS 5",
        "COMMENT ON CONSTRAINT c ON s.t IS 'x'",
    ],
)
def test_a_repeatable_statement_creates_nothing_by_name(sql):
    assert ddl.created(sql) is None


@pytest.mark.parametrize(
    ("sql", "ours"),
    [
        ("CREATE UNIQUE INDEX mover_ri_1 ON s.t USING btree (a)", True),
        ("ALTER TABLE ONLY s.t REPLICA IDENTITY USING INDEX mover_ri_1", True),
        ("ALTER TABLE ONLY s.t REPLICA IDENTITY FULL", True),
        ("CREATE TRIGGER g AFTER INSERT ON s.t FOR EACH ROW EXECUTE FUNCTION mover.guard()", True),
        ("CREATE TRIGGER mover_g AFTER INSERT ON s.t FOR EACH ROW EXECUTE FUNCTION s.f()", True),
        ("ALTER TABLE s.t ENABLE ALWAYS TRIGGER mover_g", True),
        ("COMMENT ON INDEX mover_ri_1 IS 'x'", True),
        ("CREATE INDEX i ON s.mover_list USING btree (a)", False),
        ("CREATE TABLE s.t (mover_id integer, CONSTRAINT mover_c CHECK (true))", False),
        ("CREATE TRIGGER g AFTER INSERT ON s.t FOR EACH ROW EXECUTE FUNCTION s.mover()", False),
    ],
)
def test_our_own_objects_are_recognised(sql, ours):
    assert ddl.is_ours(sql) is ours


@pytest.mark.parametrize(
    ("sql", "roles"),
    [
        ("GRANT SELECT ON TABLE s.t TO app", {"app"}),
        ('GRANT ALL ON TABLE s.t TO app, "My Role" WITH GRANT OPTION', {"app", "My Role"}),
        ("REVOKE ALL ON FUNCTION s.f() FROM PUBLIC", set()),
        (
            "ALTER DEFAULT PRIVILEGES FOR ROLE owner IN SCHEMA s GRANT SELECT ON TABLES TO app",
            {"owner", "app"},
        ),
    ],
)
def test_the_roles_of_a_grant_are_found(sql, roles):
    assert ddl.roles(sql) == roles


@pytest.mark.parametrize(
    ("schema", "sql"),
    [
        ("core_dms", "SELECT CORE_DMS.t"),
        ("Core", 'SELECT "Core".t'),
        ("ü", 'SELECT "ü".t'),
        ('it\'s "x"', 'SELECT "it\'s ""x""".t'),
    ],
)
def test_a_schema_is_found_however_its_name_is_written(schema, sql):
    assert ddl.rename_schemas(sql, {schema: "other"}) == "SELECT other.t"


@pytest.mark.parametrize(
    ("sql", "left"),
    [
        ("ALTER TABLE ONLY s.t ALTER COLUMN a SET (pg_attver=22192376)", ""),
        (
            "ALTER TABLE ONLY s.t ALTER COLUMN a SET (n_distinct=5, pg_attver=22192376)",
            "ALTER TABLE ONLY s.t ALTER COLUMN a SET (n_distinct=5)",
        ),
        ("ALTER TABLE ONLY s.t ALTER COLUMN a SET (n_distinct=5)",) * 2,
        ("ALTER TABLE s.t ALTER a SET DEFAULT ' SET (pg_attver=1)'",) * 2,
    ],
)
def test_what_a_server_keeps_for_itself_among_a_columns_options_is_left_out(sql, left):
    assert ddl.without_internal_options(sql) == left
