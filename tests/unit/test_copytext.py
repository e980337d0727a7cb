"""Lines of COPY text, read back by a model of what the server documents."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from mover.core.changes import UNCHANGED
from mover.core.copytext import NULL_OPTION, decode_row, encode_row

LETTERS = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}
SPECIAL = st.sampled_from([b"\\", b"\t", b"\n", b"\r", b"\x01", b"N", b"\\N", b".", b"\\.", b"x01", b"\0"])
VALUES = st.one_of(
    st.none(),
    st.binary(max_size=30).map(lambda b: b.replace(b"\0", b"")),
    st.lists(SPECIAL, max_size=8).map(lambda parts: b"".join(parts).replace(b"\0", b"")),
    st.text(alphabet=st.characters(blacklist_categories=("Cs",)), max_size=20).map(
        lambda t: t.replace("\0", "").encode()
    ),
)


@given(st.lists(VALUES, min_size=1, max_size=8))
@example([b"\\.", None, b"", b"\x01", b"\\N"])
@example([b"a", b"b\tc", None])
def test_a_row_comes_back(values):
    line = encode_row(values)
    assert line.endswith(b"\n") and b"\n" not in line[:-1] and b"\r" not in line
    assert line != b"\\.\n"  # the end of the data
    assert parse(line) == values


def test_what_was_not_sent_is_null():
    assert parse(encode_row([b"1", UNCHANGED, None])) == [b"1", None, None]


def test_an_empty_text_is_not_null():
    assert parse(encode_row([b"", None])) == [b"", None]


def parse(line: bytes) -> list[bytes | None]:
    """COPY FROM in text format: the NULL string is compared before escapes are resolved."""
    null = NULL_OPTION.encode()
    return [None if field == null else unescape(field) for field in line.removesuffix(b"\n").split(b"\t")]


def unescape(field: bytes) -> bytes:
    out, at = b"", 0
    while at < len(field):
        if field[at : at + 1] != b"\\":
            out += field[at : at + 1]
            at += 1
            continue
        after = field[at + 1 : at + 2]
        if after == b"x":
            digits = field[at + 2 : at + 4]
            out += bytes([int(digits, 16)])
            at += 4
        else:
            assert not after.isdigit(), "an octal escape"
            out += LETTERS.get(after, after)
            at += 2
    return out


def as_the_server_writes(values):
    """COPY TO's text format: controls by their letters, NULL as \\N."""
    by_value = {value: b"\\" + letter for letter, value in LETTERS.items()}

    def escaped(value):
        letters = (value[at : at + 1] for at in range(len(value)))
        return b"".join(by_value.get(b, b.replace(b"\\", b"\\\\")) for b in letters)

    return b"\t".join(b"\\N" if value is None else escaped(value) for value in values)


@given(st.lists(VALUES, min_size=1, max_size=8))
@example([b"\\N", None, b"", b"\\\\t", b"\b\f\v"])
def test_what_the_server_writes_is_read(values):
    assert decode_row(as_the_server_writes(values)) == values
