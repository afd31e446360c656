"""`radix-ops schema`: the JSON schema of what a command writes."""

from __future__ import annotations

import argparse
import importlib
import json
from typing import Any

from ._main import COMMANDS
from .arguments import add_command

HELP = """\
Prints the JSON schema (draft 2020-12) of each line that a command writes as JSON lines; for inspect, of the one object
that --json prints. Keys of the input that a line copies may have any name and value.

  radix-ops schema score
"""
_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def add_parser(commands) -> None:
    command = add_command(commands, "schema", "print the JSON schema of a command's lines", HELP, __name__)
    described = [name for name in COMMANDS if hasattr(_module_of(name), "SCHEMA")]
    command.add_argument("described", choices=described, metavar="COMMAND", help=", ".join(described))


def run(args: argparse.Namespace) -> None:
    print(json.dumps({"$schema": _DRAFT} | _module_of(args.described).SCHEMA, indent=2))


def _module_of(name: str) -> Any:
    return importlib.import_module(f"radix_ops_command.{name}")
