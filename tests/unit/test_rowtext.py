"""Rows in their text form, written by a model of what the server documents."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mover.core.rowtext import parse_row

SPECIAL = st.text(alphabet='",()\\ \n\tab', max_size=8)
VALUES = st.one_of(
    st.none(), SPECIAL, st.text(alphabet=st.characters(blacklist_categories=("Cs",)), max_size=9)
)


def as_the_server_writes(values):
    """Quoted where empty or with a character that means something, quotes and backslashes doubled."""

    def field(value):
        if value is None:
            return ""
        doubled = value.replace("\\", "\\\\").replace('"', '""')
        needs_quotes = not value or any(c in '",()\\' or c.isspace() for c in value)
        return f'"{doubled}"' if needs_quotes else doubled

    return f"({','.join(map(field, values))})"


@given(st.lists(VALUES, min_size=1, max_size=6))
@example(["", None, "a,b", 'say "so"', "\\", None])
@example([None])
def test_a_row_comes_back(values):
    read = parse_row(as_the_server_writes(values))
    assert read == [None if value is None else value.encode() for value in values]


@pytest.mark.parametrize("text", ["", "a,b", "(a", '("a"b)', '(a"b)'])
def test_what_the_server_does_not_write_is_refused(text):
    with pytest.raises(ValueError):
        parse_row(text)
