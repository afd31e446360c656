"""The `radix-ops` command. Each subcommand is a module of `radix_ops.commands` that adds its own parser."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

import torch

import radix_ops

from .commands.records import UserError

# Each module's add_parser(commands) adds a parser whose default `run` is a function of the parsed arguments.
COMMANDS = ("inspect", "embed", "rerank", "score")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="radix-ops",
        description="Shared prefixes of a batch, computed once. `radix-ops inspect` says whether that pays for a file.",
    )
    parser.add_argument("--version", action="version", version=f"radix-ops {radix_ops.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"radix_ops.commands.{name}").add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 for an error that one sentence names, 2 for wrong usage."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        return 0
    except UserError as error:
        message, status = str(error), 1
    except torch.OutOfMemoryError:
        message, status = "out of memory", 1
    except BrokenPipeError:
        # What reads standard output has gone; closing it again at exit must not fail loudly.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        message, status = str(error), 1
    except KeyboardInterrupt:
        message, status = "stopped", 130
        if getattr(args, "output", None) and not getattr(args, "compare", False):
            message += f"; the same command {'without --overwrite ' if args.overwrite else ''}continues"
    print(f"radix-ops: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
