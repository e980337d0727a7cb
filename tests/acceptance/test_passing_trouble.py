"""What passes by itself is waited for, with its reason in the status: full disks, servers without a free
connection, statements that an administrator cancels, hosts whose clock is wrong."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from mover.demo.servers import PostgresServer
from tests.acceptance.test_rollback import LONG_WINDOW, until_written
from tests.support.acceptance import ESTATE, at, clean, killed, until_stopped
from tests.support.waiting import until

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
DISK_BYTES = 48 << 20
CANCEL = """
select pg_cancel_backend(pid) from pg_stat_activity
 where datname = current_database() and starts_with(application_name, 'mover/') and state = 'active'
"""


async def test_statements_that_are_cancelled_are_tried_again(pg16, pg18, make_scene, capture):
    scene = make_scene(pg16, pg18, capture=capture)
    watch = scene.watch()
    async with scene.daemon() as stage, scene.writing() as workload:
        await watch.submit(stage)
        await watch.until_row(lambda row: row["phase"] == "prepare")  # before, the request itself would fail
        for _ in range(40):
            for home in scene.homes.values():
                await asyncio.to_thread(home.execute, CANCEL)
        await watch.until("completed")
    clean(workload.report())
    watch.check_completed()


@pytest.fixture
def small_server() -> Iterator[PostgresServer]:
    with PostgresServer(16, fsync=False, settings={"max_connections": "25"}) as server:
        yield server


async def test_a_target_without_a_free_connection_is_waited_for(pg18, small_server, make_scene):
    scene = make_scene(pg18, small_server)
    watch, stage = scene.watch(), scene.stage()
    async with scene.writing() as workload, killed(stage):
        await stage.start(**at("copy.begun", signal.SIGSTOP))
        await watch.submit(stage)
        await until_stopped(stage)
        with all_connections_taken(small_server):
            stage.send_signal(signal.SIGCONT)
            await watch.until_row(
                lambda row: "no connection left" in (row["progress"].get("waiting_for") or "")
            )
        await watch.until("completed")
    clean(workload.report())
    watch.check_completed()


@pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime")
async def test_a_host_whose_clock_is_ahead_does_not_clean_the_source_early(pg16, pg18, make_scene):
    scene = make_scene(pg16, pg18)
    watch = scene.watch()
    stage = scene.stage(monitoring_hours=LONG_WINDOW, abandoned_hours=0)
    ahead = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": "+2d", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    async with scene.writing() as workload, killed(stage):
        await stage.start(**ahead)
        await watch.submit(stage)
        await watch.until("monitoring")
        await until(lambda: (watch._read()["progress"].get("eta_seconds") or 0) > 3000)
        assert (await stage.run("rollback", watch.id))[0] == 0
        await watch.until("rolled_back")
        await until_written(workload, 50)
    clean(workload.report())


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """To be named before the server that uses it."""
    if os.geteuid() != 0:
        pytest.skip("needs to mount a file system")
    disk = Path(tempfile.mkdtemp(prefix="mover-disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        disk.rmdir()
        pytest.skip("file systems cannot be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
        disk.rmdir()


async def test_a_target_whose_disk_is_full_is_waited_for(pg16, small_disk, spare_server, make_scene):
    scene = make_scene(pg16, spare_server)
    move_to(small_disk, spare_server, scene.homes[ESTATE].url.rpartition("/")[2])
    watch, stage = scene.watch(), scene.stage()
    async with scene.writing() as workload, killed(stage):
        await stage.start(**at("copy.begun", signal.SIGSTOP))
        await watch.submit(stage)
        await until_stopped(stage)
        with filled(small_disk):
            stage.send_signal(signal.SIGCONT)
            await watch.until_row(lambda row: "disk full" in (row["progress"].get("waiting_for") or ""))
            assert workload.transactions > 0
        await watch.until("completed")
    clean(workload.report())
    watch.check_completed()


def move_to(disk: Path, server: PostgresServer, database: str) -> None:
    """The database's files are on that disk."""
    place = disk / "tablespace"
    place.mkdir()
    shutil.chown(disk, *account_of(server))
    shutil.chown(place, *account_of(server))
    with psycopg.connect(server.url(), autocommit=True) as conn:
        conn.execute(f"create tablespace small location '{place}'")
        conn.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity where datname = %s", (database,)
        )
        conn.execute(sql.SQL("alter database {} set tablespace small").format(sql.Identifier(database)))


def account_of(server: PostgresServer) -> tuple[int, int]:
    info = server.data.stat()
    return info.st_uid, info.st_gid


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def all_connections_taken(server: PostgresServer) -> Iterator[None]:
    """Also those that are kept for superusers."""
    with ExitStack() as held:
        with suppress(psycopg.OperationalError):
            while True:
                held.enter_context(psycopg.connect(server.url()))
        yield
