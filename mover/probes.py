"""How a tenant is served, seen from outside: by what a Prometheus server says of his requests, and by a read
and a write of our own through his route. Implements engine.health.Probes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import aiohttp

from mover.config import Health
from mover.core.errors import MoverError, Unreachable
from mover.core.ids import TenantId
from mover.core.migration import Place
from mover.core.secret import Secret
from mover.core.tables import Shape
from mover.engine.health import Probe
from mover.postgres.synthetic import SyntheticProbe

ANSWER_S = 5.0


@dataclass(frozen=True, slots=True)
class ErrorRate:
    """A PromQL query whose result is a share, of one server (https://prometheus.io/docs, HTTP API v1)."""

    url: Secret
    query: str

    async def read(self) -> float | None:
        """The largest value of the result; None where there is none. Raises Unreachable."""
        try:
            async with (
                asyncio.timeout(ANSWER_S),
                aiohttp.ClientSession() as session,
                session.get(f"{self.url.reveal()}/api/v1/query", params={"query": self.query}) as response,
            ):
                answer = await response.json()
                values = _values(answer["data"])
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError, TypeError) as error:
            raise Unreachable(f"prometheus: no usable answer ({type(error).__name__})") from error
        return max((value for value in values if not math.isnan(value)), default=None)


@dataclass(frozen=True, slots=True)
class ErrorRateProbe:
    """A spike is above `threshold`, and above `max_increase` times of the rate before the switch."""

    rate: ErrorRate
    threshold: float
    max_increase: float
    before: float | None

    async def look(self) -> str | None:
        now = await self.rate.read()
        if now is None or now <= max(self.threshold, (self.before or 0.0) * self.max_increase):
            return None
        was = "unknown" if self.before is None else f"{self.before:.1%}"
        return f"{now:.1%} of the tenant's requests fail; before the switch: {was}"


@dataclass(frozen=True, slots=True)
class ConfiguredProbes:
    """Those of the section [health], for one tenant."""

    health: Health
    tenant: TenantId
    route: Callable[[], Awaitable[Place]]  # where he is served now

    @property
    def _rate(self) -> ErrorRate | None:
        if self.health.prometheus_url is None or self.health.error_rate_query is None:
            return None
        query = self.health.error_rate_query.replace("{tenant_id}", str(self.tenant))
        return ErrorRate(self.health.prometheus_url, query)

    async def error_rate(self) -> float | None:
        try:
            return await self._rate.read() if self._rate is not None else None
        except MoverError:
            return None

    def watching(self, shape: Shape, error_rate_before: float | None) -> Sequence[Probe]:
        """`shape` is that of the way there."""
        probes: list[Probe] = []
        if self._rate is not None:
            limits = self.health.max_error_rate, self.health.max_increase
            probes.append(ErrorRateProbe(self._rate, *limits, error_rate_before))
        if self.health.synthetic:
            probes.append(SyntheticProbe(self.tenant, shape, self.route))
        return probes


def _values(data: dict[str, object]) -> list[float]:
    """Of a scalar, or of each series of a vector; `[time, "value"]` each."""
    match data:
        case {"resultType": "scalar", "result": [_, value]}:
            return [float(str(value))]
        case {"resultType": "vector", "result": list(series)}:
            return [float(one["value"][1]) for one in series]
    raise ValueError("neither a scalar nor a vector")
