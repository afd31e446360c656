"""The `radix-ops` command. Each subcommand is a module beside this one that adds its own parser."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import radix_ops_command

from . import settings
from .errors import Failure, printable
from .parser import Parser, UsageError

# Each module's add_parser(commands) adds a parser whose default `run` names the module of run(args).
COMMANDS = ("inspect", "classify", "embed", "rerank", "score", "serve", "schema", "completion")
_LONGEST_MESSAGE = 2000
EPILOG = """\
Exit status: 0 where all went well, 1 for an error that one sentence on standard error names, 2 for wrong usage, 130
where Ctrl-C stopped the command.

Options may come from the environment, as RADIX_OPS_MODEL and so on, or from a TOML file that --config names. The
command line goes before the environment, and that before the file. --no-plain and its like take back a flag that stands
there.
"""


def make_parser() -> tuple[Parser, Mapping[str, Parser]]:
    """Return the parser of all arguments, and those of the subcommands by name."""
    parser = Parser(
        prog="radix-ops",
        description="Shared prefixes of a batch, computed once. `radix-ops inspect` says whether that pays for a file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"radix-ops {radix_ops_command.__version__}")
    commands: Any = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"radix_ops_command.{name}").add_parser(commands)
    return parser, commands.choices


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line, of the environment, of --config's file, and defaults, in this order.

    Help, versions and wrong usage end the process.
    """
    parser, commands = make_parser()
    try:
        given, unknown = parser.parse_known_args(argv)
        command = commands[given.command] if hasattr(given, "command") else parser
        command.take_rest(given, unknown)
        parser.complete(given)
        if "config" in settings.names_of(command):
            settings.fill(command, given, settings.of_environment(command, commands, os.environ))
            if (path := getattr(given, "config", None)) is not None:
                settings.fill(command, given, settings.of_file(command, given.command, commands, path))
        command.complete(given)
        return given
    except UsageError as error:
        error.exit()


def options_of(name: str, values: Mapping[str, Any], where: str) -> argparse.Namespace:
    """Return a command's arguments from values by their options' names, from the environment, and defaults, in this
    order. UsageError for what can't be used; `where` names the place of the values in it."""
    _, commands = make_parser()
    command, given = commands[name], argparse.Namespace()
    settings.fill(command, given, settings.of_mapping(command, name, values, where))
    settings.fill(command, given, settings.of_environment(command, commands, os.environ))
    command.complete(given)
    return given


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit status: 0, 1 for an error that one sentence names, 2 for wrong usage."""
    _check_streams()
    args = parse(argv)
    rows: Sequence[str] = ()
    try:
        prints = getattr(args, "output", None) is None or args.compare
        if prints and sys.stdout is None:
            raise Failure("standard output is closed, and results would go there")
        _run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except Failure as failure:
        message, status, rows = str(failure), 1, failure.rows
    except BrokenPipeError:  # the reader of standard output has gone
        message, status = None, 1
    except OSError as error:
        message, status = str(error), 1
    except KeyboardInterrupt:
        message, status = "stopped", 130
        if getattr(args, "output", None) and not getattr(args, "compare", False):
            anew = args.overwrite and getattr(args, "continues", False)
            message += f"; the same command {'without --overwrite ' if anew else ''}continues"
    _drop_what_cannot_be_written()
    if message is not None:
        print(f"radix-ops: {_shortened(message)}", *map(_shortened, rows), sep="\n  ", file=sys.stderr)
    return status


def _shortened(message: str) -> str:
    message = printable(message)
    if len(message) <= _LONGEST_MESSAGE:
        return message
    return f"{message[: _LONGEST_MESSAGE // 2]} ... {message[-_LONGEST_MESSAGE // 2 :]}"


def _run(args: argparse.Namespace) -> None:
    if not args.run.startswith("radix_ops."):
        importlib.import_module(args.run).run(args)
        return
    try:
        runner = importlib.import_module("radix_ops.cli._run")  # imports torch, which takes seconds
    except ImportError as error:  # torch is missing or too old, or radix_ops was not built
        raise Failure(str(error)) from error
    runner.run(args)


def _check_streams() -> None:
    """Make standard streams that are closed, or take ASCII alone, harmless."""
    # A file that is opened must not get the number of a standard stream, to which libraries may print.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    if sys.stderr is None:  # print would take standard output for it
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_what_cannot_be_written() -> None:
    """Empty the buffer of standard output, which a full disk or a closed pipe would let fail once more at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
