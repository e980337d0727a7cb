"""Kinds of applications that everybody knows, as schemas with rows and with a clerk who works on them.

The statements are written for a `search_path` of the application's schema. `OWNED_*` are of what belongs
to a tenant through a foreign key only.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from uuid import UUID

import psycopg

from mover.core.secret import Secret

SAVEPOINT_SHARE = 0.2
ROLLBACK_SHARE = 0.1


@dataclass(frozen=True)
class Application:
    """`rows` and `changes` are of one tenant, the parameter `t`; `k` tells tenants apart by a number, and
    `n` is random."""

    service: str  # in whose schema it lives
    ddl: str
    rows: str
    changes: tuple[str, ...]
    # Given out by sequences that no column owns: query -> sequence.
    shared_numbers: tuple[tuple[str, str], ...] = ()

    def create(self, url: str, schema: str) -> None:
        with _connect(url, schema) as conn:
            conn.execute(self.ddl)

    def fill(self, url: str, schema: str, tenant: UUID, number: int) -> None:
        with _connect(url, schema) as conn, psycopg.ClientCursor(conn) as cursor:
            cursor.execute(self.rows, {"t": tenant, "k": number})

    def assert_numbers_are_new(self, url: str, schema: str) -> None:
        with _connect(url, schema) as conn:
            for query, sequence in self.shared_numbers:
                (ahead,) = conn.execute(f"select ({query}) < nextval('{sequence}')").fetchone()
                assert ahead, f"{sequence} lags behind"


def _connect(url: str, schema: str) -> psycopg.Connection:
    return psycopg.connect(url, autocommit=True, options=f"-c search_path={schema}")


class Clerk:
    """Writes one small transaction after the other, until the place says that the tenant has moved."""

    def __init__(self, application: Application, tenant: UUID, number: int, seed: int) -> None:
        self._changes = application.changes
        self._named = {"t": tenant, "k": number}
        self._random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    async def work(self, url: Secret, schema: str) -> None:
        options = f"-c search_path={schema} -c app.tenant={self._named['t']}"
        async with await psycopg.AsyncConnection.connect(url.reveal(), options=options) as conn:
            while True:
                try:
                    await self._transaction(conn)
                except psycopg.errors.ReadOnlySqlTransaction:
                    return
                except (psycopg.IntegrityError, psycopg.errors.DeadlockDetected) as error:
                    self.refused[error.sqlstate or ""] += 1
                    await conn.rollback()

    async def _transaction(self, conn: psycopg.AsyncConnection) -> None:
        chosen = self._random.choices(self._changes, k=self._random.randint(1, 4))
        for change in chosen:
            await self._change(conn, change)
        if self._random.random() < ROLLBACK_SHARE:
            await conn.rollback()
            return
        await conn.commit()
        self.done.update(chosen)

    async def _change(self, conn: psycopg.AsyncConnection, change: str) -> None:
        named = {**self._named, "n": self._random.randrange(1_000_000)}
        if self._random.random() < SAVEPOINT_SHARE:
            async with conn.transaction(force_rollback=True):
                await conn.execute(change, named)
        await conn.execute(change, named)
