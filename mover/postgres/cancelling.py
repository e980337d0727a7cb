"""Connections whose statements can be cancelled without anybody else waiting for that."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import psycopg
from psycopg import capabilities

Row = TypeVar("Row", covariant=True)


class CancellingConnection(psycopg.AsyncConnection[Row]):
    """libpq before 17 blocks until the server has taken the request, and the driver's C build holds the GIL
    meanwhile: a server that does not answer would freeze the whole process. It is asked in SQL then."""

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:
        if capabilities.has_cancel_safe() or self.closed:
            return await super().cancel_safe(timeout=timeout)
        async with asyncio.timeout(timeout), await psycopg.AsyncConnection.connect(**self._again()) as conn:
            await conn.execute("SELECT pg_catalog.pg_cancel_backend(%s)", (self.info.backend_pid,))

    def _again(self) -> dict[str, Any]:
        return {**self.info.get_parameters(), "password": self.info.password, "autocommit": True}
