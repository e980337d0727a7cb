"""What generated schemas and histories have found, each as the smallest example that shows it."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

import pytest

from tests.support.drafts import OTHER, TENANT, Schema
from tests.support.generated_move import Example, Servers, Tuning, run_example
from tests.support.timelines import GATES, Action, Gate

SMALL_PIECES = Tuning("shared", reordered=False, chunk_rows=1, wave_s=0.0001, small_batch=0)
ONE_BY_ONE = Tuning("shared", reordered=False, chunk_rows=1000, wave_s=600, small_batch=200)
FRESH = Tuning("fresh", reordered=False, chunk_rows=1000, wave_s=600, small_batch=200)
TUNINGS = pytest.mark.parametrize(
    "tuning", [SMALL_PIECES, ONE_BY_ONE, FRESH], ids=["small pieces", "one by one", "fresh"]
)
T = f"'{TENANT}'"


@pytest.fixture
def servers(pg16, pg18, between) -> AbstractAsyncContextManager[Servers]:
    return between(pg18, pg16)


async def moves(
    servers: AbstractAsyncContextManager[Servers],
    tuning: Tuning,
    ddl: list[str],
    seeds: list[str],
    **statements: list[str],
) -> None:
    """`statements` of the tenant, each a transaction, by the step of the journal that they run beside."""
    by_gate = {name.replace("__", "."): found for name, found in statements.items()}
    timeline = [
        step
        for gate in GATES
        for step in (Gate(gate), *(s for sql in by_gate.get(gate, []) for s in transaction(sql)))
    ]
    schema = Schema("tenant_id", ("app",), (), tuple(ddl))
    async with servers as opened:
        await run_example(opened, Example(schema, tuple(seeds), (), timeline, tuning))


def transaction(sql: str) -> list[Action]:
    return [Action("A", TENANT, statement) for statement in ("BEGIN", sql, "COMMIT")]


@TUNINGS
async def test_columns_may_have_the_names_that_we_use(servers, tuning):
    ddl = (
        "CREATE TABLE «0».t (tenant_id uuid NOT NULL, mover_op text, mover_n int, mover_n_ int, s text,"
        " t text, PRIMARY KEY (mover_n, mover_n_))"
    )
    await moves(
        servers,
        tuning,
        [ddl],
        [f"INSERT INTO «0».t SELECT {T}, 'a', g, g, 's', 't' FROM generate_series(1, 5) g"],
        copy=["UPDATE «0».t SET mover_op = 'b' WHERE mover_n = 2", "DELETE FROM «0».t WHERE mover_n = 3"],
        verify=["UPDATE «0».t SET mover_n_ = 10 WHERE mover_n = 4"],
    )


@pytest.mark.parametrize("tuning", [SMALL_PIECES, ONE_BY_ONE], ids=["small pieces", "one by one"])
async def test_a_key_may_be_an_array(servers, tuning):
    ddl = "CREATE TABLE «0».t (tenant_id uuid NOT NULL, k int[], n int, big text, PRIMARY KEY (k, tenant_id))"
    big = "(SELECT string_agg(md5(i::text), '') FROM generate_series(1, 300) i)"
    seeds = [
        f"INSERT INTO «0».t SELECT {T}, array[g, NULL], g, {big} FROM generate_series(1, 5) g",
        f"INSERT INTO «0».t VALUES ('{OTHER}', '{{{{1,2}},{{3,4}}}}', 1, {big})",
    ]
    enters = f"UPDATE «0».t SET tenant_id = {T} WHERE tenant_id = '{OTHER}'"
    await moves(
        servers,
        tuning,
        [ddl],
        seeds,
        copy=["UPDATE «0».t SET n = 10 WHERE n = 1", "UPDATE «0».t SET k = '{}' WHERE n = 2"],
        catch_up=[enters],
        verify=["UPDATE «0».t SET n = 20"],
    )


async def test_a_full_replica_identity_with_generated_columns_stops_nobody(servers):
    """PostgreSQL 18 refuses every tenant's UPDATE of a table that is published so."""
    ddl = [
        "CREATE TABLE «0».t (tenant_id uuid NOT NULL, id int PRIMARY KEY, n int,"
        " twice int GENERATED ALWAYS AS (n * 2) STORED)",
        "ALTER TABLE «0».t REPLICA IDENTITY FULL",
    ]
    seeds = [f"INSERT INTO «0».t VALUES ({T}, 1, 1), ('{OTHER}', 2, 2)"]
    everybody = "UPDATE «0».t SET n = n + 1"
    await moves(servers, ONE_BY_ONE, ddl, seeds, copy=[everybody], verify=[everybody])


