"""`mover verify`: two databases, a tenant, and the truth about them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from mover.cli import main
from mover.demo.servers import Cluster
from tests.conftest import MakeDatabase, Pair
from tests.support.queue import role_with_password

Mover = Callable[..., tuple[int, str]]
TENANT, OTHER = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"
ROWS = 300
SCHEMA = """
create schema {0};
create type {0}.mood as enum ('good', 'bad');
create table {0}.notes (
    tenant_id uuid not null, id bigint primary key, mood {0}.mood, body text,
    length int generated always as (length(body)) stored
);
create table {0}.tags (tenant_id uuid not null, name text, weight float8, primary key (tenant_id, name));
create table {0}.countries (code text primary key);
insert into {0}.notes
select tenant::uuid, n + first, (array['good', 'bad'])[1 + n % 2]::{0}.mood, 'planted value ' || n
  from (values ('{1}', 0), ('{2}', 1000000)) as t (tenant, first), generate_series(1, {3}) n;
insert into {0}.tags select '{1}', 'tag ' || n, n / 3.0 from generate_series(1, 20) n;
"""
SHIFTED = ("verify", "--tenant", TENANT, "--schema", "core_app=estate_app")


@pytest.fixture
def sides(pg16: Cluster, pg18: Cluster, make_database: MakeDatabase) -> Pair:
    """The same rows under two schemas' names, on two versions."""
    pair = Pair(make_database(pg16), make_database(pg18), pg16, pg18)
    execute(pair.source, SCHEMA.format("core_app", TENANT, OTHER, ROWS))
    execute(pair.target, SCHEMA.format("estate_app", TENANT, OTHER, ROWS))
    return pair


