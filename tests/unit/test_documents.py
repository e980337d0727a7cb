"""What the documents say is what the code does, as far as a machine can tell."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from mover import config
from mover.cli import build_parser
from mover.config import load_config
from mover.core.states import PHASES, Status
from mover.core.triggers import TRIGGERS, Trigger
from mover.metrics import Metrics
from tests.support.pictures import with_states

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Those whose keys the operator names are written out; the others are found.
SECTIONS: dict[str, type[BaseModel]] = {"verticals.NAME": config.Vertical} | {
    name: field.annotation
    for name, field in config.Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def table_rows(heading: str) -> dict[str, list[str]]:
    """The rows of the table whose first column is headed so, by that column's text."""
    table = re.search(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert table, heading
    cells = [line.strip("| \n").split(" | ") for line in table[1].splitlines()]
    return {first: [cell.strip() for cell in rest] for first, *rest in cells}


def test_the_picture_of_the_states_is_the_table() -> None:
    assert with_states(README) == README, "run `python -m tests.support.pictures`"


def test_every_status_and_phase_is_explained() -> None:
    statuses = " ".join(table_rows("status"))
    for status in Status:
        assert f"`{status}`" in statuses
    assert list(table_rows("phase")) == [f"`{phase}`" for phase in PHASES]


def test_every_trigger_is_explained_by_its_table() -> None:
    shown = {f"`{trigger}`": [course.before, course.after] for trigger, course in TRIGGERS.items()}
    assert table_rows("trigger") == shown
    assert set(TRIGGERS) == set(Trigger)


def test_every_command_is_shown() -> None:
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name in commands.choices:
        assert f"mover {name}" in README, name


def test_the_commands_that_are_shown_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = re.findall(r"^mover .*", "\n".join(blocks("sh")), re.MULTILINE)
    assert len(shown) > 5
    for line in shown:
        for command in re.sub(r"\s+(#|&).*", "", line).split("; "):
            for placeholder in ("$tenant", "ID"):
                command = command.replace(placeholder, "817b5ba9-2999-4c6a-8dd5-bd010605c51c")
            build_parser().parse_args(shlex.split(command)[1:])


def test_every_key_is_explained_with_its_default() -> None:
    rows = table_rows("key")
    for section, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            shown = rows.pop(f"`{section}.{name}`")[0].strip("`")
            if field.is_required():
                assert shown == "required", name
            elif isinstance(field.default, BaseModel):
                assert shown == _inline_table(field.default)
            else:
                default = str(field.default).lower() if field.default is True else f"{field.default}"
                assert shown == ("none" if field.default in (None, ()) else default), name
    assert list(rows) == ['`dedicated."TENANT"`']
    assert set(config.Config.model_fields) == {name.split(".")[0] for name in SECTIONS} | {"dedicated"}
    for name in config.Token.model_fields:
        assert name in table_rows("key")["`api.tokens`"][1]


def _inline_table(model: BaseModel) -> str:
    values: dict[str, Any] = model.model_dump(by_alias=True)
    return f"{{ {', '.join(f'{name} = {value:g}' for name, value in values.items())} }}"


def test_the_configuration_that_is_shown_can_be_loaded(tmp_path: Path) -> None:
    (text,) = blocks("toml")
    file = tmp_path / "mover.toml"
    file.write_text(text)
    environment = {name: f"postgresql://host/{name}" for name in re.findall(r'"env:(\w+)"', text)}
    loaded = load_config(file, environment | {"MOVER_TOKEN_SHA256": "0" * 64})
    assert loaded.tenancy.schemas("realestate") == ("realestate_dms", "realestate_crm")


def test_every_metric_is_listed_and_no_other() -> None:
    known = set(re.findall(r"# TYPE (mover_\w+)", Metrics().exposition().decode()))
    known = {name for name in known if not name.endswith("_created")}
    listed = set(re.findall(r"\bmover_\w+", (ROOT / "docs/metrics.md").read_text()))
    assert known <= listed
    alerts = set(re.findall(r"\bmover_\w+", " ".join(table_rows("when"))))
    assert {re.sub(r"_bucket$", "", name) for name in listed | alerts} <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = document.parent / file if file else document
        assert path.exists(), target
        headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


def test_the_changelog_begins_with_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == version


def test_decisions_are_dated_and_complete() -> None:
    for page in (ROOT / "docs/decisions").glob("*.md"):
        text = page.read_text()
        assert page.name.startswith(re.findall(r"^\d{4}-\d\d-\d\d$", text, re.MULTILINE)[0])
        assert re.findall(r"^## (.*)", text, re.MULTILINE) == [
            "Context",
            "Choice",
            "Rejected",
            "Consequences",
        ]


def test_the_image_is_pinned_and_does_not_run_as_root() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    bases = {line.split()[1] for line in lines if line.startswith("FROM ")}
    assert len(bases) == 1 and re.fullmatch(r"python:3\.\d+-slim-\w+", bases.pop())
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001"]
    assert 'ENTRYPOINT ["python", "-m", "mover"]' in lines


def test_ci_runs_the_command_that_the_readme_names() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"
    assert any(line.startswith("make test ") for block in blocks("sh") for line in block.splitlines())


def test_no_file_names_a_machine_or_where_packages_come_from() -> None:
    # Put together here, so that this file does not name them either.
    words = [f"/{name}/" for name in ("root", "work", "home")]
    words += [".".join(parts) for parts in (("pypi", "org"), ("deb", "debian", "org"), ("npmjs", "org"))]
    words += ["index" + "-url", "find" + "-links"]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        text = path.read_text(errors="ignore") if path.is_file() else ""
        assert [word for word in words if word in text] == [], name


def test_the_tests_that_watch_known_traps_are_there() -> None:
    named = re.findall(r"`([a-z]+/test_\w+\.py)::(test_\w+)`", (ROOT / "docs/pitfalls.md").read_text())
    assert len(named) > 60
    missing = [
        f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / "tests" / file).read_text()
    ]
    assert missing == []
