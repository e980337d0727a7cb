"""The command `mover`: arguments and exit codes.

0 done, 1 the operation failed, 2 wrong usage or configuration, 3 refused by preflight or policy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID

import uvloop
from rich.live import Live

from mover import log, terminal
from mover.config import Config, ConfigError, Tenancy, load_config, postgres_url
from mover.core import facts
from mover.core.errors import MoverError, Refused, UnknownTenant
from mover.core.ids import Capture, Tier
from mover.core.secret import Secret
from mover.core.states import Status
from mover.web.client import ApiClient, ApiError, connect

DEFAULT_SERVER = "http://127.0.0.1:8080"
ACTIONS = {
    "pause": "stop at the next safe point and keep everything",
    "resume": "go on from where it was paused",
    "cancel": "undo what was made on both sides",
    "rollback": "bring a switched tenant back",
    "approve": "let a migration that waits for approval begin",
}


class Exit(IntEnum):
    DONE = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3


class UsageError(MoverError):
    """The command line lacks something."""

    code = "usage"


Command: TypeAlias = Callable[[argparse.Namespace], Coroutine[Any, Any, Exit]]
Conversation: TypeAlias = Callable[[ApiClient, argparse.Namespace], Awaitable[Exit]]

_out = terminal.console(sys.stdout)
_err = terminal.console(sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    args = build_parser().parse_args(arguments)
    command: Command = args.command
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(command(args))
    except ConfigError as error:
        terminal.complain(_err, error.message, reasons=error.problems)
        return Exit.USAGE
    except ApiError as error:
        terminal.complain(_err, error.message, error.hint, error.reasons)
        return _exit_of(error)
    except MoverError as error:
        terminal.complain(_err, error.message, error.hint)
        if isinstance(error, UsageError):
            return Exit.USAGE
        return Exit.REFUSED if isinstance(error, Refused) else Exit.FAILED
    except KeyboardInterrupt:
        return Exit.FAILED
    except BrokenPipeError:  # `mover list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.DONE


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mover", description="Moves one tenant's rows between live PostgreSQL databases."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_local(commands)
    _add_verify(commands)
    _add_migrate(commands)
    _add_remote(commands)
    return parser


Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _add_local(commands: Subparsers) -> None:
    """Commands that read the configuration."""
    init = commands.add_parser("init", help="create or upgrade schema `platform`")
    init.add_argument(
        "--with-organizations", action="store_true", help="also create the routing table, if absent"
    )
    check = commands.add_parser("check", help="look at the configuration and every connection")
    serve = commands.add_parser("serve", help="run the daemon")
    for parser, command in ((init, _init), (check, _check), (serve, _serve)):
        parser.add_argument("--config", type=Path, required=True, metavar="FILE")
        parser.set_defaults(command=command)
    demo = commands.add_parser("demo", help="move a tenant between two servers of its own, while it writes")
    demo.add_argument("--rows", type=_positive, default=320_000, help="of the tenant that moves")
    demo.add_argument("--tps", type=_positive, default=250, help="transactions/s that its writers hold")
    demo.add_argument("--keep", action="store_true", help="leave everything running afterwards")
    demo.add_argument("--json", action="store_true", help="end with one JSON line on standard output")
    demo.add_argument(
        "--capture",
        choices=["wal", "trigger"],
        default="wal",
        help="trigger: on servers without logical decoding, by roles that own the tables and no more",
    )
    demo.set_defaults(command=_demo)


def _add_verify(commands: Subparsers) -> None:
    verify = commands.add_parser("verify", help="compare a tenant's rows in two databases, row by row")
    verify.add_argument("--tenant", type=UUID, required=True, metavar="UUID")
    verify.add_argument(
        "--from", type=_database, required=True, dest="source", metavar="URL", help="URL, or env:VARIABLE"
    )
    verify.add_argument("--to", type=_database, required=True, dest="target", metavar="URL", help="the same")
    which = verify.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--schema",
        type=_pair,
        action="append",
        metavar="A[=B]",
        help="schema A, which is B on the other side; may be given several times",
    )
    which.add_argument(
        "--vertical", type=_pair, metavar="A[=B]", help="the same for all services of a vertical, by --config"
    )
    verify.add_argument("--config", type=Path, metavar="FILE", help="tenant column, exempt tables, services")
    verify.add_argument("--column", metavar="NAME", help="the tenant column, `tenant_id` by default")
    verify.add_argument("--keys", action="store_true", help="also show the keys of rows that differ")
    verify.add_argument("--json", action="store_true", help="print the result as JSON")
    verify.set_defaults(command=_verify)


def _add_migrate(commands: Subparsers) -> None:
    migrate = _remote(commands, "migrate", "ask the daemon to move a tenant", _migrate)
    migrate.add_argument("--tenant", type=UUID, required=True, metavar="UUID")
    migrate.add_argument("--to-vertical", required=True, metavar="VERTICAL")
    migrate.add_argument("--to-tier", required=True, choices=[tier.value for tier in Tier])
    migrate.add_argument("--reason")
    migrate.add_argument("--priority", type=int, default=0, help="higher is more urgent")
    migrate.add_argument("--at", metavar="TIME", help="not before, ISO 8601 with a time zone")
    what = migrate.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the plan and change nothing")
    what.add_argument("--wait", action="store_true", help="follow it until the tenant is served there")


def _add_remote(commands: Subparsers) -> None:
    listing = _remote(commands, "list", "migrations, newest first", _list)
    listing.add_argument("--status", choices=[status.value for status in Status])
    listing.add_argument("--limit", type=int, default=50)
    for name, text, conversation in (
        ("status", "one migration's progress and steps", _status),
        ("watch", "follow one migration until it ends", _watch),
        *((action, meaning, _act) for action, meaning in ACTIONS.items()),
    ):
        parser = _remote(commands, name, text, conversation)
        parser.add_argument("id", type=UUID, metavar="ID")
        parser.set_defaults(action=name)


def _remote(
    commands: Subparsers, name: str, text: str, conversation: Conversation
) -> argparse.ArgumentParser:
    """A command that talks to a daemon."""
    parser = commands.add_parser(name, help=text)
    parser.add_argument("--server", default=os.environ.get("MOVER_SERVER", DEFAULT_SERVER), metavar="URL")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="instead of MOVER_TOKEN")
    parser.add_argument("--json", action="store_true", help="print the API's answer")

    async def command(args: argparse.Namespace) -> Exit:
        async with connect(args.server, _token(args.token_file)) as client:
            return await conversation(client, args)

    parser.set_defaults(command=command)
    return parser


def _token(file: Path | None) -> str:
    try:
        token = file.read_text().strip() if file else os.environ.get("MOVER_TOKEN", "")
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"the token file {file} cannot be read") from None
    if not token or not token.isprintable():
        raise UsageError("a token is needed", hint="Set MOVER_TOKEN, or give --token-file FILE.")
    return token


async def _demo(args: argparse.Namespace) -> Exit:
    from mover.demo.main import Options, run  # the other commands start without what it needs
    from mover.demo.process import ServerFailed

    options = Options(args.rows, args.tps, args.keep, args.json, Capture(args.capture))
    demo = asyncio.ensure_future(run(options))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, demo.cancel)  # as Ctrl-C: clean up
    try:
        return Exit.DONE if await demo else Exit.FAILED
    except ServerFailed as error:
        raise MoverError(str(error), hint="pip install 'tenant-mover[demo]' brings servers along.") from error
    except asyncio.CancelledError:
        _err.print("Stopped; the demo's servers and their data are removed.")
        return Exit.FAILED


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError("should be a whole number above 0")
    return int(text)


def _database(text: str) -> Secret:
    """From a variable, a password stays out of the list of processes. No message repeats the text."""
    name = text.removeprefix("env:")
    if name != text:
        text = os.environ.get(name, "")
        if not text:
            raise argparse.ArgumentTypeError(f"the environment variable {name} is not set")
    try:
        return postgres_url(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _pair(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not ours or (equals and not theirs):
        raise argparse.ArgumentTypeError("should be written as A, or as A=B")
    return ours, theirs or ours


async def _verify(args: argparse.Namespace) -> Exit:
    from mover.compare import Question, compare

    tenancy = load_config(args.config).tenancy if args.config else None
    rules = tenancy.rules if tenancy else facts.Tenancy("tenant_id")
    if args.column:
        rules = replace(rules, column=args.column)
    schemas = _schemas(args, tenancy)
    question = Question(args.tenant, args.source, args.target, schemas, rules)
    with terminal.counting(_err) as counter:
        comparison = await compare(question, counter)
    _show(args, comparison.report(with_keys=args.keys), terminal.comparison_view)
    return Exit.DONE if comparison.equal else Exit.FAILED


def _schemas(args: argparse.Namespace, tenancy: Tenancy | None) -> dict[str, str]:
    """The source's schemas with their counterparts."""
    pairs: Sequence[tuple[str, str]] = args.schema or ()
    if args.vertical:
        if tenancy is None:
            raise UsageError("--vertical needs --config", hint="Or name the schemas: --schema A=B.")
        ours, theirs = map(tenancy.schemas, args.vertical)
        pairs = list(zip(ours, theirs, strict=True))
    if len(dict(pairs)) < len(pairs) or len({theirs for _, theirs in pairs}) < len(pairs):
        raise UsageError("a schema is named twice")
    return dict(pairs)


