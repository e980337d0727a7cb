"""The protocol's model holds, and notices every way to get the protocol wrong that is written down in it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mover.sql import load

MODEL = Path(__file__).parents[2] / "docs/spec/cutover.pml"
MUTANTS = sorted(set(re.findall(r"MUTANT_[A-Z_]+[A-Z]", MODEL.read_text())))

needs_spin = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("cc")), reason="needs SPIN and a C compiler"
)


def check(folder: Path, *options: str) -> str:
    """What the checker says of the model."""
    model = shutil.copy(MODEL, folder)
    for command in (
        ["spin", "-a", *options, model],
        ["cc", "-O1", "-w", "-DSAFETY", "-o", "pan", "pan.c"],
        ["./pan", "-E", "-m100000"],
    ):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=300)
    print(done.stdout)
    return done.stdout


@needs_spin
def test_the_protocol_holds_whoever_dies_and_whenever(tmp_path):
    said = check(tmp_path)
    assert "errors: 0" in said
    assert "max search depth too small" not in said


@needs_spin
@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_way_to_get_it_wrong_is_noticed(tmp_path, mutant):
    said = check(tmp_path, f"-D{mutant}")
    assert "errors: 1" in said
    assert "assertion violated" in said


def test_the_model_has_the_states_of_the_code():
    (states,) = set(re.findall(r"'\{(\w+(?:,\w+)*)\}'::text\[\]", "".join(load("fence").values())))
    (mtypes,) = re.findall(r"mtype = \{ (.*?), source, target \};", MODEL.read_text())
    assert states.split(",") == mtypes.split(", ")
    assert len(MUTANTS) == 8
