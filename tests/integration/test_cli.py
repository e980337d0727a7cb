"""The commands against a real platform database and a real API."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from mover.cli import main
from mover.config import Role
from mover.core.migration import Progress
from mover.core.states import Phase, Status
from mover.demo.servers import Cluster, RedisServer
from mover.postgres.store import Store
from tests.conftest import MakeDatabase
from tests.support.api import TOKENS, Running, api_on, config_for
from tests.support.logs import captured_log
from tests.support.queue import CORE, ESTATE, add_tenant, platform_database, role_with_password, store_on

Run = Callable[..., tuple[int, str]]
CONFIG = """
[platform]
database_url = "{platform}"
[api]
listen = "127.0.0.1:{port}"
tokens = [{{ name = "ops", role = "admin", sha256 = "{sha256}" }}]
[tenancy]
services = ["dms"]
[routing]
redis_url = "{redis}"
[verticals.core]
database_url = "{core}"
[verticals.realestate]
database_url = "{estate}"
[verticals.health]
"""
NO_SERVER = "postgresql://app:planted-secret@127.0.0.1:9/x"


@pytest.fixture
def database(pg16: Cluster, make_database: MakeDatabase) -> str:
    return make_database(pg16)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`run(arguments…)` is the exit code and everything that was printed; no secret may be there, nor in
    the log of the API that answered."""

    def run(*arguments: str, role: Role = Role.OPERATOR) -> tuple[int, str]:
        monkeypatch.setenv("MOVER_TOKEN", TOKENS[role])
        capsys.readouterr()
        code = main(arguments)
        captured = capsys.readouterr()
        assert "planted" not in captured.out + captured.err
        return code, captured.out + captured.err

    with captured_log() as log:
        yield run
        assert "planted" not in log.getvalue()


def write_config(path: Path, platform: str, **values: str) -> str:
    """A configuration file whose other databases are the platform itself, but for `values`."""
    token = hashlib.sha256(TOKENS[Role.ADMIN].encode()).hexdigest()
    defaults = {
        "platform": platform,
        "core": platform,
        "estate": platform,
        "port": "0",
        "sha256": token,
        "redis": "redis://127.0.0.1:9/0",
    }
    file = path / "mover.toml"
    file.write_text(CONFIG.format(**defaults | values))
    return str(file)


@asynccontextmanager
async def daemon(database: str) -> AsyncIterator[tuple[Running, Store]]:
    await platform_database(database)
    async with store_on(database) as store, api_on(store, config_for(database)) as running:
        yield running, store


async def test_init_creates_once_and_says_so(database: str, tmp_path: Path, run: Run) -> None:
    config = write_config(tmp_path, database)
    code, text = await asyncio.to_thread(run, "init", "--config", config, "--with-organizations")
    assert (code, "applied 0001_migrations" in text) == (0, True)
    code, text = await asyncio.to_thread(run, "init", "--config", config)
    assert (code, "up to date" in text) == (0, True)
    await add_tenant(database)


async def test_check_is_content_with_what_is_right(
    database: str, tmp_path: Path, run: Run, redis_server: RedisServer
) -> None:
    await platform_database(database)
    config = write_config(tmp_path, database, redis=redis_server.url)
    code, text = await asyncio.to_thread(run, "check", "--config", config)
    assert code == 0, text
    assert "wal_level logical" in text
    assert "auth.organizations" in text


async def test_check_reports_every_problem_at_once(
    pg16: Cluster, database: str, tmp_path: Path, run: Run
) -> None:
    with role_with_password(pg16) as role:
        wrong = database.replace("postgres@", f"{role}:planted-secret@", 1)
        config = write_config(tmp_path, database, core=NO_SERVER, estate=wrong)
        code, text = await asyncio.to_thread(run, "check", "--config", config)
    assert code == 1
    assert "mover init" in text
    assert "no table auth.organizations" in text
    assert "redis" in text and "does not answer" in text
    problems = [line for line in text.splitlines() if line.startswith("problem")]
    assert len(problems) == 5
    assert sum("verticals.core" in line or "verticals.realestate" in line for line in problems) == 2


async def test_check_names_missing_columns_of_the_routing_table(
    database: str, tmp_path: Path, run: Run
) -> None:
    await platform_database(database)
    async with await psycopg.AsyncConnection.connect(database) as conn:
        await conn.execute("alter table auth.organizations drop database_url, drop updated_at")
    code, text = await asyncio.to_thread(run, "check", "--config", write_config(tmp_path, database))
    assert code == 1
    assert "lacks the columns database_url, updated_at" in text


async def test_a_migration_from_the_terminal(database: str, run: Run) -> None:
    async with daemon(database) as (running, store):
        tenant = await add_tenant(database)
        server = ("--server", running.url)
        migrate = ("migrate", "--tenant", str(tenant), "--to-vertical", "realestate", "--to-tier", "database")
        code, text = await asyncio.to_thread(run, *migrate, *server, "--dry-run")
        assert code == 3  # the plan is shown, and refuses
        assert "core_dms.documents" in text and "refused: which and why what to do" in text
        code, text = await asyncio.to_thread(run, *migrate, *server, "--reason", "growth")
        assert code == 0
        name = text.strip()
        assert str((await store.get(name)).id) == name
        code, text = await asyncio.to_thread(run, *migrate, *server)
        assert (code, "already has a live migration" in text) == (3, True)
        for action in ("pause", "resume"):
            assert (await asyncio.to_thread(run, action, name, *server))[0] == 0
        assert (await asyncio.to_thread(run, "resume", name, *server))[0] == 3
        code, text = await asyncio.to_thread(run, "list", *server)
        assert code == 0 and name in text and "queued" in text
        code, text = await asyncio.to_thread(run, "list", "--json", *server)
        assert json.loads(text)["migrations"][0]["id"] == name
        claim = await store.claim("one", 30)
        assert claim is not None
        await store.begin_step(claim, "prepare.slot")
        code, text = await asyncio.to_thread(run, "status", name, *server)
        assert code == 0 and "prepare.slot" in text and "in_progress" in text