async def _init(args: argparse.Namespace) -> Exit:
    from mover.postgres.platform import initialise

    config = load_config(args.config)
    table = config.routing.organizations_table if args.with_organizations else None
    applied = await initialise(config.platform.database_url, organizations=table)
    _out.print("\n".join(f"applied {name}" for name in applied) or "schema platform is up to date")
    return Exit.DONE


async def _check(args: argparse.Namespace) -> Exit:
    from mover.check import check

    findings = await check(load_config(args.config))
    _out.print(terminal.checks_table(findings))
    return Exit.FAILED if any(finding.problem for finding in findings) else Exit.DONE


async def _serve(args: argparse.Namespace) -> Exit:
    from mover.app import serve

    config: Config = load_config(args.config)
    log.configure(level=config.log.level.upper())
    await serve(config)
    return Exit.DONE


async def _migrate(client: ApiClient, args: argparse.Namespace) -> Exit:
    body: dict[str, object] = {
        "tenantId": str(args.tenant),
        "targetVertical": args.to_vertical,
        "targetTier": args.to_tier,
        "priority": args.priority,
        "reason": args.reason,
        "scheduledAt": args.at,
        "dryRun": args.dry_run,
    }
    answer = await client.submit(body)
    if args.dry_run:
        _show(args, answer, terminal.plan_view)
        return Exit.REFUSED if answer["refusals"] else Exit.DONE
    if args.wait:
        return await _follow(client, args, answer["id"], until=(Status.MONITORING,))
    _show(args, answer, lambda migration: migration["id"])
    return Exit.DONE


