"""A server that is lost, and the standby that is promoted in its place."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import psycopg

from mover.demo.servers import PostgresServer


def fail_over(server: PostgresServer) -> None:
    """It dies, and comes back at the same address as a promoted standby: another timeline, no slots."""
    server.kill9()
    _promote(server)


def keep_standby(server: PostgresServer, folder: Path) -> None:
    """As if a standby got nothing any more from now on; the server itself goes on."""
    server.kill9()
    subprocess.run(["cp", "-a", server.data, folder], check=True)
    server.come_back()


def fail_over_to(server: PostgresServer, folder: Path) -> None:
    """The server is lost, and that standby is promoted at its address."""
    server.kill9()
    shutil.rmtree(server.data)
    subprocess.run(["cp", "-a", folder, server.data], check=True)
    (server.data / "postmaster.pid").unlink(missing_ok=True)
    _promote(server)


def _promote(server: PostgresServer) -> None:
    data = server.data
    for slot in (data / "pg_replslot").iterdir():
        shutil.rmtree(slot)
    (data / "standby.signal").touch()
    server.come_back()
    with psycopg.connect(server.url(), autocommit=True) as conn:
        conn.execute("select pg_promote(true, 30)")
