"""The configuration: one TOML file, overridden by the environment, read and checked once.

Every problem is collected before anything is reported, and no message repeats a value: a value may be
a secret that stands in the wrong place.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)

from mover.core import facts
from mover.core.errors import InvalidRequest, MoverError, Refused, Where
from mover.core.ids import TableRef, TenantId, Tier
from mover.core.migration import Place
from mover.core.secret import Secret

ENVIRONMENT_PREFIX = "MOVER__"
_MAX_IDENTIFIER_BYTES = 63  # PostgreSQL cuts longer names off
_TIERS = tuple(Tier)  # from the least isolated to the most


@dataclass(eq=False)
class ConfigError(MoverError):
    """The configuration cannot be used; `problems` has one sentence for each reason."""

    problems: tuple[str, ...] = ()

    code = "configuration"


class Role(StrEnum):
    """What a token may do; each role may do what those before it may."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


def postgres_url(value: object) -> Secret:
    """Raises ValueError, which does not repeat the text."""
    text = _text(value)
    if "://" not in text:
        if "=" not in text:
            raise ValueError("is neither a postgresql:// URL nor key=value parameters")
        return Secret(text)
    if urlsplit(text).scheme not in ("postgresql", "postgres"):
        raise ValueError("is not a postgresql:// URL")
    return Secret(text)


def _redis_url(value: object) -> Secret:
    text = _text(value)
    if urlsplit(text).scheme not in ("redis", "rediss", "unix"):
        raise ValueError("is not a redis:// URL")
    return Secret(text)


def _http_url(value: object) -> Secret:
    text = _text(value)
    if urlsplit(text).scheme not in ("http", "https"):
        raise ValueError("is not an http:// URL")
    return Secret(text.rstrip("/"))


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("should be a text that is not empty")
    return value


def _table(value: object) -> TableRef:
    schema, dot, name = _text(value).partition(".")
    if not (schema and dot and name) or "." in name:
        raise ValueError('should be written as "schema.table"')
    return TableRef(schema, name)


def _identifier(value: str) -> str:
    if not value or len(value.encode()) > _MAX_IDENTIFIER_BYTES or "\0" in value:
        raise ValueError("is not a name that PostgreSQL accepts (1 to 63 bytes)")
    return value