@pytest.mark.parametrize("tuning", [SMALL_PIECES, ONE_BY_ONE], ids=["small pieces", "one by one"])
async def test_an_identity_beside_the_key_is_given_a_new_value(servers, tuning):
    ddl = (
        "CREATE TABLE «0».t (tenant_id uuid NOT NULL, id int PRIMARY KEY,"
        " n int GENERATED ALWAYS AS IDENTITY, big text)"
    )
    big = "(SELECT string_agg(md5(i::text), '') FROM generate_series(1, 300) i)"
    seeds = [f"INSERT INTO «0».t (tenant_id, id, big) SELECT {T}, g, {big} FROM generate_series(1, 3) g"]
    await moves(
        servers,
        tuning,
        [ddl],
        seeds,
        catch_up=["UPDATE «0».t SET n = DEFAULT WHERE id < 3"],
        verify=["UPDATE «0».t SET n = DEFAULT, id = 10 WHERE id = 3"],
    )


@pytest.mark.parametrize("step", ["copy", "verify"])
async def test_a_table_that_is_emptied_behind_a_snapshot(servers, step):
    """A snapshot that is older than a TRUNCATE sees the table empty, whatever it held."""
    ddl = "CREATE TABLE «0».t (tenant_id uuid NOT NULL, id int PRIMARY KEY, n int)"
    seeds = [f"INSERT INTO «0».t SELECT {T}, g, g FROM generate_series(1, 5) g"]
    emptied = [
        "UPDATE «0».t SET n = 10 WHERE id = 1",
        "TRUNCATE «0».t",
        f"INSERT INTO «0».t VALUES ({T}, 1, 1)",
    ]
    await moves(servers, SMALL_PIECES, [ddl], seeds, **{step: emptied})


async def test_row_security_arrives_at_a_fresh_target_after_the_rows(servers):
    ddl = [
        "CREATE TABLE «0».t (tenant_id uuid NOT NULL, id int PRIMARY KEY)",
        "ALTER TABLE «0».t ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY p ON «0».t USING (false)",
    ]
    await moves(servers, FRESH, ddl, [f"INSERT INTO «0».t VALUES ({T}, 1)"])


async def test_rows_that_refer_to_a_tenants_by_two_foreign_keys_go_by_the_one_that_is_given(servers):
    """Also where whose that row is, is told by foreign keys that may be NULL."""
    ddl = [
        "CREATE TABLE «0».binders (tenant_id uuid NOT NULL, id int PRIMARY KEY)",
        "CREATE TABLE «0».sheets (id int PRIMARY KEY, binder int REFERENCES «0».binders)",
        "CREATE TABLE «0».marks (id int PRIMARY KEY, sheet int NOT NULL REFERENCES «0».sheets,"
        " binder int REFERENCES «0».binders)",
    ]
    seeds = [
        f"INSERT INTO «0».binders VALUES ({T}, 1), ('{OTHER}', 2)",
        "INSERT INTO «0».sheets VALUES (1, 1), (2, 2)",
        "INSERT INTO «0».marks VALUES (1, 1, 1), (2, 2, 2), (3, 1, NULL), (4, 2, NULL)",
    ]
    added = "INSERT INTO «0».marks VALUES (5, 1, NULL), (6, 1, 1)"
    await moves(servers, ONE_BY_ONE, ddl, seeds, copy=[added], verify=["DELETE FROM «0».marks WHERE id = 6"])
