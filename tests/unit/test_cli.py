"""Arguments and exit codes, without a daemon."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from mover.cli import main

NOWHERE = ["--server", "http://127.0.0.1:9"]
MIGRATE = ["migrate", "--tenant", str(uuid4()), "--to-vertical", "realestate", "--to-tier", "database"]


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOVER_TOKEN", "planted-token")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["status"],
        ["status", "not-a-uuid"],
        ["serve"],
        [*MIGRATE[:-1], "cloud"],
        [*MIGRATE, "--dry-run", "--wait"],
        ["list", "--status", "flying"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2


def test_a_missing_token_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MOVER_TOKEN")
    assert main(["list", *NOWHERE]) == 2
    assert "MOVER_TOKEN" in capsys.readouterr().err
    assert main(["list", *NOWHERE, "--token-file", str(tmp_path / "absent")]) == 2


@pytest.mark.parametrize("arguments", [["list"], ["watch", str(uuid4())], MIGRATE, [*MIGRATE, "--wait"]])
def test_a_daemon_that_is_down_is_a_failure_with_a_clear_sentence(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *NOWHERE]) == 1
    captured = capsys.readouterr()
    assert "no daemon answers at http://127.0.0.1:9" in captured.err
    assert "mover serve" in captured.err
    assert "planted" not in captured.err + captured.out


@pytest.mark.parametrize("command", ["init", "check", "serve"])
def test_a_wrong_configuration_exits_2_with_every_problem(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mover.toml"
    file.write_text('[platform]\ndatabase_url = "planted"\n[engine]\ncopy_workers = 0\n')
    assert main([command, "--config", str(file)]) == 2
    text = capsys.readouterr().err
    for problem in ("platform.database_url", "engine.copy_workers", "tenancy: is missing"):
        assert problem in text
    assert "planted" not in text
    assert main([command, "--config", str(tmp_path / "absent.toml")]) == 2
