"""What the command line shows: tables, plans and live progress, from the API's JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, TypeAlias

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # the commands that talk to a daemon start without the drivers
    from mover.check import Finding

Json: TypeAlias = dict[str, Any]
_STYLES = {
    "completed": "green",
    "monitoring": "green",
    "failed": "red",
    "rolled_back": "red",
    "cancelled": "yellow",
    "paused": "yellow",
    "rolling_back": "yellow",
}
_KINDS = ("missing", "extra", "different")  # missing: on the source only
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


# Whoever reads a pipe wants whole lines.
_PIPE_COLUMNS = 200


def console(stream: TextIO) -> Console:
    return Console(
        stderr=stream is sys.stderr, soft_wrap=True, width=None if stream.isatty() else _PIPE_COLUMNS
    )


def migrations_table(migrations: Sequence[Json]) -> RenderableType:
    if not migrations:
        return "There are no migrations."
    table = _table("id", "tenant", "from", "to", "status", "phase", "requested")
    for migration in migrations:
        table.add_row(
            migration["id"],
            migration["tenantId"],
            f"{migration['sourceVertical']} ({migration['sourceTier']})",
            f"{migration['targetVertical']} ({migration['targetTier']})",
            _status(migration["status"]),
            migration["phase"] or "",
            migration["createdAt"][:19].replace("T", " "),
        )
    return table


def progress_panel(progress: Json) -> RenderableType:
    """One migration: a bar, the figures that are known, and why it waits or failed."""
    head = Text.assemble(
        (progress["id"], "bold"), "  ", _status(progress["status"]), "  ", progress["phase"] or ""
    )
    bar = ProgressBar(total=100, completed=progress["percent"], width=40)
    figures = Text("  ".join(_figures(progress)))
    notes = [Text(f"waiting for {progress['waitingFor']}", "yellow")] if progress["waitingFor"] else []
    if progress["error"]:
        notes.append(Text(_error_text(progress["error"]), "red"))
    return Group(head, bar, figures, *notes)


def steps_table(steps: Sequence[Json]) -> RenderableType:
    table = _table("step", "status", "ms", "detail")
    for step in steps:
        duration = f"{step['durationMs']:.0f}" if step["durationMs"] is not None else ""
        table.add_row(escape(step["name"]), step["status"], duration, escape(step["detail"] or ""))
    return table


def event_line(event: Json) -> RenderableType:
    facts = "  ".join(f"{key}={value}" for key, value in event["facts"].items())
    style = {"warning": "yellow", "error": "red"}.get(event["level"], "")
    return Text.assemble((event["at"][11:19], "dim"), " ", (event["message"], style), "  ", (facts, "dim"))


def plan_view(plan: Json) -> RenderableType:
    """A dry run: where from and to, every table with its class, what refuses and what warns."""
    tables = _table("table", "class", "rows (estimate)", "size")
    by_source = {table["source"]: table for table in plan["tables"]}
    for name, kind in sorted(plan["classes"].items()):
        moved = by_source.get(name)
        tables.add_row(
            escape(name),
            kind,
            f"{moved['estimatedRows']:,}" if moved else "",
            size(moved["estimatedBytes"]) if moved else "",
        )
    source, target = plan["source"], plan["target"]
    head = Text(f"{source['vertical']} ({source['tier']}) -> {target['vertical']} ({target['tier']})", "bold")
    steps = Text(f"steps: {', '.join(plan['steps'])}")
    facts = Text("  ".join(f"{key}={value}" for key, value in plan["facts"].items()), "dim")
    warnings = [_finding_text("warning", "yellow", item) for item in plan["warnings"]]
    refusals = [_finding_text("refused", "red", item) for item in plan["refusals"]]
    verdict = (
        Text("This migration would be refused.", "red") if refusals else Text("Nothing refuses.", "green")
    )
    return Group(head, steps, tables, facts, *warnings, *refusals, verdict)


def checks_table(findings: Sequence[Finding]) -> RenderableType:
    table = _table("", "what", "found")
    for finding in findings:
        mark = Text("problem", "red") if finding.problem else Text("ok", "green")
        table.add_row(mark, escape(finding.subject), escape(finding.problem or finding.detail))
    return table


class RowCounter:
    """A bar of the rows compared so far; an estimate that is too low grows with them."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("comparing", total=None)

    def expect(self, rows: int) -> None:
        self._bar.update(self._task, total=rows or None)

    def compared(self, rows: int) -> None:
        self._bar.advance(self._task, rows)
        task = self._bar.tasks[self._task]
        if task.total is not None and task.completed > task.total:
            self._bar.update(self._task, total=task.completed)


