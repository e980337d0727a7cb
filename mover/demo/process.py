"""Server processes that do not outlive us, whoever kills us: as which account they run, where their
data is, and how it is cleaned up. Knows nothing of PostgreSQL or Redis.

Each server has a watcher that holds the reading end of a pipe: when the owner dies, in whatever way,
the watcher ends the server and deletes its data.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.02
# Where files are in memory, on Linux; what has to be free there, so that small servers never fill it.
MEMORY, MEMORY_FREE_BYTES = Path("/dev/shm"), 8 << 30
# Becomes the server ($3…), and leaves a watcher behind that is nobody's child. A line on the pipe
# sends the watcher away; the pipe's end means that the owner is dead: end the server with signal $1
# and delete directory $2.
GUARD = """\
last=$1 home=$2; shift 2
exec 3<&0
( {
  read -r dismissed && exit 0
  kill -"$last" $$
  tries=0
  while kill -0 $$ && [ $tries -lt 30 ]; do sleep 1; tries=$((tries + 1)); done
  rm -rf "$home"
} <&3 3<&- >/dev/null 2>&1 & )
exec "$@" </dev/null 3<&-
"""
_HOME = re.compile(r"mover-[a-z0-9]+-(?P<pid>\d+)-[0-9a-f]{8}")


class ServerFailed(Exception):
    """A server could not be started or stopped; the message ends with the end of its log."""


@functools.cache
def _account() -> pwd.struct_passwd | None:
    """Who the servers run as: PostgreSQL refuses root. None: as ourselves."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def _environment() -> dict[str, str]:
    """Ours without libpq's variables, which would reach into the server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return {**kept, "LC_ALL": "C", "LANG": "C"}


def launch(
    arguments: list[str | Path], cwd: Path, log: IO[bytes], stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start a process as `_account()`, in a session of its own so that Ctrl-C does not reach it."""
    account = _account()
    return subprocess.Popen(
        arguments,
        cwd=cwd,
        env=_environment(),
        stdin=stdin,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        user=account.pw_uid if account else None,
        group=account.pw_gid if account else None,
        extra_groups=[] if account else None,
    )


def _reachable(path: Path) -> bool:
    """Whether `_account()` can execute `path`, by the permissions of others along the way."""
    return all(part.stat().st_mode & stat.S_IXOTH for part in (path, *path.parents))


@functools.cache
def executable(binary: Path) -> Path:
    """`binary`, or its twin in a copy of its whole installation where `_account()` can reach it."""
    if _account() is None or _reachable(binary):
        return binary
    return _copied_tree(binary.parent.parent) / "bin" / binary.name


@functools.cache
def _copied_tree(installation: Path) -> Path:
    """Stays for our whole life, since any server may need it; swept by a later run if we are killed."""
    home = make_home("bin")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    shutil.copytree(installation, home, symlinks=True, dirs_exist_ok=True)
    home.chmod(0o755)
    return home


def _temporary_directory() -> Path:
    ours = Path(tempfile.gettempdir())
    return ours if _account() is None or _reachable(ours) else Path("/tmp")


def _has_room(folder: Path) -> bool:
    return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free >= MEMORY_FREE_BYTES


def make_home(kind: str, *, in_memory: bool = False) -> Path:
    """A private directory of the server's account; its name carries our process id. `in_memory` where there
    is room."""
    parent = MEMORY if in_memory and _has_room(MEMORY) else _temporary_directory()
    home = parent / f"mover-{kind}-{os.getpid()}-{secrets.token_hex(4)}"
    home.mkdir(mode=0o700)
    account = _account()
    if account is not None:
        os.chown(home, account.pw_uid, account.pw_gid)
    return home


def sweep() -> list[Path]:
    """Delete what dead runs left behind; a live process's directories are not touched."""
    account = _account()
    owner = account.pw_uid if account else os.geteuid()
    swept = []
    for path in chain.from_iterable(p.glob("mover-*-*-*") for p in (_temporary_directory(), MEMORY)):
        match = _HOME.fullmatch(path.name)
        if match is None or _alive(int(match["pid"])):
            continue
        try:
            if path.lstat().st_uid != owner:
                continue
        except FileNotFoundError:  # others sweep, too
            continue
        shutil.rmtree(path, ignore_errors=True)
        swept.append(path)
    return swept


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Leash:
    """What a process that does not outlive us hangs on: a pipe whose reading end is its standard input."""

    def __init__(self) -> None:
        self.reading, self._writing = os.pipe()

    def command(
        self, arguments: Sequence[str | Path], last_signal: signal.Signals, home: Path
    ) -> list[str | Path]:
        """`arguments` with a watcher: when we die, the process gets `last_signal` and `home` is deleted."""
        name = last_signal.name.removeprefix("SIG")
        return ["/bin/sh", "-c", GUARD, "guard", name, home, *arguments]

    def held(self) -> None:
        """The process has its end now."""
        os.close(self.reading)

    def let_go(self) -> None:
        """Send the watcher away: the process is being ended, or has ended."""
        with os.fdopen(self._writing, "wb") as pipe, contextlib.suppress(BrokenPipeError):
            pipe.write(b"dismissed\n")
            pipe.flush()


@dataclass
class GuardedProcess:
    """A server process that does not outlive us, with its log and its directory."""

    home: Path
    last_signal: signal.Signals
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _leash: Leash | None = field(default=None, init=False)

    @property
    def log(self) -> Path:
        return self.home / "server.log"

    def start(self, arguments: list[str | Path]) -> None:
        leash = self._leash = Leash()
        command = leash.command(arguments, self.last_signal, self.home)
        try:
            with self.log.open("ab") as log:
                self.process = launch(command, self.home, log, stdin=leash.reading)
        finally:
            leash.held()

    def end(self, how: signal.Signals | None = None) -> None:
        """Wait for the server's end, after sending it `how`; no error when it has already ended."""
        if self.process is None or self._leash is None:
            return
        self._leash.let_go()
        process, self.process = self.process, None
        process.send_signal(how or self.last_signal)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise ServerFailed(f"a server did not stop within {STOP_TIMEOUT_S:g} s\n{self.tail()}") from None

    def delete(self) -> None:
        """End the server for good."""
        try:
            self.end()
        finally:
            shutil.rmtree(self.home, ignore_errors=True)

    def ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


def wait_until(ready: Callable[[], bool], ended: Callable[[], bool]) -> bool:
    """Whether `ready` came before `ended` and before the time-out."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and not ended():
        if ready():
            return True
        time.sleep(POLL_S)
    return False


def children(parent: int) -> list[int]:
    """Of a process, by Linux's /proc."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "pid (name) state ppid …"; the name may hold blanks and parentheses.
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(status.parent.name))
    return found