def _listen(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError('should be written as "host:port"')
    return value


def _sha256(value: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise ValueError("is not a SHA-256 in hexadecimal (64 digits): `printf %s TOKEN | sha256sum`")
    return value.lower()


def _only_static(value: object) -> str:
    if value != "static":
        raise ValueError(
            'only "static" is available in this version: create the database yourself and name it under'
            " [verticals.NAME] database_url, or under [dedicated]"
        )
    return "static"


PostgresUrl: TypeAlias = Annotated[Secret, PlainValidator(postgres_url)]
RedisUrl: TypeAlias = Annotated[Secret, PlainValidator(_redis_url)]
HttpUrl: TypeAlias = Annotated[Secret, PlainValidator(_http_url)]
Table: TypeAlias = Annotated[TableRef, PlainValidator(_table)]
Identifier: TypeAlias = Annotated[str, AfterValidator(_identifier)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Platform(_Section):
    database_url: PostgresUrl


class Token(_Section):
    """A caller of the API; the token itself is known to the caller alone."""

    name: str = Field(min_length=1)
    role: Role
    sha256: Annotated[str, AfterValidator(_sha256)] = Field(repr=False)


class Api(_Section):
    listen: Annotated[str, AfterValidator(_listen)] = "127.0.0.1:8080"
    tokens: tuple[Token, ...] = ()

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [token.name for token in self.tokens]
        if len(set(names)) < len(names):
            raise ValueError("tokens: each needs a name of its own, for the audit")
        return self


class Tenancy(_Section):
    column: Identifier = "tenant_id"
    services: tuple[Identifier, ...] = Field(min_length=1)
    schema_pattern: str = "{vertical}_{service}"
    reference_tables: tuple[Table, ...] = ()
    ignore_tables: tuple[Table, ...] = ()

    @model_validator(mode="after")
    def _pattern_yields_schemas(self) -> Self:
        if set(re.findall(r"{(.*?)}", self.schema_pattern)) != {"vertical", "service"}:
            raise ValueError("schema_pattern: should contain {vertical} and {service}, and no other braces")
        if len(set(self.services)) < len(self.services):
            raise ValueError("services: each may be there once")
        return self

    def schemas(self, vertical: str) -> tuple[str, ...]:
        return tuple(
            self.schema_pattern.replace("{vertical}", vertical).replace("{service}", service)
            for service in self.services
        )

    @property
    def rules(self) -> facts.Tenancy:
        """As preflight and comparisons apply them."""
        return facts.Tenancy(
            column=self.column,
            reference_tables=frozenset(map(str, self.reference_tables)),
            ignore_tables=frozenset(map(str, self.ignore_tables)),
        )


class Routing(_Section):
    organizations_table: Table = TableRef("auth", "organizations")
    redis_url: RedisUrl | None = None
    cache_key: str = "tenant:{tenant_id}:routing"

    @model_validator(mode="after")
    def _key_names_the_tenant(self) -> Self:
        if re.findall(r"{(.*?)}", self.cache_key) != ["tenant_id"]:
            raise ValueError("cache_key: should contain {tenant_id}, and no other braces")
        return self


class Vertical(_Section):
    database_url: PostgresUrl | None = None  # absent: nothing can be moved there yet


class Provisioner(_Section):
    kind: Annotated[str, PlainValidator(_only_static)] = "static"


class MonitoringHours(_Section):
    """How long a migration is watched before the source is cleaned, by the tier that it went to."""

    schema_: float = Field(default=24, alias="schema", ge=0)
    database: float = Field(default=24, ge=0)
    dedicated: float = Field(default=168, ge=0)
    downgrade: float = Field(default=720, ge=0)  # whatever the tier, when it became less isolated


class Engine(_Section):
    capture: Literal["auto", "wal", "trigger"] = "auto"
    copy_workers: int = Field(default=4, ge=1, le=64)
    max_connections_per_database: int = Field(
        default=12, ge=8
    )  # stream, apply, snapshot and fence need one each
    pause_budget_ms: int = Field(default=1000, ge=10)
    wave_seconds: float = Field(default=600, gt=0)
    monitoring_hours: MonitoringHours = MonitoringHours()
    tombstone_days: float = Field(default=7, ge=0)
    abandoned_hours: float = Field(default=24, ge=0)  # what a rollback leaves on the target, to be looked at
    # Until the switch; 0: no matter how long. What takes longer is rolled back.
    timeout_hours: float = Field(default=2, ge=0)
    phase_timeout_hours: float = Field(default=2, ge=0)
    unreachable_minutes: float = Field(default=10, ge=0)  # the target
    max_retained_gb: float = Field(default=100, ge=0)  # by our slot, before we give up; 0: no matter how much
    max_active_migrations: int = Field(default=5, ge=1)  # of one daemon; each holds snapshots and connections
    lease_seconds: float = Field(default=8, ge=1)  # and another daemon has taken over within ten seconds


class Health(_Section):
    """What watches a tenant after the switch, and asks for a rollback when he is served badly."""

    synthetic: bool = True  # read and write a row of his through the route, and roll that back
    prometheus_url: HttpUrl | None = None
    error_rate_query: str | None = None  # PromQL; {tenant_id} is the tenant
    max_error_rate: float = Field(default=0.05, ge=0)  # the query's result must be above it
    max_increase: float = Field(default=3, ge=1)  # and above so many times of what it was before the switch
    interval_seconds: float = Field(default=15, gt=0)
    failures: int = Field(default=3, ge=1)  # bad looks in a row, of one probe

    @model_validator(mode="after")
    def _query_has_a_server(self) -> Self:
        if (self.prometheus_url is None) != (self.error_rate_query is None):
            raise ValueError("error_rate_query: goes with prometheus_url, and that with it")
        return self


class Log(_Section):
    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(_Section):
    """Everything an operator can set."""

    platform: Platform
    api: Api = Api()
    tenancy: Tenancy
    routing: Routing = Routing()
    verticals: Mapping[Identifier, Vertical]
    dedicated: Mapping[UUID, PostgresUrl] = Field(default_factory=dict)
    provisioner: Provisioner = Provisioner()
    engine: Engine = Engine()
    health: Health = Health()
    log: Log = Log()

    @model_validator(mode="after")
    def _verticals_fit(self) -> Self:
        core = self.verticals.get("core")
        if core is None or core.database_url is None:
            raise ValueError("verticals.core.database_url: is missing; tier `schema` lives there")
        for vertical in self.verticals:
            if any(len(name.encode()) > _MAX_IDENTIFIER_BYTES for name in self.tenancy.schemas(vertical)):
                raise ValueError(f"verticals.{vertical}: its schemas' names are longer than 63 bytes")
        return self

    def configured_url(self, tenant: TenantId, vertical: str, tier: Tier) -> Secret | None:
        """The database that the configuration alone yields; None when it does not know."""
        match tier:
            case Tier.SCHEMA:
                return self.verticals["core"].database_url
            case Tier.DATABASE:
                known = self.verticals.get(vertical)
                return known.database_url if known else None
            case Tier.DEDICATED:
                return self.dedicated.get(tenant)

    def place(self, tenant: TenantId, vertical: str, tier: Tier, route_url: str | None = None) -> Place:
        """Where a tenant with this route lives, or would live.

        Raises InvalidRequest for an unknown vertical, Refused when no database is known for it."""
        if vertical not in self.verticals:
            raise InvalidRequest(
                f"unknown vertical; known are {', '.join(sorted(self.verticals))}",
                where=Where(tenant=tenant),
                hint="Add [verticals.NAME] to the configuration.",
                field="targetVertical",
            )
        url = Secret(route_url) if route_url else self.configured_url(tenant, vertical, tier)
        if url is None:
            key = (
                f"verticals.{vertical}.database_url"
                if tier is Tier.DATABASE
                else f'"{tenant}" under [dedicated]'
            )
            raise Refused(
                f"there is no database yet for {vertical} ({tier})",
                where=Where(tenant=tenant),
                hint=f"Create one and set {key}.",
            )
        return Place(vertical, tier, url, self.tenancy.schemas(vertical))

    def monitoring_seconds(self, source: Tier, target: Tier) -> float:
        """How long a migration between these tiers is watched before the source is cleaned."""
        hours = self.engine.monitoring_hours
        if _TIERS.index(target) < _TIERS.index(source):
            return hours.downgrade * 3600
        by_tier = {
            Tier.SCHEMA: hours.schema_,
            Tier.DATABASE: hours.database,
            Tier.DEDICATED: hours.dedicated,
        }
        return by_tier[target] * 3600


def load_config(path: Path, environment: Mapping[str, str] = os.environ) -> Config:
    """Raises ConfigError with every problem at once."""
    problems: list[_Problem] = []
    data = _read(path)
    _override(data, environment, problems)
    _resolve(data, environment, (), problems)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        problems += _explained(error, problems)
    if problems:
        sentences = tuple(str(problem) for problem in problems)
        raise ConfigError(f"{path.name} has {len(sentences)} problem(s)", problems=sentences)
    return config


@dataclass(frozen=True, slots=True)
class _Problem:
    path: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}: {self.text}" if self.path else self.text


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problem = f"{path}: cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        problem = f"{path}: is not UTF-8"
    except tomllib.TOMLDecodeError as error:
        problem = f"{path}: {_without_names(str(error))}"
    raise ConfigError("the configuration cannot be read", problems=(problem,))


def _without_names(message: str) -> str:
    """The parser's message keeps its position and loses whatever it quotes from the file."""
    return re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", message)


def _override(data: dict[str, Any], environment: Mapping[str, str], problems: list[_Problem]) -> None:
    """`MOVER__SECTION__KEY` replaces `section.key`; a list or a table is written as in TOML."""
    for name in sorted(environment):
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        path = tuple(part.lower() for part in name.removeprefix(ENVIRONMENT_PREFIX).split("__"))
        value: Any = environment[name]
        if value.startswith(("[", "{")):
            try:
                value = tomllib.loads(f"value = {value}")["value"]
            except tomllib.TOMLDecodeError:
                problems.append(_Problem((), f"{name}: is not a TOML list or table"))
                continue
        if not _put(data, path, value):
            problems.append(_Problem((), f"{name}: does not name a key of a section"))


def _put(data: dict[str, Any], path: Sequence[str], value: object) -> bool:
    *sections, key = path
    for section in sections:
        inner = data.setdefault(section, {})
        if not isinstance(inner, dict):
            return False
        data = inner
    if not all(path) or not sections or isinstance(data.get(key), dict):
        return False
    data[key] = value
    return True


def _resolve(
    data: dict[str, Any] | list[Any],
    environment: Mapping[str, str],
    path: tuple[str, ...],
    problems: list[_Problem],
) -> None:
    """Replace `env:NAME` by the variable's value, everywhere."""
    items: Iterator[tuple[Any, Any]] = iter(
        list(data.items()) if isinstance(data, dict) else list(enumerate(data))
    )
    for key, value in items:
        here = (*path, str(key))
        if isinstance(value, dict | list):
            _resolve(value, environment, here, problems)
        elif isinstance(value, str) and value.startswith("env:"):
            name = value.removeprefix("env:")
            data[key] = environment.get(name, "")
            if not data[key]:
                problems.append(_Problem(here, f"the environment variable {name} is not set"))


def _explained(error: ValidationError, known: Sequence[_Problem]) -> list[_Problem]:
    """Pydantic's findings, but for those about a variable that is reported already."""
    reported = {problem.path for problem in known}
    # `input` and `ctx` stay out: they hold the value.
    details = error.errors(include_url=False, include_input=False)
    problems = []
    for detail in details:
        path = tuple(str(part) for part in detail["loc"] if part != "[key]")
        if path not in reported:
            problems.append(_Problem(path, _sentence(detail["type"], detail["msg"], path)))
    return problems


def _sentence(kind: str, message: str, path: tuple[str, ...]) -> str:
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(path[-1], _keys_beside(path), n=1)
        return f"is not a known key{f'; did you mean {close[0]}?' if close else ''}"
    return message.removeprefix("Value error, ")


def _keys_beside(path: Sequence[str]) -> list[str]:
    """The keys that the section of `path` may have."""
    section: type[BaseModel] = Config
    sections: Mapping[str, type[BaseModel]] = {
        "platform": Platform,
        "api": Api,
        "tokens": Token,
        "tenancy": Tenancy,
        "routing": Routing,
        "verticals": Vertical,
        "provisioner": Provisioner,
        "engine": Engine,
        "log": Log,
        "monitoring_hours": MonitoringHours,
    }
    for part in path[:-1]:
        section = sections.get(part, section)
    return [field.alias or name for name, field in section.model_fields.items()]
