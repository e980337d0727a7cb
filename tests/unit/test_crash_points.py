"""The kill matrix has every crash point that the code has."""

from __future__ import annotations

import re
from pathlib import Path

from mover.core.crash import POINTS
from tests.support.crash_points import every_point

ROOT = Path(__file__).parents[2]
CODE = "\n".join(path.read_text() for name in ("mover", "cutover") for path in (ROOT / name).rglob("*.py"))
PREFIXES = {"{prefix}": ("monitor", "cleanup", "undo", "return")}


def test_every_point_of_the_code_says_what_has_happened():
    assert set(re.findall(r'\breach\("([\w.]+)"\)', CODE)) - {"name"} == set(POINTS)


def test_every_point_is_in_the_matrix():
    assert POINTS.keys() <= set(every_point())
    assert len(set(every_point())) >= 60


def test_every_point_is_explained():
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", (ROOT / "docs/kill-matrix.md").read_text(), re.MULTILINE)
    assert dict(rows) == dict(POINTS)


def test_every_step_of_the_journal_is_in_the_matrix():
    named = set(re.findall(r'\b(?:step|line)\(\s*f?"([\w{}]+\.\w+)"', CODE))
    steps = {
        name.replace("{prefix}", prefix)
        for name in named
        for prefix in (PREFIXES["{prefix}"] if "{prefix}" in name else ("",))
    }
    assert len(steps) > 30
    assert {f"{name}.begun" for name in steps} <= set(every_point())
