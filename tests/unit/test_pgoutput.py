"""The decoder: known messages to their values, everything else to ProtocolViolation."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mover.core.changes import UNCHANGED, Begin, Commit, Delete, Insert, Message, Relation, Update
from mover.core.ids import Lsn, TableRef
from mover.core.pgoutput import Decoder
from mover.core.walsender import ProtocolViolation

OID = 16_390
KEY, PLAIN = 1, 0


def text(value: str) -> bytes:
    return value.encode() + b"\0"


def relation(*columns: tuple[int, str], oid: int = OID, schema: str = "app", identity: str = "i") -> bytes:
    described = [struct.pack(">B", flag) + text(name) + struct.pack(">Ii", 25, -1) for flag, name in columns]
    head = b"R" + struct.pack(">I", oid) + text(schema) + text("item") + identity.encode()
    return head + struct.pack(">H", len(columns)) + b"".join(described)


def row(*values: object) -> bytes:
    parts = []
    for value in values:
        if isinstance(value, bytes):
            parts.append(b"t" + struct.pack(">I", len(value)) + value)
        else:
            parts.append(b"n" if value is None else b"u")
    return struct.pack(">H", len(values)) + b"".join(parts)


def insert(*values: object, oid: int = OID) -> bytes:
    return b"I" + struct.pack(">I", oid) + b"N" + row(*values)


def update(new: tuple, old: tuple | None = None, kind: bytes = b"K", oid: int = OID) -> bytes:
    before = b"" if old is None else kind + row(*old)
    return b"U" + struct.pack(">I", oid) + before + b"N" + row(*new)


def delete(*old: object, kind: bytes = b"K") -> bytes:
    return b"D" + struct.pack(">I", OID) + kind + row(*old)


BEGIN = b"B" + struct.pack(">QqI", 0x16_0000_0010, 7, 4_000_000_000)
COMMIT = b"C" + struct.pack(">BQQq", 0, 16, 32, 7)
MESSAGE = b"M" + struct.pack(">BQ", 1, 99) + text("mover.mark") + struct.pack(">I", 3) + b"abc"
ITEM = relation((KEY, "id"), (PLAIN, "big"), (PLAIN, "note"))


@pytest.fixture
def decoder() -> Decoder:
    decoder = Decoder()
    decoder.decode(ITEM)
    return decoder


def test_transaction_boundaries(decoder):
    assert decoder.decode(BEGIN) == Begin(Lsn.parse("16/10"), 4_000_000_000)
    assert decoder.decode(COMMIT) == Commit(Lsn(16), Lsn(32))


def test_a_relation_tells_table_identity_and_columns():
    found = Decoder().decode(relation((KEY, "id"), (PLAIN, "Größe")))
    assert isinstance(found, Relation)
    assert (found.oid, found.table, found.identity) == (OID, TableRef("app", "item"), "i")
    assert [(c.name, c.is_key, c.type_oid, c.type_modifier) for c in found.columns] == [
        ("id", True, 25, -1),
        ("Größe", False, 25, -1),
    ]


def test_an_empty_schema_name_means_pg_catalog():
    assert Decoder().decode(relation((KEY, "id"), schema="")).table.schema == "pg_catalog"


def test_a_relation_sent_again_unchanged_stays_the_same_object(decoder):
    first = decoder.decode(insert(b"1", b"x", b"y")).relation
    assert decoder.decode(ITEM) is first
    assert decoder.decode(relation((KEY, "id"), (PLAIN, "big"))) is not first


def test_values_are_text_null_or_unchanged(decoder):
    change = decoder.decode(insert(b"1", None, b""))
    assert isinstance(change, Insert) and change.new == [b"1", None, b""]
    change = decoder.decode(update((b"1", UNCHANGED, b"n")))
    assert isinstance(change, Update) and (change.old, change.new) == (None, [b"1", UNCHANGED, b"n"])


def test_a_changed_key_comes_with_the_old_one(decoder):
    change = decoder.decode(update((b"2", b"x", None), old=(b"1", None, None)))
    assert (change.old, change.new) == ([b"1", None, None], [b"2", b"x", None])


def test_a_toasted_key_that_was_not_sent_is_taken_from_the_old_row(decoder):
    change = decoder.decode(update((UNCHANGED, UNCHANGED, b"n"), old=(b"long key", None, None)))
    assert change.new == [b"long key", UNCHANGED, b"n"]


def test_a_full_old_row_fills_everything_that_was_not_sent():
    decoder = Decoder()
    decoder.decode(relation((KEY, "id"), (KEY, "big"), identity="f"))
    change = decoder.decode(update((b"1", UNCHANGED), old=(b"1", b"large"), kind=b"O"))
    assert change.new == [b"1", b"large"]


def test_a_delete_carries_the_key(decoder):
    change = decoder.decode(delete(b"1", None, None))
    assert isinstance(change, Delete) and change.old == [b"1", None, None]


def test_a_logical_message(decoder):
    assert decoder.decode(MESSAGE) == Message(True, Lsn(99), "mover.mark", b"abc")


def test_origin_and_type_carry_nothing_for_us(decoder):
    assert decoder.decode(b"O" + struct.pack(">Q", 5) + text("origin")) is None
    assert decoder.decode(b"Y" + struct.pack(">I", 5) + text("app") + text("status")) is None


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(insert(b"1", b"x"), id="narrower than its relation"),
        pytest.param(insert(b"1", b"x", b"y", b"z"), id="wider than its relation"),
        pytest.param(insert(b"1", b"x", b"y", oid=1), id="a relation never described"),
        pytest.param(b"T" + bytes(9), id="truncate, which we do not publish"),
        pytest.param(b"S" + bytes(9), id="a block of an open transaction"),
        pytest.param(b"U" + struct.pack(">I", OID) + b"K" + row(b"1", None, None) + b"X", id="no new row"),
        pytest.param(b"I" + struct.pack(">I", OID) + b"N\0\3" + b"b" * 40, id="a binary value"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_what_does_not_follow_the_format_is_a_violation(decoder, message):
    with pytest.raises(ProtocolViolation):
        decoder.decode(message)


WHOLE = [
    BEGIN,
    COMMIT,
    MESSAGE,
    ITEM,
    insert(b"1", None, b"note"),
    update((b"2", UNCHANGED, b"n"), old=(b"1", None, None)),
    delete(b"1", None, None),
]


@pytest.mark.parametrize("message", WHOLE, ids=lambda m: chr(m[0]))
def test_a_message_cut_anywhere_is_a_violation(message):
    for length in range(len(message)):
        decoder = Decoder()
        decoder.decode(ITEM)
        with pytest.raises(ProtocolViolation):
            decoder.decode(message[:length])


@given(garbage=st.binary(max_size=200))
def test_garbage_raises_nothing_else(garbage):
    expect_a_decision(garbage)


@given(message=st.sampled_from(WHOLE), data=st.data())
def test_damaged_messages_raise_nothing_else(message, data):
    damaged = bytearray(message)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    expect_a_decision(bytes(damaged))


@given(st.lists(st.one_of(st.binary(max_size=300), st.none(), st.just(UNCHANGED)), max_size=40))
def test_every_row_comes_back(values):
    decoder = Decoder()
    decoder.decode(relation(*[(PLAIN, f"c{n}") for n in range(len(values))]))
    assert decoder.decode(insert(*values)).new == values


def expect_a_decision(message: bytes) -> None:
    decoder = Decoder()
    decoder.decode(ITEM)
    try:
        decoder.decode(message)
    except ProtocolViolation:
        pass
