"""What capture by triggers costs, beside capture from the WAL.

- What guards cost whoever writes to a tenant's tables: the rate of pgbench with them, of that without.
  Durable commits, two clients, as fast as the server can; the tenant's own rows and another tenant's.
- How fast a backlog is caught up with.
- How large the log becomes under an hour's load that is replayed as fast as the source can take it, also
  while a transaction stays open beside it.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from statistics import median
from time import monotonic

import psycopg

from bench.report import Figures, Report
from mover.core.ids import Capture, Side
from mover.demo.servers import PostgresServer
from mover.postgres.capture import log_bytes
from tests.support.fencing import quiet
from tests.support.rig import OTHER, TENANT, Rig, execute, rig

SOURCE, TARGET = 16, 18
ROWS = 20_000
CLIENTS = 2
FIRST = {TENANT: 0, OTHER: 10_000_000}
BY_HAND = "SELECT tgname FROM pg_trigger WHERE tgrelid = 'app.item'::regclass AND NOT tgisinternal"
# One change, durable at once; and what an application's request looks like more often.
SCRIPTS = {
    "single": r"""
\set a random(1, {rows})
UPDATE app.item SET amount = coalesce(amount, 0) + 1 WHERE tenant_id = '{tenant}' AND id = {first} + :a;
""",
    "mixed": r"""
\set a random(1, {rows})
\set b random(1, {rows})
BEGIN;
SELECT amount FROM app.item WHERE tenant_id = '{tenant}' AND id = {first} + :a;
UPDATE app.item SET amount = coalesce(amount, 0) + 1 WHERE tenant_id = '{tenant}' AND id = {first} + :a;
SELECT name FROM app.item WHERE tenant_id = '{tenant}' AND id = {first} + :b;
UPDATE app.item SET name = 'n' WHERE tenant_id = '{tenant}' AND id = {first} + :b;
COMMIT;
""",
}
WRITE = f"""
CREATE PROCEDURE app.write(transactions bigint) LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1 .. transactions LOOP
        UPDATE app.item SET amount = coalesce(amount, 0) + 1
         WHERE tenant_id = '{TENANT}'
           AND id IN (1 + (i::bigint * 7919) % {ROWS}, 1 + (i::bigint * 104729) % {ROWS});
        COMMIT;
    END LOOP;
