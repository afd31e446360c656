"""An installed package has one binary for all torch and Python versions, and errors that say what to do."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import radix_ops
from helpers import processes
from radix_ops.ops import flash

LIBRARY = Path(radix_ops.__file__).with_name("_C.abi3.so")


def test_every_op_has_schema_fake_and_cpu_kernel():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("radix::")]
    # A build with CUDA has one for tests.
    names = [name for name in names if name != "radix::_fold_by_key"]
    assert sorted(names) == sorted(f"radix::{name}" for name in radix_ops.ops.dispatch._ALL_OPS)
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
        assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None


def test_importing_the_package_imports_no_compiler():
    """torch._dynamo takes as long as torch, which leaves it for later."""
    lines = [
        f"import sys, {name}; print({{'torch._dynamo', 'torch._inductor', 'sympy', 'triton'}} & set(sys.modules))"
        for name in ("torch", "radix_ops")
    ]
    of_torch, of_package = (processes.run_python("-c", line).stdout for line in lines)
    assert of_package == of_torch == "set()\n"


def test_a_constant_is_marked_as_torch_marks_it():
    def constant():
        return 1

    assert vars(torch.compiler.assume_constant_result(constant)) == vars(flash._is_recent)


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) reads the symbols")
def test_the_binary_uses_the_stable_c_interface_alone():
    listed = subprocess.run(["nm", "-D", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    from_torch = [symbol for symbol in symbols if re.search(r"torch|c10|N2at", symbol)]
    assert from_torch
    assert [symbol for symbol in from_torch if not symbol.startswith(("aoti_torch_", "torch_"))] == []
    assert [s for s in symbols if s.startswith(("Py", "_Py"))] == []


def test_the_binary_names_no_build_path():
    assert str(Path(__file__).parent.parent / "csrc").encode() not in LIBRARY.read_bytes()


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(ImportError, match=r"radix_ops needs torch >= 2.11, but torch 2.9.1\+cu128 is installed"):
        radix_ops._load_extension()


def test_a_missing_library_says_how_to_build(monkeypatch, tmp_path):
    monkeypatch.setattr(radix_ops, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(
        ImportError, match=r"radix_ops was not built: .*_C.abi3.so is missing. In a source tree, run `make build`"
    ):
        radix_ops._load_extension()


ROOT = Path(__file__).parents[1]
TEXTS = [*ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"] + [
    path
    for folder in ("docs", "examples", "radix_ops", "radix_ops_command", "benchmarks", "tools")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".md", ".py")
]
# An index would take these for another's package, or for none.
BY_NAME = re.compile(r"install\s+(-\S+\s+)*[`\"']?(torch-)?radix[-_]ops|radix[-_]ops\[", re.IGNORECASE)


@pytest.mark.parametrize(
    ("text", "is_by_name"),
    [
        ("pip install radix-ops[trl]", True),
        ("uv pip install --upgrade 'torch-radix-ops'", True),
        ("reinstall\nradix-ops", True),
        ("pip install --no-build-isolation .[trl]", False),
        ("`radix-ops` is installed from a checkout", False),
    ],
)
def test_what_counts_as_an_install_by_name(text, is_by_name):
    assert bool(BY_NAME.search(text)) == is_by_name


def test_no_text_tells_to_install_the_package_by_name():
    assert len(TEXTS) > 60
    assert [path.name for path in TEXTS if BY_NAME.search(path.read_text(encoding="utf-8"))] == []


def test_distribution_import_and_command_have_their_names():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^name = "torch-radix-ops"$', project, re.MULTILINE)
    assert re.search(r'^radix-ops = "radix_ops_command:main"$', project, re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+", radix_ops.__version__)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc (CUDA toolkit) compiles the CUDA sources")
def test_a_build_where_nvcc_is_has_cuda_kernels_with_or_without_a_gpu():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("radix::_fold_by_key", "CUDA")
    assert b".nv_fatbin" in LIBRARY.read_bytes()
