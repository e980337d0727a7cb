"""A lexer for PostgreSQL's SQL, just deep enough to cut pg_dump's output into statements, to know what
each creates, and to rename schemas by token: never by searching text.

Joining the tokens gives the text back, whatever the text is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from mover.core.ids import TableRef

OURS = "mover"  # our schema; the names of our objects in other schemas start with `mover_`


class Kind(StrEnum):
    SPACE = "space"
    COMMENT = "comment"
    META = "meta"  # psql's own lines, such as \restrict
    STRING = "string"
    DOLLAR = "dollar"
    QUOTED = "quoted"
    WORD = "word"
    SYMBOL = "symbol"


@dataclass(frozen=True, slots=True)
class Token:
    kind: Kind
    text: str

    @property
    def word(self) -> str:
        """The word in lower case; empty for anything that is not a bare word."""
        return self.text.lower() if self.kind is Kind.WORD else ""

    @property
    def identifier(self) -> str | None:
        """The name that this token spells, or None."""
        if self.kind is Kind.WORD:
            return self.text.lower()
        if self.kind is Kind.QUOTED and self.text.startswith('"'):
            return self.text[1:-1].replace('""', '"')
        return None


@dataclass(frozen=True, slots=True)
class Created:
    """What a statement adds, under the name by which the catalog can be asked for it."""

    kind: str  # index | constraint | trigger | policy | rule | statistics | view
    on: TableRef  # the table; for statistics and views the object itself
    name: str


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement and the entry of pg_dump's table of contents that it belongs to."""

    sql: str
    type: str = ""  # pg_dump's word: TABLE, CONSTRAINT, FK CONSTRAINT, ACL, …
    name: str = ""


_TOKEN = re.compile(
    r"""(?P<space>\s+)
      | (?P<comment>--[^\n]*)
      | (?P<block>/\*)
      | (?P<meta>(?m:^)\\[^\n]*)
      | (?P<string>[eE]'(?:[^'\\]|\\.|'')*' | (?:[bBxXnN]|[uU]&)?'(?:[^']|'')*')
      | (?P<dollar>\$(?P<tag>(?:[^\W\d]\w*)?)\$.*?\$(?P=tag)\$)
      | (?P<quoted>(?:[uU]&)?"(?:[^"]|"")*")
      | (?P<word>[^\W\d][\w$]*)
      | (?P<symbol>\d[\w.]*|.)""",
    re.VERBOSE | re.DOTALL,
)
_BLOCK_EDGE = re.compile(r"/\*|\*/")
_ENTRY = re.compile(r"-- Name: (?P<name>.*); Type: (?P<type>[A-Z ]+); Schema: .*; Owner: ")
_PLAIN = re.compile(r"[a-z0-9_]+")
_SIMPLE_NAME = re.compile(r"[a-z_][a-z0-9_$]*\Z")

_REG_TYPES = {"regclass", "regtype", "regproc", "regprocedure", "regoper", "regoperator", "regcollation"}
_NAME_FUNCTIONS = {"nextval", "currval", "setval", "to_regclass", "to_regtype", "to_regproc"}
_OUR_LANGUAGES = {"sql", "plpgsql"}


def tokens(sql: str) -> Iterator[Token]:
    position = 0
    while position < len(sql):
        match = _TOKEN.match(sql, position)
        assert match is not None and match.lastgroup is not None  # the last branch takes any character
        if match["block"] is not None:
            end = _block_comment_end(sql, position)
            yield Token(Kind.COMMENT, sql[position:end])
        else:
            end = match.end()
            yield Token(Kind(match.lastgroup), match[0])
        position = end


def _block_comment_end(sql: str, start: int) -> int:
    """Where the comment that opens at `start` closes; comments nest."""
    depth = 0
    for edge in _BLOCK_EDGE.finditer(sql, start):
        depth += 1 if edge[0] == "/*" else -1
        if depth == 0:
            return edge.end()
    return len(sql)


