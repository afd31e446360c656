"""`radix-ops completion`: a script by which a shell completes commands, options and files."""

from __future__ import annotations

import argparse

from ._main import make_parser
from .arguments import add_command
from .errors import Failure

HELP = """\
Prints a script by which a shell completes commands, options, choices and files. It needs shtab.

  radix-ops completion bash > ~/.local/share/bash-completion/completions/radix-ops
"""
SHELLS = ("bash", "zsh", "tcsh")
_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
_PLACES = ("FILE", "PATH", "TOML")  # how their values' names begin
_FOLDERS_TOO = ("model", "tokenizer", "template")


def add_parser(commands) -> None:
    command = add_command(commands, "completion", "print a script for a shell's completion", HELP, __name__)
    command.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def run(args: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError as error:
        raise Failure(
            "radix-ops completion needs shtab, which is not installed; in a checkout of radix_ops: "
            "pip install --no-build-isolation '.[completion]'"
        ) from error
    parser, commands = make_parser()
    for command in commands.values():
        for action in command.arguments:
            if str(action.metavar).startswith(_PLACES) or action.dest in _FOLDERS_TOO:
                action.complete = _FILES  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell))
