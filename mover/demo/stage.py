"""A daemon with its configuration, as an operator would run it: a process of its own, on free ports, that
does not outlive us."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mover.core.errors import MoverError
from mover.demo.process import Leash, free_port
from mover.demo.schema import REFERENCE_TABLES, SCHEMA_PATTERN, SERVICES
from mover.web.client import ApiClient, connect

READY_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0


@dataclass
class Stage:
    """Configuration and process of one daemon; `folder` holds its file and its log."""

    folder: Path
    platform_url: str
    verticals: Mapping[str, str]  # vertical -> URL
    redis_url: str | None = None
    engine: Mapping[str, object] = field(default_factory=dict)
    health: Mapping[str, object] = field(default_factory=dict)
    name: str = "daemon"
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    port: int = field(default_factory=free_port)
    process: asyncio.subprocess.Process | None = None
    _leash: Leash | None = None

    @property
    def server(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def config_path(self) -> Path:
        return self.folder / f"{self.name}.toml"

    @property
    def log_path(self) -> Path:
        return self.folder / f"{self.name}.log"

    def write_config(self) -> Path:
        """The file that `mover serve --config` reads; URLs come from the environment."""
        sections: dict[str, Mapping[str, object]] = {
            "platform": {"database_url": "env:MOVER_STAGE_PLATFORM"},
            "api": {
                "listen": f"127.0.0.1:{self.port}",
                "tokens": [
                    {
                        "name": "operator",
                        "role": "admin",
                        "sha256": hashlib.sha256(self.token.encode()).hexdigest(),
                    }
                ],
            },
            "tenancy": {
                "services": list(SERVICES),
                "schema_pattern": SCHEMA_PATTERN,
                "reference_tables": list(REFERENCE_TABLES),
            },
            "routing": {"redis_url": "env:MOVER_STAGE_REDIS"} if self.redis_url else {},
            "engine": self.engine,
            "health": self.health,
        }
        sections |= {
            f"verticals.{vertical}": {"database_url": f"env:MOVER_STAGE_{vertical.upper()}"}
            for vertical in self.verticals
        }
        self.config_path.write_text("\n".join(_section(name, keys) for name, keys in sections.items()))
        return self.config_path

    @property
    def environment(self) -> dict[str, str]:
        urls = {"PLATFORM": self.platform_url, "REDIS": self.redis_url or ""}
        urls |= {vertical.upper(): url for vertical, url in self.verticals.items()}
        return {**os.environ, **{f"MOVER_STAGE_{name}": url for name, url in urls.items() if url}}

    async def run(self, *arguments: str) -> tuple[int, str]:
        """One `mover` command to its end: exit code and output."""
        process = await asyncio.create_subprocess_exec(
            *_MOVER,
            *arguments,
            env={**self.environment, "MOVER_SERVER": self.server, "MOVER_TOKEN": self.token},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, output.decode()

    async def start(self, **environment: str) -> None:
        """Start `mover serve`, with more `environment`, and wait until it answers."""
        await self.launch(**environment)
        async with asyncio.timeout(READY_TIMEOUT_S):
            while not await self._answers():
                if self.process is None or self.process.returncode is not None:
                    raise MoverError(f"the daemon did not stay; see {self.log_path}")
                await asyncio.sleep(0.05)

    async def launch(self, **environment: str) -> None:
        """Start `mover serve` without waiting."""
        serve: list[str | Path] = [*_MOVER, "serve", "--config", self.config_path]
        leash = Leash()
        command = leash.command(serve, signal.SIGKILL, self.folder / "nothing-to-delete")
        try:
            with self.log_path.open("ab") as log:
                self.process = await asyncio.create_subprocess_exec(
                    *command,
                    env={**self.environment, **environment},
                    stdin=leash.reading,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is ours to handle: the daemon is told to stop
                )
        finally:
            leash.held()
        self._leash = leash

    async def wait(self) -> int:
        """For the daemon's end: the exit code, negative after a signal."""
        if self.process is None:
            return 0
        code = await self.process.wait()
        leash, self._leash = self._leash, None
        if leash is not None:
            leash.let_go()
        return code

    async def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_TIMEOUT_S):
            return await self.wait()

    async def kill(self) -> None:
        """kill -9."""
        self.send_signal(signal.SIGKILL)
        await self.wait()

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing happens when the daemon has ended."""
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Stage]:
        await self.start()
        try:
            yield self
        finally:
            try:
                await self.stop()
            except TimeoutError:
                await self.kill()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[ApiClient]:
        async with connect(self.server, self.token) as client:
            yield client

    async def _answers(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        return True


_MOVER = (sys.executable, "-m", "mover")


def _section(name: str, keys: Mapping[str, object]) -> str:
    lines = [f"[{name}]"] + [f"{key} = {_toml(value)}" for key, value in keys.items()]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    """JSON's texts, numbers, booleans and lists are TOML's, too; its objects are not."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value)
