"""Servers without set-up: they start, survive what tests do to them, and leave nothing behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest
import redis

from mover.demo.process import MEMORY, ServerFailed, executable, make_home, sweep
from mover.demo.servers import PASSWORD_GROUP, PostgresServer, available_versions


@pytest.fixture
def server():
    with PostgresServer(
        min(available_versions()), fsync=False, settings={"shared_buffers": "16MB"}
    ) as started:
        yield started


def eventually(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def test_servers_of_two_versions_decode_logically(pg16, pg18):
    for server, version in ((pg16, 16), (pg18, 18)):
        with psycopg.connect(server.url()) as conn:
            assert conn.info.server_version // 10000 == version
            assert conn.execute("show wal_level").fetchone() == ("logical",)


def test_settings_given_win_over_the_defaults():
    with PostgresServer(16, fsync=False, settings={"wal_level": "replica"}) as server:
        with psycopg.connect(server.url()) as conn:
            assert conn.execute("show wal_level").fetchone() == ("replica",)


def test_a_wrong_setting_is_reported_with_the_servers_words():
    with pytest.raises(ServerFailed, match="no_such_setting"):
        PostgresServer(16, settings={"no_such_setting": "1"}).start()


def test_a_version_that_is_not_here_is_named():
    with pytest.raises(ServerFailed, match="no PostgreSQL 9 here"):
        PostgresServer(9)


@pytest.mark.parametrize("how", ["restart", "kill9", "stop_immediately"])
def test_committed_rows_survive(server, how):
    with psycopg.connect(server.url(), autocommit=True) as conn:
        conn.execute("create table kept as select 1 as id")
        getattr(server, how)()
        if how != "restart":
            server.come_back()
    with psycopg.connect(server.url()) as conn:
        assert conn.execute("select id from kept").fetchall() == [(1,)]


def test_no_backend_lives_on_after_a_kill(server):
    with psycopg.connect(server.url(), autocommit=True) as conn:
        pid = conn.execute("select pg_backend_pid()").fetchone()[0]
        server.kill9()
        eventually(lambda: not _runs(pid))


def test_members_of_the_password_group_need_their_password(server):
    with psycopg.connect(server.url(), autocommit=True) as conn:
        conn.execute(f"create role {PASSWORD_GROUP}")
        conn.execute(f"create role someone login password 'right' in role {PASSWORD_GROUP}")
    with psycopg.connect(server.url(user="someone", password="right")):
        pass
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(server.url(user="someone", password="wrong"))


def test_a_database_is_dropped_whatever_holds_it(server):
    url = server.create_database("busy")
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("select pg_create_logical_replication_slot('held', 'pgoutput')")
        conn.execute("create table t (id int)")
        conn.execute("begin; insert into t values (1); prepare transaction 'held'")
        server.drop_database("busy")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(url)


def test_a_stopped_server_leaves_nothing(server):
    home = _home(server)
    server.stop()
    server.stop()
    assert not home.exists()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(server.url())


def test_a_server_dies_with_its_owner():
    program = (
        "from mover.demo.servers import PostgresServer, RedisServer\n"
        "a, b = PostgresServer(16, fsync=False).start(), RedisServer().start()\n"
        "both = a._guarded, b._guarded\n"
        "print(*(g.process.pid for g in both), *(g.home for g in both), flush=True)\n"
        "input()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    *pids, home, other_home = owner.stdout.readline().split()
    assert all(_runs(int(pid)) for pid in pids)
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    eventually(lambda: not any(_runs(int(pid)) for pid in pids))
    eventually(lambda: not Path(home).exists() and not Path(other_home).exists(), timeout_s=60)


@pytest.mark.parametrize("in_memory", [False, True])
def test_what_a_dead_run_left_is_swept_and_what_a_live_one_uses_is_not(server, in_memory):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ours = make_home("pg99", in_memory=in_memory)
    left = ours.rename(ours.with_name(ours.name.replace(str(os.getpid()), str(dead.pid))))
    sweep()
    assert not left.exists()
    assert _home(server).exists()


def test_what_another_run_sweeps_at_the_same_moment_is_no_error(monkeypatch):
    ended = 2**22 + 1  # above the highest number that Linux gives a process
    ours = make_home("pg99")
    home = ours.rename(ours.with_name(ours.name.replace(str(os.getpid()), str(ended))))

    def is_alive_until_it_is_swept(pid: int) -> bool:
        if pid == ended:
            home.rmdir()
        return pid != ended

    monkeypatch.setattr("mover.demo.process._alive", is_alive_until_it_is_swept)
    assert sweep() == []
    assert not home.exists()


@pytest.mark.skipif(not MEMORY.is_dir(), reason="files in memory are Linux's")
@pytest.mark.parametrize("wanted", [0, 1 << 60], ids=["room", "no room"])
def test_files_are_kept_in_memory_only_where_there_is_room(monkeypatch, wanted):
    monkeypatch.setattr("mover.demo.process.MEMORY_FREE_BYTES", wanted)
    home = make_home("pg99", in_memory=True)
    home.rmdir()
    assert (home.parent == MEMORY) == (wanted == 0)


def test_binaries_that_the_servers_account_cannot_reach_are_copied(tmp_path):
    installation = available_versions()[16].parent
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    shutil.copytree(installation, hidden / "pg", symlinks=True)
    found = executable(hidden / "pg" / "bin" / "postgres")
    account = {"user": "nobody"} if os.geteuid() == 0 else {}
    answer = subprocess.run([found, "--version"], capture_output=True, text=True, cwd="/", **account)
    assert answer.stdout.startswith("postgres (PostgreSQL) 16")


def test_redis_answers(redis_server):
    with redis.Redis.from_url(redis_server.url) as client:
        assert client.ping()


def _home(server):
    return server._running.home


def _runs(pid):
    """Whether the process executes; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