def significant(sql: str) -> list[Token]:
    return [t for t in tokens(sql) if t.kind not in (Kind.SPACE, Kind.COMMENT, Kind.META)]


def split(dump: str) -> list[Statement]:
    """The statements of a dump, without their semicolons and the comments around them."""
    found: list[Statement] = []
    name = type_ = ""
    parts: list[str] = []
    nesting = _Nesting()
    for token in tokens(dump):
        if not parts:
            if token.kind is Kind.COMMENT and (entry := _ENTRY.match(token.text)):
                name, type_ = entry["name"], entry["type"]
            if token.kind in (Kind.SPACE, Kind.COMMENT, Kind.META):
                continue
        if token.text == ";" and nesting.outermost:
            if parts:
                found.append(Statement("".join(parts).rstrip(), type_, name))
            parts, nesting = [], _Nesting()
            continue
        nesting.feed(token)
        parts.append(token.text)
    if parts:
        found.append(Statement("".join(parts).rstrip(), type_, name))
    return found


class _Nesting:
    """Whether a semicolon ends the statement: not inside parentheses, nor in BEGIN ATOMIC … END."""

    def __init__(self) -> None:
        self._parentheses = 0
        self._blocks = 0
        self._previous = ""

    @property
    def outermost(self) -> bool:
        return self._parentheses == 0 and self._blocks == 0

    def feed(self, token: Token) -> None:
        if token.kind in (Kind.SPACE, Kind.COMMENT):
            return
        word = token.word
        if token.text == "(":
            self._parentheses += 1
        elif token.text == ")":
            self._parentheses -= 1
        elif self._blocks and word in ("case", "end"):
            self._blocks += 1 if word == "case" else -1
        elif word == "atomic" and self._previous == "begin":
            self._blocks += 1
        self._previous = word


def quote_identifier(name: str) -> str:
    return name if _SIMPLE_NAME.match(name) else '"' + name.replace('"', '""') + '"'


def rename_schemas(sql: str, schemas: Mapping[str, str]) -> str:
    """`sql` with each schema's name mapped, where the token is a schema's name.

    That is before a dot, after SCHEMA, in SET search_path, in a literal that is cast to regclass or given
    to nextval() and the like, and the same inside the body of an SQL or PL/pgSQL function. Other literals
    and comments stay as they are.
    """
    lowered = sql.lower()
    if not any(_plain_part(schema) in lowered for schema in schemas):
        return sql  # most texts, and taking one apart is slow
    return _renamed(sql, tuple(schemas.items()))


@functools.lru_cache(maxsize=4096)
def _renamed(sql: str, schemas: tuple[tuple[str, str], ...]) -> str:
    """Every look at the schemas brings the same texts again."""
    return _Renamer(list(tokens(sql)), dict(schemas)).run()


def _plain_part(name: str) -> str:
    """What stays in the name, however it is quoted or escaped: its longest part in plain letters."""
    return max(_PLAIN.findall(name.lower()), key=len, default="")


def rename_body(body: str, language: str, schemas: Mapping[str, str]) -> str:
    """A function's source text with its schemas renamed, in the languages that we can read."""
    return rename_schemas(body, schemas) if language in _OUR_LANGUAGES else body


def mentions_in_literals(body: str, schemas: Mapping[str, str]) -> bool:
    """Whether a literal names one of `schemas` where renaming leaves it alone: dynamic SQL, most likely."""
    renamed = rename_schemas(body, {schema: "" for schema in schemas})
    literals = [t.text for t in tokens(renamed) if t.kind in (Kind.STRING, Kind.DOLLAR)]
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(schema)}(?!\w)" for schema in schemas))
    return bool(schemas) and any(pattern.search(literal) for literal in literals)


