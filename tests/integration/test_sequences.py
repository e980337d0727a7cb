"""Sequences under the fence: the target never gives out a value that the source has given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import psycopg
import pytest

from mover.core.errors import LeaseLost
from mover.core.ids import Epoch, MigrationId, TableRef
from mover.core.secret import Secret
from mover.core.tables import SequenceRef, Shape
from mover.postgres import agent, owner
from mover.postgres.connect import Database, Identity
from mover.postgres.sequences import GAP, PgSequences

DDL = """
CREATE SCHEMA {schema};
CREATE SEQUENCE {schema}.up START 100;
CREATE SEQUENCE {schema}.down INCREMENT -5 START -1;
CREATE SEQUENCE {schema}.unused START 1000;
CREATE SEQUENCE {schema}.cached CACHE 20;
CREATE SEQUENCE {schema}.small AS smallint;
CREATE SEQUENCE {schema}.handed_over;
CREATE TABLE {schema}.item (id bigint GENERATED ALWAYS AS IDENTITY);
"""
NAMES = ("up", "down", "unused", "cached", "small", "handed_over", "item_id_seq")


def shape(fresh: bool) -> Shape:
    names = tuple(SequenceRef(TableRef("core", n), TableRef("estate", n)) for n in NAMES)
    return Shape({"core": "estate"}, (), names, fresh)


@asynccontextmanager
async def carrying(pair, fresh: bool) -> AsyncIterator[PgSequences]:
    """Both schemas made, the source's sequences used in every way."""
    execute(pair.source, DDL.format(schema="core"))
    execute(pair.target, DDL.format(schema="estate"))
    use(pair.source, "core")
    identity = Identity(MigrationId(uuid4()), Epoch(1))
    source = Database(Secret(pair.source), "source", identity)
    target = Database(Secret(pair.target), "target", identity)
    await agent.install(target, identity)
    sequences = PgSequences(source, target, shape(fresh), identity)
    try:
        yield sequences
    finally:
        await sequences.close()


def use(url: str, schema: str) -> None:
    for name in ("up", "down", "cached", "small", "item_id_seq"):
        execute(url, f"SELECT nextval('{schema}.{name}') FROM generate_series(1, 7)")
    # As after loading rows with ids of their own: never called, and yet 1 to 4999 are taken.
    execute(url, f"SELECT setval('{schema}.handed_over', 5000, false)")


def execute(url: str, statement: str) -> list[tuple]:
    with psycopg.connect(url, autocommit=True) as conn:
        cursor = conn.execute(statement)
        return cursor.fetchall() if cursor.description else []


def next_values(url: str, schema: str) -> dict[str, int]:
    return {name: execute(url, f"SELECT nextval('{schema}.{name}')")[0][0] for name in NAMES}


async def test_a_fresh_target_goes_on_a_gap_beyond_where_the_source_stands(pair):
    async with carrying(pair, fresh=True) as sequences:
        await sequences.get_ready()
        execute(pair.source, "SELECT nextval('core.up')")
        await sequences.carry_over()
        await sequences.carry_over()
        target, source = next_values(pair.target, "estate"), next_values(pair.source, "core")
        assert target["unused"] == 1000 + GAP and target["handed_over"] == 5000 + GAP
        assert target["down"] == -36 - 5 * GAP and target["small"] == source["small"] + (32_767 - 7) // 100
        for name in ("up", "item_id_seq", "cached"):
            assert target[name] == source[name] + GAP, name


async def test_a_shared_target_is_ahead_of_the_source_and_never_goes_back(pair):
    async with carrying(pair, fresh=False) as sequences:
        use(pair.target, "estate")
        execute(pair.target, "SELECT setval('estate.up', 9000000), setval('estate.down', -9000000)")
        await sequences.get_ready()
        execute(pair.source, "SELECT nextval('core.item_id_seq') FROM generate_series(1, 20)")
        await sequences.carry_over()
        target, source = next_values(pair.target, "estate"), next_values(pair.source, "core")
        assert target["up"] == 9_000_001 and target["down"] == -9_000_005
        assert target["item_id_seq"] > source["item_id_seq"] + GAP // 2
        for name in NAMES:
            assert target[name] <= source[name] if name == "down" else target[name] >= source[name], name


async def test_the_gap_leaves_a_small_sequence_its_room(pair):
    async with carrying(pair, fresh=False) as sequences:
        for _ in range(10):
            await sequences.get_ready()
        assert next_values(pair.target, "estate")["small"] < 1000


async def test_what_the_gap_does_not_cover_is_carried_under_the_fence(pair):
    async with carrying(pair, fresh=False) as sequences:
        await sequences.get_ready()
        execute(pair.source, f"SELECT setval('core.up', {100 * GAP}), setval('core.down', {-100 * GAP})")
        await sequences.carry_over()
        target = next_values(pair.target, "estate")
        assert target["up"] == 101 * GAP + 1 and target["down"] == -105 * GAP - 5


async def test_other_tenants_of_the_target_get_no_value_twice(pair):
    """Each call finds the source further on, beside clients that take values without a pause."""
    async with carrying(pair, fresh=False) as sequences:
        await sequences.get_ready()
        taken: list[int] = []
        over = asyncio.Event()

        async def client() -> None:
            async with await psycopg.AsyncConnection.connect(pair.target, autocommit=True) as conn:
                while not over.is_set():
                    cursor = await conn.execute("SELECT nextval('estate.cached'), nextval('estate.up')")
                    row = await cursor.fetchone()
                    assert row is not None
                    taken.append(row[1])

        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(client())
            for ahead in range(1, 41):
                # Just ahead of the target, so that both reach for the same values.
                ((last,),) = execute(pair.target, "SELECT last_value FROM estate.up")
                execute(pair.source, f"SELECT setval('core.up', {last + ahead % 5})")
                await sequences.carry_over()
            over.set()
        assert len(taken) == len(set(taken)) > 100


async def test_an_older_owner_cannot_set_the_targets_sequences_back(pair):
    async with carrying(pair, fresh=True) as sequences:
        await sequences.get_ready()
        identity = Identity(sequences._identity.migration, Epoch(2))
        await owner.take(Database(Secret(pair.target), "target", identity), identity)
        execute(pair.source, "SELECT nextval('core.up')")
        before = execute(pair.target, "SELECT last_value FROM estate.up")
        for carry in (sequences.get_ready, sequences.carry_over):
            with pytest.raises(LeaseLost):
                await carry()
        assert execute(pair.target, "SELECT last_value FROM estate.up") == before