async def _list(client: ApiClient, args: argparse.Namespace) -> Exit:
    migrations = await client.list(args.status, args.limit)
    _show(args, {"migrations": migrations}, lambda answer: terminal.migrations_table(answer["migrations"]))
    return Exit.DONE


async def _status(client: ApiClient, args: argparse.Namespace) -> Exit:
    progress = await client.progress(str(args.id))
    _show(args, progress, terminal.progress_panel)
    if not args.json and progress["steps"]:
        _out.print(terminal.steps_table(progress["steps"]))
    return Exit.DONE


async def _watch(client: ApiClient, args: argparse.Namespace) -> Exit:
    return await _follow(client, args, str(args.id))


async def _act(client: ApiClient, args: argparse.Namespace) -> Exit:
    answer = await client.act(str(args.id), args.action)
    _show(args, answer, lambda _: f"{args.action}: accepted")
    return Exit.DONE


async def _follow(
    client: ApiClient, args: argparse.Namespace, migration_id: str, until: Sequence[Status] = ()
) -> Exit:
    """Show events and progress until the migration has ended or reached `until`."""
    progress: terminal.Json | None = None
    with Live(console=_out, transient=True, auto_refresh=False) as live:
        async with aclosing(client.events(migration_id)) as messages:
            async for message in messages:
                _show_live(args, message, live)
                if message["type"] == "progress":
                    progress = message
                    if until and _is_over(progress, until):
                        break
    if progress is None:
        raise ApiError("the daemon ended the conversation before it said anything")
    if not args.json:
        _out.print(terminal.progress_panel(progress))
    return _exit_of_migration(progress)


def _show_live(args: argparse.Namespace, message: terminal.Json, live: Live) -> None:
    if args.json:
        print(json.dumps(message), flush=True)
    elif message["type"] == "event":
        live.console.print(terminal.event_line(message))
    else:
        live.update(terminal.progress_panel(message), refresh=True)


def _is_over(progress: terminal.Json, until: Sequence[Status]) -> bool:
    """Paused with an error, only an operator can make it go on: nothing is left to wait for."""
    halted = progress["status"] == Status.PAUSED and progress["error"] is not None
    return progress["status"] in until or halted


def _exit_of_migration(progress: terminal.Json) -> Exit:
    if progress["status"] in (Status.COMPLETED, Status.MONITORING):
        return Exit.DONE
    refused = progress["error"] and progress["error"]["code"] == "refused"
    return Exit.REFUSED if refused else Exit.FAILED


def _exit_of(error: ApiError) -> Exit:
    refused = error.status in (401, 403, 409, 422) or error.kind == UnknownTenant.code
    return Exit.REFUSED if refused else Exit.FAILED


def _show(args: argparse.Namespace, answer: terminal.Json, view: Callable[[terminal.Json], Any]) -> None:
    """As JSON for programs, else as `view` draws it."""
    if args.json:
        print(json.dumps(answer), flush=True)
    else:
        _out.print(view(answer))