class _Renamer:
    """One pass over one text; each rule looks at a token and its significant neighbours."""

    def __init__(self, all_tokens: list[Token], schemas: Mapping[str, str]) -> None:
        self._tokens = all_tokens
        self._schemas = schemas
        self._out = [t.text for t in all_tokens]
        self._at = [
            i for i, t in enumerate(all_tokens) if t.kind not in (Kind.SPACE, Kind.COMMENT, Kind.META)
        ]

    def run(self) -> str:
        for i in range(len(self._at)):
            token = self._token(i)
            if token.kind in (Kind.WORD, Kind.QUOTED):
                self._identifier(i, token)
            elif token.kind is Kind.STRING:
                self._literal(i, token)
            elif token.kind is Kind.DOLLAR:
                self._dollar(i, token)
        return "".join(self._out)

    def _token(self, i: int) -> Token:
        return self._tokens[self._at[i]] if 0 <= i < len(self._at) else Token(Kind.SPACE, "")

    def _put(self, i: int, text: str) -> None:
        self._out[self._at[i]] = text

    def _identifier(self, i: int, token: Token) -> None:
        if token.word == "search_path" and self._token(i - 1).word in ("set", "local", "session"):
            self._search_path(i + 1)
        target = self._schemas.get(token.identifier or "")
        if target is None:
            return
        before_dot = self._token(i + 1).text == "." and self._token(i - 1).text != "."
        if before_dot or self._token(i - 1).word == "schema":
            self._put(i, quote_identifier(target))

    def _search_path(self, i: int) -> None:
        """`SET search_path TO a, 'b'`: pg_dump writes literals, people write names."""
        if self._token(i).text != "=" and self._token(i).word != "to":
            return
        while (token := self._token(i + 1)).kind in (Kind.WORD, Kind.QUOTED, Kind.STRING):
            name = _unquoted(token.text) if token.kind is Kind.STRING else token.identifier
            if (target := self._schemas.get(name or "")) is not None:
                self._put(i + 1, _quoted(target) if token.kind is Kind.STRING else quote_identifier(target))
            if self._token(i + 2).text != ",":
                return
            i += 2

    def _literal(self, i: int, token: Token) -> None:
        cast = self._token(i + 3).word if self._token(i + 1).text == self._token(i + 2).text == ":" else ""
        argument = self._token(i - 1).text == "(" and self._token(i - 2).word in _NAME_FUNCTIONS
        if not token.text.startswith("'"):
            return
        if cast in _REG_TYPES or argument:
            self._put(i, _quoted(rename_schemas(_unquoted(token.text), self._schemas)))
        elif cast == "regnamespace" and (target := self._schemas.get(_unquoted(token.text))) is not None:
            self._put(i, _quoted(quote_identifier(target)))

    def _dollar(self, i: int, token: Token) -> None:
        """The body of a function: `AS $$…$$`. Any other dollar-quoted text is a literal."""
        if self._token(i - 1).word != "as" or self._language() not in _OUR_LANGUAGES:
            return
        tag = token.text[: token.text.index("$", 1) + 1]
        body = token.text[len(tag) : -len(tag)]
        self._put(i, tag + rename_schemas(body, self._schemas) + tag)

    def _language(self) -> str | None:
        for i in range(len(self._at)):
            if self._token(i).word == "language":
                return self._token(i + 1).identifier
        return None


def _unquoted(literal: str) -> str:
    return literal[1:-1].replace("''", "'")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def created(sql: str) -> Created | None:
    """What the statement makes that cannot be made twice; None when it is repeatable, or makes a table."""
    words = significant(sql)
    leading = [t.word for t in words[:3]]
    if leading[:2] == ["alter", "table"]:
        return _added_constraint(words)
    if leading[:1] != ["create"]:
        return None
    for kind, place in (("index", "on"), ("trigger", "on"), ("policy", "on"), ("rule", "to")):
        if kind in leading[1:]:
            return _named(kind, _name_after(words, place), _name_after(words, kind))
    for kind in ("statistics", "view"):
        if kind in leading[1:]:
            name = _name_after(words, kind)
            return _named(kind, name, name)
    return None


