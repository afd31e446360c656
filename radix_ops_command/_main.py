"""The `radix-ops` command. Each subcommand is a module beside this one that adds its own parser."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys

import radix_ops_command

from .errors import Failure, printable

# Each module's add_parser(commands) adds a parser whose default `run` names the module of run(args).
COMMANDS = ("inspect", "embed", "rerank", "score")
_LONGEST_MESSAGE = 2000


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        super().error(printable(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="radix-ops",
        description="Shared prefixes of a batch, computed once. `radix-ops inspect` says whether that pays for a file.",
    )
    parser.add_argument("--version", action="version", version=f"radix-ops {radix_ops_command.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"radix_ops_command.{name}").add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit status: 0, 1 for an error that one sentence names, 2 for wrong usage."""
    _check_streams()
    args = _parser().parse_args(argv)
    try:
        prints = getattr(args, "output", None) is None or args.compare
        if prints and sys.stdout is None:
            raise Failure("standard output is closed, and results would go there")
        importlib.import_module("radix_ops.cli._run").run(args)  # imports torch, which takes seconds
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except Failure as failure:
        message, status = str(failure), 1
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
        message = printable(message)
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[: _LONGEST_MESSAGE // 2]} ... {message[-_LONGEST_MESSAGE // 2 :]}"
        print(f"radix-ops: {message}", file=sys.stderr)
    return status


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
