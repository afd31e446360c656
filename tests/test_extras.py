"""A library that is missing or too old is named with the extra that brings it, and the command that installs it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import radix_ops
from helpers.processes import run_python
from radix_ops import _extras
from radix_ops.engine.errors import UserError, needs

PACKAGE = Path(radix_ops.__file__).parent
PROJECT = PACKAGE.parent / "pyproject.toml"
EXTRAS = dict(
    re.findall(r"^([\w-]+) = \[(.*)\]$", PROJECT.read_text().split("optional-dependencies]")[1].split("\n[")[0], re.M)
)


def named_in(path: Path) -> Iterator[tuple[ast.expr, str]]:
    """Yield package and extra of each call that asks for a library."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("needs", "require"):
            package, extra, *_ = node.args
            if isinstance(extra, ast.Constant):
                yield package, extra.value


def test_each_extra_that_an_error_names_brings_the_library():
    named = [pair for path in PACKAGE.rglob("*.py") for pair in named_in(path)]
    assert len(named) > 5
    for package, extra in named:
        assert extra in EXTRAS
        if isinstance(package, ast.Constant):
            assert package.value.replace("_", "-") in EXTRAS[extra].replace("_", "-")


@pytest.mark.parametrize(
    ("module", "library", "message"),
    [
        ("radix_ops", "torch", "radix_ops needs torch >= 2.11, which is not installed: pip install 'torch>=2.11'"),
        (
            "radix_ops.hf",
            "transformers",
            "radix_ops.hf needs transformers >= 5.2, which is not installed; in a checkout of radix_ops: "
            "pip install --no-build-isolation '.[hf]'",
        ),
        (
            "radix_ops.trainers",
            "transformers",
            "radix_ops.hf needs transformers >= 5.2, which is not installed; in a checkout of radix_ops: "
            "pip install --no-build-isolation '.[hf]'",
        ),
        (
            "radix_ops.lm_eval",
            "lm_eval",
            "radix_ops.lm_eval needs lm_eval >= 0.4.10, which is not installed; in a checkout of radix_ops: "
            "pip install --no-build-isolation '.[lm-eval]'",
        ),
    ],
)
def test_a_module_names_the_library_that_it_lacks(module, library, message):
    done = run_python("-c", f"import sys; sys.modules[{library!r}] = None; import {module}")
    assert done.stderr.strip().splitlines()[-1] == f"ImportError: {message}"


def test_a_library_that_is_too_old_is_refused_by_both_versions(monkeypatch):
    for installed, wanted in [("5.1.9", "5.2"), ("4.57.3", "5"), ("5.2rc1", "5.10")]:
        monkeypatch.setattr(metadata, "version", lambda name, installed=installed: installed)
        with pytest.raises(ImportError, match=f"^x needs torch >= {wanted}, and {installed} is installed; in a check"):
            _extras.require("torch", "hf", "x", wanted)
    for installed, least in [("5.2.0", "5.2"), ("5.10.1", "5.2"), ("6.0.0.dev0", "5.2")]:
        monkeypatch.setattr(metadata, "version", lambda name, installed=installed: installed)
        _extras.require("torch", "hf", "x", least)


def test_the_command_gets_a_sentence_for_a_missing_library():
    with pytest.raises(UserError, match=r"^--plot needs no_such_library, which is not installed; .*'\.\[plot\]'$"):
        needs("no_such_library", "plot", "--plot")
    needs("torch", "hf")


def test_completion_names_the_library_that_it_lacks():
    code = "from radix_ops_command import main; sys.exit(main(['completion', 'bash']))"
    done = run_python("-c", f"import sys; sys.modules['shtab'] = None; {code}")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "radix-ops: radix-ops completion needs shtab, which is not installed; in a checkout of radix_ops: "
        "pip install --no-build-isolation '.[completion]'"
    )
    assert "shtab" in EXTRAS["completion"]