END $$
"""
BULK = "UPDATE app.item SET amount = coalesce(amount, 0) + 1 WHERE tenant_id = %s"
HOUR = 200 * 3600  # transactions


async def run(*, quick: bool) -> Report:
    rounds, seconds = (1, 1) if quick else (5, 4)
    hour = HOUR // 20 if quick else HOUR
    costs: dict[Capture, Figures] = {capture: {} for capture in Capture}
    speeds: dict[Capture, Figures] = {capture: {} for capture in Capture}
    with servers(fsync=True) as (source, target):
        for capture in costs:
            async with guarded(source, target, capture) as r:
                costs[capture] = await asyncio.to_thread(rates_kept, source, r, rounds, seconds)
    with servers(fsync=False) as (source, target):
        found: dict[Capture, list[Figures]] = {capture: [] for capture in Capture}
        for _ in range(rounds):
            for capture, figures in found.items():
                figures.append(await catch_up(source, target, capture, 3_000 if quick else 30_000))
        for capture, figures in found.items():
            speeds[capture] = {name: median(each[name] for each in figures) for name in figures[0]}
        logs = {
            f"log_{name}_mb": await log_of_an_hour(source, target, hour, beside=beside)
            for name, beside in (("alone", False), ("beside_an_open_transaction", True))
        }
    wal, trigger = Capture.WAL, Capture.TRIGGER
    return Report(
        "capture",
        {
            "clients": CLIENTS,
            "rows": ROWS,
            "rounds": rounds,
            "seconds": seconds,
            "transactions_of_the_hour": hour,
        },
        ours=costs[trigger] | speeds[trigger] | logs,
        peers={"wal": costs[wal] | speeds[wal]},
        ratios={f"wal {name}": round(speeds[trigger][name] / speeds[wal][name], 2) for name in speeds[wal]},
    )


@contextmanager
def servers(*, fsync: bool) -> Iterator[tuple[PostgresServer, PostgresServer]]:
    with PostgresServer(SOURCE, fsync=fsync) as source, PostgresServer(TARGET, fsync=fsync) as target:
        yield source, target


@asynccontextmanager
async def guarded(source: PostgresServer, target: PostgresServer, capture: Capture) -> AsyncIterator[Rig]:
    """Seeded databases of their own, with the guards of a migration under way."""
    name = f"bench_{random.randrange(10**9)}"
    urls = source.create_database(name), target.create_database(name)
    try:
        async with rig(*urls, rows=ROWS, capture=capture) as r:
            if capture is Capture.WAL:
                holdings = [table.holding(Side.SOURCE) for table in r.subject.shape.tables]
                await r.fence.install(holdings, "open", quiet)
            execute(urls[0], WRITE)
            yield r
    finally:
        source.drop_database(name)
        target.drop_database(name)


def rates_kept(server: PostgresServer, r: Rig, rounds: int, seconds: int) -> Figures:
    """With guards, of those without them: 1 costs nothing."""
    rates: dict[tuple[str, bool], list[float]] = {}
    for _ in range(rounds):
        for on in (True, False):
            enable(r.source_url, on)
            for who, tenant in (("tenant", TENANT), ("others", OTHER)):
                for kind, script in SCRIPTS.items():
                    text = script.format(tenant=tenant, first=FIRST[tenant], rows=ROWS)
                    rate = pgbench(server, r.source_url, text, seconds)
                    rates.setdefault((f"rate_kept_by_{who}_{kind}", on), []).append(rate)
    kept = {name for name, _ in rates}
    return {name: round(median(rates[name, True]) / median(rates[name, False]), 3) for name in sorted(kept)}


def enable(url: str, on: bool) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        for (trigger,) in conn.execute(BY_HAND).fetchall():
            conn.execute(f'ALTER TABLE app.item {"ENABLE ALWAYS" if on else "DISABLE"} TRIGGER "{trigger}"')
        conn.execute("VACUUM app.item")
        conn.execute("CHECKPOINT")


def pgbench(server: PostgresServer, url: str, script: str, seconds: int) -> float:
    """Transactions a second."""
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(script)
        file.flush()
        options = ["-n", "-M", "prepared", "-c", str(CLIENTS), "-j", "1", "-T", str(seconds), "-f", file.name]
        command = [str(server.binary("pgbench")), *options, url]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(next(line.split()[2] for line in said.splitlines() if line.startswith("tps")))


async def catch_up(
    source: PostgresServer, target: PostgresServer, capture: Capture, transactions: int
) -> Figures:
    """Changes a second: of a backlog of small transactions, and of a few that change every row."""
    found: Figures = {}
    async with guarded(source, target, capture) as r:
        async with r.following():
            await r.copy().run()
        execute(r.source_url, "CALL app.write(%s)", transactions)
        async with r.following():
            began = monotonic()
            await r.follower.catch_up_once()
            found["catch_up_small_changes_per_s"] = round(2 * transactions / (monotonic() - began))
        for _ in range(10):
            execute(r.source_url, BULK, TENANT)
        async with r.following():
            began = monotonic()
            await r.follower.catch_up_once()
            found["catch_up_bulk_changes_per_s"] = round(10 * ROWS / (monotonic() - began))
    return found


async def log_of_an_hour(
    source: PostgresServer, target: PostgresServer, transactions: int, *, beside: bool
) -> float:
    """The largest size with its index, in megabytes."""
    async with guarded(source, target, Capture.TRIGGER) as r, r.following():
        await r.copy().run()
        with psycopg.connect(r.source_url) as other:
            if beside:
                other.execute("CREATE TABLE app.other ()")  # it has an xid, so nothing can be vacuumed
            writing = asyncio.create_task(asyncio.to_thread(write, r.source_url, transactions))
            sizes = []
            while not writing.done():
                async with r.source.borrow("bench") as conn:
                    sizes.append(await log_bytes(conn, r.migration))
                await asyncio.sleep(0.25)
            await writing
            await r.follower.catch_up_once()
    return round(max(sizes) / 1e6, 1)


def write(url: str, transactions: int) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("SET synchronous_commit = off")
        conn.execute("CALL app.write(%s)", (transactions,))
