"""A server that is lost, and the standby that is promoted in its place."""

from __future__ import annotations

import shutil

import psycopg

from mover.demo.servers import PostgresServer


def fail_over(server: PostgresServer) -> None:
    """It dies, and comes back at the same address as a promoted standby: another timeline, no slots."""
    server.kill9()
    data = server.data
    for slot in (data / "pg_replslot").iterdir():
        shutil.rmtree(slot)
    (data / "standby.signal").touch()
    server.come_back()
    with psycopg.connect(server.url(), autocommit=True) as conn:
        conn.execute("select pg_promote(true, 30)")
