"""The configuration: overrides, indirection, every problem at once, and where a tenant lives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from uuid import UUID

import pytest

from mover.config import Config, ConfigError, Role, load_config
from mover.core.errors import InvalidRequest, Refused
from mover.core.ids import TableRef, TenantId, Tier

TENANT = TenantId(UUID("6f1b0a52-7f2f-4f0e-9a0e-0f4d2a9c6a11"))
GOOD = """
[platform]
database_url = "env:DATABASE_URL"
[api]
tokens = [{ name = "ops", role = "admin", sha256 = "%s" }]
[tenancy]
services = ["dms", "crm"]
[verticals.core]
database_url = "postgresql://core.example/core"
[verticals.realestate]
database_url = "postgresql://estate.example/estate"
[verticals.health]
""" % ("Ab" * 32)
ENVIRONMENT = {"DATABASE_URL": "postgresql://app:planted@platform.example/platform"}


def load(tmp_path: Path, text: str = GOOD, environment: Mapping[str, str] = ENVIRONMENT) -> Config:
    path = tmp_path / "mover.toml"
    path.write_text(text)
    return load_config(path, environment)


def problems(tmp_path: Path, text: str = GOOD, environment: Mapping[str, str] = ENVIRONMENT) -> str:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, environment)
    assert "planted" not in repr(error.value)
    return "\n".join(error.value.problems)


def test_defaults_are_those_of_the_documentation(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.api.address == ("127.0.0.1", 8080)
    assert config.api.tokens[0].role is Role.ADMIN
    assert config.api.tokens[0].sha256 == "ab" * 32
    assert config.tenancy.column == "tenant_id"
    assert config.routing.organizations_table == TableRef("auth", "organizations")
    assert config.routing.cache_key == "tenant:{tenant_id}:routing"
    engine = config.engine
    assert (engine.capture, engine.copy_workers, engine.max_connections_per_database) == ("auto", 4, 12)
    assert (engine.pause_budget_ms, engine.wave_seconds, engine.tombstone_days) == (1000, 600, 7)
    assert (engine.max_active_migrations, engine.lease_seconds) == (5, 8)


def test_a_secret_is_resolved_and_never_shown(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.platform.database_url.reveal() == ENVIRONMENT["DATABASE_URL"]
    assert "planted" not in f"{config!r} {config}"
    assert "abab" not in repr(config)


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        environment=ENVIRONMENT
        | {
            "MOVER__ENGINE__COPY_WORKERS": "2",
            "MOVER__ENGINE__MONITORING_HOURS__DATABASE": "0.5",
            "MOVER__VERTICALS__CORE__DATABASE_URL": "env:OTHER",
            "MOVER__VERTICALS__HEALTH__DATABASE_URL": "postgresql://health.example/h",
            "MOVER__TENANCY__SERVICES": '["one"]',
            "MOVER__ROUTING__REDIS_URL": "redis://cache.example/0",
            "OTHER": "postgresql://other.example/core",
            "MOVER_TOKEN": "not a key",
        },
    )
    assert config.engine.copy_workers == 2
    assert config.engine.monitoring_hours.database == 0.5
    assert config.tenancy.services == ("one",)
    core, health = config.verticals["core"].database_url, config.verticals["health"].database_url
    assert core is not None and core.reveal() == "postgresql://other.example/core"
    assert health is not None and health.reveal() == "postgresql://health.example/h"


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        """
        [platform]
        database_url = "env:NOT_SET"
        [api]
        listen = "nowhere"
        tokens = [{ name = "ops", role = "boss", sha256 = "planted-token" }]
        [tenancy]
        column = ""
        services = []
        reference_tables = ["countries"]
        [routing]
        redis_url = "http://planted@cache"
        cache_key = "tenant"
        [verticals.core]
        database_url = "mysql://planted@core"
        [provisioner]
        kind = "scalingo"
        [dedicated]
        nobody = "postgresql://x"
        [engine]
        capture = "magic"
        copy_wokers = 3
        pause_budget_ms = "planted"
        monitoring_hours = { databse = 1 }
        [platfrom]
        """,
        {"MOVER__ENGINE": "1", "MOVER__TENANCY__IGNORE_TABLES": "[planted"},
    )
    for expected in (
        "platform.database_url: the environment variable NOT_SET is not set",
        'api.listen: should be written as "host:port"',
        "api.tokens.0.role: Input should be 'viewer', 'operator' or 'admin'",
        "api.tokens.0.sha256: is not a SHA-256",
        "tenancy.column: is not a name",
        "tenancy.services: ",
        'tenancy.reference_tables.0: should be written as "schema.table"',
        "routing.redis_url: is not a redis:// URL",
        "verticals.core.database_url: is not a postgresql:// URL",
        'provisioner.kind: only "static" is available in this version',
        "dedicated.nobody: ",
        "engine.capture: Input should be 'auto', 'wal' or 'trigger'",
        "engine.copy_wokers: is not a known key; did you mean copy_workers?",
        "engine.pause_budget_ms: ",
        "engine.monitoring_hours.databse: is not a known key; did you mean database?",
        "platfrom: is not a known key; did you mean platform?",
        "MOVER__ENGINE: does not name a key of a section",
        "MOVER__TENANCY__IGNORE_TABLES: is not a TOML list or table",
    ):
        assert expected in found
    assert found.count("platform.database_url") == 1


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('["dms", "crm"]', '["dms", "dms"]', "services: each may be there once"),
        ('["dms", "crm"]', '["dms"]\nschema_pattern = "{vertical}"', "schema_pattern: should contain"),
        ("[verticals.health]", '[routing]\ncache_key = "x"', "cache_key: should contain {tenant_id}"),
        ("[verticals.core]", "[verticals.kernel]", "verticals.core.database_url: is missing"),
        ("[verticals.health]", f"[verticals.{'x' * 61}]", "longer than 63 bytes"),
        ("[tenancy]", "[tenancy", "at line"),
        ("[verticals.health]", 'x = "planted\\q"', "at line"),
    ],
)
def test_what_does_not_fit_together_is_a_problem(old: str, new: str, expected: str, tmp_path: Path) -> None:
    assert expected in problems(tmp_path, GOOD.replace(old, new))


def test_tokens_share_no_name(tmp_path: Path) -> None:
    token = '{ name = "ops", role = "viewer", sha256 = "%s" }' % ("0" * 64)
    assert "name of its own" in problems(tmp_path, GOOD.replace("tokens = [", f"tokens = [{token}, "))


def test_a_file_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "absent.toml", {})
    assert "No such file" in error.value.problems[0]
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "binary.toml", {})


def test_a_tenant_lives_where_its_tier_says(tmp_path: Path) -> None:
    config = load(tmp_path, f'{GOOD}[dedicated]\n"{TENANT}" = "postgresql://own.example/own"\n')
    shared = config.place(TENANT, "realestate", Tier.SCHEMA)
    assert shared.url.reveal() == "postgresql://core.example/core"
    assert shared.schemas == ("realestate_dms", "realestate_crm")
    assert config.place(TENANT, "realestate", Tier.DATABASE).url.reveal() == (
        "postgresql://estate.example/estate"
    )
    assert config.place(TENANT, "realestate", Tier.DEDICATED).url.reveal() == "postgresql://own.example/own"


def test_the_routes_own_url_wins(tmp_path: Path) -> None:
    place = load(tmp_path).place(TENANT, "core", Tier.SCHEMA, "postgresql://moved.example/x")
    assert place.url.reveal() == "postgresql://moved.example/x"


def test_a_place_without_a_database_is_refused_with_the_key_to_set(tmp_path: Path) -> None:
    config = load(tmp_path)
    with pytest.raises(Refused) as refused:
        config.place(TENANT, "health", Tier.DATABASE)
    assert "verticals.health.database_url" in str(refused.value.hint)
    with pytest.raises(Refused) as refused:
        config.place(TENANT, "realestate", Tier.DEDICATED)
    assert str(TENANT) in str(refused.value.hint)
    with pytest.raises(InvalidRequest) as invalid:
        config.place(TENANT, "aviation", Tier.DATABASE)
    assert "core, health, realestate" in str(invalid.value)
    assert invalid.value.field == "targetVertical"


@pytest.mark.parametrize(
    ("source", "target", "hours"),
    [
        (Tier.SCHEMA, Tier.SCHEMA, 24),
        (Tier.SCHEMA, Tier.DATABASE, 24),
        (Tier.DATABASE, Tier.DEDICATED, 168),
        (Tier.DEDICATED, Tier.DATABASE, 720),
        (Tier.DATABASE, Tier.SCHEMA, 720),
    ],
)
def test_a_tier_says_how_long_is_watched(source: Tier, target: Tier, hours: int, tmp_path: Path) -> None:
    assert load(tmp_path).monitoring_seconds(source, target) == hours * 3600


def test_a_connection_budget_that_a_migration_does_not_fit_in_is_refused(tmp_path: Path) -> None:
    found = problems(tmp_path, environment=ENVIRONMENT | {"MOVER__ENGINE__MAX_CONNECTIONS_PER_DATABASE": "7"})
    assert "engine.max_connections_per_database" in found
