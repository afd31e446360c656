"""The doors of the package: their public names, the documentation of these, and nothing else in them."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import radix_ops
from helpers.doors import PUBLIC

PACKAGE = Path(radix_ops.__file__).parent
ROOT = Path(__file__).parents[1]
OPS = [
    "common_prefix_lengths", "cut_batches", "flash_attention", "fold", "fold_batch", "fold_plan", "gather", "gather_kv",
    "lexicographic_order", "scatter_add", "scatter_add_kv", "trie_attention", "trie_attention_rows", "trie_order",
    "unpad", "varlen_attention",
]  # fmt: skip
NO_PAGE = {
    "radix_ops.cli": "docs/command.md describes the command",
    "radix_ops.reference": "its functions are those of radix_ops.ops, for readers of the tests",
}
LIBRARIES = {"radix_ops.lm_eval": "lm_eval", "radix_ops.serve": "fastapi"}
DOORS = list(PACKAGE.rglob("__init__.py"))
# Before anything else is imported, the package's own door loads the ops.
FURTHER = {"radix_ops": {"_OLDEST_TORCH", "_load_extension"}}


def load(name: str) -> ModuleType:
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name])
    return importlib.import_module(name)


def name_of(door: Path) -> str:
    return ".".join(door.parent.relative_to(PACKAGE.parent).parts)


@pytest.mark.parametrize("door", DOORS, ids=name_of)
def test_a_door_is_a_docstring_imports_and_all(door):
    docstring, *rest = ast.parse(door.read_text()).body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(docstring.value.value, str)
    allowed = {"__all__", "__version__"} | FURTHER.get(name_of(door), set())
    for node in rest:
        match node:
            case ast.Import() | ast.ImportFrom():
                continue
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.FunctionDef(name=name):
                pass
            case ast.Expr(value=ast.Call(func=ast.Name(id=name), args=[], keywords=[])):
                pass
            case _:
                name = ast.unparse(node)
        assert name in allowed


def test_public_names_are_those_that_programs_hold_on_to():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
                found[name] = ast.literal_eval(node.value)
    assert found == PUBLIC


def undocumented(public: type) -> list[str]:
    """List the class's own public methods and properties without a docstring, but for those that a base class has."""
    inherited = {name for base in public.__mro__[1:] for name in vars(base)}
    own = {name: x for name, x in vars(public).items() if not name.startswith("_") and name not in inherited}
    return [
        name
        for name, x in own.items()
        if isinstance(x, (property, functools.cached_property)) or callable(getattr(public, name))
        if not inspect.getdoc(x)
    ]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_sorted_there_and_documented(name):
    module = load(name)
    assert sorted(PUBLIC[name]) == PUBLIC[name]
    assert module.__doc__
    for member in PUBLIC[name]:
        value = getattr(module, member)
        assert inspect.getdoc(value), member
        if inspect.isclass(value):
            assert undocumented(value) == [], member


@pytest.mark.parametrize("name", PUBLIC)
def test_no_module_has_the_name_of_a_public_function(name):
    """Python would bind the module in its place, depending on what was imported first."""
    module = load(name)
    functions = [member for member in PUBLIC[name] if not inspect.ismodule(getattr(module, member))]
    if hasattr(module, "__path__"):
        files = {path.stem for path in Path(module.__file__).parent.iterdir()}
        assert not files & set(functions)


@pytest.mark.parametrize("name", sorted({*PUBLIC, "radix_ops.ops"} - set(NO_PAGE)))
def test_public_modules_have_a_page_of_the_reference(name):
    pages = [page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")]
    assert any(re.search(rf"^::: {re.escape(name)}$", page, re.MULTILINE) for page in pages)


@pytest.mark.parametrize("name", PUBLIC)
def test_help_of_the_package_leads_to_each_public_module(name):
    assert re.search(rf"\b{re.escape(name)}\b", radix_ops.__doc__)


@pytest.mark.parametrize("name", OPS)
def test_ops_are_there_and_described(name):
    assert getattr(torch.ops.radix, name)
    assert re.search(rf"^ *(.*\), )?{name}\(", radix_ops.ops.__doc__, re.MULTILINE)


def test_the_command_is_a_module_and_an_entry_point():
    assert importlib.util.find_spec("radix_ops.__main__")
    assert importlib.util.find_spec("radix_ops.cli.__main__")
    assert 'radix-ops = "radix_ops_command:main"' in (ROOT / "pyproject.toml").read_text()
