"""Help, versions and errors of usage come without torch, which takes seconds to import."""

import ast
import sys
from pathlib import Path

import pytest

import radix_ops_command
from helpers import processes
from radix_ops_command._main import COMMANDS

PACKAGE = Path(radix_ops_command.__file__).parent
RUN = """
import sys
import radix_ops_command
try:
    status = radix_ops_command.main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
print("status", status)
print("imported", *sorted({"radix_ops", "torch", "numpy", "transformers"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [("--help", 0), ("--version", 0), ("", 2), ("unknown", 2), ("score --model m --plain --compare file", 2)]
    + [("score -m m", 2), ("schema score", 0)]
    + [(f"{command} --help", 0) for command in COMMANDS]
    + [(f"{command} --no-such-option", 2) for command in COMMANDS],
)
def test_help_and_errors_of_usage_import_no_torch(arguments, status):
    lines = processes.run_python("-c", RUN, *arguments.split()).stdout.splitlines()
    assert lines[-2:] == [f"status {status}", "imported"]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_modules_import_the_standard_library_and_each_other(path):
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import():
                found = {alias.name.split(".")[0] for alias in node.names}
            case ast.ImportFrom(level=0):
                found = {node.module.split(".")[0]}
            case _:
                continue
        # shtab and, before Python 3.11, tomli are imported when they are needed.
        assert found <= {*sys.stdlib_module_names, "radix_ops_command", "shtab", "tomli"}