@contextmanager
def counting(console: Console) -> Iterator[RowCounter]:
    """The bar is there on a terminal only, and goes away at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} rows"))
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        yield RowCounter(bar)


def comparison_view(report: Json) -> RenderableType:
    """Each table's rows on both sides, what differs, what was not compared, and the verdict."""
    tables = _table("table", "source rows", "target rows", "")
    differing = {mismatch["table"]: mismatch for mismatch in report["mismatches"]}
    for name, (ours, theirs) in sorted(report["rows"].items()):
        found = differing.get(name)
        verdict = Text(_mismatch_text(found), "red") if found else Text("equal", "green")
        tables.add_row(escape(name), f"{ours:,}", f"{theirs:,}", verdict)
    for name, reason in sorted(report["incomparable"].items()):
        tables.add_row(escape(name), "", "", Text(reason, "red"))
    for name in report["left_out"]:
        tables.add_row(escape(name), "", "", Text("not compared: not a tenant table", "dim"))
    keys = [
        Text(f"{mismatch['table']}, {kind}: {', '.join('/'.join(key) for key in mismatch[kind]['keys'])}")
        for mismatch in report["mismatches"]
        for kind in _KINDS
        if mismatch[kind].get("keys")
    ]
    return Group(tables, *keys, _comparison_verdict(report))


def _mismatch_text(mismatch: Json) -> str:
    parts = [f"{mismatch[kind]['count']:,} {kind}" for kind in _KINDS if mismatch[kind]["count"]]
    if mismatch["columns"]:
        parts.append(f"in columns {', '.join(mismatch['columns'])}")
    if mismatch["schema"]:
        parts.append("different columns")
    return ", ".join(parts) or "digests differ"


def _comparison_verdict(report: Json) -> Text:
    if not report["equal"]:
        return Text("The two sides differ.", "red")
    rows = sum(ours for ours, _ in report["rows"].values())
    if rows == 0:
        return Text("Neither side holds a row of this tenant.", "yellow")
    return Text(f"Equal: {rows:,} rows, root {report['source_root']}", "green")


def size(count: float) -> str:
    """1536 -> `1.5 KiB`."""
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


def complain(console: Console, message: str, hint: str | None = None, reasons: Sequence[str] = ()) -> None:
    """What went wrong, each reason on a line of its own, and what to do."""
    console.print(Text(f"mover: {message}", "red"))
    for reason in reasons:
        console.print(Text(f"  {reason}"))
    if hint:
        console.print(Text(f"  {hint}", "dim"))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _status(status: str) -> Text:
    return Text(status, _STYLES.get(status, "cyan"))


def _figures(progress: Json) -> list[str]:
    rows, size_ = progress["rows"], progress["bytes"]
    figures = [
        f"{progress['percent']:.0f} %",
        f"{rows['done']:,} of {rows['total']:,} rows",
        size(size_["done"]),
    ]
    by = f" (by {progress['capture']})" if progress["capture"] else ""
    figures.append(f"{progress['changesApplied']:,} changes{by}")
    if progress["lagBytes"] is not None:
        figures.append(f"lag {size(progress['lagBytes'])}")
    if progress["etaSeconds"] is not None:
        figures.append(f"{progress['etaSeconds']:.0f} s to go")
    if progress["pauseMs"] is not None:
        figures.append(f"pause {progress['pauseMs']:.0f} ms")
    return figures


def _error_text(error: Json) -> str:
    hint = f" {error['hint']}" if error.get("hint") else ""
    return f"{error['code']}: {error['message']}{hint}"


def _finding_text(kind: str, style: str, finding: Json) -> Text:
    return Text.assemble((f"{kind}: ", style), finding["message"], " ", (finding["hint"] or "", "dim"))
