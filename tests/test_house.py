"""The imports of each room of the package point down, to the rooms that it stands on."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import radix_ops

PACKAGE = Path(radix_ops.__file__).parent
ROWS = "ops batch _attention losses"  # what computes on the rows of a batch
# A room is a package, or a module beside the packages; behind it stand the rooms that its files may import.
# radix_ops is the package's own door, which has the version and the folder.
ROOMS = {
    "ops": "",
    "_extras": "",
    "_interrupts": "",
    "_threads": "",
    "_transfer": "",
    "_integers": "ops",
    "_padded": "_integers",
    "batch": "ops _integers _padded _transfer",
    "_attention": "ops batch",
    "losses": "ops batch _attention",
    "reference": "ops",
    "radix_ops": "ops batch _attention _threads",
    "compat": "radix_ops ops batch _integers",
    "plan": "ops _integers",
    "graphs": "ops batch _attention",
    "models": f"{ROWS} _extras _integers graphs",
    "hf": f"{ROWS} _extras _interrupts graphs hf.sentences",
    "hf.sentences": f"{ROWS} _interrupts hf plan",
    "engine": f"{ROWS} _extras _interrupts plan models hf",
    "lm_eval": f"{ROWS} _extras plan hf engine",
    "trainers": f"{ROWS} plan hf",
    "data": "plan engine",
    "serve": "_extras radix_ops plan engine",
    "cli": "plan engine data",
    "__main__": "",
}
# The rooms that may import a library. Every room may import others.
LIBRARIES = {
    "argparse": "cli",
    "fastapi": "serve",
    "http": "",
    "ir_measures": "engine",
    "lm_eval": "lm_eval",
    "matplotlib": "cli",
    "orjson": "serve",
    "prometheus_client": "serve",
    "radix_ops_command": "cli serve __main__",
    "ray": "serve",
    "sentence_transformers": "hf.sentences engine",
    "pydantic": "serve",
    "socket": "serve",
    "transformers": "hf hf.sentences engine trainers",
    "starlette": "serve",
    "triton": "ops",
    "trl": "trainers",
    "uvicorn": "serve",
}
OPENING = {"open", "read_text", "write_text", "read_bytes", "write_bytes"}


def modules() -> dict[str, Path]:
    """Find every module of the package by its dotted name."""
    names = {path: path.relative_to(PACKAGE.parent).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in names.items()}


MODULES = modules()


def room_of(name: str) -> str:
    """Return the room of a dotted name, be it a module's or a name in one."""
    parts = name.split(".")[1:]
    rooms = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((room for room in rooms if room in ROOMS), "radix_ops")


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield the dotted names that a module of the package imports, at its top or later."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                base = resolve_name("." * node.level + (node.module or ""), package)
                yield from (f"{base}.{alias.name}" for alias in node.names)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[first, *_]):
                if name in ("import_module", "__import__"):
                    # An f-string counts up to its first value.
                    start = first.values[0] if isinstance(first, ast.JoinedStr) else first
                    if isinstance(start, ast.Constant):
                        yield resolve_name(start.value, package)


def faults(source: str, module: str, is_package: bool = False) -> list[str]:
    """List the imports that the module's room may not have."""
    room = room_of(module)
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for name in imported(ast.parse(source), package):
        library = name.split(".")[0]
        if library == "radix_ops":
            other = room_of(name)
            if other not in (room, *ROOMS[room].split()):
                found.append(f"{module} imports {name}: {room} may not know {other}")
        elif library in LIBRARIES and room not in LIBRARIES[library].split():
            found.append(f"{module} imports {name}: {room} may not know {library}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_to_rooms_below(module):
    path = MODULES[module]
    assert faults(path.read_text(), module, path.name == "__init__.py") == []


def test_every_module_has_a_room():
    assert [name for name in MODULES if room_of(name) == "radix_ops"] == ["radix_ops"]


def test_every_room_has_a_module():
    assert {room_of(name) for name in MODULES} == set(ROOMS)


def test_no_two_packages_know_each_other():
    below = {room.split(".")[0]: set() for room in ROOMS}
    for room, others in ROOMS.items():
        package = room.split(".")[0]
        below[package] |= {other.split(".")[0] for other in others.split()} - {package}
    graphlib.TopologicalSorter(below).prepare()  # raises where there is a cycle


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("radix_ops.ops.trie", "from ..batch import FoldedBatch"),
        ("radix_ops.ops.trie", "import triton\nfrom .. import batch"),
        ("radix_ops.batch", "def later():\n    from radix_ops.models import qwen3"),
        ("radix_ops.batch", "import transformers"),
        ("radix_ops.plan.budget", "from .. import hf"),
        ("radix_ops.plan.budget", "from ..hf.guards import has_own_attention"),
        ("radix_ops.plan.budget", "import importlib\nimportlib.import_module('..models.qwen3', __package__)"),
        ("radix_ops.engine.loading", "if TYPE_CHECKING:\n    import radix_ops.data.records as records"),
        ("radix_ops.engine.loading", "from ..cli import arguments"),
        ("radix_ops.engine.loading", "import argparse"),
        ("radix_ops.engine.loading", "from http.client import HTTPConnection"),
        ("radix_ops.data.records", "from ..cli.progress import progress_bar"),
        ("radix_ops.data.records", "from radix_ops_command.errors import printable"),
        ("radix_ops.cli.score", "from ..models import qwen3"),
        ("radix_ops.cli.score", "import_module(f'radix_ops.models.{name}')"),
        ("radix_ops.hf.forward", "from ..plan.planner import plan_folded"),
    ],
)
def test_a_wrong_import_is_found(module, source):
    assert len(faults(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("radix_ops.cli._run", "from radix_ops_command.errors import Failure\n\nfrom ..engine import Scorer"),
        ("radix_ops.engine.loading", "from ..models.qwen3 import Qwen3Model\nfrom .errors import UserError"),
        ("radix_ops.hf.sentences.encode", "from ...plan.planner import plan_folded\nfrom .. import guards"),
    ],
)
def test_a_right_import_is_none_of_them(module, source):
    assert faults(source, module) == []


def calls(tree: ast.AST) -> set[str]:
    """Return the names of the functions and methods that a module calls."""
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {getattr(function, "id", getattr(function, "attr", "")) for function in functions}


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) not in ("cli", "data")])
def test_rooms_below_the_command_print_nothing(module):
    tree = ast.parse(MODULES[module].read_text())
    assert not calls(tree) & {"print", "input"}
    streams = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not streams & {"stdin", "stdout", "stderr"}


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) == "engine"])
def test_the_engine_opens_no_files(module):
    """models.files and libraries read those of a model's folder."""
    assert not calls(ast.parse(MODULES[module].read_text())) & OPENING
