"""The loader of named queries, and that every shipped query says why it is safe."""

from __future__ import annotations

from importlib.resources import files

import pytest

from mover import sql


def test_named_blocks_are_split_and_keep_their_comment() -> None:
    queries = sql.parse(
        "-- a topic\n\n-- name: a\n-- Safe.\nselect 1\n\n-- name: b\n-- Safe.\nselect 2\n", "t"
    )
    assert queries == {"a": "-- Safe.\nselect 1", "b": "-- Safe.\nselect 2"}


@pytest.mark.parametrize(
    "text",
    [
        "select 1",
        "-- name: a\nselect 1",
        "-- name: a\n-- Safe.\nselect 1\n-- name: a\n-- Safe.\nselect 2",
    ],
)
def test_a_query_without_name_or_reason_or_twice_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        sql.parse(text, "t")


def test_every_shipped_topic_loads() -> None:
    topics = [entry.name for entry in files("mover.sql").iterdir() if entry.name.endswith(".sql")]
    assert "platform.sql" in topics
    for topic in topics:
        assert sql.load(topic.removesuffix(".sql"))


def test_numbered_files_are_complete_and_in_order() -> None:
    numbered = sql.load_numbered("platform_schema")
    assert [file.version for file in numbered] == list(range(1, len(numbered) + 1))
