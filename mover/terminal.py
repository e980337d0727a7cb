"""What the command line shows: tables, plans and live progress, from the API's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console, Group, RenderableType
from rich.markup import escape
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
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


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
    figures.append(f"{progress['changesApplied']:,} changes")
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
