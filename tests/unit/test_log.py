"""Log lines are JSON, carry their context, and hold no secret."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from mover import log
from mover.core.errors import SlotLost
from mover.core.secret import Secret
from tests.support.logs import captured_log


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    with captured_log() as stream:
        yield stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_carries_what_is_worked_on(stream: io.StringIO) -> None:
    with log.bound(migration="m1", tenant="t1"):
        log.logger("mover.test").info("copied", action="copy", rows=7)
    log.logger("mover.test").info("after")
    inside, after = lines(stream)
    assert (inside["migration"], inside["tenant"], inside["action"], inside["rows"]) == (
        "m1",
        "t1",
        "copy",
        7,
    )
    assert (inside["event"], inside["level"]) == ("copied", "info")
    assert "migration" not in after


@pytest.mark.parametrize(
    "text",
    [
        "cannot reach postgresql://app:planted@db.example:5432/x",
        "cannot reach postgresql://app:pl/planted@db.example/x",
        "host=db password=planted dbname=x",
        "GET /events?token=planted",
        "Authorization: Bearer planted",
    ],
)
def test_a_planted_secret_is_masked_wherever_it_stands(text: str, stream: io.StringIO) -> None:
    log.logger("mover.test").warning(text, detail={"inner": [text]})
    logging.getLogger("some.library").warning("%s", text)
    assert "planted" not in stream.getvalue()
    assert len(lines(stream)) == 2


def test_an_exception_of_a_driver_loses_its_message(stream: io.StringIO) -> None:
    try:
        raise psycopg.errors.UniqueViolation("DETAIL: Key (email)=(planted@example) already exists")
    except psycopg.Error:
        log.logger("mover.test").exception("apply failed")
        logging.getLogger("some.library").exception("failed")
    ours, theirs = lines(stream)
    assert "planted" not in stream.getvalue()
    assert ours["error"] == theirs["error"] == "UniqueViolation"
    assert "test_log.py" in ours["trace"][0]


def test_an_exception_of_ours_keeps_it(stream: io.StringIO) -> None:
    log.logger("mover.test").error("stopped", exc_info=SlotLost("slot is gone"), url=Secret("planted"))
    [line] = lines(stream)
    assert (line["error"], line["reason"], line["url"]) == ("SlotLost", "slot is gone", "***")