def _named(kind: str, on: TableRef | None, name: TableRef | None) -> Created | None:
    return Created(kind, on, name.name) if on and name else None


def _added_constraint(words: Sequence[Token]) -> Created | None:
    position = next((i for i, t in enumerate(words) if t.word == "constraint"), 0)
    if words[position - 1].word != "add":
        return None
    return _named("constraint", _name_after(words, "table"), _name_after(words[position:], "constraint"))


def _name_after(words: Sequence[Token], keyword: str) -> TableRef | None:
    """The possibly qualified name that follows the first `keyword` (and ONLY)."""
    for i, token in enumerate(words[:-1]):
        if token.word == keyword:
            i += 1 if words[i + 1].word == "only" else 0
            first = words[i + 1].identifier if i + 1 < len(words) else None
            if first is None:
                continue
            if i + 3 < len(words) and words[i + 2].text == ".":
                return TableRef(first, words[i + 3].identifier or "")
            return TableRef("", first)
    return None


def attached(sql: str) -> tuple[TableRef, TableRef] | None:
    """The partition that an ALTER TABLE … ATTACH PARTITION adds, and the table that it adds it to."""
    words = significant(sql)
    if [t.word for t in words[:2]] != ["alter", "table"] or not has_words(sql, "attach", "partition"):
        return None
    partition, table = _name_after(words, "partition"), _name_after(words, "table")
    return (partition, table) if partition and table else None


def has_words(sql: str, *phrase: str) -> bool:
    """Whether the bare words of `phrase` stand one after another in `sql`."""
    words = [t.word for t in significant(sql)]
    return any(tuple(words[i : i + len(phrase)]) == phrase for i in range(len(words)))


def without_internal_options(sql: str) -> str:
    """A column's options without the one that servers since the minor versions of November 2026 (15.20) keep
    there for themselves; nothing where no other is left. An older pg_dump does not leave it out, and no
    server takes it."""
    head, found, options = sql.rpartition(" SET (")
    if not found or _INTERNAL_OPTION not in options or not has_words(head, "alter", "column"):
        return sql
    kept = [option for option in options.rstrip("); \n").split(", ") if _INTERNAL_OPTION not in option]
    return f"{head} SET ({', '.join(kept)})" if kept else ""


_INTERNAL_OPTION = "pg_attver="


def is_ours(sql: str) -> bool:
    """Whether the statement makes or alters something of ours on a table of the application."""
    made = created(sql)
    if made is not None:
        return made.name.startswith(f"{OURS}_") or (made.kind == "trigger" and _calls_us(sql))
    words = significant(sql)
    leading = words[0].word if words else ""
    if leading == "alter" and has_words(sql, "replica", "identity"):
        return True
    return leading in ("alter", "comment") and any(
        before.word in ("index", "trigger") and (token.identifier or "").startswith(f"{OURS}_")
        for before, token in pairwise(words)
    )


def _calls_us(sql: str) -> bool:
    return any(has_words(sql, "execute", word, OURS) for word in ("function", "procedure"))


def roles(sql: str) -> frozenset[str]:
    """The roles that a GRANT, REVOKE or ALTER DEFAULT PRIVILEGES speaks of."""
    words = significant(sql)
    found: set[str] = set()
    for i, token in enumerate(words):
        opens = token.word in ("to", "from") or (token.word == "role" and words[i - 1].word == "for")
        if not opens:
            continue
        while i + 1 < len(words) and (name := words[i + 1].identifier) is not None:
            found.add(name)
            if i + 2 >= len(words) or words[i + 2].text != ",":
                break
            i += 2
    return frozenset(found - {"public"})


def default_privileges_of(sql: str) -> str | None:
    """Whose objects an ALTER DEFAULT PRIVILEGES FOR ROLE speaks of."""
    words = significant(sql)
    return next((b.identifier for a, b in pairwise(words) if a.word == "role"), None)
