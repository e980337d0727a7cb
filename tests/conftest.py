"""The test harness: async tests on uvloop, one server a version for the whole run, a database a test."""

from __future__ import annotations

import asyncio
import inspect
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import uvloop

from mover.core.ids import Capture
from mover.demo.servers import Cluster, PostgresServer, RedisServer, available_versions
from tests.support.containers import container
from tests.support.platform import Platform, seed_database, small_tenants

# Hundreds of daemons are started: where no bytecode is written, each would compile everything anew.
os.environ["PYTHONDONTWRITEBYTECODE"] = ""
TEST_TIMEOUT_S = 600
SMALL = {"shared_buffers": "128MB", "max_wal_size": "512MB"}
MakeDatabase = Callable[..., str]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs `async def` tests."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}

    async def bounded() -> None:
        async with asyncio.timeout(TEST_TIMEOUT_S):
            await pyfuncitem.obj(**arguments)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(bounded())
    return True


def _server(version: int) -> Iterator[Cluster]:
    """From the wheels or PATH; else in a container, where Docker answers; else the test is skipped."""
    if version in available_versions():
        # Tests crash processes, never the machine.
        with PostgresServer(version, fsync=False, in_memory=True, settings=SMALL) as server:
            yield server
    else:
        with container(version) as server:
            if server is None:
                pytest.skip(
                    f"PostgreSQL {version} is in no wheel and not on PATH, and Docker does not answer"
                )
            yield server


@pytest.fixture(scope="session")
def pg15() -> Iterator[Cluster]:
    yield from _server(15)


@pytest.fixture(scope="session")
def pg16() -> Iterator[Cluster]:
    yield from _server(16)


@pytest.fixture(scope="session")
def pg18() -> Iterator[Cluster]:
    yield from _server(18)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def make_database() -> Iterator[MakeDatabase]:
    """`make_database(server)` is the URL of a new database, a clone of `template` if one is named.

    Dropped after the test, whatever still holds it."""
    made: list[tuple[Cluster, str]] = []

    def make(server: Cluster, template: str = "template1") -> str:
        name = f"test_{secrets.token_hex(6)}"
        made.append((server, name))
        return server.create_database(name, template)

    yield make
    for server, name in made:
        server.drop_database(name)


@pytest.fixture(scope="session")
def platform_templates() -> Iterator[dict[tuple[int, int, int], str]]:
    """Seeded databases to clone, by server, number of tenants and rows."""
    made: dict[tuple[int, int, int], str] = {}
    yield made


@pytest.fixture
def make_platform(
    make_database: MakeDatabase, platform_templates: dict[tuple[int, int, int], str]
) -> Callable[..., Platform]:
    """`make_platform(server)` is a small seeded platform of the test's own, cloned from a template.

    `rows` of the large tenant, which is the first, and as many of all others together."""

    def make(server: Cluster, tenants: int = 4, rows: int = 1000) -> Platform:
        seeded = small_tenants(tenants, rows)
        key = (id(server), tenants, rows)
        if key not in platform_templates:
            name = f"template_{tenants}_{rows}"
            seed_database(server.create_database(name), seeded)
            platform_templates[key] = name
        return Platform(server, make_database(server, platform_templates[key]), seeded)

    return make


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of both captures between both pairs of servers runs in two of the four combinations, which hold
    each capture, each source and each target once; of a module's tests every other one takes the other two.

    Capture acts on the source, whatever the target's version is. Tests of what depends on everything at once
    are marked `every_combination`."""
    if not {"pair", "capture"} <= set(metafunc.fixturenames) or "capture" in _parametrized(metafunc):
        return
    tests = [name for name in vars(metafunc.module) if name.startswith("test_")]
    captures = list(Capture)[:: -1 if tests.index(metafunc.function.__name__) % 2 else 1]
    combinations = [
        pytest.param(*each, id=f"{'-to-'.join(each[0])}-{each[1]}")
        for each in zip(PAIRS, captures, strict=True)
    ]
    metafunc.definition.add_marker(pytest.mark.parametrize(("pair", "capture"), combinations, indirect=True))


def _parametrized(metafunc: pytest.Metafunc) -> str:
    return " ".join(str(marker.args[0]) for marker in metafunc.definition.iter_markers("parametrize"))


every_combination = pytest.mark.parametrize("capture", list(Capture), ids=str, indirect=True)


@pytest.fixture(params=list(Capture), ids=str)
def capture(request: pytest.FixtureRequest) -> Capture:
    """Both ways of following the source."""
    return request.param


@dataclass(frozen=True)
class Pair:
    """An empty database on each of two servers of different versions."""

    source: str
    target: str
    source_server: Cluster
    target_server: Cluster


PAIRS = [("pg16", "pg18"), ("pg18", "pg16")]


@pytest.fixture(params=PAIRS, ids="-to-".join)
def pair(request: pytest.FixtureRequest, make_database: MakeDatabase) -> Pair:
    source, target = (request.getfixturevalue(name) for name in request.param)
    return Pair(make_database(source), make_database(target), source, target)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the model checker said is shown when all is well, too."""
    reports = [r for r in terminalreporter.getreports("passed") if "tests/spec/" in r.nodeid and r.capstdout]
    if not reports:
        return
    terminalreporter.section("the model of the cutover")
    for report in sorted(reports, key=lambda each: each.nodeid):
        said = [line for line in report.capstdout.splitlines() if "errors:" in line or "violated" in line]
        terminalreporter.line(report.nodeid.rpartition("::")[2] + ": " + "; ".join(map(str.strip, said)))