def execute(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(statement)


@pytest.fixture
def mover(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Mover:
    """`mover(arguments…, VARIABLE=value…)`: exit code and output, in which a row's value is never seen."""

    def run(*arguments: str, **environment: str) -> tuple[int, str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        try:
            code = main(arguments)
        except SystemExit as usage:
            code = int(usage.code)
        captured = capsys.readouterr()
        assert "planted" not in captured.out + captured.err
        return code, captured.out + captured.err

    return run


@pytest.fixture
def verify(mover: Mover, sides: Pair) -> Mover:
    return functools.partial(mover, *SHIFTED, "--from", sides.source, "--to", sides.target)


def test_equal_sides_are_equal_whatever_others_hold(sides, verify):
    execute(sides.target, f"delete from estate_app.notes where tenant_id = '{OTHER}'")
    execute(sides.target, "insert into estate_app.countries values ('DE')")
    code, text = verify()
    assert code == 0, text
    assert f"Equal: {ROWS + 20} rows" in text
    assert "core_app.countries" in text and "not a tenant table" in text


def test_the_result_as_json(verify):
    code, text = verify("--json")
    report = json.loads(text)
    assert code == 0
    assert report["equal"] and report["source_root"] == report["target_root"]
    assert report["rows"] == {"core_app.notes": [ROWS, ROWS], "core_app.tags": [20, 20]}


def test_differing_rows_are_counted_and_keys_are_shown_only_when_asked_for(sides, verify):
    execute(sides.target, f"delete from estate_app.notes where tenant_id = '{TENANT}' and id in (7, 8)")
    execute(sides.target, "update estate_app.notes set mood = null, body = 'other' where id = 9")
    execute(sides.source, f"delete from core_app.tags where tenant_id = '{TENANT}' and name = 'tag 3'")
    code, text = verify()
    assert code == 1
    assert "2 missing, 1 different, in columns mood, body" in text
    assert "1 extra" in text
    assert "The two sides differ." in text
    assert "tag 3" not in text
    code, text = verify("--keys")
    assert code == 1
    assert "core_app.notes, missing: 7, 8" in text
    assert f"core_app.tags, extra: {TENANT}/tag 3" in text
    code, text = verify("--json")
    assert code == 1
    notes, tags = json.loads(text)["mismatches"]
    assert (notes["missing"], tags["extra"]) == ({"count": 2}, {"count": 1})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("drop table estate_app.tags", "is missing on the target"),
        ("alter table estate_app.tags drop weight", "has other columns on the target"),
        ("alter table estate_app.tags drop constraint tags_pkey", "no key that is the same"),
        ("alter table estate_app.tags alter weight type text", "different columns"),
        ("create table estate_app.more (id int primary key, tenant_id uuid)", "is on the target only"),
    ],
)
def test_what_cannot_be_compared_is_never_called_equal(sides, verify, change, expected):
    execute(sides.target, change)
    code, text = verify()
    assert code == 1, text
    assert expected in text


def test_with_the_configuration_and_passwords_from_the_environment(sides, mover, tmp_path: Path):
    config = tmp_path / "mover.toml"
    config.write_text(
        """
        platform = { database_url = "postgresql://127.0.0.1:9/x" }
        tenancy = { services = ["app"], ignore_tables = ["estate_app.tags"] }
        verticals = { core = { database_url = "postgresql://127.0.0.1:9/x" }, estate = {} }
        """
    )
    execute(sides.target, "truncate estate_app.tags")
    with role_with_password(sides.source_server) as role:
        execute(sides.source, f'grant usage on schema core_app to "{role}"')
        execute(sides.source, f'grant select on all tables in schema core_app to "{role}"')
        arguments = ("verify", "--tenant", TENANT, "--config", str(config), "--vertical", "core=estate")
        arguments += ("--from", "env:FROM", "--to", "env:TO")
        url = sides.source.replace("postgres@", f"{role}:right@", 1)
        code, text = mover(*arguments, FROM=url, TO=sides.target)
        assert (code, f"Equal: {ROWS} rows" in text) == (0, True), text
        url = sides.source.replace("postgres@", f"{role}:planted-secret@", 1)
        code, text = mover(*arguments, FROM=url, TO=sides.target)
        assert code == 3
        assert "source: wrong password" in text
        execute(sides.source, f'drop owned by "{role}"')


def test_a_tenant_whom_neither_side_knows_is_pointed_out(sides, mover):
    code, text = mover(
        *("verify", "--tenant", TENANT.replace("1", "3"), "--schema", "core_app=estate_app"),
        *("--from", sides.source, "--to", sides.target),
    )
    assert code == 0
    assert "Neither side holds a row of this tenant." in text


def test_wrong_usage_is_told_without_touching_anything(sides, mover):
    to = ("--to", sides.target)
    for arguments, reason in (
        (("--from", "mysql://u:planted-secret@h/d", *to, "--schema", "a"), "not a postgresql:// URL"),
        (("--from", "env:NOT_SET", *to, "--schema", "a"), "NOT_SET is not set"),
        (("--from", sides.source, *to), "one of the arguments --schema --vertical is required"),
        (("--from", sides.source, *to, "--vertical", "core"), "--vertical needs --config"),
        (("--from", sides.source, *to, "--schema", "a", "--schema", "a=b"), "named twice"),
        (("--from", sides.source, *to, "--schema", "a="), "should be written as A"),
    ):
        code, text = mover("verify", "--tenant", TENANT, *arguments)
        assert (code, reason in text) == (2, True), text


def test_nothing_to_compare_is_refused(sides, verify, mover):
    code, text = mover(
        *("verify", "--tenant", TENANT, "--schema", "core_app=absent"),
        *("--from", sides.source, "--to", sides.target),
    )
    assert (code, "schema absent does not exist on the target" in text) == (3, True), text
    code, text = verify("--column", "customer")
    assert (code, "has the column customer" in text) == (3, True), text


def test_a_server_that_is_down_is_a_failure(sides, mover):
    code, text = mover(
        *SHIFTED, "--from", sides.source, "--to", "postgresql://u:planted-secret@127.0.0.1:9/x"
    )
    assert (code, "target: nothing listens" in text) == (1, True), text