async def test_refusals_and_failures_have_their_exit_codes(database: str, run: Run) -> None:
    async with daemon(database) as (running, _):
        tenant, server = await add_tenant(database), ("--server", running.url)
        migrate = ("migrate", "--tenant", str(tenant), "--to-tier", "database", *server, "--to-vertical")
        code, text = await asyncio.to_thread(run, *migrate, "aviation")
        assert (code, "core, health, realestate" in text) == (3, True)
        code, text = await asyncio.to_thread(run, *migrate, "health")
        assert (code, "verticals.health.database_url" in text) == (3, True)
        assert (await asyncio.to_thread(run, *migrate, "realestate", "--at", "tomorrow"))[0] == 3
        one = str(uuid4())
        assert (await asyncio.to_thread(run, "pause", one, *server, role=Role.VIEWER))[0] == 3
        assert (await asyncio.to_thread(run, "pause", one, *server))[0] == 1
        assert (await asyncio.to_thread(run, "watch", one, *server))[0] == 1
        assert (await asyncio.to_thread(run, "rollback", one, *server))[0] == 1
        code, text = await asyncio.to_thread(run, "approve", one, *server, role=Role.ADMIN)
        assert (code, "not available in this version" in text) == (1, True)


async def test_waiting_ends_when_the_tenant_is_served_by_the_target(database: str, run: Run) -> None:
    async with daemon(database) as (running, store):
        tenant = await add_tenant(database)
        waiting = asyncio.ensure_future(
            asyncio.to_thread(
                run,
                *("migrate", "--tenant", str(tenant), "--to-vertical", "realestate"),
                *("--to-tier", "database", "--server", running.url, "--wait", "--json"),
            )
        )
        while (claim := await store.claim("one", 30)) is None:  # until the request has arrived
            assert not waiting.done()
            await asyncio.sleep(0)
        await store.enter_phase(claim, Phase.CUTOVER)
        await store.event(claim, "switching")
        await store.save_progress(claim, Progress(pause_ms=21.5))
        await store.decide(claim, CORE, ESTATE, {})
        code, text = await waiting
        messages = [json.loads(line) for line in text.splitlines()]
        assert code == 0
        assert "switching" in [message.get("message") for message in messages]
        assert (messages[-1]["status"], messages[-1]["pauseMs"]) == ("monitoring", 21.5)


@pytest.mark.parametrize(("error", "expected"), [("refused", 3), ("slot_lost", 1)])
async def test_a_watched_migration_that_fails_says_why(
    error: str, expected: int, database: str, run: Run
) -> None:
    async with daemon(database) as (running, store):
        tenant = await add_tenant(database)
        _, name = await asyncio.to_thread(
            run,
            *("migrate", "--tenant", str(tenant), "--to-vertical", "realestate", "--to-tier", "database"),
            *("--server", running.url),
        )
        claim = await store.claim("one", 30)
        assert claim is not None
        await store.set_status(claim, Status.FAILED, error={"code": error, "message": "the reason"})
        code, text = await asyncio.to_thread(run, "watch", name.strip(), "--server", running.url)
        assert code == expected
        assert f"{error}: the reason" in text


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@asynccontextmanager
async def served(config: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`mover serve` as a process."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mover", "serve", "--config", config), stderr=subprocess.PIPE
    )
    try:
        async with asyncio.timeout(20):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def last_words(process: asyncio.subprocess.Process) -> tuple[int, str]:
    """Exit code and what is left on standard error."""
    _, text = await process.communicate()
    assert process.returncode is not None
    assert b"planted" not in text
    return process.returncode, text.decode()


async def test_the_daemon_stops_cleanly_at_sigterm_and_logs_json(database: str, tmp_path: Path) -> None:
    await platform_database(database)
    async with served(write_config(tmp_path, database)) as process:
        assert process.stderr is not None
        while json.loads(await process.stderr.readline()).get("action") != "start":
            pass
        process.send_signal(signal.SIGTERM)
        code, text = await last_words(process)
        assert code == 0
        assert json.loads(text.splitlines()[-1])["action"] == "stop"


async def test_the_daemon_does_not_start_on_what_is_not_there(database: str, tmp_path: Path) -> None:
    async with served(write_config(tmp_path, NO_SERVER)) as process:
        code, text = await last_words(process)
        assert code == 1
        assert "platform database" in text
    async with served(write_config(tmp_path, database)) as process:
        code, text = await last_words(process)
        assert code == 3
        assert "mover init" in text


async def test_the_daemon_does_not_start_where_another_one_listens(database: str, tmp_path: Path) -> None:
    await platform_database(database)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with served(write_config(tmp_path, database, port=str(port))) as process:
            code, text = await last_words(process)
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in text
